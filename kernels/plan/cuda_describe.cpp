// Names and descriptions of plans.
#include <cstdio>

#include "normcore/kernels/cuda_plan.h"
#include "plan/cuda_problem.h"

namespace normcore::kernels {

const char* name_of(CudaPath path) {
  switch (path) {
    case CudaPath::kPack:
      return "pack";
    case CudaPath::kBlock:
      return "block";
    case CudaPath::kCluster:
      return "cluster";
    case CudaPath::kTeam:
      return "team";
    case CudaPath::kSplit:
      return "split";
    case CudaPath::kRun:
      return "run";
    case CudaPath::kStream:
      break;
  }
  return "stream";
}

std::optional<CudaPath> cuda_path_of(std::string_view name) {
  for (const CudaPath path :
       {CudaPath::kPack, CudaPath::kBlock, CudaPath::kCluster, CudaPath::kTeam, CudaPath::kSplit,
        CudaPath::kStream, CudaPath::kRun}) {
    if (name == name_of(path)) return path;
  }
  return std::nullopt;
}

std::string describe(const CudaPlan& plan) {
  char text[384], team[48] = "";
  if (is_team(plan.path)) {
    std::snprintf(team, sizeof(team), " in %ss of %d", name_of(plan.path), plan.team);
  }
  std::snprintf(
      text, sizeof(text),
      "%s path, %s: %lld blocks%s of %d threads, %d x %d vectors of %d elements per thread, "
      "%zu bytes of shared memory, %zu of workspace, %lld counters: %s",
      name_of(plan.path), plan.layout == Layout::kNCS ? "planes" : "rows",
      static_cast<long long>(plan.blocks), team, plan.threads, plan.batches, plan.vectors,
      plan.width, plan.shared_bytes, plan.workspace_bytes, static_cast<long long>(plan.counters),
      plan.reason);
  return text;
}

}  // namespace normcore::kernels
