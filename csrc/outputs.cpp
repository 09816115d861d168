#include "outputs.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace normcore {
namespace {

template <class Int>
Tensor empty(c10::ArrayRef<Int> shape, const Tensor& like, at::ScalarType dtype) {
  if constexpr (is_concrete<Int>) {
    if (like.is_cpu()) return at::detail::empty_cpu(shape, dtype);
    return at::empty(shape, like.options().dtype(dtype));
  } else {
    return at::empty_symint(shape, like.options().dtype(dtype));
  }
}

}  // namespace

template <class Int>
Tensor empty_output(const Tensor& input, at::ScalarType dtype) {
  if constexpr (is_concrete<Int>) {
    if (input.is_cpu() && input.is_non_overlapping_and_dense()) {
      return at::detail::empty_strided_cpu(input.sizes(), input.strides(), dtype);
    }
  }
  return at::empty_like(input, input.options().dtype(dtype));
}

template <class Int>
Tensor empty_statistic(const Tensor& input, c10::ArrayRef<Int> shape, at::ScalarType dtype) {
  return empty(shape, input, dtype);
}

template <class Int>
Gradients empty_gradients(const Operands& operands, const OutputMask& wanted) {
  const auto parameter = [](const OptionalTensor& t, bool want) {
    return want && has(t) ? empty(sizes_of<Int>(*t), *t, t->scalar_type()) : Tensor();
  };
  const auto& residual = operands.residual;
  return {wanted[0] ? empty_output<Int>(operands.input, operands.input.scalar_type()) : Tensor(),
          parameter(operands.weight, wanted[1]), parameter(operands.bias, wanted[2]),
          wanted[3] && has(residual) ? empty_output<Int>(operands.input, residual->scalar_type())
                                     : Tensor()};
}

template <class Int>
DoubleGradients empty_double_gradients(const Tensor& grad_output, const Operands& operands,
                                       const DoubleOutputMask& wanted) {
  const auto [output, input, weight, bias, residual] = wanted;
  return std::tuple_cat(
      std::tuple(output ? empty_output<Int>(operands.input, grad_output.scalar_type()) : Tensor()),
      empty_gradients<Int>(operands, {input, weight, bias, residual}));
}

#define NORMCORE_INSTANTIATE(Int)                                                          \
  template Tensor empty_output<Int>(const Tensor&, at::ScalarType);                        \
  template Tensor empty_statistic<Int>(const Tensor&, c10::ArrayRef<Int>, at::ScalarType); \
  template Gradients empty_gradients<Int>(const Operands&, const OutputMask&);             \
  template DoubleGradients empty_double_gradients<Int>(const Tensor&, const Operands&,     \
                                                       const DoubleOutputMask&);
NORMCORE_INSTANTIATE(std::int64_t)
NORMCORE_INSTANTIATE(c10::SymInt)
#undef NORMCORE_INSTANTIATE

void zero_parameters(const Tensor& weight, const Tensor& bias) {
  for (const auto* t : {&weight, &bias}) {
    if (t->defined()) t->zero_();
  }
}

Gradients fill_without_kernel(const Gradients& gradients, const Tensor& grad_output,
                              kernels::Activation activation) {
  auto [input, weight, bias, residual] = gradients;
  if (grad_output.numel() == 0) {
    zero_parameters(weight, bias);
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
