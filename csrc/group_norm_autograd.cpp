// Autograd of group norm.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <optional>
#include <utility>
#include <vector>

#include "autograd.h"
#include "checks.h"
#include "formulas.h"

namespace normcore::autograd {
namespace {

struct GroupNormBackward {
  static constexpr const char* kNodeName = "NormcoreGroupNormBackward";
  static constexpr const char* kDoubleNodeName = "NormcoreGroupNormBackwardBackward";

  std::int64_t num_groups = 1;
  std::vector<std::int64_t> axis;
  std::optional<std::vector<std::int64_t>> reduction_axes;
  double eps = 0.0;
  kernels::Activation activation = kernels::Activation::kNone;

  Gradients backward(const Tensor& grad_output, const Operands& operands, const Tensor& mean,
                     const Tensor& rstd, const OutputMask& output_mask) const {
    return op::group_norm_backward().call(grad_output, operands.input, operands.weight,
                                          operands.bias, operands.residual, operands.mask, mean,
                                          rstd, num_groups, axis, reduction(), eps,
                                          activation_name(activation), output_mask);
  }

  DoubleGradients double_backward(const Cotangents& cotangents, const Tensor& grad_output,
                                  const Operands& operands, const Tensor& mean, const Tensor& rstd,
                                  const DoubleOutputMask& output_mask) const {
    return op::group_norm_double_backward().call(
        cotangents.input, cotangents.weight, cotangents.bias, cotangents.residual, grad_output,
        operands.input, operands.weight, operands.bias, operands.residual, operands.mask, mean,
        rstd, num_groups, axis, reduction(), eps, activation_name(activation), output_mask);
  }

  template <class Self, class F>
  static void for_each_member(Self& self, F&& f) {
    f(self.num_groups);
    f(self.axis);
    f(self.reduction_axes);
    f(self.eps);
    f(self.activation);
  }

 private:
  at::OptionalIntArrayRef reduction() const {
    return reduction_axes ? at::OptionalIntArrayRef(*reduction_axes) : std::nullopt;
  }
};

GroupNormBackward group_norm_arguments(std::int64_t num_groups, at::IntArrayRef axis,
                                       at::OptionalIntArrayRef reduction_axes, double eps,
                                       OptionalString activation) {
  GroupNormBackward norm;
  norm.num_groups = num_groups;
  norm.axis = axis.vec();
  if (reduction_axes.has_value()) norm.reduction_axes = reduction_axes->vec();
  norm.eps = eps;
  norm.activation = parse_activation("group_norm", activation);
  return norm;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_forward(
    c10::DispatchKeySet keys, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask,
    std::int64_t num_groups, at::IntArrayRef axis, at::OptionalIntArrayRef reduction_axes,
    double eps, OptionalString activation, OptionalDType dtype) {
  const Operands operands{input, weight, bias, residual, mask};
  const Recorder recorder(operands, [&] {
    return group_norm_arguments(num_groups, axis, reduction_axes, eps, activation);
  });
  const auto result = [&] {
    const at::AutoDispatchBelowAutograd guard;
    return op::group_norm_forward().redispatch(keys & c10::after_autograd_keyset, input, weight,
                                               bias, residual, mask, num_groups, axis,
                                               reduction_axes, eps, activation, dtype);
  }();
  const auto& [y, mean, rstd] = result;
  recorder.attach(y, mean, rstd);
  propagate_tangents(y, operands,
                     [&](const Operands& primals) {
                       return Check<c10::SymInt>::group_norm(
                           primals, num_groups, axis, reduction_axes, eps, activation, dtype);
                     },
                     {mean, rstd});
  return result;
}

Gradients group_norm_backward(c10::DispatchKeySet keys, const Tensor& grad_output,
                              const Tensor& input, const OptionalTensor& weight,
                              const OptionalTensor& bias, const OptionalTensor& residual,
                              const OptionalTensor& mask, const Tensor& mean, const Tensor& rstd,
                              std::int64_t num_groups, at::IntArrayRef axis,
                              at::OptionalIntArrayRef reduction_axes, double eps,
                              OptionalString activation, OutputMask output_mask) {
  check_no_tangent("group_norm", "mean and rstd", mean, rstd);
  const Operands operands{input, weight, bias, residual, mask};
  if (have_tangent(grad_output, input, weight, bias, residual)) {
    const auto norm = Check<c10::SymInt>::group_norm_backward(
        grad_output, operands, mean, rstd, num_groups, axis, reduction_axes, eps, activation);
    return norm_backward_formula(grad_output, operands, norm, {mean, rstd}, output_mask);
  }
  const auto result = [&] {
    const at::AutoDispatchBelowAutograd guard;
    return op::group_norm_backward().redispatch(
        keys & c10::after_autograd_keyset, grad_output, input, weight, bias, residual, mask, mean,
        rstd, num_groups, axis, reduction_axes, eps, activation, output_mask);
  }();
  if (ta::compute_requires_grad(grad_output, input, weight, bias, residual)) {
    const auto norm = group_norm_arguments(num_groups, axis, reduction_axes, eps, activation);
    record_backward(result, grad_output, operands, norm, mean, rstd);
  }
  return result;
}

DoubleGradients group_norm_double_backward(
    c10::DispatchKeySet keys, const OptionalTensor& grad_grad_input,
    const OptionalTensor& grad_grad_weight, const OptionalTensor& grad_grad_bias,
    const OptionalTensor& grad_grad_residual, const Tensor& grad_output, const Tensor& input,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    const OptionalTensor& mask, const Tensor& mean, const Tensor& rstd, std::int64_t num_groups,
    at::IntArrayRef axis, at::OptionalIntArrayRef reduction_axes, double eps,
    OptionalString activation, DoubleOutputMask output_mask) {
  check_no_tangent("group_norm", "mean and rstd", mean, rstd);
  if (is_differentiated(grad_grad_input, grad_grad_weight, grad_grad_bias, grad_grad_residual,
                        grad_output, input, weight, bias, residual)) {
    return group_norm_double_backward_formula(grad_grad_input, grad_grad_weight, grad_grad_bias,
                                              grad_grad_residual, grad_output, input, weight, bias,
                                              residual, mask, mean, rstd, num_groups, axis,
                                              reduction_axes, eps, activation, output_mask);
  }
  const at::AutoDispatchBelowAutograd guard;
  return op::group_norm_double_backward().redispatch(
      keys & c10::after_autograd_keyset, grad_grad_input, grad_grad_weight, grad_grad_bias,
      grad_grad_residual, grad_output, input, weight, bias, residual, mask, mean, rstd, num_groups,
      axis, reduction_axes, eps, activation, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(normcore, Autograd, m) {
  m.impl("_group_norm", TORCH_FN(group_norm_forward));
  m.impl("_group_norm_backward", TORCH_FN(group_norm_backward));
  m.impl("_group_norm_double_backward", TORCH_FN(group_norm_double_backward));
}

}  // namespace normcore::autograd
