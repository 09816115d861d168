#include "normcore/settings.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <optional>

#include "wanted_path.h"

namespace normcore {
namespace {

std::atomic<bool> is_batch_invariant{false}, is_sync_debugged{false};
std::atomic<std::optional<kernels::CudaPath>> wanted_path{std::nullopt};
std::atomic<int> spare{0};

}  // namespace

void set_batch_invariant(bool enabled) { is_batch_invariant = enabled; }
bool batch_invariant() { return is_batch_invariant; }

void set_cuda_path(const std::string& name) {
  const auto path = kernels::cuda_path_of(name);
  TORCH_CHECK_VALUE(path || name.empty(),
                    "set_cuda_path: expected name to be pack, block, cluster, team, split, stream, "
                    "run or empty, got ",
                    name);
  wanted_path = path;
}
std::string cuda_path() {
  const auto path = wanted_cuda_path();
  return path ? name_of(*path) : "";
}
std::optional<kernels::CudaPath> wanted_cuda_path() { return wanted_path; }

void set_spare_multiprocessors(int count) {
  TORCH_CHECK_VALUE(count >= 0, "set_spare_multiprocessors: expected count >= 0, got ", count);
  spare = count;
}
int spare_multiprocessors() { return spare; }

void set_debug_sync(bool enabled) { is_sync_debugged = enabled; }
bool debug_sync() { return is_sync_debugged; }

}  // namespace normcore
