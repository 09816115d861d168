#include "outputs.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace normcore {

Tensor empty_output(const Tensor& input, at::ScalarType dtype) {
  return at::empty_like(input, input.options().dtype(dtype));
}

Tensor empty_statistic(const Tensor& input, c10::SymIntArrayRef shape, at::ScalarType dtype) {
  return at::empty_symint(shape, input.options().dtype(dtype));
}

Gradients empty_gradients(const Operands& operands, const OutputMask& wanted) {
  const auto parameter = [](const OptionalTensor& t, bool want) {
    return want && has(t) ? at::empty_symint(t->sym_sizes(), t->options()) : Tensor();
  };
  const auto& residual = operands.residual;
  return {wanted[0] ? empty_output(operands.input, operands.input.scalar_type()) : Tensor(),
          parameter(operands.weight, wanted[1]), parameter(operands.bias, wanted[2]),
          wanted[3] && has(residual) ? empty_output(operands.input, residual->scalar_type())
                                     : Tensor()};
}

Gradients fill_without_kernel(const Gradients& gradients, const Tensor& grad_output,
                              kernels::Activation activation) {
  auto [input, weight, bias, residual] = gradients;
  if (grad_output.numel() == 0) {
    if (weight.defined()) weight.zero_();
    if (bias.defined()) bias.zero_();
    return {};
  }
  if (residual.defined() && activation == kernels::Activation::kNone) {
    residual.copy_(grad_output);
    residual.reset();
  }
  return {input, weight, bias, residual};
}

bool any_defined(const Gradients& gradients) {
  return std::apply([](const auto&... gradient) { return (gradient.defined() || ...); }, gradients);
}

}  // namespace normcore
