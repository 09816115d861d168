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
#include "cuda/team.cuh"
#include "plan/cuda_constants.h"

namespace normcore::kernels::cuda {
namespace {

// What the leading lane of each group of lanes tells the others.
template <class A>
struct PlanesStatistics {
  SliceStatistics<A> of_unit[kMaxThreads];
};

template <class T, int kWidth, int kVectors, Stage kStage, bool kPlain>
class PlanesForward {
 public:
  using A = Arithmetic<T>;
  using Chunk = PlanesChunk<kWidth, kPlain>;
  // Nothing has to stay in registers for kApply: fewer at once leave room for more threads.
  static constexpr int kHeld =
      kStage == Stage::kApply ? std::min(kVectors, kApplyVectors) : kVectors;
  using Vectors = Vector<T, kWidth>[kHeld];

  __device__ PlanesForward(const ForwardCall& call, const PlanesTiling& tiling)
      : call_(call),
        tiling_(tiling),
        lanes_(tiling.lanes),
        lane_(threadIdx.x % lanes_),
        unit_(threadIdx.x / lanes_) {}

  // One chunk of one slice. All threads of the block get here together.
  __device__ void run(std::int64_t slice, std::uint32_t chunk_index, bool is_active) const {
    const Chunk chunk(call_.input, call_.num_groups, tiling_, slice, chunk_index);
    const std::uint32_t slots = is_active ? chunk.slots() : 0;
    Vectors x;
    load(chunk, slots, 0, x);
    if constexpr (kStage == Stage::kApply) {
      const auto statistics = load_statistics<A>(call_, slice);
      if (call_.given_mean && is_active && lane_ == 0 && chunk_index == 0) {
        static_cast<A*>(call_.rstd.data)[slice] = statistics.rstd;
      }
      apply(chunk, slots, statistics, x);
    } else {
      const ShiftedSums own = sum(chunk, slots, reference_of(chunk, is_active), x);
      if constexpr (kStage == Stage::kReduce) {
        auto* const records = static_cast<ShiftedSums*>(call_.records) + slice * tiling_.chunks;
        if (lane_ == 0) records[chunk_index] = own;
      } else {
        apply(chunk, slots, finish_resident(slice, is_active, own), x);
      }
    }
  }

  // The slices of this block's team, its chunk of each.
  __device__ void run_team() const {
    Team<ShiftedSums> team(tiling_.team, dynamic_shared<ShiftedSums>(), call_.records,
                           call_.counters, 1);
    for_each_item(team, tiling_.team, [&](std::int64_t slice, bool is_first, bool has_next) {
      const bool is_active = team.rank() < tiling_.chunks;
      const Chunk chunk(call_.input, call_.num_groups, tiling_, slice, is_active ? team.rank() : 0);
      const std::uint32_t slots = is_active ? chunk.slots() : 0;
      const A reference = reference_of(chunk, is_active);
      if (!kPlain || is_first) hold(chunk, slots);
      wait_for_copies();
      Vectors x;
      load(chunk, slots, 0, x);
      const ShiftedSums own = sum(chunk, slots, reference, x);
      if (threadIdx.x == 0) *team.own() = own;
      team.meet();
      const ShiftedSums all = merge_records(tiling_.chunks, lane_, lanes_,
                                            [&](std::uint64_t i) { return *team.of(i); });
      team.next();
      const Moments moments = to_moments(all);
      if (team.rank() == 0 && threadIdx.x == 0) save_statistics<A>(call_, slice, moments);
      apply(chunk, slots, statistics_of<A>(call_, moments), x, has_next);
    });
  }

 private:
  __device__ std::uint32_t slot_of(std::uint32_t batch, int k) const {
    return lane_ + (batch * kHeld + k) * lanes_;
  }

  // kTeam: the vectors of the chunk in shared memory, behind the record.
  __device__ Vector<T, kWidth>* held() const {
    return reinterpret_cast<Vector<T, kWidth>*>(dynamic_shared<ShiftedSums>() + 1);
  }
  __device__ void hold(const Chunk& chunk, std::uint32_t slots) const {
    for (std::uint32_t slot = lane_; slot < slots; slot += lanes_) {
      const PlanesPosition p = chunk.at(slot);
      hold_vector<kPlain>(held() + slot, static_cast<const T*>(call_.input.x.data), p.index,
                          p.span);
    }
  }

  __device__ void load(const Chunk& chunk, std::uint32_t slots, std::uint32_t batch,
                       Vectors& x) const {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const std::uint32_t slot = slot_of(batch, k);
      if (slot >= slots) continue;
      if constexpr (kStage == Stage::kTeam) {
        x[k] = held()[slot];
      } else {
        const PlanesPosition p = chunk.at(slot);
        x[k] = load_vector<T, kWidth>(static_cast<const T*>(call_.input.x.data), p.index, p.span);
      }
    }
  }

  // Calls f(vector, bits of the elements that count) for every vector of a batch.
  template <class F>
  __device__ void for_each_vector(const Chunk& chunk, std::uint32_t slots, std::uint32_t batch,
                                  Vectors& x, F f) const {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const std::uint32_t slot = slot_of(batch, k);
      if (slot >= slots) continue;
      keep_packed(x[k]);
      f(x[k], chunk.counting(call_.input.mask, chunk.at(slot)));
    }
  }

  // Of the first batch, which x holds: the mean about `reference`.
  __device__ A mean_about(const Chunk& chunk, std::uint32_t slots, A reference, Vectors& x) const {
    A total[kPlain ? 1 : 2] = {};
    for_each_vector(chunk, slots, 0, x, [&](const Vector<T, kWidth>& vector, unsigned counting) {
      if constexpr (!kPlain) total[1] += static_cast<A>(__popc(counting));
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const A value = convert_from<A>(vector[i]);
        total[0] += (counting >> i & 1) != 0 ? value - reference : A{0};
      }
    });
    double sums[kPlain ? 1 : 2];
    sum_over_lanes(total, lanes_, sums);
    double count = static_cast<double>(std::min(slots, kHeld * lanes_)) * kWidth;
    if constexpr (!kPlain) count = sums[1];
    return count == 0.0 ? A{0} : reference + static_cast<A>(sums[0]) / static_cast<A>(count);
  }

  __device__ bool is_masked() const { return !kPlain && call_.input.mask; }

  // A value of the slice, about which equal values give exactly themselves. Under a mask none is known to
  // count.
  __device__ A reference_of(const Chunk& chunk, bool is_active) const {
    if (!is_active || is_masked()) return A{0};
    return convert_from<A>(static_cast<const T*>(call_.input.x.data)[chunk.pivot_index()]);
  }

  // Over the chunk, whose first batch x holds. Under a mask the mean about 0 stands in for the reference.
  __device__ ShiftedSums sum(const Chunk& chunk, std::uint32_t slots, A reference,
                             Vectors& x) const {
    if (is_masked()) reference = mean_about(chunk, slots, A{0}, x);
    const A pivot = mean_about(chunk, slots, reference, x);
    A total[kPlain ? 2 : 3] = {};
    const std::uint32_t batches = kStage == Stage::kResident ? 1 : tiling_.batches;
    for (std::uint32_t batch = 0; batch < batches; ++batch) {
      if (batch != 0) load(chunk, slots, batch, x);
      for_each_vector(chunk, slots, batch, x,
                      [&](const Vector<T, kWidth>& vector, unsigned counting) {
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
    sum_over_lanes(total, lanes_, sums);
    double count = static_cast<double>(slots) * kWidth;
    if constexpr (!kPlain) count = sums[2];
    return {count, static_cast<double>(pivot), sums[0], sums[1]};
  }

  __device__ SliceStatistics<A> finish_resident(std::int64_t slice, bool is_active,
                                                const ShiftedSums& own) const {
    auto& shared = block_shared<PlanesStatistics<A>>();
    if (lane_ == 0 && is_active) {
      shared.of_unit[unit_] = save_statistics<A>(call_, slice, to_moments(own));
    }
    __syncthreads();
    return shared.of_unit[unit_];
  }

  // x holds the first batch, but for kTeam. That holds the vectors of its next slice as it goes, unless
  // they may be partial.
  __device__ void apply(const Chunk& chunk, std::uint32_t slots,
                        const SliceStatistics<A>& statistics, Vectors& x,
                        bool has_next = false) const {
    const auto affine_of = [&](std::uint32_t segment) {
      return Affine<A>::of(call_.input, statistics, chunk.sample(segment), chunk.channel(segment));
    };
    const bool is_same_affine = chunk.has_one_affine(call_.input);
    auto affine = affine_of(chunk.first_segment());
    std::uint32_t batches = kVectors / kHeld;
    if constexpr (kStage != Stage::kResident) batches *= tiling_.batches;
#pragma unroll 1
    for (std::uint32_t batch = 0; batch < batches; ++batch) {
      if (kStage == Stage::kTeam || batch != 0) load(chunk, slots, batch, x);
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const std::uint32_t slot = slot_of(batch, k);
        if (slot >= slots) continue;
        const PlanesPosition p = chunk.at(slot);
        if (p.span.is_empty()) continue;
        keep_packed(x[k]);
        keep_order();
        if (!is_same_affine) affine = affine_of(p.segment);
        apply_forward<kPlain>(call_, x[k], p.index, p.span, affine);
        if constexpr (kStage == Stage::kTeam && kPlain) {
          if (!has_next) continue;
          hold_vector<kPlain>(held() + slot, static_cast<const T*>(call_.input.x.data),
                              p.index + tiling_.next_item(), p.span);
        }
      }
    }
  }

  const ForwardCall& call_;
  const PlanesTiling& tiling_;
  unsigned lanes_, lane_, unit_;
};

template <class T, int kWidth, int kVectors, Stage kStage, bool kPlain>
__global__ void __launch_bounds__(kMaxThreads,
                                  blocks_at_once(kPlain, kStage, kStage == Stage::kApply ? 3 : 1))
    planes_forward_kernel(const __grid_constant__ ForwardCall call,
                          const __grid_constant__ PlanesTiling tiling) {
  const PlanesForward<T, kWidth, kVectors, kStage, kPlain> forward(call, tiling);
  if constexpr (kStage == Stage::kTeam) {
    forward.run_team();
    count_batch(call.running, call.counters + tiling.team.counters());
  } else {
    const unsigned units = blockDim.x / tiling.lanes;
    const std::int64_t chunks = tiling.slices * tiling.chunks;
    std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * units + threadIdx.x / tiling.lanes;
    const bool is_active = index < chunks;
    if (!is_active) index = 0;
    // What the first launch read last may still be in the cache.
    if constexpr (kStage == Stage::kApply) index = chunks - 1 - index;
    const std::int64_t slice = tiling.by_chunks.quotient_of(index);
    forward.run(slice, static_cast<std::uint32_t>(index - slice * tiling.chunks), is_active);
    if constexpr (kStage == Stage::kResident) count_batch(call.running, call.counters);
    if constexpr (kStage == Stage::kApply) count_batch(call.running, nullptr);
  }
}

}  // namespace

Status planes_forward(const ForwardCall& call, const PlanesTiling& tiling, const CudaPlan& plan,
                      CudaStream stream) {
  return for_each_stage<kForwardKernels>(
      call.input.x.dtype, plan, [&] { return merge_chunks(call, tiling.merge, stream); },
      [&]<class T, int kWidth, int kVectors, Stage kStage, bool kPlain>(std::int64_t blocks) {
        return launch_blocks(planes_forward_kernel<T, kWidth, kVectors, kStage, kPlain>, plan,
                             blocks, stream, call, tiling);
      });
}

}  // namespace normcore::kernels::cuda
