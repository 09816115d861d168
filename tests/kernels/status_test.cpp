// Broken contracts of the args structs are named by the status, and nothing is written.
#include "normcore/kernels/status.h"

#include <gtest/gtest.h>

#include <string>

#include "executors.h"
#include "norm_checks.h"

namespace normcore::kernels::testing {
namespace {

// A valid call of every entry, to be broken in one place by each test.
class StatusTest : public ::testing::Test {
 protected:
  static NormCase small_case() {
    NormCase c;
    c.extent = {2, 4, 3};
    c.num_groups = 2;
    c.activation = Activation::kReLU;
    c.residual = DType::kFloat32;
    return c;
  }

  Tensor make(std::int64_t count, DType dtype = DType::kFloat32) {
    return Tensor(dtype, count, Placement::kEnd);
  }

  BatchNormForwardArgs batch_norm_args() {
    BatchNormForwardArgs args;
    args.input = inputs_.norm_input();
    args.running = {running_mean_.view(), running_var_.view(), &counter_, 0.1, false, true};
    args.y = y_.view();
    args.mean = mean_;
    args.rstd = rstd_.view();
    return args;
  }
  GroupNormForwardArgs group_norm_args() {
    return {inputs_.norm_input(), 2, y_.view(), mean_, rstd_.view()};
  }
  GroupNormBackwardArgs backward_args() {
    GroupNormBackwardArgs args{inputs_.norm_input(), 2, inputs_.grad_y.view(), mean_,
                               rstd_.view(),         {}};
    args.grad.x = y_.view();
    return args;
  }

  BatchNormDoubleBackwardArgs batch_norm_double_backward_args() {
    BatchNormDoubleBackwardArgs args;
    args.input = inputs_.norm_input();
    args.grad_y = inputs_.grad_y.view();
    args.mean = {mean_, DType::kFloat64};
    args.rstd = rstd_.view();
    args.cotangents = cotangents_.view();
    args.grad_grad_y = y_.view();
    return args;
  }
  GroupNormDoubleBackwardArgs group_norm_double_backward_args() {
    GroupNormDoubleBackwardArgs args;
    args.input = inputs_.norm_input();
    args.num_groups = 2;
    args.grad_y = inputs_.grad_y.view();
    args.mean = mean_;
    args.rstd = rstd_.view();
    args.cotangents = cotangents_.view();
    args.grad.x = y_.view();
    return args;
  }

  template <class Args>
  Status run(const Args& args) {
    const CpuPlan plan = plan_cpu(problem_of(args), 1);
    const GuardedBuffer workspace(plan.workspace_bytes, 64, Placement::kEnd);
    return kernels::run(args, plan, workspace.data(), serial_executor());
  }

  template <class Args>
  void expect_invalid(const Args& args, const std::string& word) {
    const Status status = run(args);
    EXPECT_EQ(status.code, StatusCode::kInvalidArgument) << word;
    EXPECT_NE(std::string(status.message).find(word), std::string::npos) << status.message;
    EXPECT_EQ(counter_, 7);
    const GuardedBuffer untouched(y_.buffer().bytes(), sizeof(float), Placement::kEnd);
    EXPECT_TRUE(y_.buffer().same_bytes(untouched)) << "y was written in spite of: " << word;
  }

  Inputs inputs_{small_case()};
  Cotangents cotangents_{small_case()};
  Tensor y_ = make(24), rstd_ = make(4), running_mean_ = make(4), running_var_ = make(4);
  double mean_[4] = {};
  std::int64_t counter_ = 7;
};

TEST_F(StatusTest, ValidCallsSucceed) {
  for (std::int64_t i = 0; i < 4; ++i) rstd_.set(i, 1.0);
  EXPECT_TRUE(run(batch_norm_args()).ok());
  EXPECT_TRUE(run(group_norm_args()).ok());
  EXPECT_TRUE(run(backward_args()).ok());
  EXPECT_TRUE(run(batch_norm_double_backward_args()).ok());
  EXPECT_TRUE(run(group_norm_double_backward_args()).ok());
  EXPECT_EQ(counter_, 8);
}

TEST_F(StatusTest, Forward) {
  BatchNormForwardArgs args = batch_norm_args();
  args.input.x.data = nullptr;
  expect_invalid(args, "x must");
  args = batch_norm_args();
  args.y.data = nullptr;
  expect_invalid(args, "y must");
  args = batch_norm_args();
  args.y.dtype = DType::kFloat64;
  expect_invalid(args, "float64 y");
  args = batch_norm_args();
  args.input.residual.dtype = DType::kFloat64;
  expect_invalid(args, "float64 residual");
  args = batch_norm_args();
  args.input.mask.kind = MaskKind::kRow;
  expect_invalid(args, "mask");
  args = batch_norm_args();
  args.mean = nullptr;
  expect_invalid(args, "mean");
  args = batch_norm_args();
  args.running.var.data = nullptr;
  expect_invalid(args, "running");
  args = batch_norm_args();
  args.running.cumulative = true;
  args.running.num_batches_tracked = nullptr;
  expect_invalid(args, "num_batches_tracked");

  GroupNormForwardArgs group_args = group_norm_args();
  group_args.num_groups = 3;
  expect_invalid(group_args, "num_groups");
  group_args = group_norm_args();
  group_args.rstd.data = nullptr;
  expect_invalid(group_args, "rstd");
}

TEST_F(StatusTest, Inference) {
  const BatchNormInferenceArgs valid{inputs_.norm_input(), inputs_.running_mean.view(),
                                     inputs_.running_var.view(), y_.view(), rstd_.view()};
  BatchNormInferenceArgs args = valid;
  args.running_var.data = nullptr;
  expect_invalid(args, "running");
  args = valid;
  args.y.dtype = DType::kFloat64;
  expect_invalid(args, "float64 y");
}

TEST_F(StatusTest, Backward) {
  GroupNormBackwardArgs args = backward_args();
  args.grad_y.data = nullptr;
  expect_invalid(args, "grad_y");
  args = backward_args();
  args.grad.x.dtype = DType::kBFloat16;
  expect_invalid(args, "grad_x");
  args = backward_args();
  args.num_groups = 3;
  expect_invalid(args, "num_groups");
  args = backward_args();
  args.input.activation = Activation::kNone;
  args.grad.residual = rstd_.view();
  expect_invalid(args, "residual");
  args = backward_args();
  args.grad_y.dtype = DType::kFloat64;
  expect_invalid(args, "float64 grad_y");

  BatchNormBackwardArgs batch_args;
  batch_args.input = inputs_.norm_input();
  batch_args.grad_y = inputs_.grad_y.view();
  batch_args.rstd = rstd_.view();
  batch_args.grad.x = y_.view();
  expect_invalid(batch_args, "mean");
}

TEST_F(StatusTest, ReluBits) {
  std::uint8_t bits[24] = {};
  NormCase fitting = small_case();
  fitting.extent = {2, 4, 4};
  fitting.num_groups = 0;
  const Inputs inputs(fitting);

  BatchNormForwardArgs forward = batch_norm_args();
  forward.relu_bits = bits;
  expect_invalid(forward, "whole bytes");  // of 3 positions
  forward.input = inputs.norm_input();
  forward.input.activation = Activation::kSiLU;
  expect_invalid(forward, "whole bytes");
  forward = batch_norm_args();
  forward.input = inputs.norm_input();
  forward.input.residual = {};
  forward.input.relu_bits = bits;
  expect_invalid(forward, "backward");

  BatchNormBackwardArgs backward;
  backward.input = inputs.norm_input();
  backward.input.relu_bits = bits;
  backward.grad_y = inputs.grad_y.view();
  backward.mean = {mean_, DType::kFloat64};
  backward.rstd = rstd_.view();
  backward.grad.x = y_.view();
  expect_invalid(backward, "residual");  // is there as well
  GroupNormBackwardArgs group_norm = backward_args();
  group_norm.input.residual = {};
  group_norm.input.relu_bits = bits;
  expect_invalid(group_norm, "batch norm");
  BatchNormDoubleBackwardArgs twice = batch_norm_double_backward_args();
  twice.input = inputs.norm_input();
  twice.input.residual = {};
  twice.input.relu_bits = bits;
  expect_invalid(twice, "double backward");
}

TEST_F(StatusTest, DoubleBackward) {
  // One rule after the other, for both norms.
  const auto expect_both = [&](auto change, const char* word) {
    BatchNormDoubleBackwardArgs batch_norm = batch_norm_double_backward_args();
    change(batch_norm);
    expect_invalid(batch_norm, word);
    GroupNormDoubleBackwardArgs group_norm = group_norm_double_backward_args();
    change(group_norm);
    expect_invalid(group_norm, word);
  };
  expect_both([](auto& args) { args.input.x.data = nullptr; }, "x must");
  expect_both([](auto& args) { args.grad_y.data = nullptr; }, "grad_y");
  expect_both([](auto& args) { args.mean = {}; }, "mean");
  expect_both([](auto& args) { args.rstd.data = nullptr; }, "rstd");
  expect_both([](auto& args) { args.input.mask.kind = MaskKind::kRow; }, "mask");
  expect_both([](auto& args) { args.grad_y.dtype = DType::kFloat64; }, "float64");
  expect_both([](auto& args) { args.input.residual.dtype = DType::kFloat64; }, "float64");
  expect_both([](auto& args) { args.cotangents.x.dtype = DType::kFloat64; }, "float64");
  expect_both([](auto& args) { args.cotangents.residual.dtype = DType::kFloat64; }, "float64");
  const MutableTensor y = y_.view();
  expect_both([&](auto& args) { args.grad_grad_y = {y.data, DType::kFloat64}; }, "float64");
  expect_both([&](auto& args) { args.grad.residual = {y.data, DType::kFloat64}; }, "float64");
  expect_both([&](auto& args) { args.grad.x = {y.data, DType::kBFloat16}; }, "grad_x");
  GroupNormDoubleBackwardArgs args = group_norm_double_backward_args();
  args.num_groups = 3;
  expect_invalid(args, "num_groups");
}

}  // namespace
}  // namespace normcore::kernels::testing
