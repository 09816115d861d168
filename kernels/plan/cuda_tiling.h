// How a tensor is cut on a CUDA device. Vectors of `width` neighbouring elements are the unit of
// access. A chunk is what a group of neighbouring threads, the lanes, holds in registers: up to
// kVectors vectors per thread, or several such batches one after the other where nothing has to stay
// there, or all stay in shared memory. Several groups of lanes share a block where chunks are small. Filled by plan_cuda(), passed
// to the kernels by value. Offsets count elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "normcore/kernels/cuda_plan.h"
#include "normcore/kernels/host_device.h"
#include "plan/fast_divide.h"

namespace normcore::kernels {

// Sizes of what kernels keep in the workspace and in shared memory (cuda/call.h).
inline constexpr std::size_t kShiftedSumsBytes = 32, kParameterSumsBytes = 16;
// Sums of a channel, and values that are known of a slice (cuda/backward_pass.cuh,
// cuda/double_backward_pass.cuh).
inline constexpr std::size_t kBackwardSums = 3, kBackwardSliceValues = 3;
inline constexpr std::size_t kDoubleBackwardSums = 11, kDoubleBackwardSliceValues = 6;

// Blocks of kCluster and kTeam that hold a slice (kNCS) or a tile of columns (kNSC) together.
struct TeamTiling {
  std::uint32_t blocks = 1;  // of a team, each with a chunk; the last may have none
  std::uint32_t teams = 1;   // a cluster for each item, or those of a cooperative grid
  std::int64_t items = 0;    // slices, or tiles of columns
  bool is_cooperative = false;
  FastDivide by_blocks;

  // In memory.
  NORMCORE_HOST_DEVICE constexpr std::uint32_t counters() const {
    return is_cooperative ? teams : 0;
  }
};

// How the records of kSplit's chunks are merged.
struct MergeTiling {
  std::int64_t slices = 0;
  std::uint32_t slices_per_block = 1;
  std::uint32_t slices_per_sample = 1;  // of batch norm: of all samples
  std::uint32_t channels = 1;           // per slice
  std::uint32_t terms = 1;              // records of a slice (forward) or of a channel of it
  std::uint32_t lanes = 1;              // that take turns at them: a power of two up to the block
  std::uint32_t chunks = 1;             // kNSC: per tile
  std::int64_t records = 1;             // kNCS: per slice, of which the last may be unused
  bool is_rows = false;
  int width = 1;  // of the vectors that were reduced
  FastDivide by_channels, by_slices_per_sample;

  NORMCORE_HOST_DEVICE constexpr std::int64_t blocks() const {
    return (slices + slices_per_block - 1) / slices_per_block;
  }
  // kNSC: where the record of a channel of a slice in a chunk is.
  NORMCORE_HOST_DEVICE constexpr std::int64_t row_record(std::int64_t slice, std::uint32_t channel,
                                                         std::uint32_t chunk) const {
    const std::int64_t tile = by_slices_per_sample.quotient_of(slice);
    const std::int64_t in_tile = slice - tile * slices_per_sample;
    return ((tile * chunks + chunk) * slices_per_sample + in_tile) * channels + channel;
  }
};

// kNCS. A slice is `segments` runs of s neighbouring elements: the channels of a group (group norm),
// or the samples of a channel (batch norm). Each segment is covered by `granules` vectors, aligned
// in memory, of which the first and the last may be partly outside of the segment. A chunk is a
// number of whole segments, or a piece of one.
struct PlanesTiling {
  std::int64_t slices = 0;
  std::int64_t segment_stride = 0, plane = 0;  // elements; plane: of a channel in a sample
  std::uint32_t segments = 1;
  std::uint32_t granules = 1;            // per segment
  std::uint32_t segments_per_chunk = 1;  // 1 where a segment has several pieces
  std::uint32_t pieces = 1;              // per segment
  std::uint32_t granules_per_piece = 1;
  std::uint32_t chunks = 1;   // per slice
  std::uint32_t batches = 1;  // per chunk, of the vectors that its threads hold at once
  std::uint32_t lanes = 32;   // threads per chunk: a power of two up to 32, or the block
  FastDivide by_granules;     // by granules_per_piece
  FastDivide by_chunks;
  FastDivide by_groups;  // of group norm
  bool is_group_norm = false;
  TeamTiling team;
  MergeTiling merge;

  // Segments of group norm are channels, those of batch norm belong to one.
  NORMCORE_HOST_DEVICE constexpr std::uint32_t channels_per_chunk() const {
    return is_group_norm ? segments_per_chunk : 1;
  }
  NORMCORE_HOST_DEVICE constexpr bool has_several_channels() const {
    return channels_per_chunk() > 1;
  }
  // A whole number of segments to a chunk, or of chunks to a segment: a channel's sums in the chunks of
  // a slice are neighbours either way, as only the last chunk has fewer channels.
  NORMCORE_HOST_DEVICE constexpr std::uint32_t channels_per_slice() const {
    return is_group_norm ? segments : 1;
  }
  NORMCORE_HOST_DEVICE constexpr std::uint32_t terms_per_channel() const {
    return is_group_norm ? pieces : chunks;
  }
  NORMCORE_HOST_DEVICE constexpr std::uint32_t slots_per_chunk() const {
    return segments_per_chunk * granules_per_piece;
  }
  // From an element of a slice to the same of the team's next one.
  NORMCORE_HOST_DEVICE constexpr std::int64_t next_item() const {
    return team.teams * (is_group_norm ? segments * segment_stride : plane);
  }

  NORMCORE_HOST_DEVICE constexpr std::uint32_t first_segment(std::uint32_t chunk) const {
    return pieces > 1 ? chunk / pieces : chunk * segments_per_chunk;
  }
  NORMCORE_HOST_DEVICE constexpr std::uint32_t segments_of(std::uint32_t chunk) const {
    const std::uint32_t left = segments - first_segment(chunk);
    return left < segments_per_chunk ? left : segments_per_chunk;
  }
  NORMCORE_HOST_DEVICE constexpr std::uint32_t first_granule(std::uint32_t chunk) const {
    return pieces > 1 ? chunk % pieces * granules_per_piece : 0;
  }
};

// kNSC. A tile is a sample of s rows (group norm) or all n * s rows (batch norm); its channels are
// cut into columns of `columns` channels, its rows into chunks. Lanes are column_lanes x row_lanes.
// A chunk has rows_per_chunk rows: row_lanes * kVectors of each batch.
struct RowsTiling {
  std::int64_t tiles = 0;
  std::int64_t rows = 0;  // per tile
  std::uint32_t columns = 1;
  std::uint32_t column_tiles = 1;
  std::uint32_t column_lanes = 1;
  std::uint32_t row_lanes = 1;
  std::uint32_t units = 1;   // groups of lanes per block
  std::uint32_t chunks = 1;  // per tile
  std::uint32_t rows_per_chunk = 1;
  std::uint32_t batches = 1;  // per chunk
  std::uint32_t channels_per_slice = 1;
  FastDivide by_columns, by_column_tiles, by_chunks, by_channels_per_slice;
  TeamTiling team;
  MergeTiling merge;

  NORMCORE_HOST_DEVICE constexpr std::uint32_t unit_threads() const {
    return column_lanes * row_lanes;
  }
  NORMCORE_HOST_DEVICE constexpr std::uint32_t vectors_per_chunk() const {
    return rows_per_chunk * column_lanes;
  }
};

// Group norm of one value per channel. A slice is a run of `vectors` vectors, which `lanes` threads go
// through in batches. Backward passes: a block takes the runs of groups_per_block groups, row_lanes
// samples at once, one after the other in a chunk of samples (CudaPlan::samples_per_block).
struct RunsTiling {
  std::int64_t samples = 0;
  std::uint32_t groups = 1;
  std::uint32_t vectors = 1;  // per run
  std::uint32_t lanes = 1;    // a power of two up to 32, or the block
  std::uint32_t batches = 1;  // of the vectors that a thread holds
  std::uint32_t groups_per_block = 1;
  std::uint32_t group_tiles = 1;
  std::uint32_t row_lanes = 1;
  FastDivide by_groups, by_group_tiles;
  FastDivide by_width;  // elements of a run

  NORMCORE_HOST_DEVICE constexpr std::int64_t slices() const { return samples * groups; }
  NORMCORE_HOST_DEVICE constexpr std::uint32_t vectors_per_lane() const {
    return (vectors + lanes - 1) / lanes;
  }
};

PlanesTiling planes_tiling(const Problem& problem, const CudaPlan& plan);
RowsTiling rows_tiling(const Problem& problem, const CudaPlan& plan);
RunsTiling runs_tiling(const Problem& problem, const CudaPlan& plan);

// The parts of a call's workspace: offsets in bytes, each a multiple of 256.
struct CudaWorkspaceLayout {
  std::size_t records = 0;         // partial sums of chunks (kSplit), those of teams (kTeam)
  std::size_t channel_sums = 0;    // backward (kSplit)
  std::size_t slices = 0;          // backward (kSplit)
  std::size_t sums = 0;            // the end of all these
  std::size_t parameters = 0;      // backward of group norm: per block of samples and channel
  std::int64_t sample_blocks = 0;  // 0: parameter gradients need no second sum
  std::size_t total = 0;
};

CudaWorkspaceLayout cuda_workspace_layout(const Problem& problem, const CudaPlan& plan);

}  // namespace normcore::kernels
