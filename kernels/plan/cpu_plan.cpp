#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdio>

#include "normcore/kernels/plan.h"
#include "plan/cpu_geometry.h"

namespace normcore::kernels {
namespace {

constexpr std::int64_t kTaskBytes = 32 << 10;  // less input is not worth another thread

constexpr std::int64_t kUnknownCache = 32 << 20;

// Outputs from this size on are streamed past the caches, which saves reading what they overwrite and
// keeps x in the cache: half of the last level, within limits, since a large one is shared with
// others.
std::int64_t least_streamed(std::int64_t cache_bytes) {
  return std::clamp<std::int64_t>(cache_bytes / 2, 4 << 20, 32 << 20);
}

// Whether the backward pass would compute an exponential per value and sweep. Under a mask what is
// kept would not say which values take part.
bool may_keep(const Problem& p) {
  return p.pass == Pass::kBackward && p.reduces && p.applies && p.mask == MaskKind::kNone &&
         is_curved(p.activation);
}

}  // namespace

std::int64_t last_level_cache() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const std::int64_t bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return kUnknownCache;
}

CpuPlan plan_cpu(const Problem& problem, int num_threads, std::int64_t cache_bytes) {
  CpuPlan plan;
  if (problem.extent.numel() == 0) {
    plan.reason = "empty";
    return plan;
  }
  const auto bytes = problem.extent.numel() * static_cast<std::int64_t>(size_of(problem.dtype));
  const std::int64_t wanted =
      std::clamp<std::int64_t>(bytes / kTaskBytes, 1, std::max(num_threads, 1));
  if (SamplesGeometry::fits(problem)) {
    const SamplesGeometry g(problem);
    plan.path = CpuPath::kSample;
    plan.tiles = g.tiles();
    plan.tasks = std::min(plan.tiles, wanted);
    plan.reason = "short slices in a row: statistics of many at a time";
    plan.workspace_bytes = workspace_layout(problem, plan).total();
    return plan;
  }
  if (problem.layout == Layout::kNCS) {
    const PlanesGeometry g(problem);
    plan.chunk = g.chunk_size();
    plan.tiles = g.tiles();
    plan.chunks = g.chunks();
  } else {
    const RowsGeometry g(problem);
    plan.chunk = g.chunk_size();
    plan.fold = g.fold();
    plan.tiles = g.tiles();
    plan.chunks = g.chunks();
  }
  // Two outputs may not start at the same place in a cache line.
  plan.stream = bytes >= least_streamed(cache_bytes) && problem.pass != Pass::kDoubleBackward;
  const std::int64_t groups = ceil_div(plan.tiles, tiles_per_group(problem));
  if (problem.pass == Pass::kInference && problem.num_groups == 0) {
    plan.path = CpuPath::kChunk;
    plan.reason = "no statistics to reduce: one sweep in memory order";
  } else if (wanted == 1) {
    plan.path = CpuPath::kSlice;
    plan.reason = "one thread, or too little work for a second";
  } else if (groups >= wanted || plan.chunks == 1) {
    plan.path = CpuPath::kSlice;
    plan.tasks = std::min(groups, wanted);
    plan.reason = groups >= wanted ? "enough slices for every thread"
                                   : "slices too small to be shared by threads";
  } else {
    plan.path = CpuPath::kChunk;
    plan.reason = "fewer slices than threads: threads share the chunks of a slice";
  }
  if (may_keep(problem)) {
    // Of all tiles under way. More would come back from memory, which takes longer than another
    // exponential.
    plan.keep = true;
    const WorkspaceLayout layout = workspace_layout(problem, plan);
    const auto kept = static_cast<std::int64_t>(layout.kept) * layout.slots;
    plan.keep = kept <= least_streamed(cache_bytes);
  }
  plan.workspace_bytes = workspace_layout(problem, plan).total();
  return plan;
}

namespace {

const char* name_of(CpuPath path) {
  switch (path) {
    case CpuPath::kSample:
      return "sample";
    case CpuPath::kSlice:
      return "slice";
    case CpuPath::kChunk:
      break;
  }
  return "chunk";
}

}  // namespace

std::string describe(const CpuPlan& plan) {
  char text[320];
  std::snprintf(
      text, sizeof(text),
      "%s path: %lld tiles of %lld chunks (chunk %lld, fold %lld), %lld tasks, %zu bytes of "
      "workspace, %s stores%s: %s",
      name_of(plan.path), static_cast<long long>(plan.tiles), static_cast<long long>(plan.chunks),
      static_cast<long long>(plan.chunk), static_cast<long long>(plan.fold),
      static_cast<long long>(plan.tasks), plan.workspace_bytes,
      plan.stream ? "streaming" : "cached",
      plan.keep ? ", gradient behind the activation kept" : "", plan.reason);
  return text;
}

}  // namespace normcore::kernels
