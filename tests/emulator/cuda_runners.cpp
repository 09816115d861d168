// The CUDA kernels on the emulator: every path that can run a call, each under several schedules.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "emulator.h"
#include "guarded_buffer.h"
#include "normcore/kernels/cuda.h"
#include "plan/cuda_constants.h"
#include "runner.h"

namespace normcore::kernels::testing {
namespace {

// Small blocks: many of them even for small shapes, and few threads for the race detector. A smaller
// device has fewer to wait for: its blocks take more batches.
constexpr int kThreads = 64;
#if defined(__SANITIZE_THREAD__)
constexpr bool kDetectsRaces = true;
#elif defined(__has_feature)
constexpr bool kDetectsRaces = __has_feature(thread_sanitizer);
#else
constexpr bool kDetectsRaces = false;
#endif
// The race detector remembers the threads of three blocks.
constexpr int kCluster = kDetectsRaces ? 2 : kMaxCluster, kTeams = kDetectsRaces ? 1 : 3;
constexpr CudaDevice kDevice{8, kCluster}, kSmallDevice{1, kCluster};
// With so little shared memory that teams have several blocks.
constexpr std::size_t kLittle = 24 << 10;
constexpr CudaDevice kClusterDevice{2, kCluster, true, kLittle},
    kTeamDevice{kTeams, 1, true, kLittle};

class CudaRunner : public RunnerOf<CudaRunner> {
 public:
  CudaRunner(const std::string& name, const CudaDevice& device, const CudaOptions& options,
             const emulator::Schedule& schedule)
      : RunnerOf(name), device_(device), options_(options), schedule_(schedule) {}

  template <class Args>
  bool run_any(const Args& args) const {
    const auto plan = plan_cuda(problem_of(args), device_, options_);
    if (!plan) return false;
    const GuardedBuffer data(plan->workspace_bytes, 256, Placement::kEnd);
    const GuardedBuffer counters(static_cast<std::size_t>(plan->counters) * sizeof(unsigned),
                                 sizeof(unsigned), Placement::kEnd);
    if (counters.bytes() != 0) std::memset(counters.data(), 0, counters.bytes());
    emulator::use(schedule_);
    const CudaWorkspace workspace{plan->workspace_bytes == 0 ? nullptr : data.data(),
                                  reinterpret_cast<unsigned*>(counters.data())};
    const Status status = kernels::run(args, *plan, workspace, CudaStream{});
    EXPECT_TRUE(status.ok()) << status.message;
    EXPECT_TRUE(data.intact()) << "workspace overrun: " << describe(*plan);
    const bool are_zero = std::all_of(counters.data(), counters.data() + counters.bytes(),
                                      [](unsigned char byte) { return byte == 0; });
    EXPECT_TRUE(counters.intact() && are_zero) << "counters: " << describe(*plan);
    return true;
  }

  template <class Args>
  void run_unplanned(const Args& args) const {
    emulator::use(schedule_);
    const Status status = kernels::run(args, CudaStream{});
    EXPECT_TRUE(status.ok()) << status.message;
  }

 private:
  CudaDevice device_;
  CudaOptions options_;
  emulator::Schedule schedule_;
};

CudaOptions small_blocks() {
  CudaOptions options;
  options.max_threads = kThreads;
  return options;
}

CudaOptions forced(CudaPath path) {
  CudaOptions options = small_blocks();
  options.path = path;
  return options;
}

CudaOptions batch_invariant() {
  CudaOptions options = small_blocks();
  options.batch_invariant = true;
  return options;
}

}  // namespace

const std::vector<EqualRunners>& all_runners() {
  static const std::vector<EqualRunners> runners = [] {
    struct Way {
      std::string name;
      CudaDevice device;
      CudaOptions options;
    };
    std::vector<Way> ways = {{"batch invariant", kDevice, batch_invariant()},
                             {"planned path", kDevice, small_blocks()},
                             {"pack path", kDevice, forced(CudaPath::kPack)},
                             {"block path", kDevice, forced(CudaPath::kBlock)},
                             {"cluster path", kClusterDevice, forced(CudaPath::kCluster)},
                             {"team path", kTeamDevice, forced(CudaPath::kTeam)},
                             {"split path", kSmallDevice, forced(CudaPath::kSplit)},
                             {"run path", kSmallDevice, forced(CudaPath::kRun)}};
    if (!kDetectsRaces) ways.push_back({"planned path, blocks of any size", kDevice, {}});
    std::vector<EqualRunners> all;
    for (const Way& way : ways) {
      const auto runner = [&](const char* order, const emulator::Schedule& schedule) {
        return std::make_shared<CudaRunner>(way.name + order, way.device, way.options, schedule);
      };
      all.push_back({runner(", in order", emulator::in_order()),
                     runner(", random", emulator::random(0).window(3))});
      // Races show whatever the order.
      if (!kDetectsRaces) all.back().push_back(runner(", reversed", emulator::reversed()));
    }
    return all;
  }();
  return runners;
}

const Runner& default_runner() { return *all_runners().front().front(); }
const Runner& other_runner() { return *all_runners().front().back(); }
bool runners_are_slow() { return true; }

}  // namespace normcore::kernels::testing
