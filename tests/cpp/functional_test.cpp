#include <normcore/ops.h>

#include "reference.h"

namespace normcore::testing {
namespace {

constexpr double kEps = 1e-5;

class Functional : public ::testing::Test {
 protected:
  void SetUp() override { at::manual_seed(0); }
};

class BatchNormFunction : public Functional {};
class GroupNormFunction : public Functional {};

Tensor randn(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

TEST_F(BatchNormFunction, TakesTheStatisticsOfTheBatch) {
  const auto x = randn({4, 3, 5});
  const auto weight = randn({3}), bias = randn({3});
  auto running_mean = randn({3}), running_var = randn({3}).abs();
  auto count = at::zeros({}, at::kLong);
  const auto m = moments(x, {0, 2});
  const auto want_y = normalize(x, m, kEps) * weight.view({3, 1}) + bias.view({3, 1});
  const auto want_mean = 0.7 * running_mean + 0.3 * m.mean.view(-1);
  const auto want_var = 0.7 * running_var + 0.3 * m.var.view(-1) * 20.0 / 19.0;

  const auto y = normcore::batch_norm(
      x, running_mean, running_var, weight, bias,
      BatchNormFuncOptions().training(true).momentum(0.3).num_batches_tracked(count));

  EXPECT_TRUE(is_close(y, want_y));
  EXPECT_TRUE(is_close(running_mean, want_mean));
  EXPECT_TRUE(is_close(running_var, want_var));
  EXPECT_EQ(count.item<std::int64_t>(), 1);
}

TEST_F(BatchNormFunction, UpdatesWithTheBiasedVarianceOnRequest) {
  const auto x = randn({4, 3, 5});
  auto running_mean = at::zeros({3}, at::kDouble), running_var = at::ones({3}, at::kDouble);
  normcore::batch_norm(x, running_mean, running_var, {}, {},
                       BatchNormFuncOptions().training(true).momentum(1.0).unbiased(false));
  EXPECT_TRUE(is_close(running_var, moments(x, {0, 2}).var.view(-1)));
}

TEST_F(BatchNormFunction, AveragesCumulativelyWithoutMomentum) {
  auto running_mean = at::zeros({3}, at::kDouble), running_var = at::ones({3}, at::kDouble);
  auto count = at::zeros({}, at::kLong);
  auto sum = at::zeros({3}, at::kDouble);
  for (int step = 0; step < 3; ++step) {
    const auto x = randn({6, 3});
    normcore::batch_norm(
        x, running_mean, running_var, {}, {},
        BatchNormFuncOptions().training(true).momentum(std::nullopt).num_batches_tracked(count));
    sum += x.mean(0);
  }
  EXPECT_TRUE(is_close(running_mean, sum / 3));
}

TEST_F(BatchNormFunction, ReturnsNewStatisticsInItsFunctionalForm) {
  const auto x = randn({4, 3, 5}), mean = randn({3}), var = randn({3}).abs();
  auto running_mean = mean.clone(), running_var = var.clone();
  const auto [y, new_mean, new_var] = normcore::batch_norm_functional(x, mean, var);
  const auto want = normcore::batch_norm(x, running_mean, running_var, {}, {},
                                         BatchNormFuncOptions().training(true));
  EXPECT_TRUE(at::equal(y, want));
  EXPECT_TRUE(at::equal(new_mean, running_mean));
  EXPECT_TRUE(at::equal(new_var, running_var));
  EXPECT_FALSE(at::equal(mean, running_mean));
}

TEST_F(BatchNormFunction, TakesTheRunningStatistics) {
  const auto x = randn({4, 5, 3});
  const auto running_mean = randn({3}), running_var = randn({3}).abs();
  const auto y =
      normcore::batch_norm(x, running_mean, running_var, {}, {}, BatchNormFuncOptions().axis(-1));
  EXPECT_TRUE(is_close(y, normalize(x, {running_mean, running_var}, kEps)));
}

TEST_F(BatchNormFunction, TakesSeveralFeatureAxes) {
  const auto x = randn({4, 3, 5});
  const auto weight = randn({3, 5});
  const auto y = normcore::batch_norm(x, {}, {}, weight, {},
                                      BatchNormFuncOptions().training(true).axis({2, 1}));
  EXPECT_TRUE(is_close(y, normalize(x, moments(x, {0}), kEps) * weight));
}

TEST_F(BatchNormFunction, CountsOnlyWhatTheMaskKeeps) {
  const auto x = randn({4, 3, 5});
  const auto mask = at::arange(4).view({4, 1, 1}) < 3;
  const auto y =
      normcore::batch_norm(x, {}, {}, {}, {}, BatchNormFuncOptions().training(true).mask(mask));
  EXPECT_TRUE(is_close(y, normalize(x, moments(x.narrow(0, 0, 3), {0, 2}), kEps)));
}

TEST_F(BatchNormFunction, FusesResidualAndActivation) {
  const auto x = randn({4, 3, 5}), residual = randn({4, 3, 5});
  const auto z = normalize(x, moments(x, {0, 2}), kEps) + residual;
  const auto options = BatchNormFuncOptions().training(true).residual(residual);
  const auto apply = [&](const char* activation) {
    return normcore::batch_norm(x, {}, {}, {}, {},
                                BatchNormFuncOptions(options).activation(activation));
  };
  EXPECT_TRUE(is_close(apply("relu"), at::relu(z)));
  EXPECT_TRUE(is_close(apply("silu"), at::silu(z)));
  EXPECT_TRUE(is_close(apply("gelu"), at::gelu(z)));
  EXPECT_TRUE(is_close(apply("gelu_tanh"), at::gelu(z, "tanh")));
}

TEST_F(BatchNormFunction, RoundsToTheOutputDtypeOnce) {
  const auto x = randn({4, 3, 5}).to(at::kBFloat16);
  const auto want = normalize(x.to(at::kDouble), moments(x.to(at::kDouble), {0, 2}), kEps);
  const auto options = BatchNormFuncOptions().training(true);
  const auto same = normcore::batch_norm(x, {}, {}, {}, {}, options);
  EXPECT_EQ(same.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(is_close(same, want, 0.5));
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    const auto wide =
        normcore::batch_norm(x, {}, {}, {}, {}, BatchNormFuncOptions(options).dtype(dtype));
    EXPECT_EQ(wide.scalar_type(), dtype);
    EXPECT_TRUE(is_close(wide, want));
  }
}

TEST_F(BatchNormFunction, LeavesEverythingUnchangedForAnEmptyInput) {
  auto running_mean = at::zeros({3}), running_var = at::ones({3}), count = at::zeros({}, at::kLong);
  const auto y =
      normcore::batch_norm(at::empty({0, 3, 5}), running_mean, running_var, {}, {},
                           BatchNormFuncOptions().training(true).num_batches_tracked(count));
  EXPECT_EQ(y.sizes(), (at::IntArrayRef{0, 3, 5}));
  EXPECT_TRUE(is_equal(running_mean, at::zeros({3})));
  EXPECT_TRUE(is_equal(running_var, at::ones({3})));
  EXPECT_EQ(count.item<std::int64_t>(), 0);
}

TEST_F(BatchNormFunction, HasTheRightGradients) {
  const auto mask = at::arange(4).view({4, 1, 1}) < 3;
  const std::vector<Tensor> inputs{randn({4, 2, 3}), randn({2}), randn({2}), randn({4, 2, 3})};
  const auto running_mean = randn({2}), running_var = randn({2}).abs() + 0.5;
  for (const bool training : {true, false}) {
    const auto f = [&](const std::vector<Tensor>& in) {
      return normcore::batch_norm(
          in[0], training ? Tensor() : running_mean, training ? Tensor() : running_var, in[1],
          in[2],
          BatchNormFuncOptions().training(training).mask(mask).residual(in[3]).activation("silu"));
    };
    expect_gradients(f, inputs);
    expect_second_gradients(f, inputs);
    expect_tangents(f, inputs);
  }
}

TEST_F(BatchNormFunction, SaysWhatIsWrongAndChangesNothing) {
  const auto x = at::randn({2, 3, 4});
  auto running_mean = at::zeros({3}), running_var = at::ones({3});
  const auto call = [&](const Tensor& input, const Tensor& weight,
                        const BatchNormFuncOptions& options) {
    return [=] {
      normcore::batch_norm(input, running_mean, running_var, weight, {},
                           BatchNormFuncOptions(options).training(true));
    };
  };
  const BatchNormFuncOptions defaults;
  expect_error<c10::ValueError>(call(x, at::ones({4}), defaults),
                                "batch_norm: expected weight to have shape [3], got [4]");
  expect_error<c10::ValueError>(call(x, {}, BatchNormFuncOptions().activation("tanh")),
                                "batch_norm: expected activation to be");
  expect_error<c10::ValueError>(call(x, {}, BatchNormFuncOptions().mask(at::ones({5}))),
                                "batch_norm: expected mask to broadcast");
  expect_error<c10::ValueError>(call(x, {}, BatchNormFuncOptions().residual(at::ones({2}))),
                                "batch_norm: expected residual to have shape [2, 3, 4], got [2]");
  expect_error<c10::ValueError>(call(x, {}, BatchNormFuncOptions().axis({1, -2})),
                                "batch_norm: expected axis");
  expect_error<c10::IndexError>(call(x, {}, BatchNormFuncOptions().axis(3)),
                                "batch_norm: expected axis");
  expect_error<c10::TypeError>(call(x.to(at::kInt), {}, defaults),
                               "batch_norm: expected input to have dtype");
  EXPECT_TRUE(is_equal(running_mean, at::zeros({3})));
  EXPECT_TRUE(is_equal(running_var, at::ones({3})));
  expect_error<c10::ValueError>([&] { normcore::batch_norm(x, {}, {}); },
                                "batch_norm: expected running_mean");
}

TEST_F(GroupNormFunction, MatchesTheFormula) {
  const auto x = randn({4, 6, 5});
  const auto weight = randn({6}), bias = randn({6});
  const auto grouped = x.view({4, 3, 2, 5});
  const auto want = normalize(grouped, moments(grouped, {2, 3}), kEps).view_as(x);
  EXPECT_TRUE(is_close(normcore::group_norm(x, 3), want));
  EXPECT_TRUE(is_close(normcore::group_norm(x, 3, weight, bias),
                       want * weight.view({6, 1}) + bias.view({6, 1})));
  EXPECT_TRUE(
      is_close(normcore::group_norm(x.transpose(1, 2), 3, {}, {}, GroupNormFuncOptions().axis(-1)),
               want.transpose(1, 2)));
}

TEST_F(GroupNormFunction, TakesScaleAndShiftPerSample) {
  const auto x = randn({4, 6, 5}), weight = randn({4, 6}), bias = randn({4, 6});
  EXPECT_TRUE(is_close(normcore::group_norm(x, 3, weight, bias),
                       normcore::group_norm(x, 3) * weight.unsqueeze(2) + bias.unsqueeze(2)));
}

TEST_F(GroupNormFunction, TakesReductionAxes) {
  const auto x = randn({4, 5, 6});
  const auto grouped = x.view({4, 5, 3, 2});
  const auto options = GroupNormFuncOptions().axis(-1);
  EXPECT_TRUE(is_close(
      normcore::group_norm(x, 3, {}, {}, GroupNormFuncOptions(options).reduction_axes({-1})),
      normalize(grouped, moments(grouped, {3}), kEps).view_as(x)));
  EXPECT_TRUE(is_close(
      normcore::group_norm(x, 3, {}, {}, GroupNormFuncOptions(options).reduction_axes({0, 1, 2})),
      normalize(grouped, moments(grouped, {0, 1, 3}), kEps).view_as(x)));
}

TEST_F(GroupNormFunction, HasTheRightGradients) {
  const auto mask = at::arange(3) < 2;
  const std::vector<Tensor> inputs{randn({2, 4, 3}), randn({4}), randn({4}), randn({2, 4, 3})};
  const auto f = [&](const std::vector<Tensor>& in) {
    return normcore::group_norm(
        in[0], 2, in[1], in[2],
        GroupNormFuncOptions().mask(mask).residual(in[3]).activation("gelu_tanh"));
  };
  expect_gradients(f, inputs);
  expect_second_gradients(f, inputs);
  expect_tangents(f, inputs);
}

TEST_F(GroupNormFunction, SaysWhatIsWrong) {
  const auto x = at::randn({2, 6, 4});
  expect_error<c10::ValueError>(
      [&] { normcore::group_norm(x, 4); },
      "group_norm: expected num_groups to divide the number of channels (6), got 4");
  expect_error<c10::ValueError>([&] { normcore::group_norm(x, 0); },
                                "group_norm: expected num_groups to be positive, got 0");
  expect_error<c10::ValueError>(
      [&] { normcore::group_norm(x, 3, {}, {}, GroupNormFuncOptions().reduction_axes({2})); },
      "group_norm: expected reduction_axes to contain the feature axes [1], got [2]");
  expect_error<c10::IndexError>(
      [&] { normcore::group_norm(x, 3, {}, {}, GroupNormFuncOptions().axis(-4)); },
      "group_norm: expected axis");
}

}  // namespace
}  // namespace normcore::testing
