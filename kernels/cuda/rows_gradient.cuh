// Backward passes over kNSC tensors: every stage of every path is this one kernel. What a Pass is:
// backward_pass.cuh.
#pragma once

#include <cuda_runtime.h>

#include "cuda/call.h"
#include "cuda/gradients.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"
#include "cuda/statistics.cuh"
#include "cuda/team.cuh"
#include "plan/cuda_constants.h"

namespace normcore::kernels::cuda {

template <class Pass, int kVectors, Stage kStage>
class RowsGradient {
 public:
  static constexpr int kWidth = Pass::kWidth;
  using A = typename Pass::A;
  using Call = typename Pass::Call;
  using Chunk = RowsChunk<kWidth, kVectors, Pass::kPlain>;
  using Coefficients = PerColumn<typename Pass::Coefficients, kWidth>;
  using Operands = typename Pass::Operands;
  using Slice = typename Pass::Slice;
  using Sums = typename Pass::template Sums<A>;
  using Totals = typename Pass::template Sums<double>;

  __device__ RowsGradient(const Call& call, const RowsTiling& tiling)
      : call_(call),
        tiling_(tiling),
        has_unit_(threadIdx.x < tiling.unit_threads() * tiling.units),
        unit_(has_unit_ ? threadIdx.x / tiling.unit_threads() : 0),
        all_columns_(tiling.units * tiling.columns) {}

  // The chunks of all units; index(unit) is that of a unit, negative if it has none.
  template <class Index>
  __device__ void run(Index index) const {
    const std::int64_t own = index(unit_);
    const Chunk chunk(call_.input, call_.num_groups, tiling_, own < 0 ? 0 : own, own >= 0);
    Operands operands[kVectors];
    if constexpr (kStage == Stage::kApply) {
      if (!Pass::applies(call_)) return;
      const auto of_columns =
          coefficients(chunk, [&](auto column) { return slice(chunk, column); });
      load(chunk, 0, operands);
      apply(chunk, of_columns, operands);
    } else {
      Coefficients of_columns = coefficients_of_sums(chunk);
      load(chunk, 0, operands);
      sum_lanes(chunk, of_columns, operands);
      if constexpr (kStage == Stage::kReduce) {
        store_sums(chunk);
      } else {
        if (has_totals()) sum_columns(column_totals(), all_columns_);
        finish_resident(
            true,
            [&](unsigned unit) {
              const std::int64_t at = index(unit);
              return Chunk(call_.input, call_.num_groups, tiling_, at < 0 ? 0 : at, true);
            },
            [&](unsigned unit) { return index(unit) >= 0; });
        apply_slices(chunk, of_columns, operands);
      }
    }
  }

  // The tiles of columns of this block's team, its chunk of each.
  __device__ void run_team() const {
    Team<Totals> team(tiling_.team, team_records(), call_.records, call_.counters, tiling_.columns);
    for_each_item(team, tiling_.team, [&](std::int64_t item, bool is_first, bool has_next) {
      const Chunk chunk = Chunk::of_team(call_.input, call_.num_groups, tiling_, item, team.rank());
      const bool is_held = Pass::kPlain && !is_first && Pass::applies(call_);
      if (!is_held) hold(chunk);
      wait_for_copies();
      Coefficients of_columns = coefficients_of_sums(chunk);
      Operands operands[kVectors];
      load(chunk, 0, operands);
      sum_lanes(chunk, of_columns, operands);
      sum_columns(team.own(), tiling_.columns);
      merge_team(team);
      finish_resident(
          team.rank() == 0, [&](unsigned) { return chunk; }, [](unsigned) { return true; });
      apply_slices(chunk, of_columns, operands, has_next ? item + tiling_.team.teams : -1,
                   team.rank());
    });
  }

 private:
  // Those that sums are taken with.
  __device__ Coefficients coefficients_of_sums(const Chunk& chunk) const {
    return coefficients(chunk, [&](std::int64_t column) {
      const std::int64_t channels = chunk.channels_per_slice();
      return Pass::prepare(call_, chunk.tile(), chunk.slice_of(column) * channels);
    });
  }

  // With the slices that this launch has finished. `next`, `rank`: as in apply().
  __device__ void apply_slices(const Chunk& chunk, Coefficients& of_columns,
                               Operands (&operands)[kVectors], std::int64_t next = -1,
                               std::uint32_t rank = 0) const {
    if (!Pass::applies(call_)) return;
    if constexpr (Pass::kKeepsCoefficients) {
      set_slices(chunk, of_columns);
    } else {  // loaded again
      of_columns = coefficients(chunk, [&](auto column) { return shared_slice(chunk, column); });
    }
    apply(chunk, of_columns, operands, next, rank);
  }

  __device__ bool has_column(const Chunk& chunk, int i) const {
    return has_unit_ && chunk.column() + i < call_.input.extent.c;
  }
  __device__ std::int64_t slice_index(const Chunk& chunk, std::int64_t column) const {
    return chunk.tile() * chunk.slices_per_tile() + chunk.slice_of(column);
  }

  template <class SliceOf>
  __device__ Coefficients coefficients(const Chunk& chunk, SliceOf slice_of) const {
    Coefficients out;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      out.values[i] = {};
      if (!has_column(chunk, i)) continue;
      const std::int64_t column = chunk.column() + i;
      const auto statistics = Pass::statistics(call_, slice_index(chunk, column));
      out.values[i] = Pass::coefficients(call_, statistics, slice_of(column), chunk.tile(), column);
    }
    return out;
  }

  // As an earlier launch left it.
  __device__ Slice slice(const Chunk& chunk, std::int64_t column) const {
    if (call_.slices == nullptr) return {};
    return static_cast<const Slice*>(call_.slices)[slice_index(chunk, column)];
  }

  // As this launch left it (kResident and kTeam).
  __device__ const Slice& shared_slice(const Chunk& chunk, std::int64_t column) const {
    return shared_slices()[unit_ * slices_per_unit() + chunk.local_slice(column)];
  }
  __device__ void set_slices(const Chunk& chunk, Coefficients& of_columns) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (!has_column(chunk, i)) continue;
      of_columns.values[i].set(shared_slice(chunk, chunk.column() + i));
    }
  }

  __device__ void load(const Chunk& chunk, std::uint32_t batch,
                       Operands (&operands)[kVectors]) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      RowsPosition p;
      if (!chunk.at(batch, k, p)) continue;
      if constexpr (kStage == Stage::kTeam) {
        held().load(chunk.slot(batch, k), operands[k]);
      } else {
        operands[k].load(call_, p.index, Span{0, kWidth});
      }
    }
  }

  __device__ void hold(const Chunk& chunk) const {
    held().hold_all(call_, chunk.batches() * kVectors,
                    [&](int k, std::uint32_t& slot, std::int64_t& index, Span&) {
                      RowsPosition p;
                      if (!chunk.at(0, k, p)) return false;
                      slot = chunk.slot(0, k);
                      index = p.index;
                      return true;
                    });
  }
  __device__ void hold_next(const Chunk& next, std::uint32_t batch) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      RowsPosition p;
      if (next.at(batch, k, p)) held().hold(call_, next.slot(batch, k), p.index);
    }
  }

  // Calls f(k, position, counting elements, terms) for the vectors of a batch.
  template <class F>
  __device__ void for_each_vector(const Chunk& chunk, std::uint32_t batch,
                                  const Coefficients& coefficients, Operands (&operands)[kVectors],
                                  F f) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      RowsPosition p;
      if (!chunk.at(batch, k, p)) continue;
      operands[k].keep_packed();
      keep_order();
      const unsigned counting = chunk.counting(call_.input.mask, p);
      f(k, p, counting,
        Pass::terms(call_, operands[k], p.index, Span{0, kWidth}, counting, coefficients));
    }
  }

  // operands: of the first batch, but for kTeam. That holds those of its next tile of columns, unless it is
  // negative, as it goes, if nothing has to be converted.
  __device__ void apply(const Chunk& chunk, const Coefficients& coefficients,
                        Operands (&operands)[kVectors], std::int64_t next = -1,
                        std::uint32_t rank = 0) const {
    for (std::uint32_t batch = 0; batch < chunk.batches(); ++batch) {
      if (kStage == Stage::kTeam || batch != 0) load(chunk, batch, operands);
      for_each_vector(chunk, batch, coefficients, operands,
                      [&](int k, const RowsPosition& p, unsigned counting, const auto& terms) {
                        Pass::apply(call_, operands[k], terms, p.index, Span{0, kWidth}, counting,
                                    coefficients);
                      });
      if constexpr (kStage == Stage::kTeam && Pass::kPlain) {
        if (next < 0) continue;
        hold_next(Chunk::of_team(call_.input, call_.num_groups, tiling_, next, rank), batch);
      }
    }
  }

  // Shared memory: what is held, and the records that the team reads (kTeam); the sums of every column
  // (float64, so before those of the arithmetic type; kTeam, or kResident with several rows of lanes),
  // those of every column in every row of lanes, and what is known of every slice (but kReduce).
  __device__ auto held() const {
    return
        typename Pass::HeldOperands(dynamic_shared<unsigned char>(), tiling_.vectors_per_chunk());
  }
  __device__ Totals* team_records() const { return reinterpret_cast<Totals*>(held().end()); }
  __device__ bool has_totals() const {
    if constexpr (kStage == Stage::kResident) return tiling_.row_lanes > 1;
    return kStage == Stage::kTeam;
  }
  __device__ Totals* column_totals() const {
    if constexpr (kStage == Stage::kTeam) return team_records() + tiling_.columns;
    return dynamic_shared<Totals>();
  }
  __device__ Sums* lane_sums() const {
    return reinterpret_cast<Sums*>(column_totals() + (has_totals() ? all_columns_ : 0));
  }
  __device__ Totals totals_of(std::uint32_t column) const {
    if (has_totals()) return column_totals()[column];
    Totals totals{};
    merge(totals, lane_sums()[column]);
    return totals;
  }
  __device__ Slice* shared_slices() const {
    return reinterpret_cast<Slice*>(lane_sums() + all_columns_ * tiling_.row_lanes);
  }
  __device__ std::uint32_t slices_per_unit() const {
    return tiling_.by_channels_per_slice.quotient(tiling_.columns);
  }

  // lane_sums().
  __device__ void sum_lanes(const Chunk& chunk, const Coefficients& coefficients,
                            Operands (&operands)[kVectors]) const {
    Sums sums[kWidth] = {};
    for (std::uint32_t batch = 0; batch < chunk.batches(); ++batch) {
      if (batch != 0) load(chunk, batch, operands);
      for_each_vector(chunk, batch, coefficients, operands,
                      [&](int k, const RowsPosition&, unsigned counting, const auto& terms) {
#pragma unroll
                        for (int i = 0; i < kWidth; ++i) {
                          Pass::add(sums[i], operands[k], terms, counting, i, coefficients);
                          if constexpr (!Pass::kPlain) {
                            sums[i].count += (counting >> i & 1) != 0 ? A{1} : A{0};
                          }
                        }
                      });
    }
    if (has_unit_) {
      const unsigned at =
          (unit_ * tiling_.row_lanes + chunk.row_lane()) * tiling_.columns + chunk.local_column();
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if constexpr (Pass::kPlain) sums[i].count = static_cast<A>(chunk.own_rows());
        lane_sums()[at + i] = sums[i];
      }
    }
    __syncthreads();
  }

  // Those of the block's first columns over the rows of its chunk, to `totals`.
  __device__ void sum_columns(Totals* totals, std::uint32_t columns) const {
    sum_terms<Totals>(
        columns, tiling_.row_lanes, 1,
        [&](std::uint32_t column, std::uint32_t row) {
          const unsigned unit = tiling_.by_columns.quotient(column);
          return lane_sums()[column + (unit * (tiling_.row_lanes - 1) + row) * tiling_.columns];
        },
        [&](std::uint32_t column, const Totals& sums) { totals[column] = sums; });
    __syncthreads();
  }

  // column_totals() over the chunks of the whole team.
  __device__ void merge_team(Team<Totals>& team) const {
    team.meet();
    sum_terms<Totals>(
        tiling_.columns, tiling_.chunks, lanes_for(tiling_.chunks, blockDim.x / tiling_.columns),
        [&](std::uint32_t column, std::uint32_t chunk) { return team.of(chunk)[column]; },
        [&](std::uint32_t column, const Totals& sums) { column_totals()[column] = sums; });
    __syncthreads();
    team.next();
  }

  // What is known of the slices of every unit, each by a few lanes; `stores` gradients of parameters.
  template <class ChunkOf, class IsActive>
  __device__ void finish_resident(bool stores, ChunkOf chunk_of, IsActive has_chunk) const {
    const Chunk first(call_.input, call_.num_groups, tiling_, 0, true);
    const auto width = static_cast<std::uint32_t>(first.channels_per_slice());
    const std::uint32_t slices = slices_per_unit(), items = tiling_.units * slices;
    const unsigned lanes = lanes_for(width, tiling_.unit_threads() / slices),
                   lane = threadIdx.x % lanes;
    for (std::uint32_t at = 0; at < items; at += blockDim.x / lanes) {
      const std::uint32_t item = at + threadIdx.x / lanes;
      const std::uint32_t unit = item < items ? item / slices : 0, local = item % slices;
      const Chunk chunk = chunk_of(unit);
      const bool is_active = item < items && has_chunk(unit) && local < chunk.slices();
      const std::int64_t channel =
          (chunk.first_slice() + (is_active ? local : 0)) * chunk.channels_per_slice();
      const auto statistics = Pass::statistics(call_, slice_index(chunk, channel));
      const std::uint32_t first_column = unit * tiling_.columns + local * width;
      const Slice slice = Pass::finish_slice(
          call_, is_active, stores, statistics, chunk.tile(), channel, width, lane, lanes,
          [&](std::uint32_t i) { return totals_of(first_column + i); });
      if (is_active && lane == 0) shared_slices()[item] = slice;
    }
    __syncthreads();
  }

  // To the workspace.
  __device__ void store_sums(const Chunk& chunk) const {
    const std::int64_t c = call_.input.extent.c;
    const std::int64_t first_column =
        static_cast<std::int64_t>(chunk.column_tile()) * tiling_.columns;
    const std::int64_t left = c - first_column;
    sum_columns(static_cast<Totals*>(call_.records) +
                    (chunk.tile() * tiling_.chunks + chunk.chunk()) * c + first_column,
                left < tiling_.columns ? static_cast<std::uint32_t>(left) : tiling_.columns);
  }

  const Call& call_;
  const RowsTiling& tiling_;
  bool has_unit_;  // threads that are left over work for none
  unsigned unit_, all_columns_;
};

template <class Pass, int kVectors, Stage kStage>
__global__ void __launch_bounds__(kMaxThreads, blocks_at_once(Pass::kPlain, kStage, Pass::kBlocks))
    rows_gradient_kernel(const __grid_constant__ typename Pass::Call call,
                         const __grid_constant__ RowsTiling tiling) {
  const RowsGradient<Pass, kVectors, kStage> gradient(call, tiling);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * tiling.units;
  if constexpr (kStage == Stage::kTeam) {
    gradient.run_team();
  } else if constexpr (kStage == Stage::kResident) {
    // The samples of a block one after the other, for the sums over samples.
    const std::int64_t per_block = call.samples_per_block;
    for (std::int64_t i = 0; i < per_block; ++i) {
      gradient.run([&](unsigned unit) -> std::int64_t {
        const std::int64_t block = tiling.by_column_tiles.quotient_of(first + unit);
        const std::int64_t sample = block * per_block + i;
        if (sample >= tiling.tiles) return -1;
        return first + unit + (sample - block) * tiling.column_tiles;
      });
    }
  } else {
    const std::int64_t chunks = tiling.tiles * tiling.chunks * tiling.column_tiles;
    gradient.run([&](unsigned unit) -> std::int64_t {
      const std::int64_t index = first + unit;
      if (index >= chunks) return -1;
      // What the first launch read last may still be in the cache.
      return kStage == Stage::kApply ? chunks - 1 - index : index;
    });
  }
}

}  // namespace normcore::kernels::cuda
