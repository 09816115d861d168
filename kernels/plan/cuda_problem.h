// What plans and tilings for CUDA devices ask about a problem.
#pragma once

#include <cstddef>
#include <cstdint>

#include "normcore/kernels/plan.h"
#include "normcore/kernels/types.h"
#include "plan/cuda_constants.h"
#include "plan/cuda_tiling.h"

namespace normcore::kernels {

inline bool is_group_norm(const Problem& p) { return p.num_groups != 0; }
inline bool is_backward(const Problem& p) { return is_backward(p.pass); }
inline std::int64_t channels_per_slice(const Problem& p) {
  return is_group_norm(p) ? p.extent.c / p.num_groups : 1;
}
// Of batch norm: of all samples together.
inline std::int64_t slices_per_sample(const Problem& p) {
  return is_group_norm(p) ? p.num_groups : p.extent.c;
}
inline std::int64_t slice_count(const Problem& p) {
  return slices_per_sample(p) * (is_group_norm(p) ? p.extent.n : 1);
}
inline std::size_t arithmetic_bytes(const Problem& p) { return size_of(compute_type(p.dtype)); }

inline const CudaKernels& kernels_of(const Problem& p) {
  if (p.pass == Pass::kDoubleBackward) return kDoubleBackwardKernels;
  return p.pass == Pass::kBackward ? kBackwardKernels : kForwardKernels;
}

// Of a channel and of a slice, in a backward pass.
inline std::size_t sums_of_channel(const Problem& p) {
  return p.pass == Pass::kDoubleBackward ? kDoubleBackwardSums : kBackwardSums;
}
inline std::size_t values_of_slice(const Problem& p) {
  return p.pass == Pass::kDoubleBackward ? kDoubleBackwardSliceValues : kBackwardSliceValues;
}

// A record that blocks of a team exchange: of a channel backward, of a column or a slice forward.
inline std::size_t team_record_bytes(const Problem& p, Layout layout) {
  if (is_backward(p)) return sums_of_channel(p) * sizeof(double);
  return layout == Layout::kNSC ? 4 * arithmetic_bytes(p) : kShiftedSumsBytes;
}

// Whether several blocks may hold a slice together, in shared memory.
inline bool is_team(CudaPath path) { return path == CudaPath::kCluster || path == CudaPath::kTeam; }

// Whether there are statistics or sums to reduce.
inline bool reduces(const Problem& p) {
  return p.pass == Pass::kForward || (is_backward(p) && p.reduces);
}

// With one position per channel, or one channel, both layouts are the same memory.
inline Layout layout_of(const Problem& p) {
  if (p.extent.c == 1) return Layout::kNCS;
  if (p.extent.s == 1) return Layout::kNSC;
  return p.layout;
}

inline std::int64_t full_width(const Problem& p) { return kernels_of(p).width(size_of(p.dtype)); }

inline std::int64_t granules_per_segment(std::int64_t s, std::int64_t width) {
  return s % width == 0 ? s / width : (s + width - 2) / width + 1;
}

}  // namespace normcore::kernels
