// Backward pass over kNSC tensors: every stage of every path is this one kernel.
#include <cuda_runtime.h>

#include "cuda/dispatch.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/gradients.cuh"
#include "cuda/passes.h"
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"
#include "cuda/statistics.cuh"
#include "plan/cuda_constants.h"

namespace normcore::kernels::cuda {
namespace {

template <class T, int kWidth, int kVectors, Stage kStage, bool kPlain>
class RowsBackward {
 public:
  using A = Arithmetic<T>;
  using Chunk = RowsChunk<kWidth, kVectors, kPlain>;
  using Affines = PerColumn<Affine<A>, kWidth>;
  using Gradients = GradientVector<kPlain, T, kWidth>;

  __device__ RowsBackward(const BackwardCall& call, const RowsTiling& tiling)
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
    Affines affine = affines(chunk);
    Vector<T, kWidth> x[kVectors];
    Gradients grad_y[kVectors];
    load(chunk, 0, x, grad_y);

    if constexpr (kStage != Stage::kApply) {
      sum_columns(chunk, affine, x, grad_y);
      if constexpr (kStage == Stage::kReduce) {
        finish_split(chunk);
        return;
      }
      finish_resident(index);
      // Loaded again, for want of registers to keep them in.
      if constexpr (!kPlain) affine = affines(chunk);
    }
    if (!call_.grad.x && !call_.grad.residual) return;
    const auto gradients = slice_gradients_of(chunk);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      affine.values[i] = gradients.values[i].of(affine.values[i]);
    }
    for (std::uint32_t batch = 0; batch < chunk.batches(); ++batch) {
      if (batch != 0) load(chunk, batch, x, grad_y);
      for_each_vector(chunk, batch, affine, x, grad_y,
                      [&](int k, const RowsPosition& p, unsigned counting, const A(&g)[kWidth]) {
                        apply_backward<kPlain>(call_, x[k], g, p.index, Span{0, kWidth}, counting,
                                               affine, gradients);
                      });
    }
  }

 private:
  __device__ bool has_column(const Chunk& chunk, int i) const {
    return has_unit_ && chunk.column() + i < call_.input.extent.c;
  }
  __device__ std::int64_t slice_of(const Chunk& chunk, std::int64_t column) const {
    return chunk.tile() * chunk.slices_per_tile() + chunk.slice_of(column);
  }

  __device__ Affines affines(const Chunk& chunk) const {
    Affines out;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      out.values[i] = {A{0}, A{0}, A{0}};
      if (!has_column(chunk, i)) continue;
      const std::int64_t column = chunk.column() + i;
      const auto statistics = load_statistics<A>(call_, slice_of(chunk, column));
      out.values[i] = Affine<A>::of(call_.input, statistics, chunk.tile(), column);
    }
    return out;
  }

  __device__ void load(const Chunk& chunk, std::uint32_t batch, Vector<T, kWidth> (&x)[kVectors],
                       Gradients (&grad_y)[kVectors]) const {
    load_batch<kPlain>(call_, x, grad_y, [&](auto f) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        RowsPosition p;
        if (chunk.at(batch, k, p)) f(k, p.index, Span{0, kWidth});
      }
    });
  }

  // Calls f(k, position, counting elements, g) for the vectors of a batch.
  template <class F>
  __device__ void for_each_vector(const Chunk& chunk, std::uint32_t batch, const Affines& affine,
                                  Vector<T, kWidth> (&x)[kVectors], Gradients (&grad_y)[kVectors],
                                  F f) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      RowsPosition p;
      if (!chunk.at(batch, k, p)) continue;
      keep_packed(x[k]);
      keep_packed(grad_y[k]);
      keep_order();
      const unsigned counting = chunk.counting(call_.input.mask, p);
      A g[kWidth];
      output_gradient<kPlain>(call_, x[k], grad_y[k], p.index, Span{0, kWidth}, counting, affine,
                              g);
      f(k, p, counting, g);
    }
  }

  // Shared memory: the sums of every column (float64, so first), those of every column in every row
  // of lanes, and what grad_x needs of every slice.
  __device__ ChannelSums* channel_sums() const { return dynamic_shared<ChannelSums>(); }
  __device__ PartialSums<A>* lane_sums() const {
    return reinterpret_cast<PartialSums<A>*>(channel_sums() + all_columns_);
  }
  __device__ SliceGradient<A>* slice_gradients() const {
    return reinterpret_cast<SliceGradient<A>*>(lane_sums() + all_columns_ * tiling_.row_lanes);
  }
  __device__ std::uint32_t slices_per_unit() const {
    return tiling_.by_channels_per_slice.quotient(tiling_.columns);
  }

  // Sums of every column of the block over the rows of its chunk: to shared memory, or to the
  // workspace (kReduce).
  __device__ void sum_columns(const Chunk& chunk, const Affines& affine,
                              Vector<T, kWidth> (&x)[kVectors],
                              Gradients (&grad_y)[kVectors]) const {
    PartialSums<A> sums[kWidth] = {};
    for (std::uint32_t batch = 0; batch < chunk.batches(); ++batch) {
      if (batch != 0) load(chunk, batch, x, grad_y);
      for_each_vector(chunk, batch, affine, x, grad_y,
                      [&](int k, const RowsPosition&, unsigned counting, const A(&g)[kWidth]) {
#pragma unroll
                        for (int i = 0; i < kWidth; ++i) {
                          sums[i].add(x[k], g, counting, i, affine);
                          if constexpr (!kPlain) {
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
        if constexpr (kPlain) sums[i].count = static_cast<A>(chunk.own_rows());
        lane_sums()[at + i] = sums[i];
      }
    }
    __syncthreads();
    const std::int64_t c = call_.input.extent.c;
    sum_terms(
        all_columns_, tiling_.row_lanes, 1,
        [&](std::uint32_t column, std::uint32_t row) {
          const unsigned unit = tiling_.by_columns.quotient(column);
          return lane_sums()[column + (unit * (tiling_.row_lanes - 1) + row) * tiling_.columns];
        },
        [&](std::uint32_t column, const ChannelSums& total) {
          if constexpr (kStage == Stage::kReduce) {
            const std::int64_t channel =
                static_cast<std::int64_t>(chunk.column_tile()) * tiling_.columns + column;
            if (channel >= c) return;
            call_.records[(chunk.tile() * tiling_.chunks + chunk.chunk()) * c + channel] = total;
          } else {
            channel_sums()[column] = total;
          }
        });
    __syncthreads();
  }

  // What grad_x needs of the slices of every unit, each by a few lanes.
  template <class Index>
  __device__ void finish_resident(Index index) const {
    const Chunk first(call_.input, call_.num_groups, tiling_, 0, true);
    const auto width = static_cast<std::uint32_t>(first.channels_per_slice());
    const std::uint32_t slices = slices_per_unit(), items = tiling_.units * slices;
    const unsigned lanes = lanes_for(width), lane = threadIdx.x % lanes;
    for (std::uint32_t at = 0; at < items; at += blockDim.x / lanes) {
      const std::uint32_t item = at + threadIdx.x / lanes;
      const std::uint32_t unit = item < items ? item / slices : 0, slice = item % slices;
      const std::int64_t own = index(unit);
      const Chunk chunk(call_.input, call_.num_groups, tiling_, own < 0 ? 0 : own, true);
      const bool is_active = item < items && own >= 0 && slice < chunk.slices();
      const std::int64_t channel =
          (chunk.first_slice() + (is_active ? slice : 0)) * chunk.channels_per_slice();
      const auto statistics = load_statistics<A>(call_, slice_of(chunk, channel));
      const ChannelSums* const sums = channel_sums() + unit * tiling_.columns + slice * width;
      const auto gradient =
          finish_slice<A>(call_, is_active, statistics, chunk.tile(), channel, width, lane, lanes,
                          [&](std::uint32_t i) { return sums[i]; });
      if (is_active && lane == 0) slice_gradients()[item] = gradient;
    }
    __syncthreads();
  }

  // The last block to arrive merges the records of whole slices, column by column.
  __device__ void finish_split(const Chunk& chunk) const {
    const std::int64_t c = call_.input.extent.c;
    const RowsFinish finish(tiling_, c, chunk.tile(), chunk.column_tile());
    if (!is_last_block(call_.counters + finish.counter, finish.blocks)) return;
    const ChannelSums* const records =
        call_.records + chunk.tile() * tiling_.chunks * c + finish.first_channel;
    ChannelSums* const sums = call_.channel_sums + chunk.tile() * c + finish.first_channel;
    merge_columns<ChannelSums>(
        records, c, static_cast<std::uint32_t>(finish.channels), tiling_.chunks,
        [&](std::uint32_t column, const ChannelSums& total) { sums[column] = total; });
    __syncthreads();
    const auto width = static_cast<std::uint32_t>(chunk.channels_per_slice());
    const auto slices = static_cast<std::uint32_t>(finish.channels / width);
    const unsigned lanes = lanes_for(width), lane = threadIdx.x % lanes;
    for (std::uint32_t at = 0; at < slices; at += blockDim.x / lanes) {
      const std::uint32_t slice = at + threadIdx.x / lanes;
      const bool is_active = slice < slices;
      const std::int64_t local = static_cast<std::int64_t>(is_active ? slice : 0) * width;
      const std::int64_t channel = finish.first_channel + local;
      const std::int64_t index = slice_of(chunk, channel);
      const auto gradient =
          finish_slice<A>(call_, is_active, load_statistics<A>(call_, index), chunk.tile(), channel,
                          width, lane, lanes, [&](std::uint32_t i) { return sums[local + i]; });
      if (is_active && lane == 0) {
        static_cast<SliceGradient<A>*>(call_.slice_gradients)[index] = gradient;
      }
    }
  }

  __device__ PerColumn<SliceGradient<A>, kWidth> slice_gradients_of(const Chunk& chunk) const {
    PerColumn<SliceGradient<A>, kWidth> out;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      out.values[i] = {A{0}, A{0}, A{0}};
      if (!has_column(chunk, i)) continue;
      const std::int64_t column = chunk.column() + i;
      if constexpr (kStage == Stage::kResident) {
        out.values[i] = slice_gradients()[unit_ * slices_per_unit() + chunk.local_slice(column)];
      } else if (call_.slice_gradients != nullptr) {
        out.values[i] =
            static_cast<const SliceGradient<A>*>(call_.slice_gradients)[slice_of(chunk, column)];
      }
    }
    return out;
  }

  const BackwardCall& call_;
  const RowsTiling& tiling_;
  bool has_unit_;  // threads that are left over work for none
  unsigned unit_, all_columns_;
};

template <class T, int kWidth, int kVectors, Stage kStage, bool kPlain>
__global__ void __launch_bounds__(kMaxThreads, blocks_at_once(kPlain, kStage, 2))
    rows_backward_kernel(const __grid_constant__ BackwardCall call,
                         const __grid_constant__ RowsTiling tiling) {
  const RowsBackward<T, kWidth, kVectors, kStage, kPlain> backward(call, tiling);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * tiling.units;
  if constexpr (kStage == Stage::kResident) {
    // The samples of a block one after the other, for the sums over samples.
    const std::int64_t per_block = call.samples_per_block;
    for (std::int64_t i = 0; i < per_block; ++i) {
      backward.run([&](unsigned unit) -> std::int64_t {
        const std::int64_t block = tiling.by_column_tiles.quotient_of(first + unit);
        const std::int64_t sample = block * per_block + i;
        if (sample >= tiling.tiles) return -1;
        return first + unit + (sample - block) * tiling.column_tiles;
      });
    }
  } else {
    const std::int64_t chunks = tiling.tiles * tiling.chunks * tiling.column_tiles;
    backward.run([&](unsigned unit) -> std::int64_t {
      const std::int64_t index = first + unit;
      if (index >= chunks) return -1;
      // What the first launch read last may still be in the cache.
      return kStage == Stage::kApply ? chunks - 1 - index : index;
    });
  }
}

}  // namespace

Status rows_backward(const BackwardCall& call, const RowsTiling& tiling, const CudaPlan& plan,
                     CudaStream stream) {
  return for_each_stage<kBackwardFewVectors, kBackwardVectors>(
      call.input.x.dtype, plan, is_plain(call),
      [&]<class T, int kWidth, int kVectors, Stage kStage, bool kPlain>(std::int64_t blocks) {
        return launch_blocks(rows_backward_kernel<T, kWidth, kVectors, kStage, kPlain>, plan,
                             blocks, stream, call, tiling);
      });
}

}  // namespace normcore::kernels::cuda
