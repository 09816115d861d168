#include "relu_bits.h"

#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <c10/core/SymBool.h>
#include <normcore/kernels/norm_input.h>

#include <limits>

#include "backend.h"

namespace normcore {
namespace {

// Of dense tensors in the usual orders.
std::optional<std::int64_t> innermost_axis(const Tensor& input) {
  if (input.is_contiguous()) return input.dim() - 1;
  const bool is_channels_last =
      input.dim() == 4   ? input.is_contiguous(at::MemoryFormat::ChannelsLast)
      : input.dim() == 5 ? input.is_contiguous(at::MemoryFormat::ChannelsLast3d)
                         : false;
  return is_channels_last ? std::optional<std::int64_t>(1) : std::nullopt;
}

at::MemoryFormat format_of(const Tensor& input) {
  return input.is_contiguous() ? at::MemoryFormat::Contiguous : input.suggest_memory_format();
}

bool is_multiple(std::int64_t size, std::int64_t of) { return size != 0 && size % of == 0; }
// Of sizes that nobody knows it is not known.
bool is_multiple(const c10::SymInt& size, std::int64_t of) {
  return TORCH_GUARD_OR_FALSE((size % of).sym_eq(0)) && !TORCH_GUARD_OR_FALSE(size.sym_eq(0));
}

template <class Int>
c10::SmallVector<Int, 5> sizes_of_bits(const Tensor& input, std::int64_t axis) {
  const auto all = sizes_of<Int>(input);
  c10::SmallVector<Int, 5> sizes(all.begin(), all.end());
  sizes[axis] = sizes[axis] / elements_per_relu_byte(input);
  return sizes;
}

}  // namespace

std::int64_t elements_per_relu_byte(const Tensor& input) {
  return kernels::elements_per_relu_byte(backend::to_dtype(input.scalar_type()));
}

template <class Int>
std::optional<std::int64_t> relu_bits_axis(const Operands& operands, const CheckedNorm<Int>& norm) {
  const auto& [input, weight, bias, residual, mask] = operands;
  if (norm.activation != kernels::Activation::kReLU || !has(residual) ||
      residual->scalar_type() != input.scalar_type() || input.scalar_type() == at::kDouble ||
      norm.axes.feature.size() != 1) {
    return std::nullopt;
  }
  const auto axis = innermost_axis(input);
  const bool fits = axis && is_multiple(sizes_of<Int>(input)[*axis], elements_per_relu_byte(input));
  return fits ? axis : std::nullopt;
}

template <class Int>
Tensor empty_relu_bits(const Tensor& input, std::int64_t axis) {
  const auto sizes = sizes_of_bits<Int>(input, axis);
  const auto options = input.options().dtype(at::kByte);
  if constexpr (is_concrete<Int>) {
    return at::empty(sizes, options, format_of(input));
  } else {
    return at::empty_symint(sizes, options, format_of(input));
  }
}

bool reads_relu_bits(const Tensor& bits, const Tensor& input,
                     const CheckedNorm<std::int64_t>& norm) {
  const auto axis = innermost_axis(input);
  return axis && norm.axes.feature.size() == 1 &&
         bits.sizes() == at::IntArrayRef(sizes_of_bits<std::int64_t>(input, *axis)) &&
         bits.is_contiguous(format_of(input));
}

Tensor residual_of(const Tensor& bits, const Tensor& input) {
  std::int64_t axis = 0;
  while (axis + 1 < input.dim() &&
         TORCH_GUARD_OR_FALSE(bits.sym_size(axis).sym_eq(input.sym_size(axis)))) {
    ++axis;
  }
  // Bits of a byte along an axis of their own, behind that of the bytes.
  at::DimVector shape(input.dim() - axis, 1);
  shape[0] = elements_per_relu_byte(input);
  const auto place = at::arange(elements_per_relu_byte(input), bits.options()).view(shape);
  const auto is_set = (at::bitwise_right_shift(bits.unsqueeze(axis + 1), place) & 1) != 0;
  const auto infinity = at::full({}, std::numeric_limits<double>::infinity(), input.options());
  return at::where(is_set.flatten(axis, axis + 1), infinity, -infinity);
}

#define NORMCORE_INSTANTIATE(Int)                                                    \
  template std::optional<std::int64_t> relu_bits_axis<Int>(const Operands&,          \
                                                           const CheckedNorm<Int>&); \
  template Tensor empty_relu_bits<Int>(const Tensor&, std::int64_t);
NORMCORE_INSTANTIATE(std::int64_t)
NORMCORE_INSTANTIATE(c10::SymInt)
#undef NORMCORE_INSTANTIATE

}  // namespace normcore
