// Backward passes over kNCS tensors: every stage of every path is this one kernel. What a Pass is:
// backward_pass.cuh.
#pragma once

#include <cuda_runtime.h>

#include "cuda/call.h"
#include "cuda/gradients.cuh"
#include "cuda/planes.cuh"
#include "cuda/reduce.cuh"
#include "cuda/statistics.cuh"
#include "plan/cuda_constants.h"

namespace normcore::kernels::cuda {

// What the leading lanes of each unit tell the others.
template <class Slice>
struct UnitSlices {
  Slice of_unit[kMaxThreads];
};

template <class Pass, int kVectors, Stage kStage>
class PlanesGradient {
 public:
  using A = typename Pass::A;
  using Call = typename Pass::Call;
  using Chunk = PlanesChunk<Pass::kWidth, Pass::kPlain>;
  using Coefficients = typename Pass::Coefficients;
  using Operands = typename Pass::Operands;
  using Slice = typename Pass::Slice;
  using Sums = typename Pass::template Sums<A>;
  using Totals = typename Pass::template Sums<double>;

  __device__ PlanesGradient(const Call& call, const PlanesTiling& tiling)
      : call_(call),
        tiling_(tiling),
        lanes_(tiling.lanes),
        lane_(threadIdx.x % lanes_),
        unit_(threadIdx.x / lanes_),
        units_(blockDim.x / lanes_),
        records_(tiling.channels_per_chunk()),
        slots_(tiling.has_several_channels() ? lanes_ * kVectors * batches()
                                             : (lanes_ + kWarp - 1) / kWarp) {}

  // One chunk of one slice. All threads of the block get here together.
  __device__ void run(std::int64_t index, std::uint32_t chunk_index, bool is_active) const {
    const Chunk chunk(call_.input, call_.num_groups, tiling_, index, chunk_index);
    const auto statistics = Pass::statistics(call_, index);
    const std::uint32_t slots = is_active ? chunk.slots() : 0;

    Operands operands[kVectors];
    load(chunk, slots, 0, operands);
    Slice slice{};
    if constexpr (kStage != Stage::kApply) {
      slice = Pass::prepare(call_, chunk.sample(0), chunk.channel(0));
      sum_channels(chunk, slots, statistics, slice, operands, index, chunk_index);
      if constexpr (kStage == Stage::kReduce) {
        finish_split(chunk, index, statistics);
        return;
      }
      slice = finish_resident(chunk, is_active, statistics);
    } else if (call_.slices != nullptr) {
      slice = static_cast<const Slice*>(call_.slices)[index];
    }
    if (!Pass::applies(call_)) return;

    const bool is_same_affine = chunk.has_one_affine(call_.input);
    Coefficients coefficients = coefficients_at(chunk, chunk.first_segment(), statistics, slice);
    for (std::uint32_t batch = 0; batch < batches(); ++batch) {
      if (batch != 0) load(chunk, slots, batch, operands);
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const std::uint32_t slot = slot_of(batch, k);
        if (slot >= slots) continue;
        const PlanesPosition p = chunk.at(slot);
        if (p.span.is_empty()) continue;
        operands[k].keep_packed();
        keep_order();
        if (!is_same_affine) coefficients = coefficients_at(chunk, p.segment, statistics, slice);
        const unsigned counting = chunk.counting(call_.input.mask, p);
        const auto terms = Pass::terms(call_, operands[k], p.index, p.span, counting, coefficients);
        Pass::apply(call_, operands[k], terms, p.index, p.span, counting, coefficients);
      }
    }
  }

 private:
  __device__ std::uint32_t batches() const {
    return kStage == Stage::kResident ? 1 : tiling_.batches;
  }
  __device__ std::uint32_t slot_of(std::uint32_t batch, int k) const {
    return lane_ + (batch * kVectors + k) * lanes_;
  }

  __device__ Coefficients coefficients_at(const Chunk& chunk, std::uint32_t segment,
                                          const SliceStatistics<A>& statistics, const Slice& slice,
                                          bool for_sums = false) const {
    return Pass::coefficients(call_, statistics, slice, chunk.sample(segment),
                              chunk.channel(segment), for_sums);
  }

  __device__ void load(const Chunk& chunk, std::uint32_t slots, std::uint32_t batch,
                       Operands (&operands)[kVectors]) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const std::uint32_t slot = slot_of(batch, k);
      if (slot >= slots) continue;
      const PlanesPosition p = chunk.at(slot);
      operands[k].load(call_, p.index, p.span);
    }
  }

  // Shared memory: the sums of every channel (float64, so first; kResident), then those of every slot
  // or warp.
  __device__ Totals* channel_totals() const { return dynamic_shared<Totals>(); }
  __device__ Sums* slot_sums() const {
    const std::uint32_t totals = kStage == Stage::kResident ? records_ * units_ : 0;
    return reinterpret_cast<Sums*>(channel_totals() + totals);
  }
  __device__ Totals* chunk_records(std::int64_t index, std::uint32_t chunk) const {
    return static_cast<Totals*>(call_.records) + (index * tiling_.chunks + chunk) * records_;
  }

  // Sums of the channels of a chunk: to shared memory, or to the workspace (kReduce).
  __device__ void sum_channels(const Chunk& chunk, std::uint32_t slots,
                               const SliceStatistics<A>& statistics, const Slice& slice,
                               Operands (&operands)[kVectors], std::int64_t index,
                               std::uint32_t chunk_index) const {
    Sums* const own = slot_sums() + unit_ * slots_;
    Sums total{};
    const bool is_per_slot = tiling_.has_several_channels();
    const bool is_same_affine = chunk.has_one_affine(call_.input);
    Coefficients coefficients =
        coefficients_at(chunk, chunk.first_segment(), statistics, slice, /*for_sums=*/true);
    for (std::uint32_t batch = 0; batch < batches(); ++batch) {
      if (batch != 0) load(chunk, slots, batch, operands);
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const std::uint32_t slot = slot_of(batch, k);
        if (is_per_slot) total = Sums{};
        if (slot < slots) {
          const PlanesPosition p = chunk.at(slot);
          const unsigned counting = chunk.counting(call_.input.mask, p);
          operands[k].keep_packed();
          if (!is_same_affine) {
            coefficients = coefficients_at(chunk, p.segment, statistics, slice, /*for_sums=*/true);
          }
          const auto terms =
              Pass::terms(call_, operands[k], p.index, p.span, counting, coefficients);
          total.count += static_cast<A>(__popc(counting));
#pragma unroll
          for (int i = 0; i < Pass::kWidth; ++i) {
            if (p.span.contains(i)) {
              Pass::add(total, operands[k], terms, counting, i, coefficients);
            }
          }
        }
        if (is_per_slot) own[slot] = total;
      }
    }
    // Within a warp first, and in the arithmetic type.
    const unsigned lanes = lanes_ < kWarp ? lanes_ : kWarp;
    if (!is_per_slot) {
      Sums::for_each(total, total, [&](A& sum, A part) { sum = warp_sum(part, lanes); });
      if (lane_ % kWarp == 0) own[lane_ / kWarp] = total;
    }
    __syncthreads();
    const std::uint32_t terms = is_per_slot ? chunk.slots() / chunk.segments() : lanes_ / lanes;
    const std::uint32_t records = is_per_slot ? chunk.segments() : 1;
    sum_terms<Totals>(
        units_ * records, terms, lanes_for(terms),
        [&](std::uint32_t item, std::uint32_t term) {
          return slot_sums()[item / records * slots_ + item % records * terms + term];
        },
        [&](std::uint32_t item, const Totals& sums) {
          if constexpr (kStage == Stage::kReduce) {
            chunk_records(index, chunk_index)[item] = sums;
          } else {
            channel_totals()[item] = sums;
          }
        });
  }

  __device__ Slice finish_resident(const Chunk& chunk, bool is_active,
                                   const SliceStatistics<A>& statistics) const {
    __syncthreads();
    auto& shared = block_shared<UnitSlices<Slice>>();
    if (lane_ < kWarp) {
      const unsigned lanes = lanes_ < kWarp ? lanes_ : kWarp;
      const Totals* const totals = channel_totals() + unit_ * records_;
      const Slice slice =
          Pass::finish_slice(call_, is_active, statistics, chunk.sample(0), chunk.channel(0),
                             records_, lane_, lanes, [&](std::uint32_t i) { return totals[i]; });
      if (lane_ == 0) shared.of_unit[unit_] = slice;
    }
    __syncthreads();
    return shared.of_unit[unit_];
  }

  // The last block to arrive sums the records of the slice, channel by channel.
  __device__ void finish_split(const Chunk& chunk, std::int64_t index,
                               const SliceStatistics<A>& statistics) const {
    if (!is_last_block(call_.counters + index, tiling_.chunks)) return;
    const std::uint32_t channels = tiling_.is_group_norm ? tiling_.segments : 1;
    const std::uint32_t terms = tiling_.is_group_norm ? tiling_.pieces : tiling_.chunks;
    const Totals* const records = chunk_records(index, 0);
    Totals* const totals = static_cast<Totals*>(call_.channel_sums) + index * channels;
    // A whole number of segments to a chunk, or of chunks to a segment: a channel's records are
    // neighbours either way, as only the last chunk has fewer of them.
    sum_terms<Totals>(
        channels, terms, lanes_for(terms),
        [&](std::uint32_t channel, std::uint32_t term) { return records[channel * terms + term]; },
        [&](std::uint32_t channel, const Totals& sums) { totals[channel] = sums; });
    __syncthreads();
    if (threadIdx.x >= kWarp) return;
    const Slice slice =
        Pass::finish_slice(call_, true, statistics, chunk.sample(0), chunk.channel(0), channels,
                           threadIdx.x, kWarp, [&](std::uint32_t i) { return totals[i]; });
    if (threadIdx.x == 0) static_cast<Slice*>(call_.slices)[index] = slice;
  }

  const Call& call_;
  const PlanesTiling& tiling_;
  unsigned lanes_, lane_, unit_, units_;
  std::uint32_t records_, slots_;
};

template <class Pass, int kVectors, Stage kStage>
__global__ void __launch_bounds__(kMaxThreads, blocks_at_once(Pass::kPlain, kStage, Pass::kBlocks))
    planes_gradient_kernel(const __grid_constant__ typename Pass::Call call,
                           const __grid_constant__ PlanesTiling tiling) {
  const PlanesGradient<Pass, kVectors, kStage> gradient(call, tiling);
  const unsigned units = blockDim.x / tiling.lanes;
  const std::int64_t index =
      static_cast<std::int64_t>(blockIdx.x) * units + threadIdx.x / tiling.lanes;
  if constexpr (kStage == Stage::kResident) {
    // The samples of a block one after the other, for the sums over samples.
    const bool is_group_norm = call.num_groups != 0;
    const std::int64_t block = is_group_norm ? tiling.by_groups.quotient_of(index) : 0;
    const std::int64_t first = index + block * (call.samples_per_block - 1) * call.num_groups;
    for (std::int64_t i = 0; i < call.samples_per_block; ++i) {
      const std::int64_t slice = first + i * call.num_groups;
      const bool is_active = slice < tiling.slices;
      gradient.run(is_active ? slice : 0, 0, is_active);
    }
  } else {
    const std::int64_t chunks = tiling.slices * tiling.chunks;
    const bool is_active = index < chunks;
    // What the first launch read last may still be in the cache.
    const std::int64_t at = !is_active ? 0 : kStage == Stage::kApply ? chunks - 1 - index : index;
    const std::int64_t slice = tiling.by_chunks.quotient_of(at);
    gradient.run(slice, static_cast<std::uint32_t>(at - slice * tiling.chunks), is_active);
  }
}

}  // namespace normcore::kernels::cuda
