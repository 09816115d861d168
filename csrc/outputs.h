// The tensors that the operators return. With and without data they have the same shapes, strides
// and dtypes: whatever has the input's shape keeps its layout.
#pragma once

#include <c10/core/SymIntArrayRef.h>

#include "checks.h"

namespace normcore {

// Int: std::int64_t where there is data; on the CPU, tensors are then made without the dispatcher.
template <class Int>
Tensor empty_output(const Tensor& input, at::ScalarType dtype);
template <class Int>
Tensor empty_statistic(const Tensor& input, c10::ArrayRef<Int> shape, at::ScalarType dtype);

// The gradients that `wanted` asks for; undefined for the others, and for operands that are absent.
template <class Int>
Gradients empty_gradients(const Operands& operands, const OutputMask& wanted);

// The same for the double backward pass.
template <class Int>
DoubleGradients empty_double_gradients(const Tensor& grad_output, const Operands& operands,
                                       const DoubleOutputMask& wanted);

// Fills the gradients that need no kernel: parameters of an empty input (zero), and the residual
// without an activation (grad_output itself). Returns those that are left.
Gradients fill_without_kernel(const Gradients& gradients, const Tensor& grad_output,
                              kernels::Activation activation);

// Gradients of the parameters of an empty input.
void zero_parameters(const Tensor& weight, const Tensor& bias);

bool any_defined(const Gradients& gradients);

}  // namespace normcore
