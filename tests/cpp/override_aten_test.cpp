// torch's own norms on the kernels of this library, from C++.
#include <gtest/gtest.h>
#include <normcore/normcore.h>
#include <torch/torch.h>

namespace {

std::int64_t calls() { return normcore::aten_override_calls().normcore; }

TEST(OverrideAten, ModulesOfTorchCallTheKernels) {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::BatchNorm2d(4), torch::nn::GroupNorm(2, 4));
  const auto x = torch::randn({3, 4, 5, 6}, torch::requires_grad());
  const auto gradient = [&] {
    return torch::autograd::grad({model->forward(x).square().sum()}, {x}).front();
  };
  const auto want = gradient();
  const auto before = calls();
  normcore::enable_aten_override();
  const auto got = gradient();
  normcore::disable_aten_override();
  EXPECT_EQ(calls() - before, 4);  // two norms, forward and backward
  EXPECT_TRUE(torch::allclose(got, want, 1e-4, 1e-5));
}

TEST(OverrideAten, CallsNest) {
  const auto x = torch::randn({2, 4, 3});
  const auto runs_here = [&] {
    const auto before = calls();
    torch::group_norm(x, 2);
    return calls() > before;
  };
  EXPECT_FALSE(runs_here());
  normcore::enable_aten_override();
  normcore::enable_aten_override();
  normcore::disable_aten_override();
  EXPECT_TRUE(runs_here());
  normcore::disable_aten_override();
  EXPECT_FALSE(runs_here());
  EXPECT_THROW(normcore::disable_aten_override(), c10::Error);
}

}  // namespace
