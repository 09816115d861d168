#include <algorithm>
#include <cstdio>

#include "normcore/kernels/plan.h"
#include "plan/cpu_geometry.h"

namespace normcore::kernels {
namespace {

constexpr std::int64_t kTaskBytes = 32 << 10;  // less input is not worth another thread

}  // namespace

CpuPlan plan_cpu(const Problem& problem, int num_threads) {
  CpuPlan plan;
  if (problem.extent.numel() == 0) {
    plan.reason = "empty";
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
  const auto bytes = problem.extent.numel() * static_cast<std::int64_t>(size_of(problem.dtype));
  const std::int64_t groups = ceil_div(plan.tiles, tiles_per_group(problem));
  const std::int64_t wanted =
      std::clamp<std::int64_t>(bytes / kTaskBytes, 1, std::max(num_threads, 1));
  if (problem.pass == Pass::kInference) {
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
  plan.workspace_bytes = workspace_layout(problem, plan).total();
  return plan;
}

std::string describe(const CpuPlan& plan) {
  char text[256];
  std::snprintf(
      text, sizeof(text),
      "%s path: %lld tiles of %lld chunks (chunk %lld, fold %lld), %lld tasks, %zu bytes of "
      "workspace: %s",
      plan.path == CpuPath::kSlice ? "slice" : "chunk", static_cast<long long>(plan.tiles),
      static_cast<long long>(plan.chunks), static_cast<long long>(plan.chunk),
      static_cast<long long>(plan.fold), static_cast<long long>(plan.tasks), plan.workspace_bytes,
      plan.reason);
  return text;
}

}  // namespace normcore::kernels
