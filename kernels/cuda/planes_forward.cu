// Forward pass over kNCS tensors: every stage of every path is this one kernel.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "cuda/dispatch.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/passes.h"
#include "cuda/planes.cuh"
#include "cuda/reduce.cuh"
#include "cuda/statistics.cuh"
#include "plan/cuda_constants.h"

namespace normcore::kernels::cuda {
namespace {

// What the leading lane of each group of lanes tells the others.
template <class A>
struct PlanesStatistics {
  SliceStatistics<A> of_unit[kMaxThreads];
};

template <class T, int kWidth, int kVectors, Stage kStage, bool kPlain>
__global__ void __launch_bounds__(kMaxThreads,
                                  blocks_at_once(kPlain, kStage, kStage == Stage::kApply ? 3 : 1))
    planes_forward_kernel(const __grid_constant__ ForwardCall call,
                          const __grid_constant__ PlanesTiling tiling) {
  using A = Arithmetic<T>;
  const unsigned lanes = tiling.lanes, lane = threadIdx.x % lanes, unit = threadIdx.x / lanes;
  const std::int64_t units = tiling.slices * tiling.chunks;
  std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / lanes) + unit;
  const bool is_active = index < units;
  if (!is_active) index = 0;
  // What the first launch read last may still be in the cache.
  if constexpr (kStage == Stage::kApply) index = units - 1 - index;
  const std::int64_t slice = tiling.by_chunks.quotient_of(index);
  const auto chunk_index = static_cast<std::uint32_t>(index - slice * tiling.chunks);
  const PlanesChunk<kWidth, kPlain> chunk(call.input, call.num_groups, tiling, slice, chunk_index);
  const std::uint32_t slots = is_active ? chunk.slots() : 0;
  const T* const data = static_cast<const T*>(call.input.x.data);
  const Mask& mask = call.input.mask;

  // Nothing has to stay in registers for kApply: fewer at once leave room for more threads.
  constexpr int kHeld = kStage == Stage::kApply ? std::min(kVectors, kApplyVectors) : kVectors;
  Vector<T, kWidth> x[kHeld];
  const auto load = [&](std::uint32_t first) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const std::uint32_t slot = first + k * lanes;
      if (slot >= slots) continue;
      const PlanesPosition p = chunk.at(slot);
      x[k] = load_vector<T, kWidth>(data, p.index, p.span);
    }
  };
  load(lane);

  SliceStatistics<A> statistics;
  if constexpr (kStage != Stage::kApply) {
    // Calls f(vector, bits of the elements that count) for every vector that this thread holds.
    const auto for_each_vector = [&](std::uint32_t first, auto f) {
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const std::uint32_t slot = first + k * lanes;
        if (slot >= slots) continue;
        keep_packed(x[k]);
        f(x[k], chunk.counting(mask, chunk.at(slot)));
      }
    };
    // Of the first batch: the mean about `reference`, and how many values count.
    const auto mean_about = [&](A reference, double& count) {
      A total[kPlain ? 1 : 2] = {};
      for_each_vector(lane, [&](const Vector<T, kWidth>& vector, unsigned counting) {
        if constexpr (!kPlain) total[1] += static_cast<A>(__popc(counting));
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const A value = convert_from<A>(vector[i]);
          total[0] += (counting >> i & 1) != 0 ? value - reference : A{0};
        }
      });
      double sums[kPlain ? 1 : 2];
      sum_over_lanes(total, lanes, sums);
      if constexpr (kPlain) {
        count = static_cast<double>(std::min(slots, kHeld * lanes)) * kWidth;
      } else {
        count = sums[1];
      }
      return count == 0.0 ? A{0} : reference + static_cast<A>(sums[0]) / static_cast<A>(count);
    };
    // About a value of the slice itself, so that equal values give exactly themselves. Under a mask
    // no value is known to count: the mean about 0 stands in.
    double count = 0.0;
    A reference = is_active && !mask ? convert_from<A>(data[chunk.pivot_index()]) : A{0};
    if (mask) reference = mean_about(A{0}, count);
    const A pivot = mean_about(reference, count);
    A total[kPlain ? 2 : 3] = {};
    const std::uint32_t batches = kStage == Stage::kReduce ? tiling.batches : 1;
    for (std::uint32_t batch = 0; batch < batches; ++batch) {
      const std::uint32_t first = lane + batch * kHeld * lanes;
      if (batch != 0) load(first);
      for_each_vector(first, [&](const Vector<T, kWidth>& vector, unsigned counting) {
        if constexpr (!kPlain) total[2] += static_cast<A>(__popc(counting));
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const A value = convert_from<A>(vector[i]);
          const A centered = (counting >> i & 1) != 0 ? value - pivot : A{0};
          total[0] += centered;
          total[1] = std::fma(centered, centered, total[1]);
        }
      });
    }
    double sums[kPlain ? 2 : 3];
    sum_over_lanes(total, lanes, sums);
    if constexpr (kPlain) {
      count = static_cast<double>(slots) * kWidth;
    } else {
      count = sums[2];
    }
    const ShiftedSums own{count, static_cast<double>(pivot), sums[0], sums[1]};

    if constexpr (kStage == Stage::kReduce) {
      auto* const records = static_cast<ShiftedSums*>(call.records) + slice * tiling.chunks;
      if (lane == 0) records[chunk_index] = own;
      if (!is_last_block(call.counters + slice, tiling.chunks)) return;
      const ShiftedSums all =
          merge_records(tiling.chunks, lane, lanes, [&](std::uint64_t i) { return records[i]; });
      if (lane == 0) save_reduced<A>(call, slice, to_moments(all));
      return;
    }
    auto& shared = block_shared<PlanesStatistics<A>>();
    if (lane == 0 && is_active) {
      shared.of_unit[unit] = save_statistics<A>(call, slice, to_moments(own));
    }
    __syncthreads();
    statistics = shared.of_unit[unit];
    count_batch(call.running, call.counters);
  } else {
    statistics = load_statistics<A>(call, slice);
    if (call.given_mean && is_active && lane == 0 && chunk_index == 0) {
      static_cast<A*>(call.rstd.data)[slice] = statistics.rstd;
    }
    count_batch(call.running, nullptr);
  }

  const auto affine_of = [&](std::uint32_t segment) {
    return Affine<A>::of(call.input, statistics, chunk.sample(segment), chunk.channel(segment));
  };
  const bool is_same_affine = chunk.has_one_affine(call.input);
  auto affine = affine_of(chunk.first_segment());
  const std::uint32_t vectors = kStage == Stage::kApply ? kVectors * tiling.batches : kVectors;
#pragma unroll 1
  for (std::uint32_t done = 0; done < vectors; done += kHeld) {
    const std::uint32_t first = lane + done * lanes;
    if (done != 0) load(first);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const std::uint32_t slot = first + k * lanes;
      if (slot >= slots) continue;
      const PlanesPosition p = chunk.at(slot);
      if (p.span.is_empty()) continue;
      keep_packed(x[k]);
      keep_order();
      if (!is_same_affine) affine = affine_of(p.segment);
      apply_forward<kPlain>(call, x[k], p.index, p.span, affine);
    }
  }
}

}  // namespace

Status planes_forward(const ForwardCall& call, const PlanesTiling& tiling, const CudaPlan& plan,
                      CudaStream stream) {
  return for_each_stage<kForwardKernels>(
      call.input.x.dtype, plan, is_plain(call) && call.input.extent.s % plan.width == 0,
      [&]<class T, int kWidth, int kVectors, Stage kStage, bool kPlain>(std::int64_t blocks) {
        return launch_blocks(planes_forward_kernel<T, kWidth, kVectors, kStage, kPlain>, plan,
                             blocks, stream, call, tiling);
      });
}

}  // namespace normcore::kernels::cuda
