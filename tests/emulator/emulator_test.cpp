// The emulator itself: right kernels give the same bits under every schedule, wrong ones are caught.
#include "emulator.h"

#include <gtest/gtest.h>

#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "planted_bugs.h"

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

constexpr int kSize = 1000, kBlocks = 6, kCluster = 4;

std::vector<float> input() {
  std::vector<float> x(kSize + 1, std::numeric_limits<float>::quiet_NaN());  // one past the end
  // Of many magnitudes: another order of additions has another rounding.
  for (int i = 0; i < kSize; ++i) {
    x[static_cast<std::size_t>(i)] =
        0.1f * static_cast<float>(i % 37) * static_cast<float>(1 << (i % 13));
  }
  return x;
}

using Result = std::vector<float>;

Result run_block_sum(Bug bug) {
  Result sum(1, -1.0f);
  block_sum(input().data(), kSize, sum.data(), bug);
  return sum;
}

// Twice: a ticket that is not reset shows in the second launch.
Result run_ticket_sum(Bug bug) {
  Result result;
  std::vector<float> partials(kBlocks, std::numeric_limits<float>::quiet_NaN());
  unsigned ticket = 0;
  for (int launch = 0; launch < 2; ++launch) {
    float sum = -1.0f;
    ticket_sum(input().data(), kSize, kBlocks, partials.data(), &ticket, &sum, bug);
    result.push_back(sum);
    partials.assign(kBlocks, std::numeric_limits<float>::quiet_NaN());
  }
  return result;
}

Result run_cluster_sum(Bug bug) {
  Result sums(kCluster, -1.0f);
  cluster_sum(input().data(), kSize, sums.data(), bug);
  return sums;
}

Result run_team_sum(Bug bug) {
  Result sums(kBlocks, -1.0f);
  std::vector<float> partials(kBlocks, std::numeric_limits<float>::quiet_NaN());
  unsigned counter = 0;
  team_sum(input().data(), kSize, kBlocks, partials.data(), &counter, sums.data(), bug);
  return sums;
}

// What happens with a bug under any of the schedules: the emulator's error, or "wrong result".
std::string symptom(Result (*run)(Bug), Bug bug) {
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

using Kernel = Result (*)(Bug);

TEST(Emulator, RightKernelsGiveTheSameBitsUnderEverySchedule) {
  const std::vector<float> x = input();
  const double expected = std::accumulate(x.begin(), x.end() - 1, 0.0);
  for (const Kernel run : {run_block_sum, run_ticket_sum, run_cluster_sum, run_team_sum}) {
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

TEST(Emulator, CatchesBugsBetweenBlocks) {
  expect_symptom(run_ticket_sum, Bug::kMergesFromItself, "wrong result");
  expect_symptom(run_ticket_sum, Bug::kTicketBeforeWrite, "wrong result");
  expect_symptom(run_ticket_sum, Bug::kTicketNotReset, "wrong result");
  expect_symptom(run_cluster_sum, Bug::kNoClusterBarrier, "has not started");
  expect_symptom(run_cluster_sum, Bug::kLeavesCluster, "has exited");
  expect_symptom(run_team_sum, Bug::kNoTeamBarrier, "wrong result");
  expect_symptom(run_team_sum, Bug::kNotCooperative, "deadlock: ");
}

TEST(Emulator, NamesThePlaceOfADeadlock) {
  const std::string found = symptom(run_team_sum, Bug::kNotCooperative);
  EXPECT_NE(found.find("threads at pause planted_bugs.cu:"), std::string::npos) << found;
}

}  // namespace
}  // namespace normcore::kernels::testing
