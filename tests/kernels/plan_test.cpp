#include "normcore/kernels/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <sstream>
#include <string>

#include "norm_case.h"
#include "problems.h"

namespace normcore::kernels::testing {
namespace {

constexpr int kThreadCounts[] = {1, 2, 3, 8, 64, 256};

TEST(Plan, IsLegalForEveryShape) {
  for_each_problem([](const Problem& p) {
    for (const int threads : kThreadCounts) {
      const CpuPlan plan = plan_cpu(p, threads);
      const std::string what = to_string(p) + ": " + describe(plan);
      const bool has_chunks = plan.path != CpuPath::kSample;
      ASSERT_EQ(plan.chunk > 0, has_chunks) << what;
      ASSERT_GE(plan.fold, 1) << what;
      ASSERT_GE(plan.tiles, 1) << what;
      ASSERT_GE(plan.tasks, 1) << what;
      ASSERT_LE(plan.tasks, threads) << what;
      ASSERT_STRNE(plan.reason, "") << what;
      if (p.pass != Pass::kInference && has_chunks) {
        ASSERT_GE(plan.chunks, 1) << what;
      }
    }
  });
}

// A leaf of the reduction tree keeps float32 chains short: at most 1024 additions per lane.
TEST(Plan, ChunksAreShort) {
  for_each_problem([](const Problem& p) {
    const CpuPlan plan = plan_cpu(p, 1);
    ASSERT_LE(plan.chunk, p.layout == Layout::kNCS ? 4096 : 1024) << to_string(p);
  });
}

TEST(Plan, ReductionTreeDoesNotDependOnThreads) {
  for_each_problem([](const Problem& p) {
    const CpuPlan one = plan_cpu(p, 1);
    for (const int threads : kThreadCounts) {
      const CpuPlan plan = plan_cpu(p, threads);
      ASSERT_EQ(plan.chunk, one.chunk) << to_string(p);
      ASSERT_EQ(plan.fold, one.fold) << to_string(p);
      ASSERT_EQ(plan.chunks, one.chunks) << to_string(p);
    }
  });
}

TEST(Plan, ReductionTreeOfGroupNormDoesNotDependOnTheBatch) {
  for_each_problem([](const Problem& p) {
    if (p.num_groups == 0) return;
    Problem sample = p;
    sample.extent.n = 1;
    const CpuPlan alone = plan_cpu(sample, 1), batch = plan_cpu(p, 8);
    ASSERT_EQ(alone.chunk, batch.chunk) << to_string(p);
    ASSERT_EQ(alone.fold, batch.fold) << to_string(p);
    ASSERT_EQ(alone.chunks, batch.chunks) << to_string(p);
  });
}

// Scratch memory: less than the tensor in float64, beside what slices, parameters and threads need.
TEST(Plan, WorkspaceIsSmall) {
  for_each_problem([](const Problem& p) {
    for (const int threads : {1, 2, 8, 64}) {
      const CpuPlan plan = plan_cpu(p, threads);
      const std::int64_t slices = p.num_groups == 0 ? p.extent.c : p.extent.n * p.num_groups;
      const std::int64_t samples = p.num_groups == 0 ? 1 : p.extent.n;
      const std::int64_t columns =
          plan.path == CpuPath::kSample
              ? p.extent.c * p.extent.s
              : std::max(p.extent.c, std::min<std::int64_t>(16 * p.extent.c, 2048));
      // The double backward pass has more sums and coefficients.
      const std::int64_t more = p.pass == Pass::kDoubleBackward ? 3 : 1;
      const std::int64_t limit = 8 * p.extent.numel() + 512 * slices +
                                 more * (32 * p.extent.c * samples + 128 * columns * threads) +
                                 65536;
      ASSERT_LE(plan.workspace_bytes, static_cast<std::size_t>(limit))
          << to_string(p) << " with " << threads << " threads: " << describe(plan);
    }
  });
}

TEST(Plan, UsesThreadsForLargeInputsOnly) {
  Problem small;
  small.extent = {2, 8, 16};
  EXPECT_EQ(plan_cpu(small, 8).path, CpuPath::kSlice);
  EXPECT_EQ(plan_cpu(small, 8).tasks, 1);
  Problem large;
  large.extent = {32, 64, 3136};
  EXPECT_EQ(plan_cpu(large, 8).tasks, 8) << "64 channels for 8 threads";
  large.extent = {2, 2, 1 << 20};
  EXPECT_EQ(plan_cpu(large, 8).path, CpuPath::kChunk) << "2 channels for 8 threads";
  large.extent = {1, 512, 1024};
  large.num_groups = 32;
  large.pass = Pass::kBackward;
  EXPECT_EQ(plan_cpu(large, 8).tasks, 8) << "one sample, but 32 groups for 8 threads";
}

TEST(Plan, StreamsOutputsThatTheCacheCannotHold) {
  constexpr std::int64_t kMiB = 1 << 20;
  const auto streams = [](std::int64_t output, std::int64_t cache) {
    Problem problem;
    problem.dtype = DType::kBFloat16;
    problem.extent = {1, 2, output / 4};
    const bool stream = plan_cpu(problem, 1, cache).stream;
    EXPECT_EQ(plan_cpu(problem, 8, cache).stream, stream) << "whatever the threads";
    return stream;
  };
  EXPECT_FALSE(streams(15 * kMiB, 32 * kMiB));
  EXPECT_TRUE(streams(16 * kMiB, 32 * kMiB));
  EXPECT_FALSE(streams(3 * kMiB, kMiB)) << "too small to matter";
  EXPECT_TRUE(streams(4 * kMiB, kMiB));
  EXPECT_FALSE(streams(31 * kMiB, 1024 * kMiB));
  EXPECT_TRUE(streams(32 * kMiB, 1024 * kMiB)) << "a large cache is shared with others";
}

TEST(Plan, KeepsGradientsBehindActivationsThatCost) {
  Problem problem;
  problem.extent = {2, 64, 64 * 64};
  problem.num_groups = 32;
  problem.pass = Pass::kBackward;
  EXPECT_FALSE(plan_cpu(problem, 2).keep);
  problem.activation = Activation::kReLU;
  EXPECT_FALSE(plan_cpu(problem, 2).keep);
  problem.activation = Activation::kSiLU;
  EXPECT_TRUE(plan_cpu(problem, 2).keep);
  EXPECT_NE(describe(plan_cpu(problem, 2)).find("kept"), std::string::npos);
  problem.applies = false;
  EXPECT_FALSE(plan_cpu(problem, 2).keep) << "one sweep";
  problem.applies = true;
  problem.mask = MaskKind::kRow;
  EXPECT_FALSE(plan_cpu(problem, 2).keep);
  problem.mask = MaskKind::kNone;
  constexpr std::int64_t kMiB = 1 << 20;
  problem.num_groups = 1;
  problem.extent = {1, 4, kMiB};  // 16 MiB of float32
  EXPECT_TRUE(plan_cpu(problem, 1, 32 * kMiB).keep);
  EXPECT_FALSE(plan_cpu(problem, 1, 31 * kMiB).keep) << "they would come back from memory";
  problem.extent.n = 2;
  EXPECT_TRUE(plan_cpu(problem, 1, 32 * kMiB).keep) << "a tile at a time";
  EXPECT_FALSE(plan_cpu(problem, 2, 32 * kMiB).keep) << "two tiles at a time";
}

TEST(Plan, TakesWholeSamplesOfShortSlices) {
  const auto path = [](Extent extent, Layout layout, std::int64_t num_groups) {
    Problem problem;
    problem.extent = extent;
    problem.layout = layout;
    problem.num_groups = num_groups;
    const CpuPath forward = plan_cpu(problem, 1).path;
    for (const Pass pass : {Pass::kBackward, Pass::kDoubleBackward}) {
      problem.pass = pass;
      EXPECT_EQ(plan_cpu(problem, 1).path, forward) << to_string(problem);
    }
    return forward;
  };
  EXPECT_EQ(path({4096, 256, 1}, Layout::kNSC, 32), CpuPath::kSample);
  EXPECT_EQ(path({4096, 256, 1}, Layout::kNCS, 1), CpuPath::kSample);
  EXPECT_EQ(path({64, 32, 4}, Layout::kNCS, 8), CpuPath::kSample);
  EXPECT_EQ(path({64, 32, 4}, Layout::kNSC, 8), CpuPath::kSlice) << "slices have gaps";
  EXPECT_EQ(path({64, 1 << 20, 1}, Layout::kNCS, 8), CpuPath::kSlice) << "a sample is large";
  EXPECT_EQ(path({4096, 256, 1}, Layout::kNSC, 0), CpuPath::kSlice) << "batch norm";
}

TEST(Plan, OfEmptyInput) {
  for (const Extent extent : {Extent{0, 4, 5}, Extent{4, 0, 5}, Extent{4, 4, 0}}) {
    for (const Layout layout : kBothLayouts) {
      for (const std::int64_t num_groups : {0, 2}) {
        Problem problem;
        problem.extent = extent;
        problem.layout = layout;
        problem.num_groups = num_groups;
        EXPECT_EQ(plan_cpu(problem, 4).workspace_bytes, 0u);
      }
    }
  }
}

TEST(Plan, DescribesItself) {
  Problem problem;
  problem.extent = {2, 2, 1 << 20};
  const CpuPlan plan = plan_cpu(problem, 8);
  const std::string text = describe(plan);
  EXPECT_EQ(text.find('\n'), std::string::npos);
  EXPECT_NE(text.find("chunk path"), std::string::npos) << text;
  EXPECT_NE(text.find(plan.reason), std::string::npos) << text;
  EXPECT_NE(text.find(std::to_string(plan.workspace_bytes)), std::string::npos) << text;
  EXPECT_NE(text.find(plan.stream ? "streaming stores" : "cached stores"), std::string::npos)
      << text;
}

}  // namespace
}  // namespace normcore::kernels::testing
