// The emulator with a race detector: right kernels give no report, racy ones end the process.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>

#include "emulator.h"
#include "planted_runs.h"

// The first report ends the process, of whichever test: kernels must give none.
extern "C" const char* __tsan_default_options();
extern "C" const char* __tsan_default_options() { return "halt_on_error=1:exitcode=66"; }

namespace normcore::kernels::testing {
namespace {

constexpr emulator::Schedule kSchedules[] = {emulator::in_order().window(3),
                                             emulator::random(0).window(3)};

void expect_race(Kernel run, Bug bug, const emulator::Schedule& schedule) {
  constexpr int kRaceReported = 66;
  const auto run_once = [&] {
    emulator::use(schedule);
    run(bug);
    std::fprintf(stderr, "not reported\n");
    std::_Exit(0);
  };
  EXPECT_EXIT(run_once(), ::testing::ExitedWithCode(kRaceReported), "data race")
      << "bug " << static_cast<int>(bug) << ", seed " << schedule.seed();
}

class RaceDetector : public ::testing::Test {
 protected:
  // A new process for each: the sanitizer need not survive a fork.
  void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
};

TEST_F(RaceDetector, ReportsNothingForRightKernels) {
  for (const emulator::Schedule& schedule : kSchedules) {
    emulator::use(schedule);
    for (const Kernel run : kAllKernels) run(Bug::kNone);
  }
}

TEST_F(RaceDetector, ReportsWhatNoScheduleShows) {
  for (const emulator::Schedule& schedule : kSchedules) {
    for (const auto& [run, bug] : kRacesOnly) expect_race(run, bug, schedule);
  }
}

// Where a schedule would have to be lucky to give wrong values: one in order is enough.
TEST_F(RaceDetector, ReportsWhatSomeSchedulesShow) {
  const emulator::Schedule in_order = emulator::in_order().window(3);
  expect_race(run_block_sum, Bug::kNoBarrier, in_order);
  expect_race(run_ticket_sum, Bug::kTicketBeforeWrite, in_order);
  expect_race(run_team_sum, Bug::kNoTeamBarrier, in_order);
}

TEST_F(RaceDetector, EndsTheProcessWithTheEmulatorsError) {
  emulator::use(emulator::in_order());
  EXPECT_DEATH(run_block_sum(Bug::kBarrierInBranches), "emulator: divergent __syncthreads");
}

}  // namespace
}  // namespace normcore::kernels::testing
