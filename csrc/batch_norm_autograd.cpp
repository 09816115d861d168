// Autograd and version counters of batch norm.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <vector>

#include "autograd.h"
#include "checks.h"
#include "formulas.h"
#include "relu_bits.h"
#include "subclass.h"

namespace normcore::autograd {
namespace {

struct BatchNormBackward {
  static constexpr const char* kNodeName = "NormcoreBatchNormBackward";
  static constexpr const char* kDoubleNodeName = "NormcoreBatchNormBackwardBackward";

  std::vector<std::int64_t> axis;
  bool batch_statistics = true;
  double eps = 0.0;
  kernels::Activation activation = kernels::Activation::kNone;
  at::MemoryFormat bits_format = at::MemoryFormat::Contiguous;  // of relu_bits, if there are any

  Gradients backward(const Tensor& grad_output, const Operands& operands, const Tensor& mean,
                     const Tensor& rstd, const OutputMask& output_mask) const {
    const OptionalTensor none;
    const bool has_bits = is_relu_bits(operands.residual);
    return op::batch_norm_backward().call(
        grad_output, operands.input, operands.weight, operands.bias,
        has_bits ? none : operands.residual, operands.mask, mean, rstd, axis, batch_statistics, eps,
        activation_name(activation), output_mask, has_bits ? operands.residual : none,
        has_bits ? OptionalFormat(bits_format) : std::nullopt);
  }

  DoubleGradients double_backward(const Cotangents& cotangents, const Tensor& grad_output,
                                  const Operands& operands, const Tensor& mean, const Tensor& rstd,
                                  const DoubleOutputMask& output_mask) const {
    const auto& kept = operands.residual;
    const auto residual =
        is_relu_bits(kept) ? OptionalTensor(residual_of(*kept, bits_format, operands.input)) : kept;
    return op::batch_norm_double_backward().call(
        cotangents.input, cotangents.weight, cotangents.bias, cotangents.residual, grad_output,
        operands.input, operands.weight, operands.bias, residual, operands.mask, mean, rstd, axis,
        batch_statistics, eps, activation_name(activation), output_mask);
  }

  template <class Self, class F>
  static void for_each_member(Self& self, F&& f) {
    f(self.axis);
    f(self.batch_statistics);
    f(self.eps);
    f(self.activation);
    f(self.bits_format);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_train(
    c10::DispatchKeySet keys, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, at::IntArrayRef axis, std::optional<double> momentum,
    double eps, bool unbiased, OptionalString activation, OptionalDType dtype,
    OptionalFormat relu_bits_format) {
  check_no_tangent("batch_norm", "running_mean and running_var", running_mean, running_var);
  check_no_grad("batch_norm", running_mean, running_var);
  const Operands operands{input, weight, bias, residual, mask};
  auto format = relu_bits_format;
  const Recorder recorder(operands, [&] {
    BatchNormBackward norm{axis.vec(), /*batch_statistics=*/true, eps,
                           parse_activation("batch_norm", activation)};
    // DTensor does not know how they are spread.
    if (!format && !is_dtensor(input))
      format = format_for_relu_bits(operands, axis, norm.activation);
    norm.bits_format = format.value_or(norm.bits_format);
    return norm;
  });
  const auto [y, mean, rstd, relu_bits] = [&] {
    const at::AutoDispatchBelowAutograd guard;
    return op::batch_norm_train().redispatch(
        keys & c10::after_autograd_keyset, input, weight, bias, residual, mask, running_mean,
        running_var, num_batches_tracked, axis, momentum, eps, unbiased, activation, dtype, format);
  }();
  recorder.attach(y, mean, rstd, relu_bits);
  propagate_tangents(y, operands,
                     [&](const Operands& primals) {
                       return Check<c10::SymInt>::batch_norm_train(
                           primals, std::nullopt, std::nullopt, std::nullopt, axis, momentum, eps,
                           activation, dtype);
                     },
                     {mean, rstd});
  return {y, mean, rstd, relu_bits_format ? relu_bits : Tensor()};
}

std::tuple<Tensor, Tensor> batch_norm_eval(c10::DispatchKeySet keys, const Tensor& input,
                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                           const OptionalTensor& residual,
                                           const Tensor& running_mean, const Tensor& running_var,
                                           at::IntArrayRef axis, double eps,
                                           OptionalString activation, OptionalDType dtype) {
  check_no_tangent("batch_norm", "running_mean and running_var", running_mean, running_var);
  check_no_grad("batch_norm", running_mean, running_var);
  const OptionalTensor no_mask;
  const Operands operands{input, weight, bias, residual, no_mask};
  const Recorder recorder(operands, [&] {
    return BatchNormBackward{axis.vec(), /*batch_statistics=*/false, eps,
                             parse_activation("batch_norm", activation)};
  });
  const auto result = [&] {
    const at::AutoDispatchBelowAutograd guard;
    return op::batch_norm_eval().redispatch(keys & c10::after_autograd_keyset, input, weight, bias,
                                            residual, running_mean, running_var, axis, eps,
                                            activation, dtype);
  }();
  const auto& [y, rstd] = result;
  // The running mean itself: if it changes before the backward pass, that raises.
  recorder.attach(y, running_mean, rstd);
  propagate_tangents(y, operands,
                     [&](const Operands& primals) {
                       return Check<c10::SymInt>::batch_norm_eval(
                           primals, running_mean, running_var, axis, eps, activation, dtype);
                     },
                     {running_mean, rstd, /*are_constants=*/true});
  return result;
}

Gradients batch_norm_backward(c10::DispatchKeySet keys, const Tensor& grad_output,
                              const Tensor& input, const OptionalTensor& weight,
                              const OptionalTensor& bias, const OptionalTensor& residual,
                              const OptionalTensor& mask, const Tensor& mean, const Tensor& rstd,
                              at::IntArrayRef axis, bool batch_statistics, double eps,
                              OptionalString activation, OutputMask output_mask,
                              const OptionalTensor& relu_bits, OptionalFormat relu_bits_format) {
  check_no_tangent("batch_norm", "mean and rstd", mean, rstd);
  const OptionalTensor no_mask;
  const auto& counting = batch_statistics ? mask : no_mask;
  if (have_tangent(grad_output, input, weight, bias, residual)) {
    const auto norm = Check<c10::SymInt>::batch_norm_backward(
        grad_output, {input, weight, bias, residual, counting}, mean, rstd, axis, batch_statistics,
        eps, activation, relu_bits, relu_bits_format);
    const auto stand_in = has(relu_bits)
                              ? OptionalTensor(residual_of(*relu_bits, *relu_bits_format, input))
                              : residual;
    const Operands operands{input, weight, bias, stand_in, counting};
    return norm_backward_formula(grad_output, operands, norm, {mean, rstd, !batch_statistics},
                                 output_mask);
  }
  const auto result = [&] {
    const at::AutoDispatchBelowAutograd guard;
    return op::batch_norm_backward().redispatch(
        keys & c10::after_autograd_keyset, grad_output, input, weight, bias, residual, mask, mean,
        rstd, axis, batch_statistics, eps, activation, output_mask, relu_bits, relu_bits_format);
  }();
  if (ta::compute_requires_grad(grad_output, input, weight, bias, residual)) {
    const BatchNormBackward norm{axis.vec(), batch_statistics, eps,
                                 parse_activation("batch_norm", activation),
                                 relu_bits_format.value_or(at::MemoryFormat::Contiguous)};
    record_backward(result, grad_output,
                    {input, weight, bias, has(relu_bits) ? relu_bits : residual, counting}, norm,
                    mean, rstd);
  }
  return result;
}

DoubleGradients batch_norm_double_backward(
    c10::DispatchKeySet keys, const OptionalTensor& grad_grad_input,
    const OptionalTensor& grad_grad_weight, const OptionalTensor& grad_grad_bias,
    const OptionalTensor& grad_grad_residual, const Tensor& grad_output, const Tensor& input,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    const OptionalTensor& mask, const Tensor& mean, const Tensor& rstd, at::IntArrayRef axis,
    bool batch_statistics, double eps, OptionalString activation, DoubleOutputMask output_mask) {
  check_no_tangent("batch_norm", "mean and rstd", mean, rstd);
  if (is_differentiated(grad_grad_input, grad_grad_weight, grad_grad_bias, grad_grad_residual,
                        grad_output, input, weight, bias, residual)) {
    return batch_norm_double_backward_formula(grad_grad_input, grad_grad_weight, grad_grad_bias,
                                              grad_grad_residual, grad_output, input, weight, bias,
                                              residual, mask, mean, rstd, axis, batch_statistics,
                                              eps, activation, output_mask);
  }
  const at::AutoDispatchBelowAutograd guard;
  return op::batch_norm_double_backward().redispatch(
      keys & c10::after_autograd_keyset, grad_grad_input, grad_grad_weight, grad_grad_bias,
      grad_grad_residual, grad_output, input, weight, bias, residual, mask, mean, rstd, axis,
      batch_statistics, eps, activation, output_mask);
}

// Version counters of what training has changed. Inference tensors have none. A size that is not
// known yet counts as not empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_train_bump_versions(
    c10::DispatchKeySet keys, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, at::IntArrayRef axis, std::optional<double> momentum,
    double eps, bool unbiased, OptionalString activation, OptionalDType dtype,
    OptionalFormat relu_bits_format) {
  auto result = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op::batch_norm_train().redispatch(keys & c10::after_ADInplaceOrView_keyset, input,
                                             weight, bias, residual, mask, running_mean,
                                             running_var, num_batches_tracked, axis, momentum, eps,
                                             unbiased, activation, dtype, relu_bits_format);
  }();
  if (input.sym_numel().maybe_as_int() == 0) return result;
  for (const auto* t : {&running_mean, &running_var, &num_batches_tracked}) {
    if (has(*t) && !(*t)->is_inference()) ta::impl::bump_version(**t);
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(normcore, Autograd, m) {
  m.impl("_batch_norm_train", TORCH_FN(batch_norm_train));
  m.impl("_batch_norm_eval", TORCH_FN(batch_norm_eval));
  m.impl("_batch_norm_backward", TORCH_FN(batch_norm_backward));
  m.impl("_batch_norm_double_backward", TORCH_FN(batch_norm_double_backward));
}

TORCH_LIBRARY_IMPL(normcore, ADInplaceOrView, m) {
  m.impl("_batch_norm_train", TORCH_FN(batch_norm_train_bump_versions));
}

}  // namespace normcore::autograd
