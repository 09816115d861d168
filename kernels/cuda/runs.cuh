// Group norm where each channel has a single value: a slice is a run of neighbouring elements, which a
// group of lanes goes through several times. What a thread holds of it stays in registers; a longer
// run is read again, from the cache.
#pragma once

#include <cstdint>

#include "cuda/elements.cuh"
#include "normcore/kernels/norm_input.h"
#include "plan/cuda_tiling.h"

namespace normcore::kernels::cuda {

// The part of a run that a thread goes through. kPlain: all elements count.
template <int kWidth, int kHeld, bool kPlain>
class RunPart {
 public:
  // An inactive thread has no vectors, of a run that exists.
  __device__ RunPart(const RunsTiling& tiling, std::int64_t sample, std::uint32_t group,
                     unsigned lane, bool is_active)
      : tiling_(tiling),
        sample_(sample),
        slice_(sample * tiling.groups + group),
        channel_(static_cast<std::int64_t>(group) * tiling.vectors * kWidth),
        lane_(lane),
        vectors_(is_active ? tiling.vectors : 0) {}

  __device__ std::int64_t sample() const { return sample_; }
  __device__ std::int64_t slice() const { return slice_; }
  __device__ std::int64_t first_channel() const { return channel_; }
  __device__ std::int64_t start() const { return slice_ * tiling_.vectors * kWidth; }

  __device__ std::uint32_t batches() const { return tiling_.batches; }
  // The k-th vector of a batch: whether there is one, its first element in the tensor and channel.
  __device__ std::uint32_t vector(std::uint32_t batch, int k) const {
    return lane_ + (batch * kHeld + k) * tiling_.lanes;
  }
  __device__ bool has(std::uint32_t vector) const { return vector < vectors_; }
  __device__ std::int64_t index(std::uint32_t vector) const {
    return start() + static_cast<std::int64_t>(vector) * kWidth;
  }
  __device__ std::int64_t channel(std::uint32_t vector) const {
    return channel_ + static_cast<std::int64_t>(vector) * kWidth;
  }

  __device__ unsigned counting(const Mask& mask, std::uint32_t vector) const {
    if constexpr (kPlain) return existing_elements({0, kWidth});
    return counting_elements<kWidth>(mask, index(vector), sample_, false, {0, kWidth});
  }

 private:
  const RunsTiling& tiling_;
  std::int64_t sample_, slice_, channel_;
  unsigned lane_;
  std::uint32_t vectors_;
};

}  // namespace normcore::kernels::cuda
