// Backward passes over kNCS tensors: every stage of every path is this one kernel. What a Pass is:
// backward_pass.cuh.
#pragma once

#include <cuda_runtime.h>

#include "cuda/call.h"
#include "cuda/gradients.cuh"
#include "cuda/planes.cuh"
#include "cuda/reduce.cuh"
#include "cuda/statistics.cuh"
#include "cuda/team.cuh"
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
        sums_(!tiling.has_several_channels() ? (lanes_ + kWarp - 1) / kWarp
              : kStage == Stage::kTeam       ? tiling.slots_per_chunk()
                                             : lanes_ * kVectors * batches()) {}

  // One chunk of one slice. All threads of the block get here together.
  __device__ void run(std::int64_t index, std::uint32_t chunk_index, bool is_active) const {
    const Chunk chunk(call_.input, call_.num_groups, tiling_, index, chunk_index);
    const auto statistics = Pass::statistics(call_, index);
    const std::uint32_t slots = is_active ? chunk.slots() : 0;

    Operands operands[kVectors];
    load(chunk, slots, 0, operands);
    if constexpr (kStage == Stage::kApply) {
      Slice slice{};
      if (call_.slices != nullptr) slice = static_cast<const Slice*>(call_.slices)[index];
      apply(chunk, slots, statistics, slice, operands);
    } else {
      const Slice before_sums = Pass::prepare(call_, chunk.sample(0), chunk.channel(0));
      Totals* const totals =
          kStage == Stage::kReduce ? chunk_records(index, chunk_index) : channel_totals();
      sum_channels(chunk, slots, statistics, before_sums, operands, totals);
      if constexpr (kStage == Stage::kResident) {
        apply(chunk, slots, statistics, finish_resident(chunk, is_active, statistics), operands);
      }
    }
  }

  // The slices of this block's team, its chunk of each.
  __device__ void run_team() const {
    Team<Totals> team(tiling_.team, team_records(), call_.records, call_.counters, records_);
    for_each_item(team, tiling_.team, [&](std::int64_t index, bool is_first, bool has_next) {
      const bool is_active = team.rank() < tiling_.chunks;
      const Chunk chunk(call_.input, call_.num_groups, tiling_, index, is_active ? team.rank() : 0);
      const auto statistics = Pass::statistics(call_, index);
      const std::uint32_t slots = is_active ? chunk.slots() : 0;
      const bool is_held = Pass::kPlain && !is_first && Pass::applies(call_);
      if (!is_held) hold(chunk, slots);
      wait_for_copies();
      Operands operands[kVectors];
      load(chunk, slots, 0, operands);
      const Slice before_sums = Pass::prepare(call_, chunk.sample(0), chunk.channel(0));
      sum_channels(chunk, slots, statistics, before_sums, operands, team.own());
      apply(chunk, slots, statistics, finish_team(team, chunk, statistics), operands, has_next);
    });
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
      if constexpr (kStage == Stage::kTeam) {
        held().load(slot, operands[k]);
      } else {
        const PlanesPosition p = chunk.at(slot);
        operands[k].load(call_, p.index, p.span);
      }
    }
  }

  // Shared memory: what is held (kTeam), the records that the team reads (kTeam), the sums of every
  // channel (float64, so before those of the arithmetic type; kResident and kTeam), and those of every
  // slot or warp.
  __device__ auto held() const {
    return typename Pass::HeldOperands(dynamic_shared<unsigned char>(), tiling_.slots_per_chunk());
  }
  __device__ Totals* team_records() const { return reinterpret_cast<Totals*>(held().end()); }
  __device__ Totals* channel_totals() const {
    if constexpr (kStage == Stage::kTeam) return team_records() + records_;
    return dynamic_shared<Totals>();
  }
  __device__ Sums* slot_sums() const {
    const std::uint32_t totals = kStage == Stage::kTeam       ? tiling_.channels_per_slice()
                                 : kStage == Stage::kResident ? records_ * units_
                                                              : 0;
    return reinterpret_cast<Sums*>(channel_totals() + totals);
  }
  __device__ Totals* chunk_records(std::int64_t index, std::uint32_t chunk) const {
    return static_cast<Totals*>(call_.records) + (index * tiling_.chunks + chunk) * records_;
  }

  __device__ void hold(const Chunk& chunk, std::uint32_t slots) const {
    held().hold_all(call_, batches() * kVectors,
                    [&](int k, std::uint32_t& slot, std::int64_t& index, Span& span) {
                      slot = slot_of(0, k);
                      if (slot >= slots) return false;
                      const PlanesPosition p = chunk.at(slot);
                      index = p.index;
                      span = p.span;
                      return true;
                    });
  }

  // operands: of the first batch, but for kTeam. That holds those of its next slice as it goes, unless they
  // may be partial.
  __device__ void apply(const Chunk& chunk, std::uint32_t slots,
                        const SliceStatistics<A>& statistics, const Slice& slice,
                        Operands (&operands)[kVectors], bool has_next = false) const {
    if (!Pass::applies(call_)) return;
    const bool is_same_affine = chunk.has_one_affine(call_.input);
    Coefficients coefficients = coefficients_at(chunk, chunk.first_segment(), statistics, slice);
    for (std::uint32_t batch = 0; batch < batches(); ++batch) {
      if (kStage == Stage::kTeam || batch != 0) load(chunk, slots, batch, operands);
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
        if constexpr (kStage == Stage::kTeam && Pass::kPlain) {
          if (has_next) held().hold(call_, slot, p.index + tiling_.next_item());
        }
      }
    }
  }

  // Sums of the channels of a chunk (of every unit) to `totals`.
  __device__ void sum_channels(const Chunk& chunk, std::uint32_t slots,
                               const SliceStatistics<A>& statistics, const Slice& slice,
                               Operands (&operands)[kVectors], Totals* totals) const {
    Sums* const own = slot_sums() + unit_ * sums_;
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
        if (is_per_slot && slot < sums_) own[slot] = total;
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
          return slot_sums()[item / records * sums_ + item % records * terms + term];
        },
        [&](std::uint32_t item, const Totals& sums) { totals[item] = sums; });
  }

  __device__ Slice finish_resident(const Chunk& chunk, bool is_active,
                                   const SliceStatistics<A>& statistics) const {
    __syncthreads();
    auto& shared = block_shared<UnitSlices<Slice>>();
    if (lane_ < kWarp) {
      const unsigned lanes = lanes_ < kWarp ? lanes_ : kWarp;
      const Totals* const totals = channel_totals() + unit_ * records_;
      const Slice slice = Pass::finish_slice(call_, is_active, /*stores=*/true, statistics,
                                             chunk.sample(0), chunk.channel(0), records_, lane_,
                                             lanes, [&](std::uint32_t i) { return totals[i]; });
      if (lane_ == 0) shared.of_unit[unit_] = slice;
    }
    __syncthreads();
    return shared.of_unit[unit_];
  }

  // Every block of the team sums the records of the slice, the first stores gradients of parameters.
  __device__ Slice finish_team(Team<Totals>& team, const Chunk& chunk,
                               const SliceStatistics<A>& statistics) const {
    team.meet();
    const std::uint32_t channels = tiling_.channels_per_slice(),
                        terms = tiling_.terms_per_channel();
    Totals* const totals = channel_totals();
    sum_terms<Totals>(
        channels, terms, lanes_for(terms),
        [&](std::uint32_t channel, std::uint32_t term) {
          const std::uint32_t at = channel * terms + term, rank = at / records_;
          return team.of(rank)[at - rank * records_];
        },
        [&](std::uint32_t channel, const Totals& sums) { totals[channel] = sums; });
    __syncthreads();
    team.next();
    auto& shared = block_shared<Slice>();
    if (threadIdx.x < kWarp) {
      const Slice slice = Pass::finish_slice(
          call_, true, /*stores=*/team.rank() == 0, statistics, chunk.sample(0), chunk.channel(0),
          channels, threadIdx.x, kWarp, [&](std::uint32_t i) { return totals[i]; });
      if (threadIdx.x == 0) shared = slice;
    }
    __syncthreads();
    return shared;
  }

  const Call& call_;
  const PlanesTiling& tiling_;
  unsigned lanes_, lane_, unit_, units_;
  std::uint32_t records_;  // of a chunk, a record for each of its channels
  std::uint32_t sums_;     // of a chunk, one for each slot or warp
};

template <class Pass, int kVectors, Stage kStage>
__global__ void __launch_bounds__(kMaxThreads, blocks_at_once(Pass::kPlain, kStage, Pass::kBlocks))
    planes_gradient_kernel(const __grid_constant__ typename Pass::Call call,
                           const __grid_constant__ PlanesTiling tiling) {
  const PlanesGradient<Pass, kVectors, kStage> gradient(call, tiling);
  const unsigned units = blockDim.x / tiling.lanes;
  const std::int64_t index =
      static_cast<std::int64_t>(blockIdx.x) * units + threadIdx.x / tiling.lanes;
  if constexpr (kStage == Stage::kTeam) {
    gradient.run_team();
  } else if constexpr (kStage == Stage::kResident) {
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
