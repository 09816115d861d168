// The emulator itself: right kernels give the same bits under every schedule, wrong ones are caught.
#include "emulator.h"

#include <gtest/gtest.h>

#include <numeric>
#include <string>
#include <vector>

#include "plan/cuda_constants.h"
#include "planted_runs.h"

// A thread that ran into an error is abandoned: what its frames own is never freed.
extern "C" const char* __asan_default_options();
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }

namespace normcore::kernels::testing {
namespace {

const std::vector<emulator::Schedule>& schedules() {
  static const std::vector<emulator::Schedule> all = [] {
    std::vector<emulator::Schedule> some = {emulator::in_order(), emulator::reversed()};
    for (unsigned seed = 0; seed < 6; ++seed) {
      some.push_back(emulator::random(seed).window(3 + seed));
    }
    return some;
  }();
  return all;
}

// What happens with a bug under any of the schedules: the emulator's error, or "wrong result".
std::string symptom(Kernel run, Bug bug) {
  emulator::use(emulator::in_order());
  const Result right = run(Bug::kNone);
  for (const emulator::Schedule& schedule : schedules()) {
    emulator::use(schedule);
    try {
      if (run(bug) != right) return "wrong result";
    } catch (const emulator::Error& error) {
      return error.what();
    }
  }
  return "";
}

TEST(Emulator, RightKernelsGiveTheSameBitsUnderEverySchedule) {
  const std::vector<float> x = input();
  const double expected = std::accumulate(x.begin(), x.end() - 1, 0.0);
  for (const Kernel run : kAllKernels) {
    EXPECT_EQ(symptom(run, Bug::kNone), "");
    for (const float sum : run(Bug::kNone)) EXPECT_NEAR(sum, expected, 1e-5 * expected);
  }
}

void expect_symptom(Kernel run, Bug bug, const std::string& expected) {
  const std::string found = symptom(run, bug);
  EXPECT_NE(found.find(expected), std::string::npos)
      << "bug " << static_cast<int>(bug) << ": \"" << found << '"';
  EXPECT_NE(found, "");
}

TEST(Emulator, CatchesBugsOfABlock) {
  expect_symptom(run_block_sum, Bug::kNoBarrier, "wrong result");
  expect_symptom(run_block_sum, Bug::kBarrierInBranches, "divergent __syncthreads");
  expect_symptom(run_block_sum, Bug::kBarrierInOneBranch, "__syncthreads");
  expect_symptom(run_block_sum, Bug::kReadsPastTheEnd, "wrong result");
  expect_symptom(run_block_sum, Bug::kWritesPastShared, "write outside of shared memory");
  expect_symptom(run_block_sum, Bug::kLaneOutsideOfMask, "is not in its own mask");
  expect_symptom(run_block_sum, Bug::kLeavesEarly, "");
}

TEST(Emulator, CatchesTooMuchSharedMemory) {
  expect_symptom(run_block_sum, Bug::kSharedUnasked, "more than 49152 without asking for it");
  expect_symptom(run_block_sum, Bug::kSharedOverAsked, "dynamic bytes, asked for");
  expect_symptom(run_block_sum, Bug::kSharedOverDevice, "dynamic bytes, more than 101376");
  expect_symptom(run_block_sum, Bug::kStaticOverExpected, "the launch expects up to 255");
}

TEST(Emulator, LaunchAsksForTheSharedMemoryThatAKernelNeeds) {
  emulator::use(emulator::in_order());
  for (const std::size_t bytes : {std::size_t{4}, kDefaultDynamicShared, kDefaultDynamicShared + 1,
                                  kDefaultShared, kDefaultShared + 1, kMaxDynamicShared}) {
    EXPECT_EQ(large_static(bytes), 1.0f) << bytes;
  }
  EXPECT_THROW(large_static(kMaxDynamicShared + 1), emulator::Error);
}

TEST(Emulator, CatchesBugsBetweenBlocks) {
  expect_symptom(run_ticket_sum, Bug::kMergesFromItself, "wrong result");
  expect_symptom(run_ticket_sum, Bug::kTicketBeforeWrite, "wrong result");
  expect_symptom(run_ticket_sum, Bug::kTicketNotReset, "wrong result");
  expect_symptom(run_cluster_sum, Bug::kNoClusterBarrier, "has not started");
  expect_symptom(run_cluster_sum, Bug::kLeavesCluster, "has exited");
  expect_symptom(run_team_sum, Bug::kNoTeamBarrier, "wrong result");
  expect_symptom(run_team_sum, Bug::kNotCooperative, "deadlock: ");
}

TEST(Emulator, MissesWhatOnlyTheRaceDetectorSees) {
  for (const auto& [run, bug] : kRacesOnly) {
    EXPECT_EQ(symptom(run, bug), "") << "bug " << static_cast<int>(bug);
  }
}

TEST(Emulator, NamesThePlaceOfADeadlock) {
  const std::string found = symptom(run_team_sum, Bug::kNotCooperative);
  EXPECT_NE(found.find("threads at pause planted_bugs.cu:"), std::string::npos) << found;
}

}  // namespace
}  // namespace normcore::kernels::testing
