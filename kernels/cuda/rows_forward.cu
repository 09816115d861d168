// Forward pass over kNSC tensors: every stage of every path is this one kernel.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "cuda/dispatch.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/passes.h"
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"
#include "cuda/statistics.cuh"
#include "cuda/team.cuh"
#include "plan/cuda_constants.h"

namespace normcore::kernels::cuda {
namespace {

template <class T, int kWidth, int kVectors, Stage kStage, bool kPlain>
class RowsForward {
 public:
  using A = Arithmetic<T>;
  using Chunk = RowsChunk<kWidth, kVectors, kPlain>;

  __device__ RowsForward(const ForwardCall& call, const RowsTiling& tiling)
      : call_(call),
        tiling_(tiling),
        has_unit_(threadIdx.x < tiling.unit_threads() * tiling.units),
        unit_(has_unit_ ? threadIdx.x / tiling.unit_threads() : 0),
        units_(tiling.units),
        all_columns_(units_ * tiling.columns) {}

  // `first` is the index of the block's first chunk, `chunks` their number in all. All threads of the
  // block get here together.
  __device__ void run(std::int64_t first, std::int64_t chunks) const {
    const std::int64_t index = index_of(first, unit_, chunks);
    const Chunk chunk(call_.input, call_.num_groups, tiling_, index, first + unit_ < chunks);

    Vector<T, kWidth> x[kVectors];
    load(chunk, 0, x);
    if constexpr (kStage != Stage::kApply) {
      sum_columns(chunk, first_row(chunk), x);
      if constexpr (kStage == Stage::kReduce) {
        store_sums(chunk);
        return;
      }
      const Chunk own = chunk_of(first, 0, chunks);
      finish_resident(
          static_cast<std::uint32_t>(own.channels_per_slice()), true,
          [&](unsigned unit) { return chunk_of(first, unit, chunks); },
          [&](unsigned unit) { return first + unit < chunks; },
          [&](std::uint32_t column) { return static_cast<ShiftedSums>(column_sums()[column]); });
    } else {
      load_statistics_of_slices(first, chunks);
    }
    apply(chunk, x);
  }

  // The tiles of columns of this block's team, its chunk of each.
  __device__ void run_team() const {
    Team<ColumnSums<A>> team(tiling_.team, column_sums(), call_.records, call_.counters,
                             tiling_.columns);
    for_each_item(team, tiling_.team, [&](std::int64_t item, bool is_first, bool has_next) {
      const Chunk chunk = Chunk::of_team(call_.input, call_.num_groups, tiling_, item, team.rank());
      const Vector<T, kWidth> row = first_row(chunk);
      if (is_first) hold(chunk);
      wait_for_copies();
      Vector<T, kWidth> x[kVectors];
      load(chunk, 0, x);
      sum_columns(chunk, row, x);
      if (tiling_.team.is_cooperative) {
        for (unsigned i = threadIdx.x; i < tiling_.columns; i += blockDim.x) {
          team.own()[i] = column_sums()[i];
        }
      }
      merge_team(team);
      finish_resident(
          static_cast<std::uint32_t>(chunk.channels_per_slice()), team.rank() == 0,
          [&](unsigned) { return chunk; }, [](unsigned) { return true; },
          [&](std::uint32_t column) { return team_sums()[column]; });
      apply(chunk, x, has_next ? item + tiling_.team.teams : -1, team.rank());
    });
  }

 private:
  // What the first launch read last may still be in the cache.
  __device__ static std::int64_t index_of(std::int64_t first, unsigned unit, std::int64_t chunks) {
    const std::int64_t index = first + unit < chunks ? first + unit : 0;
    return kStage == Stage::kApply ? chunks - 1 - index : index;
  }
  __device__ Chunk chunk_of(std::int64_t first, unsigned unit, std::int64_t chunks) const {
    return Chunk(call_.input, call_.num_groups, tiling_, index_of(first, unit, chunks), true);
  }

  __device__ void load(const Chunk& chunk, std::uint32_t batch,
                       Vector<T, kWidth> (&x)[kVectors]) const {
    const T* const data = static_cast<const T*>(call_.input.x.data);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      RowsPosition p;
      if (!chunk.at(batch, k, p)) continue;
      if constexpr (kStage == Stage::kTeam) {
        x[k] = held()[chunk.slot(batch, k)];
      } else {
        x[k] = load_vector<T, kWidth>(data, p.index, {0, kWidth});
      }
    }
  }

  // x: of the first batch, but for kTeam. That holds the vectors of its next tile of columns, unless it is
  // negative, as it goes.
  __device__ void apply(const Chunk& chunk, Vector<T, kWidth> (&x)[kVectors],
                        std::int64_t next = -1, std::uint32_t rank = 0) const {
    const PerColumn<Affine<A>, kWidth> affine = affines(chunk);
    for (std::uint32_t batch = 0; batch < chunk.batches(); ++batch) {
      if (kStage == Stage::kTeam || batch != 0) load(chunk, batch, x);
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        RowsPosition p;
        if (!chunk.at(batch, k, p)) continue;
        keep_packed(x[k]);
        apply_forward<kPlain>(call_, x[k], p.index, Span{0, kWidth}, affine);
      }
      if constexpr (kStage == Stage::kTeam) {
        if (next < 0) continue;
        hold(Chunk::of_team(call_.input, call_.num_groups, tiling_, next, rank), batch);
      }
    }
  }

  // Shared memory: what is held, and sums of columns of the whole team (kTeam); ColumnSums of all
  // columns, then for each of them three values per row of lanes, or the statistics of all slices.
  __device__ Vector<T, kWidth>* held() const { return dynamic_shared<Vector<T, kWidth>>(); }
  __device__ ShiftedSums* team_sums() const {
    return reinterpret_cast<ShiftedSums*>(held() + tiling_.vectors_per_chunk());
  }
  __device__ ColumnSums<A>* column_sums() const {
    if constexpr (kStage == Stage::kTeam) {
      return reinterpret_cast<ColumnSums<A>*>(team_sums() + tiling_.columns);
    }
    return dynamic_shared<ColumnSums<A>>();
  }
  __device__ A* lane_values(int which) const {
    return reinterpret_cast<A*>(column_sums() + all_columns_) +
           which * (all_columns_ * tiling_.row_lanes);
  }
  __device__ SliceStatistics<A>* slice_statistics() const {
    return reinterpret_cast<SliceStatistics<A>*>(lane_values(0));
  }

  // Sums over the rows of lanes: of every column, store(column, sums). In the end the lane values may
  // be written again.
  template <int kValues, class Store>
  __device__ void sum_lanes(const Chunk& chunk, const A (&values)[kValues][kWidth],
                            Store store) const {
    if (has_unit_) {
      const unsigned at =
          (unit_ * tiling_.row_lanes + chunk.row_lane()) * tiling_.columns + chunk.local_column();
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) lane_values(v)[at + i] = values[v][i];
      }
    }
    __syncthreads();
    for (unsigned column = threadIdx.x; column < all_columns_; column += blockDim.x) {
      const unsigned unit = tiling_.by_columns.quotient(column);
      const unsigned first = column + unit * (tiling_.row_lanes - 1) * tiling_.columns;
      A sums[kValues] = {};
      for (unsigned row = 0; row < tiling_.row_lanes; ++row) {
#pragma unroll
        for (int v = 0; v < kValues; ++v) sums[v] += lane_values(v)[first + row * tiling_.columns];
      }
      store(column, sums);
    }
    __syncthreads();
  }

  // Of the chunk, in the thread's columns.
  __device__ Vector<T, kWidth> first_row(const Chunk& chunk) const {
    const bool is_wanted = (kPlain || !call_.input.mask) && chunk.is_active();
    if (!is_wanted) return Vector<T, kWidth>::zero();
    return load_vector<T, kWidth>(static_cast<const T*>(call_.input.x.data), chunk.start(),
                                  {0, kWidth});
  }

  // ColumnSums of every column of the block, over the rows of its chunk.
  __device__ void sum_columns(const Chunk& chunk, const Vector<T, kWidth>& first,
                              Vector<T, kWidth> (&x)[kVectors]) const {
    const Mask& mask = call_.input.mask;
    const unsigned own_column = unit_ * tiling_.columns + chunk.local_column();
    // Calls f(element, value, whether it counts) for those of a batch.
    const auto for_each_value = [&](std::uint32_t batch, auto f) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        RowsPosition p;
        if (!chunk.at(batch, k, p)) continue;
        keep_packed(x[k]);
        const unsigned counting = chunk.counting(mask, p);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          f(i, convert_from<A>(x[k][i]), (counting >> i & 1) != 0);
        }
      }
    };
    // The pivot is the mean of the first batch. That is taken about a value of the column itself, so
    // that equal values give exactly themselves; under a mask, where no value is known to count, in
    // two steps, first about 0.
    A about[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) about[i] = convert_from<A>(first[i]);
    const std::uint32_t first_rows = std::min(chunk.rows(), tiling_.row_lanes * kVectors);
    const int first_step = kPlain || !mask ? 1 : 0;
    for (int step = first_step; step < 2; ++step) {
      A values[kPlain ? 1 : 2][kWidth] = {};
      for_each_value(0, [&](int i, A value, bool counts) {
        values[0][i] += counts ? value - about[i] : A{0};
        if constexpr (!kPlain) values[1][i] += counts ? A{1} : A{0};
      });
      if (step == first_step && has_unit_ && chunk.row_lane() == 0) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) column_sums()[own_column + i].pivot = about[i];
      }
      sum_lanes(chunk, values, [&](unsigned column, const auto& sums) {
        A count = static_cast<A>(first_rows);
        if constexpr (!kPlain) count = sums[1];
        if (count != A{0}) column_sums()[column].pivot += sums[0] / count;
      });
#pragma unroll
      for (int i = 0; i < kWidth; ++i) about[i] = column_sums()[own_column + i].pivot;
    }
    A values[kPlain ? 2 : 3][kWidth] = {};
    for (std::uint32_t batch = 0; batch < chunk.batches(); ++batch) {
      if (batch != 0) load(chunk, batch, x);
      for_each_value(batch, [&](int i, A value, bool counts) {
        const A centered = counts ? value - about[i] : A{0};
        values[0][i] += centered;
        values[1][i] = std::fma(centered, centered, values[1][i]);
        if constexpr (!kPlain) values[2][i] += counts ? A{1} : A{0};
      });
    }
    sum_lanes(chunk, values, [&](unsigned column, const auto& sums) {
      ColumnSums<A>& out = column_sums()[column];
      A count = static_cast<A>(chunk.rows());
      if constexpr (!kPlain) count = sums[2];
      out = {count, out.pivot, sums[0], sums[1]};
    });
  }

  __device__ void hold(const Chunk& chunk, std::uint32_t batch) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      RowsPosition p;
      if (!chunk.at(batch, k, p)) continue;
      hold_vector<kPlain>(held() + chunk.slot(batch, k), static_cast<const T*>(call_.input.x.data),
                          p.index, Span{0, kWidth});
    }
  }
  __device__ void hold(const Chunk& chunk) const {
    for (std::uint32_t batch = 0; batch < chunk.batches(); ++batch) hold(chunk, batch);
  }

  // Sums of every column over the chunks of the whole team.
  __device__ void merge_team(Team<ColumnSums<A>>& team) const {
    team.meet();
    const unsigned lanes = lanes_for(tiling_.chunks, blockDim.x / tiling_.columns),
                   lane = threadIdx.x % lanes;
    for (std::uint32_t at = 0; at < tiling_.columns; at += blockDim.x / lanes) {
      const std::uint32_t column = at + threadIdx.x / lanes;
      const std::uint32_t i = column < tiling_.columns ? column : 0;
      const ShiftedSums all = merge_records(tiling_.chunks, lane, lanes, [&](std::uint64_t chunk) {
        return static_cast<ShiftedSums>(team.of(static_cast<std::uint32_t>(chunk))[i]);
      });
      if (column < tiling_.columns && lane == 0) team_sums()[column] = all;
    }
    __syncthreads();
    team.next();
  }

  // Statistics of the slices of every unit, each by a few lanes, from the sums of its columns; whether
  // this block saves them.
  template <class ChunkOf, class IsActive, class SumsOf>
  __device__ void finish_resident(std::uint32_t width, bool saves, ChunkOf chunk_of,
                                  IsActive is_active, SumsOf sums_of) const {
    const std::uint32_t slices = tiling_.columns / width, items = units_ * slices;
    const unsigned lanes = lanes_for(width, tiling_.unit_threads() / slices),
                   lane = threadIdx.x % lanes;
    for (std::uint32_t at = 0; at < items; at += blockDim.x / lanes) {
      const std::uint32_t item = at + threadIdx.x / lanes;
      const std::uint32_t unit = item < items ? item / slices : 0, slice = item % slices;
      const Chunk chunk = chunk_of(unit);
      const std::uint32_t first_column = unit * tiling_.columns + slice * width;
      const Moments moments = to_moments(merge_records(width, lane, lanes, [&](std::uint64_t i) {
        return sums_of(first_column + static_cast<std::uint32_t>(i));
      }));
      if (item >= items || lane != 0 || !is_active(unit) || slice >= chunk.slices()) continue;
      const std::int64_t index =
          chunk.tile() * chunk.slices_per_tile() + chunk.first_slice() + slice;
      slice_statistics()[item] =
          saves ? save_statistics<A>(call_, index, moments) : statistics_of<A>(call_, moments);
    }
    __syncthreads();
  }

  // To the workspace.
  __device__ void store_sums(const Chunk& chunk) const {
    const std::int64_t c = call_.input.extent.c;
    auto* const records = static_cast<ColumnSums<A>*>(call_.records) +
                          (chunk.tile() * tiling_.chunks + chunk.chunk()) * c;
    for (unsigned i = threadIdx.x; i < tiling_.columns; i += blockDim.x) {
      const std::int64_t channel =
          static_cast<std::int64_t>(chunk.column_tile()) * tiling_.columns + i;
      if (channel < c) records[channel] = column_sums()[i];
    }
  }

  // Statistics that a former launch saved, or that are given.
  __device__ void load_statistics_of_slices(std::int64_t first, std::int64_t chunks) const {
    const Chunk chunk = chunk_of(first, 0, chunks);
    for (unsigned i = threadIdx.x; i < chunk.slices(); i += blockDim.x) {
      const std::int64_t slice = chunk.tile() * chunk.slices_per_tile() + chunk.first_slice() + i;
      const auto statistics = load_statistics<A>(call_, slice);
      if (call_.given_mean && chunk.chunk() == 0) {
        static_cast<A*>(call_.rstd.data)[slice] = statistics.rstd;
      }
      slice_statistics()[i] = statistics;
    }
    __syncthreads();
  }

  __device__ PerColumn<Affine<A>, kWidth> affines(const Chunk& chunk) const {
    PerColumn<Affine<A>, kWidth> out;
    const std::uint32_t slices =
        kStage == Stage::kResident ? tiling_.by_channels_per_slice.quotient(tiling_.columns) : 0;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const std::int64_t column = chunk.column() + i;
      out.values[i] = {A{0}, A{0}, A{0}};
      if (!has_unit_ || column >= call_.input.extent.c) continue;
      out.values[i] =
          Affine<A>::of(call_.input, slice_statistics()[unit_ * slices + chunk.local_slice(column)],
                        chunk.tile(), column);
    }
    return out;
  }

  const ForwardCall& call_;
  const RowsTiling& tiling_;
  bool has_unit_;  // threads that are left over work for none
  unsigned unit_, units_, all_columns_;
};

template <class T, int kWidth, int kVectors, Stage kStage, bool kPlain>
__global__ void __launch_bounds__(kMaxThreads, blocks_at_once(kPlain, kStage, 2))
    rows_forward_kernel(const __grid_constant__ ForwardCall call,
                        const __grid_constant__ RowsTiling tiling) {
  const RowsForward<T, kWidth, kVectors, kStage, kPlain> forward(call, tiling);
  if constexpr (kStage == Stage::kTeam) {
    forward.run_team();
    count_batch(call.running, call.counters + tiling.team.counters());
  } else {
    forward.run(static_cast<std::int64_t>(blockIdx.x) * tiling.units,
                tiling.tiles * tiling.chunks * tiling.column_tiles);
    if constexpr (kStage == Stage::kResident) count_batch(call.running, call.counters);
    if constexpr (kStage == Stage::kApply) count_batch(call.running, nullptr);
  }
}

}  // namespace

Status rows_forward(const ForwardCall& call, const RowsTiling& tiling, const CudaPlan& plan,
                    CudaStream stream) {
  return for_each_stage<kForwardKernels>(
      call.input.x.dtype, plan, [&] { return merge_chunks(call, tiling.merge, stream); },
      [&]<class T, int kWidth, int kVectors, Stage kStage, bool kPlain>(std::int64_t blocks) {
        return launch_blocks(rows_forward_kernel<T, kWidth, kVectors, kStage, kPlain>, plan, blocks,
                             stream, call, tiling);
      });
}

}  // namespace normcore::kernels::cuda
