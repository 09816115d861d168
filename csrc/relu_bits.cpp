#include "relu_bits.h"

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

// What is not known of a symbolic size does not hold.
bool is_one(std::int64_t size) { return size == 1; }
bool is_one(const c10::SymInt& size) { return TORCH_GUARD_OR_FALSE(size.sym_eq(1)); }
bool is_multiple(std::int64_t size, std::int64_t of) { return size % of == 0; }
bool is_multiple(const c10::SymInt& size, std::int64_t of) {
  return TORCH_GUARD_OR_FALSE((size % of).sym_eq(0));
}

bool is_channels_last(at::MemoryFormat format) { return format != at::MemoryFormat::Contiguous; }

}  // namespace

std::int64_t elements_per_relu_byte(const Tensor& input) {
  return kernels::elements_per_relu_byte(backend::to_dtype(input.scalar_type()));
}

template <class Int>
bool fits_relu_bits(const Tensor& input, const Axes& axes, at::MemoryFormat format) {
  const auto sizes = sizes_of<Int>(input);
  if (axes.feature.size() != 1) return false;
  const auto feature = axes.feature[0];
  Int positions = 1;
  for (auto d = feature + 1; d < input.dim(); ++d) positions = positions * sizes[d];
  const auto& neighbours = is_channels_last(format) ? sizes[1]
                           : is_one(positions)      ? sizes[feature]
                                                    : positions;
  return is_multiple(neighbours, elements_per_relu_byte(input));
}

OptionalFormat format_for_relu_bits(const Operands& operands, at::IntArrayRef axis,
                                    kernels::Activation activation) {
  const auto& [input, weight, bias, residual, mask] = operands;
  if (activation != kernels::Activation::kReLU || !has(residual) ||
      residual->scalar_type() != input.scalar_type() || input.scalar_type() == at::kDouble ||
      axis.size() != 1 || axis[0] < -input.dim() || axis[0] >= input.dim()) {
    return std::nullopt;
  }
  Axes axes;
  axes.feature = {axis[0] < 0 ? axis[0] + input.dim() : axis[0]};
  for (const auto& [rank, format] :
       {std::pair(input.dim(), at::MemoryFormat::Contiguous),
        std::pair(std::int64_t{4}, at::MemoryFormat::ChannelsLast),
        std::pair(std::int64_t{5}, at::MemoryFormat::ChannelsLast3d)}) {
    if (input.dim() != rank || !input.is_contiguous(format)) continue;
    if (fits_relu_bits<c10::SymInt>(input, axes, format)) return format;
    break;
  }
  return std::nullopt;
}

template <class Int>
Tensor empty_relu_bits(const Tensor& input) {
  const auto options = input.options().dtype(at::kByte);
  if constexpr (is_concrete<Int>) {
    return at::empty({input.numel() / elements_per_relu_byte(input)}, options);
  } else {
    return at::empty_symint({input.sym_numel() / elements_per_relu_byte(input)}, options);
  }
}

Tensor residual_of(const Tensor& bits, at::MemoryFormat format, const Tensor& input) {
  const auto place = at::arange(elements_per_relu_byte(input), bits.options());
  auto is_set = (at::bitwise_right_shift(bits.unsqueeze(1), place) & 1) != 0;
  if (is_channels_last(format)) {
    const auto in_memory = [](const Tensor& t) { return t.movedim(1, -1); };
    is_set = is_set.view_symint(in_memory(input).sym_sizes()).movedim(-1, 1);
  } else {
    is_set = is_set.view_symint(input.sym_sizes());
  }
  const auto infinity = at::full({}, std::numeric_limits<double>::infinity(), input.options());
  return at::where(is_set, infinity, -infinity);
}

template bool fits_relu_bits<std::int64_t>(const Tensor&, const Axes&, at::MemoryFormat);
template bool fits_relu_bits<c10::SymInt>(const Tensor&, const Axes&, at::MemoryFormat);
template Tensor empty_relu_bits<std::int64_t>(const Tensor&);
template Tensor empty_relu_bits<c10::SymInt>(const Tensor&);

}  // namespace normcore
