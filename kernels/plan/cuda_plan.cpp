#include "normcore/kernels/cuda_plan.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>

#include "plan/cpu_geometry.h"
#include "plan/cuda_constants.h"
#include "plan/cuda_problem.h"
#include "plan/cuda_tiling.h"

namespace normcore::kernels {
namespace {

constexpr std::int64_t kMaxGrid = std::numeric_limits<std::int32_t>::max();
// Of the numbers that kernels hold in 32 bits: vectors of a segment, segments, chunks.
constexpr std::int64_t kMaxCount = std::numeric_limits<std::int32_t>::max();

std::int64_t round_up(std::int64_t value, std::int64_t to) { return ceil_div(value, to) * to; }

std::int64_t power_of_two(std::int64_t at_least) {
  std::int64_t value = 1;
  while (value < at_least) value *= 2;
  return value;
}

class Planner {
 public:
  Planner(const Problem& problem, const CudaDevice& device, const CudaOptions& options)
      : problem_(problem), device_(device), options_(options) {}

  std::optional<CudaPlan> plan() {
    if (problem_.extent.numel() == 0) {
      plan_.reason = "empty";
      return plan_;
    }
    if (problem_.extent.c > kMaxCount) return std::nullopt;
    plan_.layout = layout_of(problem_);
    const bool is_planned =
        plan_runs() || (plan_.layout == Layout::kNCS ? plan_planes() : plan_rows());
    if (!is_planned) return std::nullopt;
    if (plan_.blocks > kMaxGrid || plan_.apply_blocks > kMaxGrid) return std::nullopt;
    plan_.is_plain = is_plain();
    // kSplit counts the batch in its last launch, the others when all blocks have read the old count.
    plan_.counters = problem_.cumulative && plan_.path != CudaPath::kSplit ? 1 : 0;
    if (plan_.path == CudaPath::kTeam) plan_.counters += plan_.blocks / plan_.team;
    plan_.workspace_bytes = cuda_workspace_layout(problem_, plan_).total;
    if (problem_.pass == Pass::kDoubleBackward && !is_worth_its_workspace()) return std::nullopt;
    return plan_;
  }

 private:
  bool may_take(CudaPath path) const { return !options_.path || *options_.path == path; }

  // A pass that reduces nothing has nothing to keep, one that only reduces nothing to keep it for.
  bool may_keep() const { return reduces(problem_) && !problem_.is_partial; }
  // Float64 has no registers to spare (but for runs, which may be read again).
  bool may_reside() const { return may_keep() && problem_.dtype != DType::kFloat64; }

  // Nothing to ask about single elements.
  bool is_plain() const {
    if (problem_.mask != MaskKind::kNone || !problem_.uniform) return false;
    return plan_.layout == Layout::kNSC || problem_.extent.s % plan_.width == 0;
  }

  // Of the sums of slices: the same for every number of samples if results have to be.
  bool is_worth_its_workspace() const {
    constexpr std::int64_t kSamples = 1024;
    Problem p = problem_;
    if (options_.batch_invariant && is_group_norm(p)) p.extent.n = kSamples;
    const std::size_t tensor = size_of(p.dtype) * static_cast<std::size_t>(p.extent.numel());
    return cuda_workspace_layout(p, plan_).sums <= kFreeWorkspace + kMaxWorkspaceRatio * tensor;
  }

  // Vectors are aligned in memory: samples that start within one would be cut in their own way, or
  // without vectors if they came alone.
  bool has_aligned_samples() const {
    const Extent& e = problem_.extent;
    return e.c * e.s * static_cast<std::int64_t>(size_of(problem_.dtype)) % kVectorBytes == 0;
  }
  // The width, or 1 where vectors would depend on what else is in the batch.
  int invariant(std::int64_t width) const {
    const bool is_cut = options_.batch_invariant && is_group_norm(problem_);
    return is_cut && !has_aligned_samples() ? 1 : static_cast<int>(width);
  }

  std::int64_t max_threads() const {
    return std::min<std::int64_t>(kMaxThreads, options_.max_threads);
  }

  // For units of so many lanes, of which a sample has some.
  void set_sample_blocks(std::int64_t lanes, std::int64_t units_of_sample) {
    if (!is_backward(problem_) || !is_group_norm(problem_) || problem_.affine_per_sample) return;
    const std::int64_t enough = kResidentBlocksPerMultiprocessor * device_.multiprocessors *
                                std::max<std::int64_t>(max_threads() / lanes, 1);
    const std::int64_t blocks =
        std::clamp(ceil_div(enough, units_of_sample), kSampleBlocks, kMaxSampleBlocks);
    plan_.samples_per_block = ceil_div(problem_.extent.n, blocks);
  }
  // Groups of lanes that a resident pass needs.
  std::int64_t resident_units(std::int64_t slices_per_sample) const {
    if (!is_group_norm(problem_)) return slices_per_sample;
    return ceil_div(problem_.extent.n, plan_.samples_per_block) * slices_per_sample;
  }

  std::int64_t resident_units_of_planes(std::int64_t lanes) {
    const std::int64_t slices = slices_per_sample(problem_);
    set_sample_blocks(lanes, slices);
    return resident_units(slices);
  }

  // The paths that hold a slice in registers, from the smallest holder to the largest.
  bool plan_resident_planes(std::int64_t slots) {
    return may_reside() && (plan_packed_planes(slots) || plan_block_planes(slots));
  }

  bool plan_split_or_stream(const char* split_reason) {
    plan_.vectors = kernels_of(problem_).vectors;
    plan_.path = reduces(problem_) ? CudaPath::kSplit : CudaPath::kStream;
    plan_.reason =
        plan_.path == CudaPath::kSplit ? split_reason : "nothing to reduce: one pointwise sweep";
    return may_take(plan_.path);
  }

  // ---- slices that blocks hold together

  bool may_share() const {
    return may_reside() && kernels_of(problem_).team_vectors(true) > 0 && plan_.width > 1 &&
           plan_.width == full_width(problem_);
  }

  // Calls plan() for the paths of teams, until one gives a plan. A cooperative grid only on demand, until
  // it has been measured: a simple one (benchmarks/device_limits.cu) was no faster than kSplit.
  template <class Plan>
  bool plan_shared(Plan plan) {
    if (!may_share()) return false;
    const CudaPlan before = plan_;
    for (const CudaPath path : {CudaPath::kCluster, CudaPath::kTeam}) {
      if (!may_take(path) || (path == CudaPath::kTeam && !(options_.path && device_.cooperative))) {
        continue;
      }
      plan_.path = path;
      plan_.vectors = kernels_of(problem_).team_vectors(is_plain());
      if (plan()) return true;
      plan_ = before;
    }
    return false;
  }

  // That run together: of a cooperative grid, and in clusters of so many.
  std::int64_t blocks_at_once() const {
    return team_blocks(is_plain()) *
           std::max(device_.multiprocessors - options_.spare_multiprocessors, 1);
  }
  std::int64_t blocks_of_clusters(std::int64_t blocks) const {
    const std::int64_t all = team_blocks(is_plain()) * device_.multiprocessors;
    return blocks <= 2 ? all : all * kClusterPlaces / 16;
  }

  // Of a vector of x and what is beside it in shared memory.
  std::size_t held_bytes() const {
    const std::size_t own = size_of(problem_.dtype);
    const std::size_t gradient = is_plain() ? own : arithmetic_bytes(problem_);
    return static_cast<std::size_t>(plan_.width) * (is_backward(problem_) ? own + gradient : own);
  }

  // Dynamic shared memory of a block.
  std::size_t room_of_team() const {
    const std::size_t share = device_.shared_bytes / kTeamBlocksPerMultiprocessor;
    constexpr std::size_t kOthers = kMaxStaticShared + kReservedShared;
    return share < kOthers ? 0 : std::min(share - kOthers, kMaxDynamicShared);
  }

  // Blocks of teams that hold `items`, with so many vectors each: as few as there is room in, or more to
  // fill the device, of which items_at_once are known to take part. cut(blocks) sets the parts of the plan
  // that depend on their number.
  template <class Cut>
  bool choose_team(std::int64_t items, std::int64_t items_at_once, std::int64_t vectors, Cut cut) {
    const bool is_cluster = plan_.path == CudaPath::kCluster;
    const std::int64_t most = is_cluster ? device_.max_cluster : blocks_at_once();
    const auto room = static_cast<std::int64_t>(room_of_team());
    const std::int64_t vectors_per_block = room / static_cast<std::int64_t>(held_bytes());
    if (vectors > most * vectors_per_block) return false;
    std::int64_t blocks = ceil_div(vectors, vectors_per_block);
    if (is_cluster) blocks = power_of_two(blocks);
    if (blocks > most) return false;
    const auto has_room = [&] {
      plan_.team = static_cast<int>(blocks);
      cut(blocks);
      return plan_.shared_bytes <= room_of_team();
    };
    while (!has_room()) {
      blocks = is_cluster ? 2 * blocks : blocks + 1;
      if (blocks > most) return false;
    }
    if (is_cluster) {
      const auto may_double = [&] {
        return 2 * blocks <= std::min(device_.max_cluster, kPortableCluster) &&
               items_at_once * 2 * blocks <= blocks_of_clusters(2 * blocks) &&
               vectors >= 2 * blocks * max_threads();
      };
      while (may_double()) {
        blocks *= 2;
        has_room();
      }
      plan_.blocks = items * blocks;
    } else {  // all that run together
      const std::int64_t teams = std::min(items_at_once, blocks_at_once() / blocks);
      blocks = std::min(blocks_at_once() / teams, std::max(vectors / max_threads(), blocks));
      has_room();
      plan_.blocks = std::min(items, blocks_at_once() / blocks) * blocks;
    }
    plan_.reason =
        !is_cluster   ? "blocks that run together have room for the slice in shared memory: "
                        "it is read once"
        : blocks == 1 ? "the slice fits into the shared memory of a block: it is read once"
                      : "the slice fits into the shared memory of a cluster: it is read once";
    return true;
  }

  // ---- one value per channel

  // Of whole vectors.
  bool plan_runs() {
    const Extent& e = problem_.extent;
    if (!is_group_norm(problem_) || e.s != 1 || !may_keep() || !problem_.aligned) return false;
    const std::int64_t width = invariant(full_width(problem_)), run = channels_per_slice(problem_);
    if (width == 1 || run % width != 0 || !may_take(CudaPath::kRun)) return false;
    const std::int64_t vectors = run / width;
    const std::int64_t lanes =
        std::min(power_of_two(ceil_div(vectors, kRunVectorsPerLane)),
                 std::int64_t{std::bit_floor(static_cast<std::uint32_t>(max_threads()))});
    const int held = is_backward(problem_) ? kRunGradientVectors : kRunForwardVectors;
    CudaPlan plan = plan_;
    plan.path = CudaPath::kRun;
    plan.reason = "a slice is a run of neighbouring elements: it is read from memory once";
    plan.width = static_cast<int>(width);
    plan.vectors = held;
    plan.lanes = static_cast<int>(lanes);
    plan.threads = static_cast<int>(lanes > kWarp ? lanes : max_threads());
    const std::int64_t units = plan.threads / lanes, per_lane = ceil_div(vectors, lanes);
    if (ceil_div(per_lane, held) > kMaxRunBatches) return false;
    plan.batches = static_cast<int>(ceil_div(per_lane, held));
    plan.blocks = ceil_div(e.n * problem_.num_groups, units);
    if (is_backward(problem_)) {
      const std::int64_t sums =
          problem_.affine_per_sample ? 0 : 2 * plan.threads * per_lane * width;
      plan.shared_bytes = static_cast<std::size_t>(sums) * arithmetic_bytes(problem_);
      if (plan.shared_bytes > kMaxDynamicShared) return false;
      const RunsTiling tiling = runs_tiling(problem_, plan);
      const std::int64_t steps = ceil_div(e.n, tiling.row_lanes);
      const std::int64_t enough =
          ceil_div(kRunBlocksPerMultiprocessor * device_.multiprocessors, tiling.group_tiles);
      // Their sums over samples take no more memory than sums of slices may.
      const auto step_bytes = static_cast<std::int64_t>(kMaxWorkspaceRatio *
                                                        size_of(problem_.dtype) * tiling.row_lanes);
      const std::int64_t least =
          ceil_div(static_cast<std::int64_t>(kParameterSumsBytes), step_bytes);
      plan.samples_per_block =
          std::clamp(ceil_div(steps, enough), least, kMaxRunSamples) * tiling.row_lanes;
      plan.blocks = ceil_div(e.n, plan.samples_per_block) * tiling.group_tiles;
    }
    plan_ = plan;
    return true;
  }

  // ---- kNCS

  bool plan_planes() {
    const Extent& e = problem_.extent;
    plan_.width = problem_.aligned && e.s > 1 ? static_cast<int>(full_width(problem_)) : 1;
    // Runs much shorter than a vector would leave most of it empty.
    if (2 * e.s <= plan_.width) plan_.width = 1;
    plan_.width = invariant(plan_.width);
    const std::int64_t segments = is_group_norm(problem_) ? channels_per_slice(problem_) : e.n;
    const std::int64_t granules = granules_per_segment(e.s, plan_.width);
    if (granules > kMaxCount || segments > kMaxCount) return false;
    const std::int64_t slots = segments * granules;
    if (plan_resident_planes(slots)) {
      set_shared_planes(plan_.lanes);
      if (plan_.shared_bytes <= kMaxDynamicShared) return true;
      plan_.samples_per_block = 1;
    }
    if (plan_shared([&] { return plan_team_planes(slots); })) return true;
    const char* const reason = problem_.dtype == DType::kFloat64
                                   ? "float64 takes too many registers to hold a slice"
                                   : "the slice is too large to be held";
    if (!plan_split_or_stream(reason)) return false;
    plan_.threads = plan_.lanes = static_cast<int>(max_threads());
    if (ceil_div(slots, plan_.threads) > kMaxCount) return false;
    if (!fit_chunks_to_channels(granules)) set_batches_of_planes();
    const PlanesTiling tiling = planes_tiling(problem_, plan_);
    plan_.blocks = tiling.slices * tiling.chunks;
    plan_.apply_blocks = problem_.applies ? plan_.blocks : 0;
    set_shared_planes(plan_.threads);
    return true;
  }

  // Sums of channels that share a chunk go through shared memory, vector by vector: where they are
  // long enough, and fill the device, each has a chunk, and a block of the threads that it needs.
  bool fit_chunks_to_channels(std::int64_t granules) {
    if (!is_backward(problem_) || !is_group_norm(problem_) || !reduces(problem_)) return false;
    const std::int64_t channels =
        problem_.extent.c * (options_.batch_invariant ? 1 : problem_.extent.n);
    if (channels < kPlanesBackwardBlocksPerMultiprocessor * device_.multiprocessors) return false;
    const std::int64_t batches = ceil_div(granules, max_threads() * plan_.vectors);
    if (batches > kMaxPlanesBatches) return false;
    const std::int64_t threads = round_up(ceil_div(granules, batches * plan_.vectors), kWarp);
    const std::int64_t capacity = threads * plan_.vectors * batches;
    if (capacity >= 2 * granules) return false;
    plan_.threads = plan_.lanes = static_cast<int>(threads);
    plan_.batches = static_cast<int>(batches);
    return true;
  }

  // As many as leave enough blocks, and room in shared memory.
  void set_batches_of_planes() {
    const PlanesTiling tiling = planes_tiling(problem_, plan_);
    const bool is_by_sample = is_group_norm(problem_) && options_.batch_invariant;
    const std::int64_t slices = is_by_sample ? problem_.num_groups : tiling.slices;
    const std::int64_t enough =
        device_.multiprocessors * (is_backward(problem_) ? kPlanesBackwardBlocksPerMultiprocessor
                                                         : kPlanesForwardBlocksPerMultiprocessor);
    plan_.batches = static_cast<int>(
        std::clamp<std::int64_t>(slices * tiling.chunks / enough, 1, kMaxPlanesBatches));
    while (plan_.batches > 1 && shared_bytes_of_planes(plan_.threads) > kDefaultDynamicShared) {
      --plan_.batches;
    }
  }

  bool plan_packed_planes(std::int64_t slots) {
    const int many = kernels_of(problem_).resident_vectors, few = kernels_of(problem_).few_vectors;
    if (slots > kWarp * many || !may_take(CudaPath::kPack)) return false;
    const bool is_few = plan_.width > 1 && slots <= kWarp * few;
    plan_.path = CudaPath::kPack;
    plan_.reason = "slices of a few vectors: several share a block, each is read once";
    plan_.vectors = is_few ? few : many;
    plan_.lanes = static_cast<int>(power_of_two(ceil_div(slots, plan_.vectors)));
    const std::int64_t units = resident_units_of_planes(plan_.lanes);
    plan_.threads = static_cast<int>(std::min(max_threads(), round_up(units * plan_.lanes, kWarp)));
    // Fewer units where the sums of their channels do not fit.
    while (plan_.threads > static_cast<int>(kWarp) &&
           shared_bytes_of_planes(plan_.lanes) > kMaxDynamicShared) {
      plan_.threads -= kWarp;
    }
    plan_.blocks = ceil_div(units, plan_.threads / plan_.lanes);
    return true;
  }

  bool plan_block_planes(std::int64_t slots) {
    const int many = kernels_of(problem_).resident_vectors, few = kernels_of(problem_).few_vectors;
    if (slots > max_threads() * many || !may_take(CudaPath::kBlock)) return false;
    const bool is_few = plan_.width > 1 && slots <= max_threads() * few;
    plan_.vectors = is_few ? few : many;
    plan_.path = CudaPath::kBlock;
    plan_.reason = "the slice fits into the registers of a block: it is read once";
    plan_.threads = static_cast<int>(round_up(ceil_div(slots, plan_.vectors), kWarp));
    plan_.lanes = plan_.threads;
    plan_.blocks = resident_units_of_planes(plan_.lanes);
    return true;
  }

  bool plan_team_planes(std::int64_t slots) {
    const std::int64_t slices = slice_count(problem_);
    const bool is_by_sample = is_group_norm(problem_) && options_.batch_invariant;
    return choose_team(
        slices, is_by_sample ? problem_.num_groups : slices, slots, [&](std::int64_t) {
          const PlanesTiling tiling = planes_tiling(problem_, plan_);
          const std::int64_t chunk = tiling.slots_per_chunk();
          plan_.threads = static_cast<int>(
              std::min(max_threads(), round_up(ceil_div(chunk, plan_.vectors), kWarp)));
          plan_.lanes = plan_.threads;
          plan_.batches =
              static_cast<int>(ceil_div(chunk, std::int64_t{plan_.threads} * plan_.vectors));
          plan_.shared_bytes =
              static_cast<std::size_t>(chunk) * held_bytes() + team_bytes_of_planes(tiling);
        });
  }

  // Beside what is held: records, sums of the whole slice, and of slots or warps.
  std::size_t team_bytes_of_planes(const PlanesTiling& tiling) const {
    const std::size_t record = team_record_bytes(problem_, Layout::kNCS);
    if (!is_backward(problem_)) return record;
    const std::int64_t sums = tiling.has_several_channels() ? std::int64_t{tiling.slots_per_chunk()}
                                                            : plan_.threads / std::int64_t{kWarp};
    return (tiling.channels_per_chunk() + tiling.channels_per_slice()) * record +
           static_cast<std::size_t>(sums) * sums_of_channel(problem_) * arithmetic_bytes(problem_);
  }

  bool is_resident() const {
    return plan_.path == CudaPath::kPack || plan_.path == CudaPath::kBlock;
  }

  // Sums of slots (or warps), and of channels that stay there.
  std::size_t shared_bytes_of_planes(std::int64_t lanes) const {
    if (!is_backward(problem_)) return 0;
    const PlanesTiling tiling = planes_tiling(problem_, plan_);
    const std::int64_t units = plan_.threads / lanes;
    const std::int64_t per_unit = tiling.has_several_channels()
                                      ? lanes * plan_.vectors * plan_.batches
                                      : ceil_div(lanes, kWarp);
    const std::int64_t totals = is_resident() ? units * tiling.channels_per_chunk() : 0;
    const auto sums = static_cast<std::size_t>(units * per_unit);
    return sums_of_channel(problem_) *
           (sums * arithmetic_bytes(problem_) + static_cast<std::size_t>(totals) * sizeof(double));
  }
  void set_shared_planes(std::int64_t lanes) { plan_.shared_bytes = shared_bytes_of_planes(lanes); }

  // ---- kNSC

  bool plan_rows() {
    const std::int64_t c = problem_.extent.c, width = full_width(problem_);
    plan_.width = problem_.aligned && c % width == 0 ? invariant(width) : 1;
    const std::int64_t rows =
        is_group_norm(problem_) ? problem_.extent.s : problem_.extent.n * problem_.extent.s;
    const char* reason = "float64 takes too many registers to hold a slice";
    if (may_reside() && plan_resident_rows(rows, reason)) return true;
    if (plan_shared([&] { return plan_team_rows(rows); })) return true;
    if (!plan_split_or_stream(reason)) return false;
    plan_.samples_per_block = 1;
    const std::int64_t column_lanes =
        std::min(plan_.width > 1 ? lanes_of_row() : kNarrowColumnLanes, c / plan_.width);
    plan_.threads = static_cast<int>(max_threads());
    const std::int64_t row_lanes = plan_.threads / column_lanes;
    plan_.lanes = static_cast<int>(column_lanes * row_lanes);
    plan_.columns = static_cast<int>(column_lanes * plan_.width);
    const std::int64_t batch = row_lanes * plan_.vectors;
    const std::int64_t tiles =
        is_group_norm(problem_) && !options_.batch_invariant ? problem_.extent.n : 1;
    const std::int64_t blocks = tiles * ceil_div(c, plan_.columns) * ceil_div(rows, batch);
    const std::int64_t enough = kRowsBlocksPerMultiprocessor * device_.multiprocessors;
    const std::int64_t batches =
        std::clamp<std::int64_t>(ceil_div(blocks, enough), 1, kMaxRowsBatches);
    plan_.batches = static_cast<int>(std::min(batches, ceil_div(rows, batch)));
    plan_.rows_per_chunk = batch * plan_.batches;
    const RowsTiling tiling = rows_tiling(problem_, plan_);
    plan_.blocks = tiling.tiles * tiling.chunks * tiling.column_tiles;
    plan_.apply_blocks = problem_.applies ? plan_.blocks : 0;
    set_shared_rows(tiling);
    return true;
  }

  // Never left out for an idle device: a tile is no larger than a chunk of kSplit.
  bool plan_resident_rows(std::int64_t rows, const char*& why_not) {
    why_not = "a tile of rows and whole slices is too large to be held";
    const auto bytes = static_cast<std::int64_t>(size_of(problem_.dtype));
    const std::int64_t c = problem_.extent.c;
    const int many = kernels_of(problem_).resident_vectors, few = kernels_of(problem_).few_vectors;
    const std::int64_t vectors = plan_.width > 1 && rows <= few ? few : many;
    const std::int64_t row_lanes = ceil_div(rows, vectors);
    const std::int64_t whole = std::lcm(channels_per_slice(problem_), plan_.width);
    if (whole / plan_.width * row_lanes > max_threads()) return false;
    std::int64_t columns = whole;
    while (columns * bytes < kRowBytes && columns + whole <= c &&
           (columns + whole) / plan_.width * row_lanes <= max_threads()) {
      columns += whole;
    }
    const std::int64_t lanes = columns / plan_.width * row_lanes;
    const std::size_t unit_bytes = resident_bytes_of_rows(columns, row_lanes);
    if (unit_bytes > kMaxDynamicShared) return false;
    if (!options_.path && columns * bytes < kSectorBytes && c * bytes >= kSectorBytes) {
      why_not = "a tile that can be held has rows shorter than a sector of memory";
      return false;
    }
    set_sample_blocks(lanes, ceil_div(c, columns));
    const std::int64_t all_units = resident_units(ceil_div(c, columns));
    std::int64_t units = std::clamp<std::int64_t>(max_threads() / lanes, 1, all_units);
    // Whole warps may have room for more of them.
    const auto units_of_block = [&] { return round_up(units * lanes, kWarp) / lanes; };
    while (units > 1 &&
           static_cast<std::size_t>(units_of_block()) * unit_bytes > kMaxDynamicShared) {
      --units;
    }
    const bool is_packed = units > 1 && may_take(CudaPath::kPack);
    if (!is_packed && !may_take(CudaPath::kBlock)) {
      plan_.samples_per_block = 1;
      return false;
    }
    plan_.path = is_packed ? CudaPath::kPack : CudaPath::kBlock;
    plan_.reason = is_packed ? "tiles of a few vectors: several share a block, each is read once"
                             : "a tile of rows and whole slices fits into the registers of a "
                               "block: it is read once";
    plan_.vectors = static_cast<int>(vectors);
    plan_.lanes = static_cast<int>(lanes);
    plan_.columns = static_cast<int>(columns);
    plan_.rows_per_chunk = row_lanes * vectors;
    plan_.threads = static_cast<int>(round_up((is_packed ? units : 1) * lanes, kWarp));
    plan_.blocks = ceil_div(all_units, is_packed ? units : 1);
    set_shared_rows(rows_tiling(problem_, plan_));
    return true;
  }

  // Tiles of whole slices: wide ones if those fill the device, narrower ones otherwise.
  bool plan_team_rows(std::int64_t rows) {
    const auto bytes = static_cast<std::int64_t>(size_of(problem_.dtype));
    const std::int64_t c = problem_.extent.c;
    const std::int64_t whole = std::lcm(channels_per_slice(problem_), plan_.width);
    if (whole > max_threads() * plan_.width) return false;
    std::int64_t columns = whole;
    while (columns * bytes < kRowBytes && columns + whole <= c &&
           columns + whole <= max_threads() * plan_.width) {
      columns += whole;
    }
    const std::int64_t tiles = is_group_norm(problem_) ? problem_.extent.n : 1;
    const std::int64_t tiles_at_once = options_.batch_invariant ? 1 : tiles;
    std::optional<CudaPlan> best;
    for (; columns > 0; columns = columns / 2 / whole * whole) {
      const std::int64_t least = best ? kSectorBytes : kTeamRowBytes;
      if (columns * bytes < std::min(least, c * bytes) && !(options_.path && !best)) break;
      plan_.columns = static_cast<int>(columns);
      const std::int64_t items = ceil_div(c, columns), lanes = columns / plan_.width;
      const bool is_chosen =
          choose_team(tiles * items, tiles_at_once * items, rows * lanes,
                      [&](std::int64_t blocks) { cut_rows(ceil_div(rows, blocks), lanes); });
      if (is_chosen) best = plan_;
      if (is_chosen && tiles_at_once * items * plan_.team >= device_.multiprocessors) break;
    }
    if (best) plan_ = *best;
    return best.has_value();
  }

  // Chunks of so many rows for units of so many neighbouring lanes.
  void cut_rows(std::int64_t rows, std::int64_t column_lanes) {
    const std::int64_t row_lanes =
        std::min(ceil_div(rows, plan_.vectors), max_threads() / column_lanes);
    plan_.lanes = static_cast<int>(column_lanes * row_lanes);
    plan_.threads = static_cast<int>(round_up(plan_.lanes, kWarp));
    plan_.rows_per_chunk = rows;
    plan_.batches = static_cast<int>(ceil_div(rows, row_lanes * plan_.vectors));
    // Sums of the whole team and records, then what a resident unit has.
    const std::size_t record = team_record_bytes(problem_, Layout::kNSC),
                      arithmetic = arithmetic_bytes(problem_);
    const std::size_t of_column = is_backward(problem_)
                                      ? 2 * record + values_of_slice(problem_) * arithmetic
                                      : record + kShiftedSumsBytes;
    plan_.shared_bytes = static_cast<std::size_t>(rows * column_lanes) * held_bytes() +
                         static_cast<std::size_t>(plan_.columns) * of_column +
                         lane_bytes_of_rows(plan_.columns, row_lanes);
  }

  // Those that read kRowBytes with vectors.
  std::int64_t lanes_of_row() const {
    return kRowBytes / (plan_.width * static_cast<std::int64_t>(size_of(problem_.dtype)));
  }

  // Sums of the lanes of a unit.
  std::size_t lane_bytes_of_rows(std::int64_t columns, std::int64_t row_lanes) const {
    const std::size_t sums = is_backward(problem_) ? sums_of_channel(problem_) : 3;
    return static_cast<std::size_t>(columns * row_lanes) * sums * arithmetic_bytes(problem_);
  }
  // And in a resident pass coefficients, and sums of channels, if those are not of a single row of lanes.
  std::size_t resident_bytes_of_rows(std::int64_t columns, std::int64_t row_lanes) const {
    const std::size_t arithmetic = arithmetic_bytes(problem_);
    std::size_t of_column = 4 * arithmetic;
    if (is_backward(problem_)) {
      const std::size_t totals = row_lanes > 1 ? sums_of_channel(problem_) * sizeof(double) : 0;
      of_column = totals + values_of_slice(problem_) * arithmetic;
    }
    return lane_bytes_of_rows(columns, row_lanes) + static_cast<std::size_t>(columns) * of_column;
  }

  void set_shared_rows(const RowsTiling& tiling) {
    const bool keeps_columns = is_resident() || !is_backward(problem_);
    plan_.shared_bytes =
        tiling.units * (keeps_columns ? resident_bytes_of_rows(tiling.columns, tiling.row_lanes)
                                      : lane_bytes_of_rows(tiling.columns, tiling.row_lanes));
  }

  const Problem& problem_;
  const CudaDevice& device_;
  const CudaOptions& options_;
  CudaPlan plan_;
};

}  // namespace

std::optional<CudaPlan> plan_cuda(const Problem& problem, const CudaDevice& device,
                                  const CudaOptions& options) {
  return Planner(problem, device, options).plan();
}

CudaDevice with_less_room(const CudaDevice& device, const CudaPlan& plan) {
  CudaDevice less = device;
  if (plan.path == CudaPath::kTeam) {
    less.cooperative = false;
  } else {
    less.max_cluster = std::max(plan.team / 2, 1);
  }
  return less;
}

}  // namespace normcore::kernels
