// Sums over neighbouring threads, in an order that depends on the number of threads only. `lanes`
// is a power of two up to 32, or the size of the block (whole warps); every thread of the block
// takes part and gets the sum of its own lanes. Within a warp sums are taken in the arithmetic
// type, above it in float64.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"
#include "plan/cuda_constants.h"

namespace normcore::kernels::cuda {

inline constexpr unsigned kMaxWarps = kMaxThreads / kWarp;
static_assert(kMaxWarps <= kWarp);

template <class A>
__device__ A warp_sum(A value, unsigned lanes) {
  for (unsigned offset = lanes / 2; offset != 0; offset /= 2) {
    value += __shfl_xor_sync(~0u, value, static_cast<int>(offset));
  }
  return value;
}

// The lanes that `terms` terms deserve, of so many threads that there are for them.
__device__ inline unsigned lanes_for(std::uint32_t terms, unsigned threads = kWarp) {
  unsigned lanes = 1;
  while (lanes < kWarp && lanes < terms && 2 * lanes <= threads) lanes *= 2;
  return lanes;
}

template <int kValues>
struct WarpSums {
  double values[kMaxWarps][kValues];
};

template <int kValues, class A>
__device__ void sum_over_lanes(const A (&values)[kValues], unsigned lanes,
                               double (&sums)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    sums[i] = static_cast<double>(warp_sum(values[i], lanes < kWarp ? lanes : kWarp));
  }
  if (lanes <= kWarp) return;
  auto& shared = block_shared<WarpSums<kValues>>();
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) shared.values[threadIdx.x / kWarp][i] = sums[i];
  }
  __syncthreads();
  // Every warp sums all of them: a lane takes one.
  const unsigned lane = threadIdx.x % kWarp;
  const bool has_value = lane < blockDim.x / kWarp;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    sums[i] = warp_sum(has_value ? shared.values[lane][i] : 0.0, kWarp);
  }
  __syncthreads();  // the next sum may overwrite the shared values
}

// The block that is the last of `blocks` to get here sees what all of them wrote before; the
// counter is 0 before the first and after the last.
struct Arrival {
  bool is_last;
};
__device__ inline bool is_last_block(unsigned* counter, unsigned blocks) {
  __syncthreads();  // what the block's threads wrote is ordered before the arrival
  auto& arrival = block_shared<Arrival>();
  if (threadIdx.x == 0) {
    arrival.is_last = fetch_add_acq_rel(counter, 1) == blocks - 1;
    if (arrival.is_last) store_relaxed(counter, 0);
  }
  __syncthreads();
  return arrival.is_last;
}

}  // namespace normcore::kernels::cuda
