#include "plan/cpu_geometry.h"

#include <numeric>

namespace normcore::kernels {
namespace {

constexpr std::int64_t kRunChunk = 4096;      // values per leaf of the tree, kNCS
constexpr std::int64_t kShortRun = 1024;      // batch norm tiles channels whose planes are shorter
constexpr std::int64_t kPieceValues = 32768;  // values per unit of the second sweep
constexpr std::int64_t kRowChunkValues =
    65536;  // values per leaf of the tree, kNSC, within the next two limits
constexpr std::int64_t kMinRows = 128, kMaxRowsPerChunk = 1024;
constexpr std::int64_t kLaneMultiple =
    32;  // columns of a folded row are a multiple of this when possible
constexpr std::int64_t kWideRow = 128;  // columns from which rows are not folded further
constexpr std::int64_t kMaxFoldedColumns = 2048;
// Whole samples: values of a slice, positions of a channel that have coefficients of their own,
// columns, and columns of a part, whose arrays stay in the first two levels of cache.
constexpr std::int64_t kMaxSlice = 2048, kMaxPositions = 16, kMaxColumns = 65536;
constexpr std::int64_t kPartColumns = 1024;

std::size_t round_up(std::int64_t bytes) {
  return static_cast<std::size_t>((bytes + 63) / 64 * 64);
}

std::int64_t fold_of(std::int64_t c, std::int64_t rows) {
  std::int64_t fold = kLaneMultiple / std::gcd(c, kLaneMultiple);
  if (fold * c < kWideRow) fold *= ceil_div(kWideRow, fold * c);
  if (fold * c > kMaxFoldedColumns) fold = 1;
  return std::min(fold, std::max<std::int64_t>(rows, 1));
}

}  // namespace

PlanesGeometry::PlanesGeometry(const Problem& p)
    : n_(p.extent.n),
      c_(p.extent.c),
      s_(p.extent.s),
      groups_(p.num_groups),
      group_norm_(p.num_groups != 0) {
  const bool backward = is_backward(p.pass);
  channel_records_ = !group_norm_ || backward;
  if (group_norm_) {
    planes_ = c_ / groups_;
    tiles_ = n_ * groups_;
    // planes are contiguous: one run, unless something differs from plane to plane
    const bool by_plane = backward || p.mask == MaskKind::kRow;
    runs_ = by_plane && !backward ? planes_ : 1;
    run_stride_ = s_;
    length_ = by_plane ? s_ : planes_ * s_;
  } else {
    // neighbouring short planes share cache lines and calls; inference has nothing to reduce and
    // takes all channels
    const std::int64_t together = s_ < kShortRun ? kRunChunk / s_ + 1 : 1;
    planes_ = p.pass == Pass::kInference ? c_ : std::min(c_, together);
    tiles_ = ceil_div(c_, planes_);
    runs_ = n_;
    run_stride_ = c_ * s_;
    length_ = s_;
  }
  chunk_ = kRunChunk;
  chunks_per_run_ = ceil_div(length_, chunk_);
  runs_per_chunk_ = length_ >= chunk_ ? 1 : std::max<std::int64_t>(1, chunk_ / length_);
  chunks_ = chunks_per_run_ > 1 ? runs_ * chunks_per_run_ : ceil_div(runs_, runs_per_chunk_);
  if (p.pass == Pass::kInference) chunks_ = 0;
  piece_length_ = std::min(s_, kPieceValues);
  pieces_per_plane_ = ceil_div(s_, piece_length_);
  planes_per_piece_ = std::max<std::int64_t>(1, kPieceValues / s_);
}

RunChunk PlanesGeometry::chunk(const PlanesTile& tile, std::int64_t index) const {
  RunChunk out;
  std::int64_t run, start = 0;
  if (chunks_per_run_ > 1) {
    run = index / chunks_per_run_;
    start = index % chunks_per_run_ * chunk_;
    out.runs = 1;
    out.length = std::min(chunk_, length_ - start);
  } else {
    run = index * runs_per_chunk_;
    out.runs = std::min(runs_per_chunk_, runs_ - run);
    out.length = length_;
  }
  out.offset = run * run_stride_ + start;
  out.kept_offset = run * kept_run_stride() + start;
  out.row_mask_offset = tile.sample * s_ + run * row_mask_run_stride() + start;
  return out;
}

PlanePiece PlanesGeometry::piece(const PlanesTile& tile, std::int64_t index) const {
  // Divisions by 1 would take a good part of what a short tile does.
  const auto quotient = [](std::int64_t a, std::int64_t b) { return b == 1 ? a : a / b; };
  const std::int64_t per_block = pieces_per_block(tile), block = quotient(index, per_block),
                     within = index - block * per_block,
                     plane = quotient(within, pieces_per_plane_),
                     start = (within - plane * pieces_per_plane_) * piece_length_;
  PlanePiece out;
  out.first_plane = plane * planes_per_piece_;
  out.planes = std::min(planes_per_piece_, tile.planes - out.first_plane);
  out.length = std::min(piece_length_, s_ - start);
  out.offset = block * run_stride_ + out.first_plane * s_ + start;
  out.kept_offset = block * kept_run_stride() + out.first_plane * s_ + start;
  out.row_mask_offset = (group_norm_ ? tile.sample : block) * s_ + start;
  return out;
}

RowsGeometry::RowsGeometry(const Problem& p) : c_(p.extent.c) {
  const bool group_norm = p.num_groups != 0;
  tiles_ = group_norm ? p.extent.n : 1;
  rows_ = group_norm ? p.extent.s : p.extent.n * p.extent.s;
  fold_ = p.mask == MaskKind::kRow ? 1 : fold_of(c_, rows_);
  chunk_ = std::clamp(kRowChunkValues / width(), kMinRows, kMaxRowsPerChunk);
  chunks_ = ceil_div(rows_ / fold_, chunk_) + (rows_ % fold_ != 0 ? 1 : 0);
}

RowChunk RowsGeometry::chunk(std::int64_t index) const {
  const std::int64_t folded = rows_ / fold_, first = index * chunk_;
  if (first < folded) return {first * fold_, std::min(chunk_, folded - first), width()};
  return {folded * fold_, 1, rows_ % fold_ * c_};
}

SamplesGeometry::SamplesGeometry(const Problem& p)
    : n_(p.extent.n),
      c_(p.extent.c),
      s_(p.extent.s),
      groups_(p.num_groups),
      per_block_(samples_per_block(p.extent.n)) {
  slices_per_part_ = std::clamp<std::int64_t>(kPartColumns / slice_size(), 1, groups_);
  parts_ = ceil_div(groups_, slices_per_part_);
}

bool SamplesGeometry::fits(const Problem& p) {
  if (p.num_groups == 0 || p.mask != MaskKind::kNone || p.is_partial) return false;
  const bool is_dense = p.layout == Layout::kNCS || p.extent.s == 1;
  const std::int64_t columns = p.extent.c * p.extent.s;
  return is_dense && p.extent.s <= (p.affine_per_sample ? 1 : kMaxPositions) &&
         columns <= kMaxColumns && columns / p.num_groups <= kMaxSlice;
}

std::int64_t tiles_per_group(const Problem& p) {
  if (p.num_groups == 0 || !is_backward(p.pass)) return 1;
  // Slices of one sample have parameters of their own; only samples share them.
  const std::int64_t samples = samples_per_block(p.extent.n);
  return samples == 1 ? 1 : samples * (p.layout == Layout::kNCS ? p.num_groups : 1);
}

WorkspaceLayout workspace_layout(const Problem& p, const CpuPlan& plan) {
  const auto element = static_cast<std::int64_t>(size_of(compute_type(p.dtype)));
  const bool backward = is_backward(p.pass), planes = p.layout == Layout::kNCS;
  constexpr std::int64_t kDouble = sizeof(double);
  const PassArrays arrays = arrays_of(p.pass);
  // Moments are float64.
  const std::int64_t partial = backward ? element : kDouble;
  WorkspaceLayout w;
  const bool is_samples = plan.path == CpuPath::kSample;
  w.affine = arrays.parameters * round_up(p.extent.c * (is_samples ? p.extent.s : 1) *
                                          (p.affine_per_sample ? p.extent.n : 1) * element);
  if (backward && p.num_groups != 0) {
    w.parameters =
        round_up(ceil_div(p.extent.n, samples_per_block(p.extent.n)) * p.extent.c * 2 * kDouble);
  }
  if (is_samples) {
    const SamplesGeometry g(p);
    const std::int64_t scratch = g.scratch_arrays(p.pass) + (backward ? g.kSumArrays : 0);
    w.state = round_up(scratch * g.padded_columns() * element);
  } else if (planes) {
    const PlanesGeometry g(p);
    w.state = arrays.coefficients * round_up(g.max_planes() * element) +
              round_up(arrays.merged * g.max_records() * kDouble);
    w.partial = arrays.sums * round_up(g.max_records() * partial);
    w.kept = plan.keep ? round_up(g.tile_size() * element) : 0;
  } else {
    const RowsGeometry g(p);
    w.state = arrays.coefficients * round_up(g.width() * element) +
              round_up(arrays.merged * p.extent.c * kDouble);
    w.partial = arrays.sums * round_up(g.width() * partial);
    w.kept = plan.keep ? round_up(g.tile_size() * element) : 0;
  }
  w.slots = plan.path == CpuPath::kChunk ? plan.tiles : plan.tasks;
  w.chunks = p.pass == Pass::kInference ? 0 : plan.chunks;
  return w;
}

}  // namespace normcore::kernels
