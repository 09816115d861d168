// The coefficients of a tile in the workspace: arrays of the arithmetic type, one entry per plane
// or per column, and float64 scratch behind them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/affine.h"
#include "cpu/primitives.h"
#include "cpu/statistics.h"

namespace normcore::kernels {

template <class A>
class TileState {
 public:
  // `arrays`: 3 for the forward pass (center, scale, shift), 5 for the backward pass (also slope,
  // offset), 10 for the double backward pass (all).
  TileState(void* state, std::int64_t entries, std::int64_t arrays)
      : center(static_cast<A*>(state)),
        scale(center + padded(entries)),
        shift(scale + padded(entries)),
        slope(arrays >= 5 ? shift + padded(entries) : nullptr),
        offset(arrays >= 5 ? slope + padded(entries) : nullptr),
        tangent_slope(arrays >= 10 ? offset + padded(entries) : nullptr),
        tangent_offset(arrays >= 10 ? tangent_slope + padded(entries) : nullptr),
        g_gain(arrays >= 10 ? tangent_offset + padded(entries) : nullptr),
        u_gain(arrays >= 10 ? g_gain + padded(entries) : nullptr),
        u_center(arrays >= 10 ? u_gain + padded(entries) : nullptr),
        scratch(reinterpret_cast<double*>(center + arrays * padded(entries))) {}

  // Entries in whole cache lines.
  static constexpr std::int64_t padded(std::int64_t entries) {
    constexpr std::int64_t kLine = 64 / sizeof(A);
    return (entries + kLine - 1) / kLine * kLine;
  }

  A* center;
  A* scale;
  A* shift;
  A* slope;
  A* offset;
  A* tangent_slope;
  A* tangent_offset;
  A* g_gain;
  A* u_gain;
  A* u_center;
  double* scratch;

  // z = (x - center) * scale + shift for `count` channels of a slice, from entry `first` on. center
  // is the mean rounded to A; what the rounding lost is put back through shift, in float64.
  void set_affine(std::int64_t first, std::int64_t count, const SliceStatistics<A>& statistics,
                  const Affine<A>& affine, std::int64_t sample, std::int64_t channel) const {
    const A rounded_mean = static_cast<A>(statistics.mean);
    const double rounding = statistics.mean - rounded_mean;
    const A* const weight = affine.scale(sample, channel);
    const A* const bias = affine.bias(sample, channel);
    std::fill_n(center + first, count, canonical(rounded_mean));
    for (std::int64_t i = 0; i < count; ++i) {
      const A gain = statistics.rstd * weight[i];
      scale[first + i] = canonical(gain);
      shift[first + i] = canonical(static_cast<A>(bias[i] - rounding * static_cast<double>(gain)));
    }
  }

  // Repeats the first `count` entries of every array up to `entries`: columns of folded rows.
  void repeat(std::int64_t count, std::int64_t entries) const {
    for (A* array : {center, scale, shift, slope, offset, tangent_slope, tangent_offset, g_gain,
                     u_gain, u_center}) {
      if (array == nullptr) continue;
      for (std::int64_t i = count; i < entries; i += count) std::copy_n(array, count, array + i);
    }
  }

  // From entry `first` on. `with_statistics` false: grad_x does not flow through the statistics.
  Coefficients<A> view(std::int64_t first, bool with_statistics = true) const {
    const bool gradient = slope != nullptr && with_statistics;
    return {center + first, scale + first, shift + first, gradient ? slope + first : nullptr,
            gradient ? offset + first : nullptr};
  }

  DoubleCoefficients<A> double_view(std::int64_t first) const {
    return {view(first),    tangent_slope + first, tangent_offset + first,
            g_gain + first, u_gain + first,        u_center + first};
  }

  // The value; a NaN without what it carries (StoreOptions in convert-inl.h).
  static A canonical(A value) {
    return std::isnan(value) ? std::numeric_limits<A>::quiet_NaN() : value;
  }
};

// The mask of a chunk or piece of runs.
inline MaskBlock mask_of_runs(const Mask& mask, std::int64_t offset, std::int64_t row_mask_offset,
                              std::int64_t record_stride, std::int64_t run_stride,
                              std::int64_t row_mask_run_stride) {
  switch (mask.kind) {
    case MaskKind::kNone:
      break;
    case MaskKind::kRow:
      return {mask.data + row_mask_offset, 0, row_mask_run_stride, false};
    case MaskKind::kElement:
      return {mask.data + offset, record_stride, run_stride, false};
  }
  return {};
}

// The mask of rows: `row` counts rows of the tensor, `offset` its values.
inline MaskBlock mask_of_rows(const Mask& mask, std::int64_t offset, std::int64_t row) {
  switch (mask.kind) {
    case MaskKind::kNone:
      break;
    case MaskKind::kRow:
      return {mask.data + row, 0, 0, true};
    case MaskKind::kElement:
      return {mask.data + offset, 0, 0, false};
  }
  return {};
}

}  // namespace normcore::kernels
