// The bits of ReLU that batch norm in training leaves for its backward pass (norm_input.h of the kernels) as
// a tensor: uint8, with the shape and the memory format of the input, but for the axis along which neighbours
// lie in memory. That one has an entry for each byte.
#pragma once

#include <optional>

#include "checks.h"

namespace normcore {

// That axis; none where a norm of this input leaves no bits.
template <class Int>
std::optional<std::int64_t> relu_bits_axis(const Operands& operands, const CheckedNorm<Int>& norm);

template <class Int>
Tensor empty_relu_bits(const Tensor& input, std::int64_t axis);

// Of an input that is not float64.
std::int64_t elements_per_relu_byte(const Tensor& input);

// Whether kernels that are given this input read them as they lie.
bool reads_relu_bits(const Tensor& bits, const Tensor& input,
                     const CheckedNorm<std::int64_t>& norm);

// A stand-in for the residual, for whatever does not read bits: infinity where they are set, -infinity
// elsewhere, in the shape and dtype of the input.
Tensor residual_of(const Tensor& bits, const Tensor& input);

// Where a residual or its bits are kept: which of the two.
inline bool is_relu_bits(const OptionalTensor& t) {
  return has(t) && t->scalar_type() == at::kByte;
}

}  // namespace normcore
