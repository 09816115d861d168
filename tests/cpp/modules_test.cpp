#include <torch/nn/init.h>
#include <torch/nn/modules/container/sequential.h>

#include <cmath>
#include <stdexcept>
#include <string>

#include "module_test.h"

namespace normcore::testing {
namespace {

class BatchNormModule : public Modules {};
class GroupNormModule : public Modules {};

// A module whose parameters and statistics are all different from their initial values.
BatchNorm trained_batch_norm(const BatchNormOptions& options) {
  BatchNorm bn(options);
  at::NoGradGuard no_grad;
  bn->scale.normal_();
  bn->bias.normal_();
  bn->mean.normal_();
  bn->var.uniform_(0.5, 2.0);
  return bn;
}

TEST_F(BatchNormModule, HasTheDefaultsOfThePythonModule) {
  const BatchNormOptions options;
  EXPECT_FALSE(options.num_features());
  EXPECT_EQ(at::IntArrayRef(options.axis()), at::IntArrayRef(-1));
  EXPECT_EQ(options.momentum(), 0.99);
  EXPECT_EQ(options.epsilon(), 1e-5);
  EXPECT_EQ(options.dtype(), at::kFloat);
  EXPECT_EQ(options.param_dtype(), at::kFloat);
  EXPECT_TRUE(options.use_bias() && options.use_scale());
  EXPECT_FALSE(options.bias_init() || options.scale_init());
  EXPECT_FALSE(options.axis_name() || options.axis_index_groups());
  EXPECT_EQ(options.sync_weighting(), "count");
  EXPECT_FALSE(options.activation() || options.device());
}

TEST_F(GroupNormModule, HasTheDefaultsOfThePythonModule) {
  const GroupNormOptions options;
  EXPECT_FALSE(options.num_features() || options.num_groups() || options.group_size());
  EXPECT_EQ(at::IntArrayRef(options.axis()), at::IntArrayRef(-1));
  EXPECT_EQ(options.epsilon(), 1e-5);
  EXPECT_EQ(options.dtype(), at::kFloat);
  EXPECT_EQ(options.param_dtype(), at::kFloat);
  EXPECT_TRUE(options.use_bias() && options.use_scale());
  EXPECT_FALSE(options.bias_init() || options.scale_init() || options.reduction_axes());
  EXPECT_FALSE(options.axis_name() || options.axis_index_groups());
  EXPECT_EQ(options.sync_weighting(), "count");
  EXPECT_FALSE(options.activation() || options.device());

  GroupNorm gn;
  const auto x = at::randn({2, 5, 64});
  EXPECT_TRUE(is_equal(gn->forward(x), normcore::group_norm(x, 32, gn->scale, gn->bias,
                                                            GroupNormFuncOptions().axis(-1))));
}

TEST_F(BatchNormModule, StartsFromOnesAndZeros) {
  BatchNorm bn(BatchNormOptions().num_features({3, 4}).axis({1, 2}));
  EXPECT_TRUE(is_equal(bn->scale, at::ones({3, 4})));
  EXPECT_TRUE(is_equal(bn->bias, at::zeros({3, 4})));
  EXPECT_TRUE(is_equal(bn->mean, at::zeros({3, 4})));
  EXPECT_TRUE(is_equal(bn->var, at::ones({3, 4})));
  EXPECT_TRUE(bn->scale.requires_grad() && bn->bias.requires_grad());
  EXPECT_EQ(bn->named_parameters().keys(), (std::vector<std::string>{"scale", "bias"}));
  EXPECT_EQ(bn->named_buffers().keys(), (std::vector<std::string>{"mean", "var"}));
}

TEST_F(BatchNormModule, UsesTheGivenInitializersAndDtype) {
  BatchNorm bn(BatchNormOptions()
                   .num_features(3)
                   .param_dtype(at::kHalf)
                   .scale_init(torch::nn::init::zeros_)
                   .bias_init([](at::Tensor t) { torch::nn::init::constant_(t, 2.0); }));
  EXPECT_TRUE(is_equal(bn->scale, at::zeros({3}, at::kHalf)));
  EXPECT_TRUE(is_equal(bn->bias, at::full({3}, 2.0, at::kHalf)));
  EXPECT_EQ(bn->mean.scalar_type(), at::kFloat);

  BatchNorm plain(BatchNormOptions().num_features(3).use_scale(false).use_bias(false));
  EXPECT_FALSE(plain->scale.defined() || plain->bias.defined());
  EXPECT_EQ(plain->parameters().size(), 0);
}

// Every row of the truth table: which statistics a call uses, and whether it updates them.
TEST_F(BatchNormModule, FollowsTheTruthTable) {
  const auto x = at::randn({4, 3, 5}) * 2 + 1;
  for (const bool training : {true, false}) {
    for (const bool frozen : {true, false}) {
      for (const auto argument :
           {std::optional<bool>(), std::optional(true), std::optional(false)}) {
        auto bn = trained_batch_norm(BatchNormOptions().num_features(3).axis(1).momentum(0.75));
        bn->train(training);
        bn->freeze(frozen);
        auto mean = bn->mean.clone(), var = bn->var.clone();
        const bool batch = argument ? !*argument : training && !frozen;

        const auto y = bn->forward(x, argument);

        const auto want = normcore::batch_norm(
            x, mean, var, bn->scale, bn->bias,
            BatchNormFuncOptions().training(batch).momentum(0.25).unbiased(false));
        EXPECT_TRUE(is_equal(y, want));
        EXPECT_TRUE(is_equal(bn->mean, mean));  // updated by the function if `batch`
        EXPECT_TRUE(is_equal(bn->var, var));
      }
    }
  }
}

TEST_F(BatchNormModule, PassesEveryArgumentOn) {
  auto bn = trained_batch_norm(BatchNormOptions()
                                   .num_features(3)
                                   .axis(-2)
                                   .epsilon(1e-2)
                                   .dtype(at::kBFloat16)
                                   .activation("gelu"));
  const auto x = at::randn({4, 3, 5}), residual = at::randn({4, 3, 5});
  const auto mask = at::rand({4, 1, 5}) < 0.5;
  auto mean = bn->mean.clone(), var = bn->var.clone();
  const auto y = bn->forward(x, {}, mask, residual);
  const auto want = normcore::batch_norm(x, mean, var, bn->scale, bn->bias,
                                         BatchNormFuncOptions()
                                             .training(true)
                                             .momentum(1.0 - 0.99)
                                             .eps(1e-2)
                                             .axis(-2)
                                             .mask(mask)
                                             .activation("gelu")
                                             .residual(residual)
                                             .unbiased(false)
                                             .dtype(at::kBFloat16));
  EXPECT_TRUE(is_equal(y, want));
  EXPECT_TRUE(is_equal(bn->mean, mean));
  EXPECT_TRUE(is_equal(bn->var, var));
}

TEST_F(GroupNormModule, PassesEveryArgumentOn) {
  GroupNorm gn(GroupNormOptions()
                   .group_size(2)
                   .axis(1)
                   .epsilon(1e-2)
                   .dtype(at::kHalf)
                   .reduction_axes({1, 3})
                   .activation("silu"));
  const auto x = at::randn({2, 6, 3, 4}), residual = at::randn({2, 6, 3, 4});
  const auto mask = at::rand({4}) < 0.7;
  const auto want = normcore::group_norm(x, 3, {}, {},
                                         GroupNormFuncOptions()
                                             .eps(1e-2)
                                             .reduction_axes({1, 3})
                                             .mask(mask)
                                             .activation("silu")
                                             .residual(residual)
                                             .dtype(at::kHalf));
  EXPECT_TRUE(is_equal(gn->forward(x, mask, residual), want));
  gn->eval();
  gn->freeze();
  EXPECT_TRUE(is_equal(gn->forward(x, mask, residual), want));
}

TEST_F(BatchNormModule, TakesItsFeaturesFromTheFirstInput) {
  BatchNorm bn(BatchNormOptions().axis(1));
  EXPECT_FALSE(bn->is_initialized());
  EXPECT_EQ(bn->parameters().size(), 0);

  const auto x = at::randn({4, 3, 5}) + 1;
  bn->init(x);
  EXPECT_TRUE(bn->is_initialized());
  EXPECT_TRUE(is_equal(bn->mean, at::zeros({3})));
  EXPECT_TRUE(is_equal(bn->var, at::ones({3})));
  EXPECT_EQ(bn->parameters().size(), 2);

  BatchNorm called(BatchNormOptions().axis(1));  // without init(), the first call is a normal one
  const auto y = called->forward(x);
  EXPECT_TRUE(is_equal(y, bn->forward(x)));
  EXPECT_TRUE(is_equal(called->mean, bn->mean));
  EXPECT_FALSE(at::equal(bn->mean, at::zeros({3})));

  const auto mean = bn->mean.clone();
  expect_error<c10::ValueError>([&] { bn->forward(at::randn({4, 6, 5})); },
                                "BatchNorm: expected 3 features on axis [1], got 6");
  EXPECT_TRUE(is_equal(bn->mean, mean));
}

template <class Module>
void expect_lazy(const Module& module) {
  EXPECT_FALSE(module->is_initialized());
  EXPECT_FALSE(module->options.num_features() || module->options.device());
  EXPECT_FALSE(module->scale.defined() || module->bias.defined());
  EXPECT_TRUE(module->parameters().empty() && module->buffers().empty());
}

TEST_F(BatchNormModule, StaysLazyWhenTheFirstCallThrows) {
  const auto x = at::randn({4, 3, 5});
  BatchNorm bn(BatchNormOptions().axis(1));
  EXPECT_THROW(bn->forward(x, {}, /*mask=*/at::ones({7})), c10::Error);
  expect_lazy(bn);
  EXPECT_FALSE(bn->mean.defined() || bn->var.defined());

  const auto other = at::randn({4, 6, 5});  // not bound to the features of x
  BatchNorm fresh(BatchNormOptions().axis(1));
  const auto y = bn->forward(other);
  EXPECT_TRUE(is_equal(y, fresh->forward(other)));
  EXPECT_TRUE(is_equal(bn->mean, fresh->mean));
  EXPECT_EQ(bn->named_buffers().keys(), (std::vector<std::string>{"mean", "var"}));
  EXPECT_TRUE(bn->named_buffers()["mean"].is_same(bn->mean));
  y.sin().sum().backward();
  EXPECT_TRUE(bn->named_parameters()["scale"].grad().defined());
}

TEST_F(GroupNormModule, StaysLazyWhenTheFirstCallThrows) {
  GroupNorm gn(GroupNormOptions().num_groups(1).axis(1));
  EXPECT_THROW(gn->forward(at::randn({4, 3, 5}), /*mask=*/at::ones({7})), c10::Error);
  expect_lazy(gn);
  gn->forward(at::randn({4, 6, 5}));
  EXPECT_EQ(gn->parameters().size(), 2);
}

TEST_F(BatchNormModule, StaysLazyWhenAnInitializerThrows) {
  bool broken = true;
  const Initializer initializer = [&](at::Tensor tensor) {
    tensor.fill_(2.0);
    if (broken) throw std::runtime_error("broken initializer");
  };
  const auto x = at::randn({4, 3});
  const auto archive = saved(BatchNorm(BatchNormOptions().num_features(3)));
  for (const auto& options :
       {BatchNormOptions().scale_init(initializer), BatchNormOptions().bias_init(initializer)}) {
    broken = true;
    BatchNorm bn(options);
    EXPECT_THROW(bn->init(x), std::runtime_error);
    expect_lazy(bn);
    EXPECT_THROW(bn->forward(x), std::runtime_error);
    expect_lazy(bn);
    EXPECT_THROW(load(bn, archive), std::runtime_error);
    expect_lazy(bn);
    EXPECT_FALSE(bn->mean.defined() || bn->var.defined());
    broken = false;
    bn->init(x);
    EXPECT_EQ(bn->parameters().size(), 2);

    bn->to(at::kDouble);
    at::NoGradGuard no_grad;
    for (const auto& tensor : {bn->scale, bn->bias, bn->mean}) tensor.fill_(5.0);
    broken = true;
    EXPECT_THROW(bn->reset(), std::runtime_error);
    for (const auto& tensor : {bn->scale, bn->bias, bn->mean}) {
      EXPECT_TRUE(is_equal(tensor, at::full({3}, 5.0, at::kDouble)));
    }
  }
}

TEST_F(BatchNormModule, FreezesUntilUnfrozen) {
  BatchNorm bn(BatchNormOptions().num_features(3).axis(1));
  bn->bias.set_requires_grad(false);
  const auto x = at::randn({4, 3, 5}) + 1;

  bn->freeze();
  bn->freeze();  // a second time must not lose what the first has found
  bn->train();
  EXPECT_TRUE(bn->is_frozen() && bn->is_training());
  EXPECT_FALSE(bn->scale.requires_grad() || bn->bias.requires_grad());
  bn->forward(x);
  EXPECT_TRUE(is_equal(bn->mean, at::zeros({3})));

  bn->unfreeze();
  EXPECT_FALSE(bn->is_frozen());
  EXPECT_TRUE(bn->scale.requires_grad());
  EXPECT_FALSE(bn->bias.requires_grad());

  bn->freeze(true, /*affine=*/false);
  EXPECT_TRUE(bn->is_frozen() && bn->scale.requires_grad());

  BatchNorm lazy(BatchNormOptions().axis(1));
  lazy->freeze();
  lazy->init(x);
  EXPECT_FALSE(lazy->scale.requires_grad());
  lazy->unfreeze();
  EXPECT_TRUE(lazy->scale.requires_grad());
}

TEST_F(BatchNormModule, SavesAndLoads) {
  auto bn = trained_batch_norm(BatchNormOptions().num_features(3).axis(1));
  const auto archive = saved(bn);
  const auto x = at::randn({4, 3, 5});
  const auto want = bn->forward(x, true);

  BatchNorm same(BatchNormOptions().num_features(3).axis(1));
  load(same, archive);
  EXPECT_TRUE(is_equal(same->forward(x, true), want));
  EXPECT_TRUE(same->scale.requires_grad());

  BatchNorm lazy(BatchNormOptions().axis(1));
  load(lazy, archive);
  EXPECT_TRUE(lazy->is_initialized());
  EXPECT_TRUE(is_equal(lazy->forward(x, true), want));

  BatchNorm half(BatchNormOptions().num_features(3).axis(1).param_dtype(at::kHalf));
  load(half, archive);
  EXPECT_TRUE(is_equal(half->scale, bn->scale.to(at::kHalf)));  // a module keeps its dtypes
  EXPECT_TRUE(is_equal(half->mean, bn->mean));
}

TEST_F(BatchNormModule, RefusesToLoadAnotherState) {
  const auto bn = trained_batch_norm(BatchNormOptions().num_features(4));
  BatchNorm other(BatchNormOptions().num_features(3));
  expect_error<c10::ValueError>([&] { load(other, saved(bn)); },
                                "BatchNorm: expected scale to have shape [3], got [4]");
  GroupNorm gn(GroupNormOptions().num_features(3).num_groups(1));
  expect_error<c10::Error>([&] { load(other, saved(gn)); },
                           "BatchNorm: expected mean in the archive, found none");
  EXPECT_TRUE(is_equal(other->scale, at::ones({3})));

  BatchNorm lazy, stays_lazy;
  load(stays_lazy, saved(lazy));
  EXPECT_FALSE(stays_lazy->is_initialized());
  expect_error<c10::Error>([&] { load(other, saved(lazy)); }, "expected scale in the archive");

  GroupNorm lazy_gn;  // 32 groups
  expect_error<c10::ValueError>(
      [&] { load(lazy_gn, saved(gn)); },
      "GroupNorm: expected num_groups to divide the number of channels (3), got 32");
  EXPECT_FALSE(lazy_gn->is_initialized());
}

TEST_F(BatchNormModule, ClonesDeeply) {
  const auto x = at::randn({4, 3, 5});
  auto bn = trained_batch_norm(BatchNormOptions().num_features(3).axis(1));
  bn->to(at::kDouble);
  bn->freeze();
  const auto copy = std::dynamic_pointer_cast<BatchNormImpl>(bn->clone());
  EXPECT_TRUE(is_equal(copy->forward(x, true), bn->forward(x, true)));
  EXPECT_EQ(copy->var.scalar_type(), at::kDouble);
  EXPECT_TRUE(copy->is_frozen() && !copy->scale.requires_grad());
  copy->unfreeze();
  EXPECT_TRUE(copy->scale.requires_grad() && !bn->scale.requires_grad());
  const auto mean = bn->mean.clone();
  copy->forward(x);
  EXPECT_TRUE(is_equal(bn->mean, mean));
  EXPECT_FALSE(at::equal(copy->mean, mean));

  BatchNorm lazy(BatchNormOptions().axis(1));
  const auto lazy_copy = std::dynamic_pointer_cast<BatchNormImpl>(lazy->clone());
  EXPECT_FALSE(lazy_copy->is_initialized());
  lazy->init(x);
  EXPECT_FALSE(lazy_copy->is_initialized());
  EXPECT_TRUE(std::dynamic_pointer_cast<BatchNormImpl>(lazy->clone())->is_initialized());
}

TEST_F(BatchNormModule, ResetsInPlace) {
  auto bn = trained_batch_norm(BatchNormOptions().num_features(3));
  const auto scale = bn->scale;
  bn->reset();
  EXPECT_TRUE(scale.is_same(bn->scale));
  EXPECT_TRUE(is_equal(bn->scale, at::ones({3})));
  EXPECT_TRUE(is_equal(bn->bias, at::zeros({3})));
  EXPECT_TRUE(is_equal(bn->mean, at::zeros({3})));
  EXPECT_TRUE(is_equal(bn->var, at::ones({3})));
}

TEST_F(BatchNormModule, KeepsTheStatisticsWideWhenConverted) {
  for (const auto dtype : {at::kHalf, at::kBFloat16}) {
    auto bn = trained_batch_norm(BatchNormOptions().num_features(3));
    const auto mean = bn->mean.clone(), var = bn->var.clone(), scale = bn->scale.detach().clone();
    bn->to(at::Device(at::kCPU), dtype);
    EXPECT_TRUE(is_equal(bn->scale, scale.to(dtype)));
    EXPECT_TRUE(is_equal(bn->mean, mean));
    EXPECT_TRUE(is_equal(bn->var, var));
    bn->to(at::kDouble);
    EXPECT_TRUE(is_equal(bn->mean, mean.to(at::kDouble)));
    bn->to(at::kFloat);
    EXPECT_EQ(bn->var.scalar_type(), at::kFloat);
  }
  BatchNorm lazy;
  lazy->to(at::kDouble);
  lazy->init(at::randn({2, 3}));
  EXPECT_EQ(lazy->scale.scalar_type(), at::kDouble);
  EXPECT_EQ(lazy->var.scalar_type(), at::kDouble);
  BatchNorm half;
  half->to(at::kHalf);
  half->init(at::randn({2, 3}));
  EXPECT_EQ(half->scale.scalar_type(), at::kHalf);
  EXPECT_EQ(half->var.scalar_type(), at::kFloat);
}

TEST_F(BatchNormModule, ConvertsAsAChild) {
  torch::nn::Sequential net(BatchNorm(BatchNormOptions().num_features(3).axis(1)));
  net->to(at::kBFloat16);
  EXPECT_EQ(net->parameters().front().scalar_type(), at::kBFloat16);
  EXPECT_EQ(net->buffers().front().scalar_type(), at::kFloat);
}

TEST_F(BatchNormModule, ChoosesTheOutputDtype) {
  struct Row {
    at::ScalarType x;
    std::optional<at::ScalarType> param;  // empty: no parameters
    std::optional<at::ScalarType> dtype;
    at::ScalarType want;
  };
  const std::vector<Row> rows{
      {at::kBFloat16, at::kFloat, at::kFloat, at::kFloat},
      {at::kDouble, at::kFloat, at::kFloat, at::kFloat},
      {at::kFloat, at::kFloat, at::kHalf, at::kHalf},
      {at::kFloat, at::kFloat, at::kDouble, at::kDouble},
      {at::kBFloat16, at::kFloat, std::nullopt, at::kFloat},
      {at::kHalf, at::kBFloat16, std::nullopt, at::kFloat},
      {at::kBFloat16, std::nullopt, std::nullopt, at::kBFloat16},
      {at::kFloat, at::kDouble, std::nullopt, at::kDouble},
      {at::kInt, at::kFloat, at::kFloat, at::kFloat},
      {at::kLong, at::kBFloat16, std::nullopt, at::kBFloat16},
      {at::kInt, std::nullopt, std::nullopt, at::kFloat},
      {at::kByte, at::kDouble, std::nullopt, at::kDouble},
  };
  for (const auto& row : rows) {
    BatchNorm bn(BatchNormOptions()
                     .dtype(row.dtype)
                     .param_dtype(row.param.value_or(at::kFloat))
                     .use_scale(row.param.has_value())
                     .use_bias(row.param.has_value()));
    const auto x = at::randint(0, 8, {4, 3}).to(row.x);
    const auto y = bn->forward(x);
    EXPECT_EQ(y.scalar_type(), row.want);
    EXPECT_EQ(bn->mean.scalar_type(), at::kFloat);
    const auto wide = x.to(at::kDouble);
    EXPECT_TRUE(is_close(y, normalize(wide, moments(wide, {0}), 1e-5)));
  }
}

}  // namespace
}  // namespace normcore::testing
