#include "plan/cuda_tiling.h"

#include <algorithm>
#include <numeric>

#include "plan/cpu_geometry.h"
#include "plan/cuda_constants.h"
#include "plan/cuda_problem.h"

namespace normcore::kernels {
namespace {

TeamTiling team_tiling(const CudaPlan& plan, std::int64_t items) {
  TeamTiling t;
  t.blocks = static_cast<std::uint32_t>(plan.team);
  t.teams = static_cast<std::uint32_t>(plan.blocks / plan.team);
  t.items = items;
  t.is_cooperative = plan.path == CudaPath::kTeam;
  t.by_blocks = FastDivide(t.blocks);
  return t;
}

// As even chunks for the blocks of a team as whole segments, or pieces of one, allow.
void cut_for_team(PlanesTiling& t, std::uint32_t blocks) {
  const auto divide = [](std::uint32_t a, std::uint32_t b) { return (a + b - 1) / b; };
  t.granules_per_piece = t.granules;
  if (blocks >= 2 * t.segments) {
    t.granules_per_piece = divide(t.granules, blocks / t.segments);
    t.pieces = divide(t.granules, t.granules_per_piece);
    t.chunks = t.segments * t.pieces;
  } else {
    t.segments_per_chunk = divide(t.segments, blocks);
    t.chunks = divide(t.segments, t.segments_per_chunk);
  }
}

// As many lanes as have some records each, and as many slices as there are threads for.
MergeTiling merge_tiling(const Problem& problem, const CudaPlan& plan, std::uint32_t chunks,
                         std::uint32_t terms_of_channel) {
  MergeTiling t;
  t.slices = slice_count(problem);
  t.slices_per_sample = static_cast<std::uint32_t>(slices_per_sample(problem));
  t.channels = static_cast<std::uint32_t>(channels_per_slice(problem));
  t.is_rows = plan.layout == Layout::kNSC;
  t.chunks = chunks;
  const bool takes_channels = is_backward(problem);
  t.terms = takes_channels ? terms_of_channel : t.is_rows ? chunks * t.channels : chunks;
  const std::uint32_t items = takes_channels ? t.channels : 1;
  while (t.lanes * items * 2 <= kMergeThreads && t.lanes * kMergedRecords < t.terms) t.lanes *= 2;
  t.slices_per_block = std::max(kMergeThreads / t.lanes / items, 1u);
  t.width = plan.width;
  t.by_channels = FastDivide(t.channels);
  t.by_slices_per_sample = FastDivide(t.slices_per_sample);
  return t;
}

}  // namespace

PlanesTiling planes_tiling(const Problem& problem, const CudaPlan& plan) {
  const Extent& e = problem.extent;
  PlanesTiling t;
  t.slices = slice_count(problem);
  t.segments =
      static_cast<std::uint32_t>(is_group_norm(problem) ? channels_per_slice(problem) : e.n);
  t.plane = e.s;
  t.segment_stride = is_group_norm(problem) ? e.s : e.c * e.s;
  const std::int64_t granules = granules_per_segment(e.s, plan.width);
  t.granules = static_cast<std::uint32_t>(granules);
  t.lanes = static_cast<std::uint32_t>(plan.lanes);
  if (plan.path == CudaPath::kPack || plan.path == CudaPath::kBlock) {
    t.segments_per_chunk = t.segments;
    t.granules_per_piece = t.granules;
  } else if (is_team(plan.path)) {
    t.batches = static_cast<std::uint32_t>(plan.batches);
    t.team = team_tiling(plan, t.slices);
    cut_for_team(t, t.team.blocks);
  } else {
    t.batches = static_cast<std::uint32_t>(plan.batches);
    const std::int64_t capacity =
        static_cast<std::int64_t>(plan.threads) * plan.vectors * plan.batches;
    if (granules <= capacity) {
      t.segments_per_chunk =
          static_cast<std::uint32_t>(std::min<std::int64_t>(capacity / granules, t.segments));
      t.granules_per_piece = t.granules;
      t.chunks = static_cast<std::uint32_t>(ceil_div(t.segments, t.segments_per_chunk));
    } else {
      t.granules_per_piece = static_cast<std::uint32_t>(capacity);
      t.pieces = static_cast<std::uint32_t>(ceil_div(granules, capacity));
      t.chunks = t.segments * t.pieces;
    }
  }
  t.by_granules = FastDivide(t.granules_per_piece);
  t.by_chunks = FastDivide(t.chunks);
  t.is_group_norm = is_group_norm(problem);
  if (plan.path == CudaPath::kSplit) {
    t.merge = merge_tiling(problem, plan, t.chunks, t.terms_per_channel());
    t.merge.records = std::int64_t{t.chunks} * (is_backward(problem) ? t.channels_per_chunk() : 1u);
  }
  if (t.is_group_norm) t.by_groups = FastDivide(static_cast<std::uint32_t>(problem.num_groups));
  return t;
}

RowsTiling rows_tiling(const Problem& problem, const CudaPlan& plan) {
  const Extent& e = problem.extent;
  RowsTiling t;
  t.tiles = is_group_norm(problem) ? e.n : 1;
  t.rows = is_group_norm(problem) ? e.s : e.n * e.s;
  t.columns = static_cast<std::uint32_t>(plan.columns);
  t.column_tiles = static_cast<std::uint32_t>(ceil_div(e.c, plan.columns));
  t.column_lanes = static_cast<std::uint32_t>(plan.columns / plan.width);
  t.row_lanes = static_cast<std::uint32_t>(plan.lanes) / t.column_lanes;
  t.units =
      plan.path == CudaPath::kPack ? static_cast<std::uint32_t>(plan.threads / plan.lanes) : 1;
  t.rows_per_chunk = static_cast<std::uint32_t>(plan.rows_per_chunk);
  t.batches = static_cast<std::uint32_t>(plan.batches);
  t.chunks = static_cast<std::uint32_t>(ceil_div(t.rows, plan.rows_per_chunk));
  const std::int64_t d = channels_per_slice(problem);
  t.channels_per_slice = static_cast<std::uint32_t>(d);
  t.by_columns = FastDivide(t.columns);
  t.by_column_tiles = FastDivide(t.column_tiles);
  t.by_chunks = FastDivide(t.chunks);
  t.by_channels_per_slice = FastDivide(t.channels_per_slice);
  if (is_team(plan.path)) t.team = team_tiling(plan, t.tiles * t.column_tiles);
  if (plan.path == CudaPath::kSplit) t.merge = merge_tiling(problem, plan, t.chunks, t.chunks);
  return t;
}

RunsTiling runs_tiling(const Problem& problem, const CudaPlan& plan) {
  RunsTiling t;
  const std::int64_t run = channels_per_slice(problem);
  const std::uint32_t units = static_cast<std::uint32_t>(plan.threads / plan.lanes);
  t.samples = problem.extent.n;
  t.groups = static_cast<std::uint32_t>(problem.num_groups);
  t.vectors = static_cast<std::uint32_t>(run / plan.width);
  t.lanes = static_cast<std::uint32_t>(plan.lanes);
  t.batches = static_cast<std::uint32_t>(plan.batches);
  t.groups_per_block = std::min(t.groups, units);
  t.group_tiles = (t.groups + t.groups_per_block - 1) / t.groups_per_block;
  t.row_lanes = units / t.groups_per_block;
  t.by_groups = FastDivide(t.groups);
  t.by_group_tiles = FastDivide(t.group_tiles);
  t.by_width = FastDivide(static_cast<std::uint32_t>(run));
  return t;
}

CudaWorkspaceLayout cuda_workspace_layout(const Problem& problem, const CudaPlan& plan) {
  CudaWorkspaceLayout layout;
  const auto take = [&](std::size_t& offset, std::int64_t count, std::size_t bytes) {
    offset = layout.total;
    const std::size_t size = static_cast<std::size_t>(count) * bytes;
    layout.total += (size + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
  };
  const Extent& e = problem.extent;
  const bool is_rows = plan.layout == Layout::kNSC, is_split = plan.path == CudaPath::kSplit;
  const std::size_t arithmetic = arithmetic_bytes(problem);
  if (e.numel() == 0) return layout;
  if (is_split) {
    const PlanesTiling planes = is_rows ? PlanesTiling{} : planes_tiling(problem, plan);
    const RowsTiling rows = is_rows ? rows_tiling(problem, plan) : RowsTiling{};
    const std::int64_t row_records = rows.tiles * rows.chunks * e.c;
    const std::int64_t plane_chunks = planes.slices * planes.chunks;
    if (is_backward(problem)) {
      take(layout.records, is_rows ? row_records : plane_chunks * planes.channels_per_chunk(),
           sums_of_channel(problem) * sizeof(double));
      take(layout.channel_sums, (is_group_norm(problem) ? e.n : 1) * e.c,
           sums_of_channel(problem) * sizeof(double));
      take(layout.slices, slice_count(problem), values_of_slice(problem) * arithmetic);
    } else {
      take(layout.records, is_rows ? row_records : plane_chunks,
           is_rows ? 4 * arithmetic : kShiftedSumsBytes);
    }
  }
  if (plan.path == CudaPath::kTeam) {
    const std::int64_t records = is_rows ? plan.columns
                                 : is_backward(problem)
                                     ? planes_tiling(problem, plan).channels_per_chunk()
                                     : 1;
    take(layout.records, 2 * plan.blocks * records, team_record_bytes(problem, plan.layout));
  }
  if (is_backward(problem) && problem.is_partial && !problem.reduces) {
    take(layout.slices, slice_count(problem), values_of_slice(problem) * arithmetic);
  }
  layout.sums = layout.total;
  const bool has_sums_of_samples = is_group_norm(problem) && !problem.affine_per_sample && e.n > 1;
  if (is_backward(problem) && has_sums_of_samples && plan.path != CudaPath::kStream) {
    layout.sample_blocks = ceil_div(e.n, plan.samples_per_block);
    take(layout.parameters, layout.sample_blocks * e.c, kParameterSumsBytes);
  }
  return layout;
}

}  // namespace normcore::kernels
