#include "mapping.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty_strided.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <utility>

namespace normcore {
namespace {

struct Placement {
  kernels::Extent extent;
  kernels::Layout layout;
};

at::DimVector concatenate(std::initializer_list<at::IntArrayRef> parts) {
  at::DimVector result;
  for (const auto part : parts) result.append(part.begin(), part.end());
  return result;
}

at::DimVector without_unit_axes(at::IntArrayRef axes, at::IntArrayRef sizes) {
  at::DimVector result;
  for (const auto axis : axes) {
    if (sizes[axis] != 1) result.push_back(axis);
  }
  return result;
}

std::int64_t product(at::IntArrayRef axes, at::IntArrayRef sizes) {
  std::int64_t result = 1;
  for (const auto axis : axes) result *= sizes[axis];
  return result;
}

at::DimVector memory_order(const Tensor& input) {
  at::DimVector strides(input.strides());
  if (!input.is_non_overlapping_and_dense()) {
    strides = at::infer_dense_strides(input.sizes(), strides);
  }
  at::DimVector order(input.dim());
  for (std::int64_t d = 0; d < input.dim(); ++d) order[d] = d;
  std::stable_sort(order.begin(), order.end(),
                   [&](auto a, auto b) { return strides[a] > strides[b]; });
  return order;
}

bool has_strides(const Tensor& t, at::IntArrayRef strides) {
  for (std::int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) != 1 && t.stride(d) != strides[d]) return false;
  }
  return true;
}

std::optional<Placement> place(at::IntArrayRef all_axes, const Axes& axes, at::IntArrayRef sizes,
                               Samples samples) {
  const auto order = without_unit_axes(all_axes, sizes);
  const auto feature = without_unit_axes(axes.feature, sizes);
  const auto c = product(feature, sizes);

  const auto begin = std::search(order.begin(), order.end(), feature.begin(), feature.end());
  if (begin == order.end() && !feature.empty()) return std::nullopt;
  const at::IntArrayRef before(order.begin(), feature.empty() ? order.end() : begin);
  const at::IntArrayRef after(before.end() + feature.size(), order.end());

  auto n = std::int64_t{1};
  auto reduced_before = before;
  if (samples == Samples::kKept) {
    const auto kept = without_unit_axes(axes.kept, sizes);
    if (before.size() < kept.size() || before.slice(0, kept.size()) != at::IntArrayRef(kept)) {
      return std::nullopt;
    }
    n = product(kept, sizes);
    reduced_before = before.slice(kept.size());
    if (!reduced_before.empty() && !after.empty()) return std::nullopt;
  } else if (!after.empty()) {
    n = product(before, sizes);
    reduced_before = {};
  }
  // Channels that are neighbours in memory are rows of channels, unless there is only one.
  const bool rows = after.empty() && c != 1;
  return Placement{{n, c, product(reduced_before, sizes) * product(after, sizes)},
                   rows ? kernels::Layout::kNSC : kernels::Layout::kNCS};
}

}  // namespace

Mapping::Mapping(const Tensor& input, const Axes& axes, Samples samples)
    : sizes_(input.sizes()), order_(memory_order(input)), features_(axes.feature) {
  auto placement = place(order_, axes, sizes_, samples);
  if (!placement.has_value()) {
    order_ = concatenate({axes.kept, axes.feature, axes.reduced});
    placement = place(order_, axes, sizes_, samples);
  }
  extent_ = placement->extent;
  layout_ = placement->layout;
}

at::DimVector Mapping::dense_strides(at::IntArrayRef sizes) const {
  at::DimVector strides(sizes.size());
  std::int64_t stride = 1;
  for (auto axis = order_.rbegin(); axis != order_.rend(); ++axis) {
    strides[*axis] = stride;
    stride *= sizes[*axis];
  }
  return strides;
}

bool Mapping::reads(const Tensor& t) const { return has_strides(t, dense_strides(sizes_)); }

Tensor Mapping::arrange(const Tensor& t) const { return arrange_as(t, sizes_, t.scalar_type()); }

Tensor Mapping::arrange_mask(const Tensor& mask) const {
  return arrange_as(mask, sizes_, at::kBool);
}

Tensor Mapping::arrange_row_mask(const Tensor& mask) const {
  auto sizes = sizes_;
  for (const auto axis : features_) sizes[axis] = 1;
  return arrange_as(mask, sizes, at::kBool);
}

bool Mapping::is_row_mask(const Tensor& mask) const {
  const auto missing = static_cast<std::int64_t>(sizes_.size()) - mask.dim();
  return std::all_of(features_.begin(), features_.end(),
                     [&](auto axis) { return axis < missing || mask.size(axis - missing) == 1; });
}

Tensor Mapping::buffer_for(const Tensor& result) const {
  const auto strides = dense_strides(sizes_);
  if (has_strides(result, strides)) return result;
  return at::empty_strided(sizes_, strides, result.options());
}

Tensor Mapping::arrange_as(const Tensor& t, at::IntArrayRef sizes, at::ScalarType dtype) const {
  const auto strides = dense_strides(sizes);
  if (t.scalar_type() == dtype && t.sizes() == sizes && has_strides(t, strides)) return t;
  return at::empty_strided(sizes, strides, t.options().dtype(dtype)).copy_(t);
}

}  // namespace normcore
