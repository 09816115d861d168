// Modules inside other modules, as text and beside process groups.
#include <torch/nn/modules/container/sequential.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include "module_test.h"

namespace normcore::testing {
namespace {

TEST_F(Modules, WorkInSequential) {
  torch::nn::Sequential net(BatchNorm(BatchNormOptions().axis(1).activation("relu")),
                            GroupNorm(GroupNormOptions().num_groups(2).axis(1)));
  const auto x = at::randn({4, 6, 5}).requires_grad_();
  const auto y = net->forward(x);
  EXPECT_EQ(net->parameters().size(), 4);
  y.sin().sum().backward();
  for (const auto& parameter : net->parameters()) {
    EXPECT_GT(parameter.grad().abs().max().item<double>(), 0.0);
  }
  EXPECT_TRUE(x.grad().isfinite().all().item<bool>());

  const auto archive = saved(net);
  torch::nn::Sequential restored(BatchNorm(BatchNormOptions().axis(1).activation("relu")),
                                 GroupNorm(GroupNormOptions().num_groups(2).axis(1)));
  load(restored, archive);
  net->eval();
  restored->eval();
  EXPECT_TRUE(is_equal(restored->forward(x), net->forward(x)));

  const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(net->clone());
  EXPECT_TRUE(is_equal(copy->forward(x), net->forward(x)));

  torch::nn::AnyModule any(BatchNorm(BatchNormOptions().axis(1)));
  EXPECT_TRUE(is_close(any.forward(x, std::optional<bool>(true)),
                       x.detach().to(at::kDouble) / std::sqrt(1.0 + 1e-5)));
}

TEST_F(Modules, DescribeThemselves) {
  EXPECT_EQ(printed(BatchNorm()),
            "normcore::BatchNorm(num_features=None, axis=-1, momentum=0.99, epsilon=1e-05)");
  BatchNorm bn(BatchNormOptions()
                   .num_features({3, 4})
                   .axis({1, 2})
                   .dtype(std::nullopt)
                   .param_dtype(at::kDouble)
                   .use_bias(false)
                   .activation("relu"));
  bn->freeze();
  EXPECT_EQ(printed(bn),
            "normcore::BatchNorm(num_features=[3, 4], axis=[1, 2], momentum=0.99, epsilon=1e-05, "
            "dtype=None, param_dtype=float64, use_bias=false, activation=relu, frozen=true)");
  EXPECT_EQ(printed(BatchNorm(BatchNormOptions()
                                  .axis_name("data")
                                  .axis_index_groups({{{0, 2}, {1}}})
                                  .sync_weighting("rank"))),
            "normcore::BatchNorm(num_features=None, axis=-1, momentum=0.99, epsilon=1e-05, "
            "axis_name=data, axis_index_groups=[[0, 2], [1]], sync_weighting=rank)");
  EXPECT_EQ(printed(GroupNorm()),
            "normcore::GroupNorm(num_features=None, axis=-1, num_groups=32, epsilon=1e-05)");
  EXPECT_EQ(printed(GroupNorm(GroupNormOptions()
                                  .num_features(6)
                                  .group_size(2)
                                  .reduction_axes({-1})
                                  .dtype(at::kHalf)
                                  .use_scale(false))),
            "normcore::GroupNorm(num_features=6, axis=-1, group_size=2, reduction_axes=-1, "
            "epsilon=1e-05, dtype=float16, use_scale=false)");
}

// A process group that c10d knows by its name for the lifetime of this.
class RegisteredGroup {
 public:
  RegisteredGroup(std::string name, int size)
      : name_(std::move(name)), group_(c10::make_intrusive<c10d::ProcessGroup>(/*rank=*/0, size)) {
    c10d::register_process_group(name_, group_);  // does not own it
  }
  RegisteredGroup(const RegisteredGroup&) = delete;
  RegisteredGroup& operator=(const RegisteredGroup&) = delete;
  ~RegisteredGroup() { c10d::unregister_process_group(name_); }

 private:
  std::string name_;
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
};

TEST_F(Modules, FindTheProcessGroupOfAxisName) {
  const auto x = at::randn({4, 6});
  const auto want = BatchNorm()->forward(x);
  const auto expect_local = [&](const char* name) {
    EXPECT_TRUE(is_equal(BatchNorm(BatchNormOptions().axis_name(name))->forward(x), want));
    GroupNorm(GroupNormOptions().num_groups(2).axis_name(name))->forward(x);
  };
  const auto expect_unknown = [&](const char* name) {
    BatchNorm bn(BatchNormOptions().axis_name(name));
    GroupNorm gn(GroupNormOptions().num_groups(2).axis_name(name));
    const char* text = "expected axis_name to be 'world' or the name of a process group, got '";
    expect_error<c10::ValueError>([&] { bn->forward(x); }, text + std::string(name));
    expect_error<c10::ValueError>([&] { gn->forward(x); }, text + std::string(name));
    bn->forward(x, /*use_running_average=*/true);
  };

  expect_local("data");  // no group at all: one rank
  expect_local("world");
  {
    const RegisteredGroup world("0", 1);
    expect_unknown("data");
    expect_local("world");
    const RegisteredGroup data("data", 1);
    expect_local("data");
  }
  {
    const RegisteredGroup world("0", 2);
    expect_unknown("data");
    const RegisteredGroup data("data", 1);  // this rank alone
    expect_local("data");
  }
}

TEST_F(Modules, RefuseToCombineStatisticsOfSeveralRanks) {
  const auto x = at::randn({4, 6});
  const auto expect_refused = [&](const char* group, const char* axis_name) {
    BatchNorm bn(BatchNormOptions().axis_name(axis_name));
    GroupNorm gn(GroupNormOptions().num_groups(2).axis_name(axis_name));
    bn->forward(x);
    const auto mean = bn->mean.clone();
    const RegisteredGroup two_ranks(group, 2);
    const char* text = "expected axis_name to span one rank, got 2";
    expect_error<c10::NotImplementedError>([&] { bn->forward(x); }, text);
    expect_error<c10::NotImplementedError>([&] { gn->forward(x); }, text);
    EXPECT_TRUE(is_equal(bn->mean, mean));
    bn->forward(x, /*use_running_average=*/true);
    BatchNorm()->forward(x);
  };
  expect_refused("data", "data");
  expect_refused("0", "world");  // the default group
  expect_refused("0", "0");
}

}  // namespace
}  // namespace normcore::testing
