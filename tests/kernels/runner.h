// The ways to run the kernels that the tests try: executors on the CPU, schedules and paths of the
// CUDA emulator. The test sources are the same for all; which runners exist is decided by the file
// that is linked with them (cpu_runners.cpp, ../emulator/cuda_runners.cpp).
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "normcore/kernels/batch_norm.h"
#include "normcore/kernels/group_norm.h"
#include "normcore/kernels/sync.h"

namespace normcore::kernels::testing {

class Runner {
 public:
  virtual ~Runner() = default;
  virtual std::string name() const = 0;
  // Plans the call and runs it, with a guarded workspace of exactly the planned size. False if this
  // way does not exist for the call; then nothing was written.
  virtual bool run(const BatchNormForwardArgs& args) const = 0;
  virtual bool run(const BatchNormInferenceArgs& args) const = 0;
  virtual bool run(const BatchNormBackwardArgs& args) const = 0;
  virtual bool run(const BatchNormDoubleBackwardArgs& args) const = 0;
  virtual bool run(const GroupNormForwardArgs& args) const = 0;
  virtual bool run(const GroupNormBackwardArgs& args) const = 0;
  virtual bool run(const GroupNormDoubleBackwardArgs& args) const = 0;
  virtual bool run(const SyncMomentsArgs& args) const = 0;
  virtual bool run(const SyncApplyArgs& args) const = 0;
  virtual bool run(const SyncGradientSumsArgs& args) const = 0;
  virtual bool run(const SyncGradientArgs& args) const = 0;
  virtual void run(const SyncStatisticsArgs& args) const = 0;  // needs no plan
};

// Runners that give the same bits for every call.
using EqualRunners = std::vector<std::shared_ptr<const Runner>>;

const std::vector<EqualRunners>& all_runners();
// One that runs every call that has a kernel, and one that shares the work out in another way with
// the same bits.
const Runner& default_runner();
const Runner& other_runner();
// Whether a call takes a thousand times as long as the kernels it is about.
bool runners_are_slow();

// For entries that are overloads: all of them are Derived::run_any(args).
template <class Derived>
class RunnerOf : public Runner {
 public:
  explicit RunnerOf(std::string name) : name_(std::move(name)) {}
  std::string name() const override { return name_; }
  bool run(const BatchNormForwardArgs& args) const override { return derived().run_any(args); }
  bool run(const BatchNormInferenceArgs& args) const override { return derived().run_any(args); }
  bool run(const BatchNormBackwardArgs& args) const override { return derived().run_any(args); }
  bool run(const BatchNormDoubleBackwardArgs& args) const override {
    return derived().run_any(args);
  }
  bool run(const GroupNormForwardArgs& args) const override { return derived().run_any(args); }
  bool run(const GroupNormBackwardArgs& args) const override { return derived().run_any(args); }
  bool run(const GroupNormDoubleBackwardArgs& args) const override {
    return derived().run_any(args);
  }
  bool run(const SyncMomentsArgs& args) const override { return derived().run_any(args); }
  bool run(const SyncApplyArgs& args) const override { return derived().run_any(args); }
  bool run(const SyncGradientSumsArgs& args) const override { return derived().run_any(args); }
  bool run(const SyncGradientArgs& args) const override { return derived().run_any(args); }
  void run(const SyncStatisticsArgs& args) const override { derived().run_unplanned(args); }

 private:
  const Derived& derived() const { return static_cast<const Derived&>(*this); }
  std::string name_;
};

}  // namespace normcore::kernels::testing
