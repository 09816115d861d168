// Where the vectors of a chunk lie in a kNCS tensor. A chunk's vectors are numbered segment by
// segment: its slots, which the lanes take in turns so that neighbours read neighbouring memory.
// kPlain: all of its elements exist and count.
#pragma once

#include "cuda/elements.cuh"
#include "normcore/kernels/norm_input.h"
#include "plan/cuda_tiling.h"

namespace normcore::kernels::cuda {

struct PlanesPosition {
  std::uint32_t segment;  // of the slice
  std::int64_t index;     // of the vector's first element, in the tensor
  std::int64_t position;  // of the same, in the segment; negative if the segment starts behind it
  Span span;
};

template <int kWidth, bool kPlain>
class PlanesChunk {
 public:
  __device__ PlanesChunk(const NormInput& input, std::int64_t num_groups,
                         const PlanesTiling& tiling, std::int64_t slice, std::uint32_t chunk)
      : tiling_(tiling),
        extent_(input.extent),
        is_group_norm_(num_groups != 0),
        sample_(is_group_norm_ ? tiling.by_groups.quotient_of(slice) : 0),
        first_channel_(is_group_norm_ ? (slice - sample_ * num_groups) * tiling.segments : slice),
        offset_(slice * input.extent.s * (is_group_norm_ ? tiling.segments : 1)),
        first_segment_(tiling.first_segment(chunk)),
        first_granule_(tiling.first_granule(chunk)),
        segments_(tiling.segments_of(chunk)) {
    const std::uint32_t left = tiling.granules - first_granule_;
    granules_ = left < tiling.granules_per_piece ? left : tiling.granules_per_piece;
    if constexpr (!kPlain) last_whole_ = input.extent.numel() - kWidth;
  }

  __device__ std::uint32_t slots() const { return segments_ * granules_; }
  __device__ std::uint32_t segments() const { return segments_; }
  __device__ std::uint32_t first_segment() const { return first_segment_; }

  __device__ PlanesPosition at(std::uint32_t slot) const {
    // granules_ is granules_per_piece wherever a chunk has more than one segment
    const std::uint32_t local = segments_ > 1 ? tiling_.by_granules.quotient(slot) : 0;
    return at(local, slot - local * granules_);
  }

  // An element of the chunk, to be a pivot. A piece may lie behind the end of its segment, where the
  // segment's last element stands in.
  __device__ std::int64_t pivot_index() const {
    const PlanesPosition first = at(0, 0);
    return first.span.is_empty() ? first.index - first.position + extent_.s - 1
                                 : first.index + first.span.begin;
  }

  __device__ std::int64_t channel(std::uint32_t segment) const {
    return is_group_norm_ ? first_channel_ + segment : first_channel_;
  }
  __device__ std::int64_t sample(std::uint32_t segment) const {
    return is_group_norm_ ? sample_ : segment;
  }
  // Whether scale and bias are the same for all segments.
  __device__ bool has_one_affine(const NormInput& input) const {
    return segments_ == 1 || (!is_group_norm_ && !input.affine_per_sample);
  }

  // Bits of the elements that count for the statistics.
  __device__ unsigned counting(const Mask& mask, const PlanesPosition& p) const {
    if (kPlain || !mask) return existing_elements(p.span);  // without the division of sample()
    const std::int64_t row = sample(p.segment) * extent_.s + p.position;
    return counting_elements<kWidth>(mask, p.index, row, true, p.span);
  }

 private:
  __device__ PlanesPosition at(std::uint32_t local_segment, std::uint32_t granule) const {
    PlanesPosition p;
    p.segment = first_segment_ + local_segment;
    const std::int64_t start = offset_ + p.segment * tiling_.segment_stride;
    if constexpr (kPlain) {
      p.position = static_cast<std::int64_t>(first_granule_ + granule) * kWidth;
      p.index = start + p.position;
      p.span = {0, kWidth};
      return p;
    }
    p.position =
        static_cast<std::int64_t>(first_granule_ + granule) * kWidth - (start & (kWidth - 1));
    p.index = start + p.position;
    const std::int64_t left = extent_.s - p.position;
    p.span.begin = p.position < 0 ? static_cast<int>(-p.position) : 0;
    p.span.end = left < kWidth ? (left < 0 ? 0 : static_cast<int>(left)) : kWidth;
    p.span.is_whole_load = left > 0 && p.index <= last_whole_;
    return p;
  }

  const PlanesTiling& tiling_;
  const Extent& extent_;
  bool is_group_norm_;
  std::int64_t sample_, first_channel_, offset_;
  std::int64_t last_whole_ = 0;  // index of the last vector that lies in the tensor
  std::uint32_t first_segment_, first_granule_, segments_, granules_;
};

}  // namespace normcore::kernels::cuda
