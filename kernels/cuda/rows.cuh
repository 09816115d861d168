// Where the vectors of a chunk lie in a kNSC tensor, and which slices its columns belong to. A unit
// of column_lanes x row_lanes threads holds up to kVectors rows of a vector per thread: a batch. A
// chunk is one batch, or several that are read one after the other. kPlain: all elements count.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/reduce.cuh"
#include "normcore/kernels/norm_input.h"
#include "plan/cuda_constants.h"
#include "plan/cuda_tiling.h"

namespace normcore::kernels::cuda {

// What belongs to each element of a vector of neighbouring columns.
template <class Value, int kWidth>
struct PerColumn {
  Value values[kWidth];
  __device__ const Value& operator[](int i) const { return values[i]; }
};

struct RowsPosition {
  std::int64_t row;    // in the tile
  std::int64_t index;  // of the vector's first element, in the tensor
};

template <int kWidth, int kVectors, bool kPlain>
class RowsChunk {
 public:
  // `index` counts chunks: column tiles first, then chunks of a tile, then tiles. A thread without a
  // unit, or a unit without a chunk, has no rows.
  __device__ RowsChunk(const NormInput& input, std::int64_t num_groups, const RowsTiling& tiling,
                       std::int64_t index, bool is_active)
      : tiling_(tiling), extent_(input.extent), groups_(num_groups) {
    const std::int64_t chunk = tiling.by_column_tiles.quotient_of(index);
    column_tile_ = static_cast<std::uint32_t>(index - chunk * tiling.column_tiles);
    tile_ = tiling.by_chunks.quotient_of(chunk);
    chunk_ = static_cast<std::uint32_t>(chunk - tile_ * tiling.chunks);
    const unsigned unit = threadIdx.x / tiling.unit_threads(),
                   lane = threadIdx.x - unit * tiling.unit_threads();
    row_lane_ = lane / tiling.column_lanes;
    local_column_ = (lane - row_lane_ * tiling.column_lanes) * kWidth;
    column_ = static_cast<std::int64_t>(column_tile_) * tiling.columns + local_column_;
    first_row_ = static_cast<std::int64_t>(chunk_) * tiling.rows_per_chunk;
    const std::int64_t left = tiling.rows - first_row_;
    rows_ = left < tiling.rows_per_chunk ? static_cast<std::uint32_t>(left) : tiling.rows_per_chunk;
    start_ = (tile_ * tiling.rows + first_row_) * extent_.c + column_;
    is_active_ = is_active && column_ < extent_.c && unit < tiling.units;
  }

  // Of a tile of columns, numbered as chunks are, if a tile had one: that of a team's block, if it has
  // one.
  __device__ static RowsChunk of_team(const NormInput& input, std::int64_t num_groups,
                                      const RowsTiling& tiling, std::int64_t item,
                                      std::uint32_t rank) {
    const bool is_active = rank < tiling.chunks;
    const std::int64_t tile = tiling.by_column_tiles.quotient_of(item),
                       column_tile = item - tile * tiling.column_tiles,
                       chunk = tile * tiling.chunks + (is_active ? rank : 0);
    return {input, num_groups, tiling, chunk * tiling.column_tiles + column_tile, is_active};
  }

  __device__ std::int64_t tile() const { return tile_; }
  __device__ std::uint32_t chunk() const { return chunk_; }
  __device__ std::uint32_t column_tile() const { return column_tile_; }
  __device__ std::int64_t column() const { return column_; }  // of the thread's first element
  __device__ std::uint32_t rows() const { return rows_; }
  __device__ bool is_active() const { return is_active_; }  // whether the thread has rows of it

  __device__ std::uint32_t batches() const { return tiling_.batches; }
  // The k-th row of this thread in a batch; whether it exists.
  __device__ bool at(std::uint32_t batch, int k, RowsPosition& p) const {
    const std::uint32_t local = local_row(batch, k);
    p.row = first_row_ + local;
    p.index = start_ + static_cast<std::int64_t>(std::uint64_t{local} *
                                                 static_cast<std::uint32_t>(extent_.c));
    return is_active_ && local < rows_;
  }
  // That of its vectors, row by row, for chunks of one unit.
  __device__ std::uint32_t slot(std::uint32_t batch, int k) const {
    return local_row(batch, k) * tiling_.column_lanes + local_column_ / kWidth;
  }
  // Of the chunk's first row, in the thread's columns.
  __device__ std::int64_t start() const { return start_; }
  // Where the thread is among those of its unit: its row of lanes, and its first column in the tile.
  __device__ std::uint32_t row_lane() const { return row_lane_; }
  __device__ std::uint32_t local_column() const { return local_column_; }
  // How many of its rows are this thread's.
  __device__ std::uint32_t own_rows() const {
    return is_active_ ? (rows_ + tiling_.row_lanes - 1 - row_lane_) / tiling_.row_lanes : 0;
  }

  __device__ unsigned counting(const Mask& mask, const RowsPosition& p) const {
    if constexpr (kPlain) return existing_elements({0, kWidth});
    return counting_elements<kWidth>(mask, p.index, tile_ * tiling_.rows + p.row, false,
                                     {0, kWidth});
  }

  // Slices. Those of a column tile are numbered from its first column's on.
  __device__ std::int64_t channels_per_slice() const { return tiling_.channels_per_slice; }
  __device__ std::int64_t slices_per_tile() const { return groups_ == 0 ? extent_.c : groups_; }
  __device__ std::int64_t first_slice() const {
    return slice_of(static_cast<std::int64_t>(column_tile_) * tiling_.columns);
  }
  __device__ std::uint32_t slices() const {
    const std::int64_t end = static_cast<std::int64_t>(column_tile_ + 1) * tiling_.columns;
    const std::int64_t last = (end < extent_.c ? end : extent_.c) - 1;
    return static_cast<std::uint32_t>(slice_of(last) - first_slice() + 1);
  }
  __device__ std::uint32_t local_slice(std::int64_t column) const {
    return static_cast<std::uint32_t>(slice_of(column) - first_slice());
  }
  // In its tile.
  __device__ std::int64_t slice_of(std::int64_t column) const {
    return tiling_.by_channels_per_slice.quotient_of(column);
  }

 private:
  __device__ std::uint32_t local_row(std::uint32_t batch, int k) const {
    return (batch * kVectors + k) * tiling_.row_lanes + row_lane_;
  }

  const RowsTiling& tiling_;
  const Extent& extent_;
  std::int64_t groups_, tile_, column_, first_row_, start_;
  std::uint32_t rows_, column_tile_, chunk_, row_lane_, local_column_;
  bool is_active_;
};

}  // namespace normcore::kernels::cuda
