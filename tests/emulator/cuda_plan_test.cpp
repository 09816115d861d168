// plan_cuda() on thousands of problems: every plan is legal and covers the tensor.
#include "normcore/kernels/cuda_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "norm_case.h"
#include "plan/cuda_constants.h"
#include "plan/cuda_problem.h"
#include "plan/cuda_tiling.h"
#include "plan/fast_divide.h"
#include "problems.h"

namespace normcore::kernels::testing {
namespace {

constexpr CudaDevice kDevices[] = {{132}, {16}, {8, 1, false, 100 << 10}};
constexpr const CudaDevice& kNoClusters = kDevices[2];

// Larger than what any device holds: its grid may be illegal.
bool is_beyond_memory(const Problem& p) { return p.extent.numel() > std::int64_t{1} << 40; }

// Calls body(problem, device, plan) for every problem, device, kind of alignment and wanted gradients.
template <class Body>
void for_each_plan(const CudaOptions& options, Body body) {
  for_each_problem([&](Problem problem) {
    for (const CudaDevice& device : kDevices) {
      for (int bits = 0; bits < (is_backward(problem.pass) ? 8 : 2); ++bits) {
        problem.aligned = (bits & 1) == 0;
        problem.reduces = (bits & 2) == 0;
        problem.applies = (bits & 4) == 0;
        if (!problem.reduces && !problem.applies) continue;
        const auto plan = plan_cuda(problem, device, options);
        if (!plan) {
          const bool may_be_none = options.path || problem.pass == Pass::kDoubleBackward;
          ASSERT_TRUE(may_be_none || is_beyond_memory(problem)) << to_string(problem);
          continue;
        }
        body(problem, device, *plan);
      }
    }
  });
}

void expect_legal(const Problem& p, const CudaDevice& device, const CudaPlan& plan) {
  const std::string what = to_string(p) + ": " + describe(plan);
  ASSERT_GE(plan.blocks, 1) << what;
  ASSERT_LE(plan.blocks, std::int64_t{2147483647}) << what;
  ASSERT_EQ(plan.threads % 32, 0) << what;
  ASSERT_GE(plan.threads, 32) << what;
  ASSERT_LE(plan.threads, kMaxThreads) << what;
  ASSERT_LE(plan.shared_bytes, kMaxDynamicShared) << what;
  if (is_team(plan.path)) {
    ASSERT_LE(
        kTeamBlocksPerMultiprocessor * (plan.shared_bytes + kMaxStaticShared + kReservedShared),
        device.shared_bytes)
        << what;
  }
  ASSERT_STRNE(plan.reason, "") << what;
  if (!p.aligned) {
    ASSERT_EQ(plan.width, 1) << what;
  }
  if (is_team(plan.path)) {
    ASSERT_EQ(plan.blocks % plan.team, 0) << what;
    ASSERT_NE(plan.path == CudaPath::kCluster, plan.counters == plan.blocks / plan.team) << what;
    ASSERT_LE(plan.path == CudaPath::kCluster ? plan.team : plan.blocks / 2,
              plan.path == CudaPath::kCluster ? device.max_cluster : device.multiprocessors)
        << what;
    ASSERT_NE(p.pass, Pass::kDoubleBackward) << what;
    ASSERT_EQ(plan.samples_per_block, 1) << what;
  }
  const bool is_split = plan.path == CudaPath::kSplit;
  if (is_split) {
    ASSERT_EQ(plan.counters, 0) << what;
    ASSERT_EQ(plan.apply_blocks, p.applies ? plan.blocks : 0) << what;
  }
  if (p.pass == Pass::kDoubleBackward) {
    const std::size_t tensor = size_of(p.dtype) * static_cast<std::size_t>(p.extent.numel());
    ASSERT_LE(cuda_workspace_layout(p, plan).sums, kFreeWorkspace + kMaxWorkspaceRatio * tensor)
        << what;
  }
  if (p.dtype == DType::kFloat64) {
    ASSERT_NE(plan.path, CudaPath::kPack) << what;
    ASSERT_NE(plan.path, CudaPath::kBlock) << what;
    ASSERT_FALSE(is_team(plan.path)) << what;
  }
}

// A cluster takes one item; the teams of a cooperative grid at least one.
void expect_teams(const TeamTiling& t, const CudaPlan& plan, const std::string& what) {
  ASSERT_EQ(std::int64_t{t.blocks} * t.teams, plan.blocks) << what;
  ASSERT_EQ(t.is_cooperative, plan.path == CudaPath::kTeam) << what;
  ASSERT_LE(t.teams, t.items) << what;
  ASSERT_TRUE(t.is_cooperative || t.teams == t.items) << what;
}

// Every slot of every slice belongs to a thread's vector.
void expect_coverage(const Problem& p, const CudaPlan& plan) {
  const std::string what = to_string(p) + ": " + describe(plan);
  const bool is_resident = plan.path == CudaPath::kPack || plan.path == CudaPath::kBlock;
  if (plan.path == CudaPath::kRun) {
    const RunsTiling t = runs_tiling(p, plan);
    ASSERT_EQ(p.extent.s, 1) << what;
    ASSERT_EQ(std::int64_t{t.groups} * t.vectors * plan.width, p.extent.c) << what;
    ASSERT_GE(std::int64_t{plan.lanes} * plan.vectors * plan.batches, t.vectors) << what;
    ASSERT_TRUE(plan.lanes <= 32 || plan.lanes == plan.threads) << what;
    if (!is_backward(p.pass)) {
      ASSERT_GE(plan.blocks * (plan.threads / plan.lanes), t.slices()) << what;
      return;
    }
    ASSERT_GE(t.groups_per_block * t.group_tiles, t.groups) << what;
    ASSERT_GE(t.row_lanes, 1u) << what;
    ASSERT_LE(t.row_lanes * t.groups_per_block * t.lanes, static_cast<unsigned>(plan.threads))
        << what;
    ASSERT_EQ(plan.samples_per_block % t.row_lanes, 0) << what;
    ASSERT_LE(plan.samples_per_block, kMaxRunSamples * t.row_lanes) << what;
    const std::int64_t sums = 2 * t.vectors_per_lane() * plan.width * plan.threads;
    ASSERT_TRUE(p.affine_per_sample || plan.shared_bytes == static_cast<std::size_t>(sums) *
                                                                size_of(compute_type(p.dtype)))
        << what;
    ASSERT_GE(plan.blocks / t.group_tiles * plan.samples_per_block, p.extent.n) << what;
  } else if (plan.layout == Layout::kNCS) {
    const PlanesTiling t = planes_tiling(p, plan);
    ASSERT_GE(std::int64_t{t.granules} * plan.width, p.extent.s) << what;
    std::int64_t segments = 0, pieces = 0;
    for (std::uint32_t chunk = 0; chunk < t.chunks && t.chunks < 5000; ++chunk) {
      const std::int64_t granules =
          std::min(t.granules - t.first_granule(chunk), t.granules_per_piece);
      ASSERT_LE(t.segments_of(chunk) * granules,
                std::int64_t{plan.lanes} * plan.vectors * plan.batches)
          << what;
      ASSERT_EQ(t.first_segment(chunk), t.pieces > 1 ? chunk / t.pieces : segments) << what;
      segments += t.pieces > 1 ? 0 : t.segments_of(chunk);
      pieces += granules * t.segments_of(chunk);
    }
    if (t.chunks < 5000) {
      ASSERT_EQ(pieces, std::int64_t{t.granules} * t.segments) << what;
    }
    if (is_team(plan.path)) {
      ASSERT_LE(t.chunks, t.team.blocks) << what;
      ASSERT_EQ(t.team.items, slice_count(p)) << what;
      expect_teams(t.team, plan, what);
    }
    if (is_resident) {
      ASSERT_EQ(t.chunks, 1u) << what;
      ASSERT_EQ(plan.batches, 1) << what;
      ASSERT_EQ(plan.threads % plan.lanes, 0) << what;
    }
  } else {
    const RowsTiling t = rows_tiling(p, plan);
    ASSERT_GE(std::int64_t{t.column_tiles} * t.columns, p.extent.c) << what;
    ASSERT_GE(std::int64_t{t.chunks} * t.rows_per_chunk, t.rows) << what;
    const std::int64_t held = std::int64_t{t.row_lanes} * plan.vectors * plan.batches;
    if (is_team(plan.path)) {
      ASSERT_LE(t.rows_per_chunk, held) << what;
    } else {
      ASSERT_EQ(t.rows_per_chunk, held) << what;
    }
    ASSERT_LE(t.units * t.column_lanes * t.row_lanes, static_cast<unsigned>(plan.threads)) << what;
    if (is_team(plan.path)) {
      ASSERT_LE(t.chunks, t.team.blocks) << what;
      ASSERT_EQ(t.team.items, t.tiles * t.column_tiles) << what;
      expect_teams(t.team, plan, what);
    }
    if (is_resident || is_team(plan.path)) {
      const std::int64_t d = p.num_groups == 0 ? 1 : p.extent.c / p.num_groups;
      ASSERT_EQ(t.columns % d, 0) << what;
    }
  }
}

TEST(CudaPlan, IsLegalAndCoversEveryShape) {
  for_each_plan({}, [](const Problem& p, const CudaDevice& device, const CudaPlan& plan) {
    expect_legal(p, device, plan);
    expect_coverage(p, plan);
  });
}

// What fits without asking only if the kernel had no static shared memory.
TEST(CudaPlan, SomeNeedTheSharedMemoryOfTheStaticPart) {
  Problem p;
  p.extent = {4, 64, 1 << 16};
  p.layout = Layout::kNSC;
  p.num_groups = 1;
  p.pass = Pass::kDoubleBackward;
  const auto plan = plan_cuda(p, kDevices[0]);
  EXPECT_GT(plan->shared_bytes, kDefaultDynamicShared) << describe(*plan);
  EXPECT_LE(plan->shared_bytes, kDefaultShared) << describe(*plan);
}

TEST(CudaPlan, ForcedPathsAreLegal) {
  for (const CudaPath path : {CudaPath::kPack, CudaPath::kBlock, CudaPath::kCluster,
                              CudaPath::kTeam, CudaPath::kSplit, CudaPath::kRun}) {
    CudaOptions options;
    options.path = path;
    options.max_threads = 64;
    std::int64_t count = 0;
    for_each_plan(options, [&](const Problem& p, const CudaDevice& device, const CudaPlan& plan) {
      ASSERT_EQ(plan.path, path);
      expect_legal(p, device, plan);
      expect_coverage(p, plan);
      ++count;
    });
    EXPECT_GT(count, path == CudaPath::kRun ? 500 : 1000);
  }
}

// What decides about the bits of a sample in group norm.
void expect_same_bits_alone(const CudaDevice& device, std::optional<CudaPath> path) {
  CudaOptions options;
  options.batch_invariant = true;
  options.path = path;
  for_each_problem([&](const Problem& problem) {
    if (problem.num_groups == 0 && problem.pass != Pass::kInference) return;
    if (is_beyond_memory(problem)) return;
    Problem one = problem;
    one.extent.n = 1;
    // A sample may start anywhere in the batch's memory.
    const std::size_t sample_bytes =
        size_of(one.dtype) * static_cast<std::size_t>(one.extent.numel());
    if (one.num_groups != 0) one.aligned = sample_bytes % kVectorBytes == 0;
    const auto alone = plan_cuda(one, device, options);
    const auto together = plan_cuda(problem, device, options);
    const auto what = to_string(problem);
    ASSERT_EQ(alone.has_value(), together.has_value()) << what;
    if (!alone) {
      ASSERT_TRUE(path || problem.pass == Pass::kDoubleBackward) << what;
      return;
    }
    ASSERT_EQ(alone->path == CudaPath::kSplit, together->path == CudaPath::kSplit) << what;
    ASSERT_EQ(alone->width, together->width) << what;
    ASSERT_EQ(alone->vectors, together->vectors) << what;
    ASSERT_EQ(alone->team, together->team) << what;
    ASSERT_EQ(alone->lanes, together->lanes) << what;
    ASSERT_EQ(alone->columns, together->columns) << what;
    if (problem.num_groups != 0) {
      ASSERT_EQ(alone->rows_per_chunk, together->rows_per_chunk) << what;
    }
    if (is_team(alone->path)) {
      ASSERT_EQ(alone->batches, together->batches) << what;
    }
  });
}

TEST(CudaPlan, BatchInvariantPlansDoNotDependOnTheBatchSize) {
  for (const CudaDevice& device : {CudaDevice{132}, CudaDevice{2}, kNoClusters}) {
    expect_same_bits_alone(device, std::nullopt);
    expect_same_bits_alone(device, CudaPath::kCluster);
    expect_same_bits_alone(device, CudaPath::kTeam);
  }
}

// The partial sums of the double backward pass are no larger than a few tensors; what is short is read
// once, and what is too short for that has no kernel.
TEST(CudaPlan, DoubleBackwardOfShortSlices) {
  Problem p;
  p.pass = Pass::kDoubleBackward;
  p.dtype = DType::kBFloat16;
  for (const auto& [extent, num_groups] :
       {std::pair(Extent{4096, 256, 1}, 32), std::pair(Extent{65536, 64, 4}, 32),
        std::pair(Extent{4096, 256, 49}, 32), std::pair(Extent{1 << 25, 64, 1}, 8),
        std::pair(Extent{8192, 1024, 1}, 1)}) {
    p.extent = extent;
    p.num_groups = num_groups;
    const auto plan = plan_cuda(p, kDevices[0]);
    ASSERT_TRUE(plan) << to_string(p);
    EXPECT_NE(plan->path, CudaPath::kSplit) << describe(*plan);
    EXPECT_LE(plan->workspace_bytes, std::size_t{8} << 20) << describe(*plan);
  }
  p.num_groups = 1;
  p.extent = {1 << 19, 1 << 12, 1};
  EXPECT_EQ(plan_cuda(p, kDevices[0])->path, CudaPath::kRun);
  p.extent = {1 << 18, 1 << 12, 2};
  EXPECT_FALSE(plan_cuda(p, kDevices[0]));
}

// Gradients of the parameters of one sample are those of the tensor.
TEST(CudaPlan, SumsGradientsOverSamplesIfThereAreSeveral) {
  Problem p;
  p.pass = Pass::kBackward;
  p.num_groups = 32;
  for (const Extent& extent : {Extent{2, 64, 100}, Extent{2, 128, 1 << 16}, Extent{2, 4096, 1}}) {
    p.extent = extent;
    EXPECT_EQ(cuda_workspace_layout(p, *plan_cuda(p, kDevices[0])).sample_blocks, 2);
    p.extent.n = 1;
    EXPECT_EQ(cuda_workspace_layout(p, *plan_cuda(p, kDevices[0])).sample_blocks, 0);
  }
}

// Kernels count vectors, segments and chunks in 32 bits.
TEST(CudaPlan, RefusesWhatCannotBeCounted) {
  constexpr std::int64_t kMany = 5'000'000'000;
  Problem p;
  p.dtype = DType::kBFloat16;
  p.extent = {1, 1, kMany};
  const auto plan = plan_cuda(p, kDevices[0]);
  ASSERT_TRUE(plan);
  expect_legal(p, kDevices[0], *plan);
  EXPECT_GE(planes_tiling(p, *plan).granules * std::int64_t{plan->width}, kMany);
  p.aligned = false;
  EXPECT_FALSE(plan_cuda(p, kDevices[0]));
  p.aligned = true;
  p.extent = {kMany, 1, 1};
  EXPECT_FALSE(plan_cuda(p, kDevices[0]));
}

TEST(CudaPlan, SaysWhySlicesAreSplit) {
  const auto reason_of = [](const Problem& p) {
    return std::string(plan_cuda(p, kDevices[0])->reason);
  };
  Problem p;
  p.extent = {1, 2, 1 << 20};
  EXPECT_NE(reason_of(p).find("too large to be held"), std::string::npos);
  p.dtype = DType::kFloat64;
  EXPECT_NE(reason_of(p).find("float64"), std::string::npos);
}

// A row of a resident tile has whole sectors of memory, where the tensor's rows have.
TEST(CudaPlan, TilesOfRowsHaveWholeSectors) {
  const auto expect_sectors = [](const Problem& p, const CudaDevice&, const CudaPlan& plan) {
    const auto bytes = static_cast<std::int64_t>(size_of(p.dtype));
    const bool is_held =
        plan.path == CudaPath::kPack || plan.path == CudaPath::kBlock || is_team(plan.path);
    if (plan.layout != Layout::kNSC || !is_held || p.extent.c * bytes < kSectorBytes) return;
    ASSERT_GE(plan.columns * bytes, kSectorBytes) << to_string(p) << ": " << describe(plan);
  };
  for_each_plan({}, expect_sectors);
  CudaOptions options;
  options.batch_invariant = true;
  for_each_plan(options, expect_sectors);

  Problem p;
  p.layout = Layout::kNSC;
  p.extent = {64, 8, 784};
  EXPECT_EQ(plan_cuda(p, kDevices[0])->path, CudaPath::kSplit);
  // 16 bytes of 2048 rows fill a block, 32 of 1024 rows.
  p.extent = {2, 64, 1024};
  const auto plan = plan_cuda(p, kNoClusters);
  EXPECT_EQ(plan->path, CudaPath::kSplit);
  EXPECT_NE(std::string(plan->reason).find("sector"), std::string::npos);
  EXPECT_EQ(plan_cuda(p, kDevices[0])->path, CudaPath::kCluster);
  options = {};
  options.path = CudaPath::kBlock;
  EXPECT_TRUE(plan_cuda(p, kDevices[0], options));
  p.extent.s = 512;
  EXPECT_EQ(plan_cuda(p, kDevices[0])->path, CudaPath::kBlock);
  // The tensor's rows have 28 bytes.
  p.extent = {2, 7, 1024};
  EXPECT_EQ(plan_cuda(p, kDevices[0])->path, CudaPath::kBlock);
}

TEST(CudaPlan, ReadsSmallSlicesOnce) {
  Problem p;
  p.dtype = DType::kBFloat16;
  p.extent = {32, 256, 196};
  p.num_groups = 32;
  EXPECT_EQ(plan_cuda(p, kDevices[0])->path, CudaPath::kPack);
  p.extent = {32, 512, 784};
  EXPECT_EQ(plan_cuda(p, kDevices[0])->path, CudaPath::kBlock);
  p.extent = {1, 128, 1 << 20};
  EXPECT_EQ(plan_cuda(p, kDevices[0])->path, CudaPath::kSplit);
  p.num_groups = 0;
  p.pass = Pass::kInference;
  EXPECT_EQ(plan_cuda(p, kDevices[0])->path, CudaPath::kStream);
}

TEST(FastDivide, IsDivision) {
  const std::int64_t top = std::int64_t{1} << 31;
  for (const std::int64_t divisor : std::initializer_list<std::int64_t>{
           1, 2, 3, 5, 7, 49, 255, 256, 257, 3136, 65535, 65536, 999983, top / 2, top - 1}) {
    const FastDivide by(static_cast<std::uint32_t>(divisor));
    for (const std::int64_t multiple : {std::int64_t{0}, divisor, 2 * divisor, 1000 * divisor,
                                        top / divisor * divisor, top, 3 * top, 1000003 * top}) {
      for (std::int64_t value = multiple - 2; value <= multiple + 2; ++value) {
        if (value < 0) continue;
        EXPECT_EQ(by.quotient_of(value), value / divisor) << value << " / " << divisor;
      }
    }
  }
}

// As few blocks as have room, more where they would leave multiprocessors idle.
TEST(CudaPlan, TeamsHoldWhatOneBlockCannot) {
  const auto plan_of = [](const Problem& p, std::optional<CudaPath> path = std::nullopt) {
    CudaOptions options;
    options.path = path;
    return plan_cuda(p, kDevices[0], options);
  };
  Problem p;
  p.dtype = DType::kBFloat16;
  p.extent = {32, 256, 3136};
  p.num_groups = 32;  // slices of 49 KiB
  EXPECT_EQ(plan_of(p)->path, CudaPath::kCluster);
  EXPECT_EQ(plan_of(p)->team, 1) << describe(*plan_of(p));
  p.pass = Pass::kBackward;
  EXPECT_EQ(plan_of(p)->team, 2) << describe(*plan_of(p));
  p.layout = Layout::kNSC;  // tiles of 64 channels, 392 KiB
  p.pass = Pass::kForward;
  EXPECT_EQ(plan_of(p)->team, 8) << describe(*plan_of(p));
  p.layout = Layout::kNCS;
  p.num_groups = 0;  // slices of 196 KiB
  EXPECT_EQ(plan_of(p)->team, 4) << describe(*plan_of(p));
  p.extent = {2, 16, 1 << 15};  // 16 slices of 128 KiB
  EXPECT_EQ(plan_of(p)->team, 8) << describe(*plan_of(p));
  p.extent = {16, 16, 1 << 15};  // of 1 MiB
  EXPECT_EQ(plan_of(p)->team, 16) << describe(*plan_of(p));
  EXPECT_EQ(plan_cuda(p, CudaDevice{132, kPortableCluster})->path, CudaPath::kSplit);

  p.extent = {1, 256, 17 * 256 * 256};
  p.num_groups = 32;  // slices of 17 MiB
  EXPECT_EQ(plan_of(p)->path, CudaPath::kSplit);
  const auto teams = plan_of(p, CudaPath::kTeam);
  ASSERT_TRUE(teams);
  EXPECT_GT(teams->team, 132) << describe(*teams);
  EXPECT_EQ(teams->counters, 1) << describe(*teams);
  EXPECT_LE(teams->blocks, 264) << describe(*teams);
  CudaOptions options;
  options.path = CudaPath::kTeam;
  options.spare_multiprocessors = 64;
  EXPECT_FALSE(plan_cuda(p, kDevices[0], options));
  p.pass = Pass::kBackward;  // and twice as much
  EXPECT_FALSE(plan_of(p, CudaPath::kTeam));
  options.spare_multiprocessors = 0;
  EXPECT_FALSE(plan_cuda(p, kNoClusters, options));
}

// Vectors of a slice are counted in 64 bits until it is known to be small.
TEST(CudaPlan, TeamsHoldNoSliceOfBillions) {
  Problem p;
  p.dtype = DType::kBFloat16;
  for (const auto& [extent, num_groups] :
       {std::pair(Extent{1, 32, std::int64_t{1} << 30}, 1),
        std::pair(Extent{1 << 20, 1, 1 << 14}, 0), std::pair(Extent{1431655766, 1, 10}, 0),
        std::pair(Extent{1 << 28, 3, 128}, 0), std::pair(Extent{1, 1 << 20, 1 << 15}, 1)}) {
    p.extent = extent;
    p.num_groups = num_groups;
    for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
      p.pass = pass;
      for (const Layout layout : {Layout::kNCS, Layout::kNSC}) {
        p.layout = layout;
        const auto plan = plan_cuda(p, kDevices[0]);
        ASSERT_TRUE(plan) << to_string(p);
        EXPECT_EQ(plan->path, CudaPath::kSplit) << describe(*plan);
        CudaOptions options;
        options.path = CudaPath::kTeam;
        EXPECT_FALSE(plan_cuda(p, kDevices[0], options)) << to_string(p);
      }
    }
  }
}

// Where the device has no room for the blocks of a plan together, the next one asks for less.
TEST(CudaPlan, EndsWithoutTeamsWhereThereIsNoRoom) {
  Problem p;
  p.dtype = DType::kBFloat16;
  p.extent = {16, 16, 1 << 15};
  CudaDevice device;
  std::vector<std::pair<CudaPath, int>> tried;
  for (int i = 0; i < 10 && (tried.empty() || tried.back().first != CudaPath::kSplit); ++i) {
    const auto plan = plan_cuda(p, device);
    tried.emplace_back(plan->path, plan->team);
    device = with_less_room(device, *plan);
  }
  EXPECT_EQ(tried,
            (std::vector{std::pair(CudaPath::kCluster, 16), std::pair(CudaPath::kSplit, 1)}));

  p.extent.n = 2;  // would have room in fewer, if they had more multiprocessors
  tried.clear();
  device = {};
  while (tried.size() < 10 && (tried.empty() || tried.back().second > 1)) {
    const auto plan = plan_cuda(p, device);
    tried.emplace_back(plan->path, plan->team);
    device = with_less_room(device, *plan);
  }
  EXPECT_EQ(tried, (std::vector{std::pair(CudaPath::kCluster, 8), std::pair(CudaPath::kCluster, 4),
                                std::pair(CudaPath::kCluster, 2), std::pair(CudaPath::kSplit, 1)}));

  CudaOptions options;
  options.path = CudaPath::kTeam;
  const auto team = plan_cuda(p, {}, options);
  EXPECT_FALSE(plan_cuda(p, with_less_room({}, *team), options));
}

TEST(CudaPlan, DescribesItself) {
  Problem p;
  p.extent = {2, 64, 100};
  p.num_groups = 32;
  const std::string text = describe(*plan_cuda(p, kDevices[0]));
  EXPECT_NE(text.find("pack path, planes"), std::string::npos) << text;
  EXPECT_NE(text.find("each is read once"), std::string::npos) << text;
  p.extent = {2, 64, 10000};
  const std::string of_cluster = describe(*plan_cuda(p, kDevices[0]));
  EXPECT_NE(of_cluster.find("in clusters of 2"), std::string::npos) << of_cluster;
}

}  // namespace
}  // namespace normcore::kernels::testing
