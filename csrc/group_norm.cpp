// Group norm: the public operator and the low-level ones below autograd. A kernel template with Int
// = std::int64_t computes; with c10::SymInt it only makes the outputs (Meta).
#include <torch/library.h>

#include "backend.h"
#include "checks.h"
#include "context.h"
#include "formulas.h"
#include "outputs.h"
#include "staging.h"
#include "subclass.h"
#include "sync.h"

namespace normcore {
namespace {

template <class Int>
std::tuple<Tensor, Tensor, Tensor> group_norm_forward(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& mask, std::int64_t num_groups,
    at::IntArrayRef axis, at::OptionalIntArrayRef reduction_axes, double eps,
    OptionalString activation, OptionalDType dtype) {
  const Operands operands{input, weight, bias, residual, mask};
  const auto norm =
      Check<Int>::group_norm(operands, num_groups, axis, reduction_axes, eps, activation, dtype);
  const auto y = empty_output<Int>(input, norm.dtype);
  const auto mean = empty_statistic<Int>(input, {norm.samples, norm.num_groups}, at::kDouble);
  const auto rstd = empty_statistic<Int>(input, {norm.samples, norm.num_groups},
                                         compute_dtype(input.scalar_type()));
  if constexpr (is_concrete<Int>) {
    if (input.numel() == 0) return {y, mean.zero_(), rstd.zero_()};
    Staging staging(operands, norm, Samples::kKept);
    kernels::GroupNormForwardArgs args;
    args.input = staging.input();
    args.num_groups = num_groups;
    args.y = staging.write(y);
    args.mean = mean.template mutable_data_ptr<double>();
    args.rstd = backend::mutable_view(rstd);
    backend::run(args, input.device());
    staging.finish();
  }
  return {y, mean, rstd};
}

template <class Int>
Gradients group_norm_backward(const Tensor& grad_output, const Tensor& input,
                              const OptionalTensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& residual, const OptionalTensor& mask,
                              const Tensor& mean, const Tensor& rstd, std::int64_t num_groups,
                              at::IntArrayRef axis, at::OptionalIntArrayRef reduction_axes,
                              double eps, OptionalString activation, OutputMask output_mask) {
  const Operands operands{input, weight, bias, residual, mask};
  const auto norm = Check<Int>::group_norm_backward(grad_output, operands, mean, rstd, num_groups,
                                                    axis, reduction_axes, eps, activation);
  const auto gradients = empty_gradients<Int>(operands, output_mask);
  if constexpr (is_concrete<Int>) {
    const auto remaining = fill_without_kernel(gradients, grad_output, norm.activation);
    if (!any_defined(remaining)) return gradients;
    Staging staging(operands, norm, Samples::kKept);
    kernels::GroupNormBackwardArgs args;
    args.input = staging.input();
    args.num_groups = num_groups;
    args.grad_y = staging.read(grad_output);
    args.mean = static_cast<const double*>(staging.read_vector(mean).data);
    args.rstd = staging.read_vector(rstd);
    args.grad = staging.write(remaining);
    backend::run(args, input.device());
    staging.finish();
  }
  return gradients;
}

template <class Int>
DoubleGradients group_norm_double_backward(
    const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
    const OptionalTensor& grad_grad_bias, const OptionalTensor& grad_grad_residual,
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask,
    const Tensor& mean, const Tensor& rstd, std::int64_t num_groups, at::IntArrayRef axis,
    at::OptionalIntArrayRef reduction_axes, double eps, OptionalString activation,
    DoubleOutputMask output_mask) {
  const Operands operands{input, weight, bias, residual, mask};
  const Cotangents cotangents{grad_grad_input, grad_grad_weight, grad_grad_bias,
                              grad_grad_residual};
  const auto norm =
      Check<Int>::group_norm_double_backward(cotangents, grad_output, operands, mean, rstd,
                                             num_groups, axis, reduction_axes, eps, activation);
  const auto gradients = empty_double_gradients<Int>(grad_output, operands, output_mask);
  if constexpr (is_concrete<Int>) {
    const auto& [grad_grad_output, x, w, b, r] = gradients;
    if (input.numel() == 0) {
      zero_parameters(w, b);
      return gradients;
    }
    Staging staging(operands, norm, Samples::kKept);
    kernels::GroupNormDoubleBackwardArgs args;
    args.input = staging.input();
    args.num_groups = num_groups;
    args.grad_y = staging.read(grad_output);
    args.mean = static_cast<const double*>(staging.read_vector(mean).data);
    args.rstd = staging.read_vector(rstd);
    args.cotangents = staging.read(cotangents);
    args.grad_grad_y = staging.write(grad_grad_output);
    args.grad = staging.write(Gradients{x, w, b, r});
    if (!backend::try_run(args, input.device())) {
      return group_norm_double_backward_formula(grad_grad_input, grad_grad_weight, grad_grad_bias,
                                                grad_grad_residual, grad_output, input, weight,
                                                bias, residual, mask, mean, rstd, num_groups, axis,
                                                reduction_axes, eps, activation, output_mask);
    }
    staging.finish();
  }
  return gradients;
}

Tensor group_norm(const Tensor& input, std::int64_t num_groups, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps, at::IntArrayRef axis,
                  at::OptionalIntArrayRef reduction_axes, const OptionalTensor& mask,
                  OptionalString activation, const OptionalTensor& residual, OptionalDType dtype,
                  OptionalString group, std::string_view sync_weighting) {
  const auto ranks = check_ranks("group_norm", group, sync_weighting);
  const auto x = promote_input(input, {&weight, &bias, &residual}, dtype);
  const auto y_dtype = dtype.value_or(input.scalar_type());
  const Operands operands{x, weight, bias, residual, mask};
  const bool is_spread = is_dtensor("group_norm", operands);
  if (is_spread || ranks) {
    Check<c10::SymInt>::group_norm(operands, num_groups, axis, reduction_axes, eps, activation,
                                   y_dtype);
  }
  // A DTensor has the statistics of all devices, whatever the group says.
  if (ranks && !is_spread) {
    check_transforms("group_norm");
    return sync_norm(operands, {num_groups, axis, reduction_axes}, {}, eps, activation, y_dtype,
                     ranks);
  }
  return std::get<0>(op::group_norm_forward().call(x, weight, bias, residual, mask, num_groups,
                                                   axis, reduction_axes, eps, activation, y_dtype));
}

Tensor group_norm_decomposed(const Tensor& input, std::int64_t num_groups,
                             const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                             at::IntArrayRef axis, at::OptionalIntArrayRef reduction_axes,
                             const OptionalTensor& mask, OptionalString activation,
                             const OptionalTensor& residual, OptionalDType dtype,
                             OptionalString group, std::string_view sync_weighting) {
  if (check_ranks("group_norm", group, sync_weighting)) {
    return group_norm(input, num_groups, weight, bias, eps, axis, reduction_axes, mask, activation,
                      residual, dtype, group, sync_weighting);
  }
  const auto x = promote_input(input, {&weight, &bias, &residual}, dtype);
  const Operands operands{x, weight, bias, residual, mask};
  return group_norm_formula(
      operands, Check<c10::SymInt>::group_norm(operands, num_groups, axis, reduction_axes, eps,
                                               activation, dtype.value_or(input.scalar_type())));
}

}  // namespace

DoubleGradients group_norm_double_backward_formula(
    const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
    const OptionalTensor& grad_grad_bias, const OptionalTensor& grad_grad_residual,
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask,
    const Tensor& mean, const Tensor& rstd, std::int64_t num_groups, at::IntArrayRef axis,
    at::OptionalIntArrayRef reduction_axes, double eps, OptionalString activation,
    DoubleOutputMask output_mask) {
  const Operands operands{input, weight, bias, residual, mask};
  const Cotangents cotangents{grad_grad_input, grad_grad_weight, grad_grad_bias,
                              grad_grad_residual};
  const auto norm = Check<c10::SymInt>::group_norm_double_backward(
      cotangents, grad_output, operands, mean, rstd, num_groups, axis, reduction_axes, eps,
      activation);
  return norm_double_backward_formula(cotangents, grad_output, operands, norm, {mean, rstd},
                                      output_mask);
}

TORCH_LIBRARY_IMPL(normcore, CompositeImplicitAutograd, m) {
  m.impl("group_norm", TORCH_FN(group_norm));
  m.impl("_group_norm_decomposed", TORCH_FN(group_norm_decomposed));
}

// Without autograd (inference_mode) a tensor subclass would see the composite operator itself.
TORCH_LIBRARY_IMPL(normcore, Python, m) {
  m.impl("group_norm", TORCH_FN(group_norm));
  m.impl("_group_norm_decomposed", TORCH_FN(group_norm_decomposed));
}

// Under vmap a composite operator has to be registered as a decomposition as well.
TORCH_LIBRARY_IMPL(normcore, FuncTorchBatchedDecomposition, m) {
  m.impl("group_norm", TORCH_FN(group_norm));
  m.impl("_group_norm_decomposed", TORCH_FN(group_norm_decomposed));
  m.impl("_group_norm_double_backward", TORCH_FN(group_norm_double_backward_formula));
}

TORCH_LIBRARY_IMPL(normcore, CPU, m) {
  m.impl("_group_norm", TORCH_FN(group_norm_forward<std::int64_t>));
  m.impl("_group_norm_backward", TORCH_FN(group_norm_backward<std::int64_t>));
  m.impl("_group_norm_double_backward", TORCH_FN(group_norm_double_backward<std::int64_t>));
}

// The same functions: the backend decides what runs on a device.
TORCH_LIBRARY_IMPL(normcore, CUDA, m) {
  m.impl("_group_norm", TORCH_FN(group_norm_forward<std::int64_t>));
  m.impl("_group_norm_backward", TORCH_FN(group_norm_backward<std::int64_t>));
  m.impl("_group_norm_double_backward", TORCH_FN(group_norm_double_backward<std::int64_t>));
}

TORCH_LIBRARY_IMPL(normcore, Meta, m) {
  m.impl("_group_norm", TORCH_FN(group_norm_forward<c10::SymInt>));
  m.impl("_group_norm_backward", TORCH_FN(group_norm_backward<c10::SymInt>));
  m.impl("_group_norm_double_backward", TORCH_FN(group_norm_double_backward<c10::SymInt>));
}

}  // namespace normcore
