// One typed handle per operator: calls go through the dispatcher (autograd, autocast, transforms)
// without a lookup by name on the call path. Signatures follow schema.cpp argument by argument.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/MemoryFormat.h>
#include <c10/core/ScalarType.h>
#include <c10/util/OptionalArrayRef.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

namespace normcore {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalString = std::optional<std::string_view>;
using OptionalDType = std::optional<at::ScalarType>;
using OptionalFormat = std::optional<at::MemoryFormat>;
using OutputMask = std::array<bool, 4>;  // gradients of input, weight, bias, residual
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Of the double backward pass: gradients of grad_output, input, weight, bias, residual.
using DoubleOutputMask = std::array<bool, 5>;
using DoubleGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

using BatchNormFn = Tensor(const Tensor& input, const OptionalTensor& running_mean,
                           const OptionalTensor& running_var, const OptionalTensor& weight,
                           const OptionalTensor& bias, bool training,
                           std::optional<double> momentum, double eps, at::IntArrayRef axis,
                           const OptionalTensor& mask, OptionalString activation,
                           const OptionalTensor& residual, bool unbiased,
                           const OptionalTensor& num_batches_tracked, OptionalDType dtype,
                           OptionalString group, std::string_view sync_weighting);

using BatchNormFunctionalFn = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor& input, const Tensor& running_mean, const Tensor& running_var,
    const OptionalTensor& weight, const OptionalTensor& bias, std::optional<double> momentum,
    double eps, at::IntArrayRef axis, const OptionalTensor& mask, OptionalString activation,
    const OptionalTensor& residual, bool unbiased, const OptionalTensor& num_batches_tracked,
    OptionalDType dtype, OptionalString group, std::string_view sync_weighting);

using GroupNormFn = Tensor(const Tensor& input, std::int64_t num_groups,
                           const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                           at::IntArrayRef axis, at::OptionalIntArrayRef reduction_axes,
                           const OptionalTensor& mask, OptionalString activation,
                           const OptionalTensor& residual, OptionalDType dtype,
                           OptionalString group, std::string_view sync_weighting);

using BatchNormTrainFn = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& mask, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    at::IntArrayRef axis, std::optional<double> momentum, double eps, bool unbiased,
    OptionalString activation, OptionalDType dtype, OptionalFormat relu_bits_format);

using BatchNormEvalFn = std::tuple<Tensor, Tensor>(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const Tensor& running_mean, const Tensor& running_var,
    at::IntArrayRef axis, double eps, OptionalString activation, OptionalDType dtype);

using BatchNormBackwardFn = Gradients(const Tensor& grad_output, const Tensor& input,
                                      const OptionalTensor& weight, const OptionalTensor& bias,
                                      const OptionalTensor& residual, const OptionalTensor& mask,
                                      const Tensor& mean, const Tensor& rstd, at::IntArrayRef axis,
                                      bool batch_statistics, double eps, OptionalString activation,
                                      OutputMask output_mask, const OptionalTensor& relu_bits,
                                      OptionalFormat relu_bits_format);

using BatchNormDoubleBackwardFn = DoubleGradients(
    const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
    const OptionalTensor& grad_grad_bias, const OptionalTensor& grad_grad_residual,
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask,
    const Tensor& mean, const Tensor& rstd, at::IntArrayRef axis, bool batch_statistics, double eps,
    OptionalString activation, DoubleOutputMask output_mask);

using GroupNormForwardFn = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& mask, std::int64_t num_groups,
    at::IntArrayRef axis, at::OptionalIntArrayRef reduction_axes, double eps,
    OptionalString activation, OptionalDType dtype);

using GroupNormBackwardFn = Gradients(const Tensor& grad_output, const Tensor& input,
                                      const OptionalTensor& weight, const OptionalTensor& bias,
                                      const OptionalTensor& residual, const OptionalTensor& mask,
                                      const Tensor& mean, const Tensor& rstd,
                                      std::int64_t num_groups, at::IntArrayRef axis,
                                      at::OptionalIntArrayRef reduction_axes, double eps,
                                      OptionalString activation, OutputMask output_mask);

using GroupNormDoubleBackwardFn = DoubleGradients(
    const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
    const OptionalTensor& grad_grad_bias, const OptionalTensor& grad_grad_residual,
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask,
    const Tensor& mean, const Tensor& rstd, std::int64_t num_groups, at::IntArrayRef axis,
    at::OptionalIntArrayRef reduction_axes, double eps, OptionalString activation,
    DoubleOutputMask output_mask);

// Of slices that several ranks share (sync.h of the kernels); num_groups = 0 is batch norm.
using SyncMomentsFn = Tensor(const Tensor& input, const OptionalTensor& mask,
                             std::int64_t num_groups, at::IntArrayRef axis,
                             at::OptionalIntArrayRef reduction_axes, bool by_rank);

using SyncStatisticsFn = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor& own, const Tensor& total, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum, bool unbiased, bool by_rank);

using SyncApplyFn = std::tuple<Tensor, Tensor>(const Tensor& input, const OptionalTensor& weight,
                                               const OptionalTensor& bias,
                                               const OptionalTensor& residual, const Tensor& mean,
                                               const Tensor& var, std::int64_t num_groups,
                                               at::IntArrayRef axis,
                                               at::OptionalIntArrayRef reduction_axes, double eps,
                                               OptionalString activation, OptionalDType dtype);

using SyncGradientSumsFn = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask,
    const Tensor& mean, const Tensor& rstd, std::int64_t num_groups, at::IntArrayRef axis,
    at::OptionalIntArrayRef reduction_axes, double eps, OptionalString activation,
    std::array<bool, 3> output_mask);

using SyncGradientFn = std::tuple<Tensor, Tensor>(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask,
    const Tensor& mean, const Tensor& rstd, const OptionalTensor& sums, const Tensor& share,
    std::int64_t num_groups, at::IntArrayRef axis, at::OptionalIntArrayRef reduction_axes,
    double eps, OptionalString activation, std::array<bool, 2> output_mask);

using AllReduceSumFn = Tensor(const Tensor& t, std::string_view group);

template <class Fn>
c10::TypedOperatorHandle<Fn> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Fn>();
}

namespace op {

inline const auto& batch_norm() {
  static const auto handle = find_op<BatchNormFn>("normcore::batch_norm");
  return handle;
}
inline const auto& batch_norm_functional() {
  static const auto handle = find_op<BatchNormFunctionalFn>("normcore::batch_norm_functional");
  return handle;
}
inline const auto& group_norm() {
  static const auto handle = find_op<GroupNormFn>("normcore::group_norm");
  return handle;
}
inline const auto& batch_norm_train() {
  static const auto handle = find_op<BatchNormTrainFn>("normcore::_batch_norm_train");
  return handle;
}
inline const auto& batch_norm_eval() {
  static const auto handle = find_op<BatchNormEvalFn>("normcore::_batch_norm_eval");
  return handle;
}
inline const auto& batch_norm_backward() {
  static const auto handle = find_op<BatchNormBackwardFn>("normcore::_batch_norm_backward");
  return handle;
}
inline const auto& batch_norm_double_backward() {
  static const auto handle =
      find_op<BatchNormDoubleBackwardFn>("normcore::_batch_norm_double_backward");
  return handle;
}
inline const auto& group_norm_forward() {
  static const auto handle = find_op<GroupNormForwardFn>("normcore::_group_norm");
  return handle;
}
inline const auto& group_norm_backward() {
  static const auto handle = find_op<GroupNormBackwardFn>("normcore::_group_norm_backward");
  return handle;
}

inline const auto& group_norm_double_backward() {
  static const auto handle =
      find_op<GroupNormDoubleBackwardFn>("normcore::_group_norm_double_backward");
  return handle;
}

inline const auto& sync_moments() {
  static const auto handle = find_op<SyncMomentsFn>("normcore::_sync_moments");
  return handle;
}
inline const auto& sync_statistics() {
  static const auto handle = find_op<SyncStatisticsFn>("normcore::_sync_statistics");
  return handle;
}
inline const auto& sync_apply() {
  static const auto handle = find_op<SyncApplyFn>("normcore::_sync_apply");
  return handle;
}
inline const auto& sync_gradient_sums() {
  static const auto handle = find_op<SyncGradientSumsFn>("normcore::_sync_gradient_sums");
  return handle;
}
inline const auto& sync_gradient() {
  static const auto handle = find_op<SyncGradientFn>("normcore::_sync_gradient");
  return handle;
}
inline const auto& all_reduce_sum() {
  static const auto handle = find_op<AllReduceSumFn>("normcore::_all_reduce_sum");
  return handle;
}

}  // namespace op

inline bool has(const OptionalTensor& t) { return t.has_value() && t->defined(); }
inline Tensor value_or_undefined(const OptionalTensor& t) { return t.value_or(Tensor()); }

}  // namespace normcore
