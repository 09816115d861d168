#include <gtest/gtest.h>

#include "executors.h"
#include "guarded_buffer.h"
#include "runner.h"

namespace normcore::kernels::testing {
namespace {

class CpuRunner : public RunnerOf<CpuRunner> {
 public:
  using Change = void (*)(CpuPlan& plan);
  CpuRunner(
      const std::string& name, const CpuExecutor& executor, Change change = [](CpuPlan&) {})
      : RunnerOf(name), executor_(executor), change_(change) {}

  template <class Args>
  bool run_any(const Args& args) const {
    CpuPlan plan = plan_cpu(problem_of(args), executor_.num_threads);
    change_(plan);
    const GuardedBuffer workspace(plan.workspace_bytes, 64, Placement::kEnd);
    void* const data = plan.workspace_bytes == 0 ? nullptr : workspace.data();
    const Status status = kernels::run(args, plan, data, executor_);
    EXPECT_TRUE(status.ok()) << status.message;
    EXPECT_TRUE(workspace.intact()) << "workspace overrun: " << describe(plan);
    return true;
  }

  template <class Args>
  void run_unplanned(const Args& args) const {
    const Status status = kernels::run(args, executor_);
    EXPECT_TRUE(status.ok()) << status.message;
  }

 private:
  CpuExecutor executor_;
  Change change_;
};

}  // namespace

const std::vector<EqualRunners>& all_runners() {
  static const std::vector<EqualRunners> runners = [] {
    EqualRunners equal = {std::make_shared<CpuRunner>("serial", serial_executor())};
    for (const NamedExecutor& other : other_executors()) {
      equal.push_back(std::make_shared<CpuRunner>(other.name, other.executor));
    }
    // Choices that may depend on sizes of memory.
    equal.push_back(std::make_shared<CpuRunner>("serial, streaming stores", serial_executor(),
                                                [](CpuPlan& plan) { plan.stream = true; }));
    equal.push_back(std::make_shared<CpuRunner>("serial, gradients computed again",
                                                serial_executor(),
                                                [](CpuPlan& plan) { plan.keep = false; }));
    return std::vector<EqualRunners>{equal};
  }();
  return runners;
}

const Runner& default_runner() { return *all_runners().front().front(); }

const Runner& other_runner() {
  static const CpuRunner runner("threads", thread_executor());
  return runner;
}

bool runners_are_slow() { return false; }

}  // namespace normcore::kernels::testing
