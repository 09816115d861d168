// How a tensor is cut on the CPU: tiles (slices that are finished together), chunks of a tile (the
// leaves of the reduction tree, merged in order) and pieces of a tile (units of the second sweep).
// Offsets count elements. Shared by plan_cpu(), which sizes the workspace, and by the loops in
// kernels/cpu.
#pragma once

#include <algorithm>
#include <cstdint>

#include "normcore/kernels/norm_input.h"
#include "normcore/kernels/plan.h"

namespace normcore::kernels {

// Arrays of a pass: parameters in the arithmetic type, coefficients per plane or column (TileState
// in cpu/coefficients.h), sums per channel and chunk, and float64 values per channel while they are
// merged.
struct PassArrays {
  std::int64_t parameters, coefficients, sums, merged;
};
constexpr PassArrays arrays_of(Pass pass) {
  switch (pass) {
    case Pass::kForward:
    case Pass::kInference:
      break;
    case Pass::kBackward:
      return {2, 5, 2, 3};
    case Pass::kDoubleBackward:
      return {4, 10, 10, 11};
  }
  return {2, 3, 3, 3};
}

// Where a channel has one position both layouts are the same, and rows are less work than planes of
// one value.
inline NormInput with_rows_of_channels(NormInput input) {
  if (input.extent.s == 1) input.layout = Layout::kNSC;
  return input;
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Values of a slice, masked-out ones included.
inline std::int64_t slice_size(const Problem& p) {
  return p.extent.s * (p.num_groups == 0 ? p.extent.n : p.extent.c / p.num_groups);
}

// A leaf of the reduction tree: `runs` runs of `length` values, or `rows` rows.
struct RunChunk {
  std::int64_t offset = 0;           // from the tile's first value
  std::int64_t row_mask_offset = 0;  // from the mask's first byte, for a mask [n][s]
  std::int64_t kept_offset = 0;      // the same in a copy of the tile without gaps
  std::int64_t runs = 0, length = 0;
};

struct PlanesTile {
  std::int64_t sample = 0;  // 0 for batch norm
  std::int64_t first_channel = 0, planes = 0;
  std::int64_t offset = 0;  // from the tensor's first value
};

// Neighbouring planes of a tile, or a part of one plane.
struct PlanePiece {
  std::int64_t offset = 0;           // from the tile's first value
  std::int64_t row_mask_offset = 0;  // from the mask's first byte, for a mask [n][s]
  std::int64_t kept_offset = 0;      // the same in a copy of the tile without gaps
  std::int64_t first_plane = 0, planes = 0, length = 0;
};

// kNCS. Batch norm: a tile is a few neighbouring channels, a slice is a channel with n runs of s
// values. Group norm: a tile is one slice of d planes, contiguous in memory. The backward pass
// reduces every channel of a slice by itself.
class PlanesGeometry {
 public:
  explicit PlanesGeometry(const Problem& problem);

  std::int64_t tiles() const { return tiles_; }
  std::int64_t chunks() const { return chunks_; }
  PlanesTile tile(std::int64_t index) const {
    const std::int64_t sample = group_norm_ ? index / groups_ : 0;
    const std::int64_t first = (index - sample * groups_) * planes_;
    return {sample, first, std::min(planes_, c_ - first), (sample * c_ + first) * s_};
  }
  std::int64_t pieces(const PlanesTile& tile) const {
    return (group_norm_ ? 1 : n_) * pieces_per_block(tile);
  }
  std::int64_t max_planes() const { return planes_; }
  std::int64_t tile_size() const { return (group_norm_ ? 1 : n_) * planes_ * s_; }  // values
  // Independent reductions per chunk.
  std::int64_t records(const PlanesTile& tile) const { return channel_records_ ? tile.planes : 1; }
  std::int64_t max_records() const { return channel_records_ ? planes_ : 1; }
  std::int64_t record_stride() const { return s_; }
  std::int64_t run_stride() const { return run_stride_; }
  std::int64_t kept_run_stride() const { return planes_ * s_; }
  std::int64_t row_mask_run_stride() const { return group_norm_ ? 0 : s_; }
  std::int64_t chunk_size() const { return chunk_; }

  RunChunk chunk(const PlanesTile& tile, std::int64_t index) const;
  PlanePiece piece(const PlanesTile& tile, std::int64_t index) const;

 private:
  std::int64_t pieces_per_block(const PlanesTile& tile) const {
    return tile.planes <= planes_per_piece_
               ? pieces_per_plane_
               : ceil_div(tile.planes, planes_per_piece_) * pieces_per_plane_;
  }

  std::int64_t n_, c_, s_, groups_;
  bool group_norm_, channel_records_;
  std::int64_t tiles_, planes_;              // planes: channels per (full) tile
  std::int64_t runs_, run_stride_, length_;  // of one record
  std::int64_t chunk_, chunks_, chunks_per_run_, runs_per_chunk_;
  std::int64_t piece_length_, pieces_per_plane_, planes_per_piece_;
};

// Neighbouring rows of a tile, as `rows` folded rows of `columns` values. Rows that do not fill a
// folded row make a last chunk of one shorter row.
struct RowChunk {
  std::int64_t first_row = 0;  // single rows from the tile's first row
  std::int64_t rows = 0;
  std::int64_t columns = 0;
};

// kNSC. Batch norm: one tile of n * s rows. Group norm: a tile per sample, of s rows. Chunks are
// also the pieces. Under a row mask rows are not folded.
class RowsGeometry {
 public:
  explicit RowsGeometry(const Problem& problem);

  std::int64_t tiles() const { return tiles_; }
  std::int64_t chunks() const { return chunks_; }
  std::int64_t rows() const { return rows_; }  // single rows per tile
  std::int64_t fold() const { return fold_; }
  std::int64_t width() const { return fold_ * c_; }
  std::int64_t chunk_size() const { return chunk_; }
  std::int64_t tile_size() const { return rows_ * c_; }  // values
  std::int64_t offset(std::int64_t tile) const { return tile * rows_ * c_; }

  RowChunk chunk(std::int64_t index) const;

 private:
  std::int64_t c_, tiles_, rows_, fold_, chunk_, chunks_;
};

// Group norm of short slices that lie one after the other: a tile is a block of samples, of each
// the same part of neighbouring slices.
class SamplesGeometry {
 public:
  explicit SamplesGeometry(const Problem& problem);

  // Whether slices are such, and columns few enough for scale and bias of each.
  static bool fits(const Problem& problem);

  std::int64_t blocks() const { return ceil_div(n_, per_block_); }
  std::int64_t tiles() const { return blocks() * parts_; }
  std::int64_t block(std::int64_t tile) const { return tile / parts_; }
  std::int64_t first_sample(std::int64_t tile) const { return block(tile) * per_block_; }
  std::int64_t samples(std::int64_t tile) const {
    return std::min(per_block_, n_ - first_sample(tile));
  }
  std::int64_t first_slice(std::int64_t tile) const { return tile % parts_ * slices_per_part_; }
  std::int64_t slices(std::int64_t tile) const {
    return std::min(slices_per_part_, groups_ - first_slice(tile));
  }
  std::int64_t slices_per_sample() const { return groups_; }
  std::int64_t slice_size() const { return c_ * s_ / groups_; }
  std::int64_t channels_per_slice() const { return c_ / groups_; }
  std::int64_t columns() const { return c_ * s_; }  // values of a sample
  std::int64_t positions() const { return s_; }     // columns per channel

  // Scratch arrays of a pass's primitive, and behind them, in the backward passes, two of sums over
  // columns.
  static constexpr std::int64_t scratch_arrays(Pass pass) {
    if (pass == Pass::kDoubleBackward) return 16;
    return pass == Pass::kBackward ? 12 : 7;
  }
  static constexpr std::int64_t kSumArrays = 2;
  // Values of such an array: a part and a vector of any instruction set.
  std::int64_t padded_columns() const { return (slices_per_part_ * slice_size() + 31) / 16 * 16; }

 private:
  std::int64_t n_, c_, s_, groups_, per_block_, slices_per_part_, parts_;
};

// Group norm sums its parameter gradients over samples in two levels: over blocks of neighbouring
// samples, then over the blocks. What a block's samples add to the same channels is added by one
// task, in order.
inline std::int64_t samples_per_block(std::int64_t samples) {
  return std::clamp<std::int64_t>(samples / 64, 1, 32);
}

// The parts of a call's workspace, in bytes; each part is a multiple of 64.
struct WorkspaceLayout {
  std::size_t affine = 0;      // scale and bias in arithmetic type, once
  std::size_t parameters = 0;  // partial parameter gradients of group norm, once
  std::size_t state = 0;       // coefficients and scratch, per tile
  std::size_t partial = 0;     // per chunk of a tile
  std::size_t kept = 0;        // gradient behind the activation, per tile
  std::int64_t slots = 0;      // tiles that need state and partials at the same time
  std::int64_t chunks = 0;

  std::size_t before_kept() const { return state + partial * static_cast<std::size_t>(chunks); }
  std::size_t slot() const { return before_kept() + kept; }
  std::size_t total() const {
    return affine + parameters + slot() * static_cast<std::size_t>(slots);
  }
};

WorkspaceLayout workspace_layout(const Problem& problem, const CpuPlan& plan);

// Tiles that must run in one task, in order.
std::int64_t tiles_per_group(const Problem& problem);

}  // namespace normcore::kernels
