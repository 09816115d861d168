// The bits of ReLU that batch norm in training leaves for its backward pass (norm_input.h of the
// kernels) as a flat tensor of bytes (uint8). Whoever asks for them says in which order they are to
// be: that of a contiguous or of a channels-last input. Compilers may give an operator other strides
// than it was traced with; its results must not depend on them.
#pragma once

#include <optional>

#include "checks.h"

namespace normcore {

// In which order a norm of this input leaves bits without a copy; none if it cannot, or if its
// backward pass reads no residual. The arguments may break the rules of the operator.
OptionalFormat format_for_relu_bits(const Operands& operands, at::IntArrayRef axis,
                                    kernels::Activation activation);

// Whether neighbours in that order are whole bytes: positions of a channel, or channels of a
// position.
template <class Int>
bool fits_relu_bits(const Tensor& input, const Axes& axes, at::MemoryFormat format);

// Of an input that is not float64.
std::int64_t elements_per_relu_byte(const Tensor& input);

template <class Int>
Tensor empty_relu_bits(const Tensor& input);

// A stand-in for the residual, for whatever does not read bits: infinity where they are set, -infinity
// elsewhere, in the shape and dtype of the input.
Tensor residual_of(const Tensor& bits, at::MemoryFormat format, const Tensor& input);

// Where a residual or its bits are kept: which of the two.
inline bool is_relu_bits(const OptionalTensor& t) {
  return has(t) && t->scalar_type() == at::kByte;
}

}  // namespace normcore
