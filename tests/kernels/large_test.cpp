// More than 2^31 elements, every entry in both layouts. x and grad_y repeat a short tensor, so the
// result must repeat as well: in its first period as computed from the short tensor alone, and
// everywhere else as in its first period. The output takes 4 GiB: skipped on machines with less than
// 8 GiB of free memory and under sanitizers. Inputs are one block of memory mapped again and again.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <tuple>

#include "cpu/reference.h"
#include "executors.h"
#include "guarded_buffer.h"
#include "norm_case.h"
#include "normcore/kernels/batch_norm.h"
#include "normcore/kernels/group_norm.h"

namespace normcore::kernels::testing {
namespace {

constexpr std::int64_t kPeriod = 1024;  // values after which the inputs repeat
constexpr std::int64_t kChannels = 2;
constexpr Extent kLarge{1, kChannels, (std::int64_t{1} << 30) + kPeriod};

// The least extent with the statistics of kLarge: a period per channel, or one of both channels.
constexpr Extent small_extent(Layout layout) {
  return {1, kChannels, layout == Layout::kNCS ? kPeriod : kPeriod / kChannels};
}

bool has_memory() {
#ifdef __SANITIZE_ADDRESS__
  return false;
#else
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  for (std::int64_t kibibytes = 0; file >> key >> kibibytes >> unit;) {
    if (key == "MemAvailable:") return kibibytes >= std::int64_t{8} << 20;
  }
  return false;
#endif
}

// `bytes` of address space. Repeated: every block of it is the same memory.
class LargeBuffer {
 public:
  enum class Kind { kPlain, kRepeated };
  LargeBuffer(Kind kind, std::size_t bytes)
      : bytes_(bytes),
        data_(
            static_cast<unsigned char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    if (data_ == MAP_FAILED) std::abort();
    if (kind == Kind::kPlain) {
      madvise(data_, bytes, MADV_HUGEPAGE);
      return;
    }
    const int file = memfd_create("block", 0);
    if (file < 0 || ftruncate(file, kBlock) != 0) std::abort();
    for (std::size_t at = 0; at < bytes; at += kBlock) {
      void* block = mmap(data_ + at, std::min(kBlock, bytes - at), PROT_READ | PROT_WRITE,
                         MAP_SHARED | MAP_FIXED, file, 0);
      if (block == MAP_FAILED) std::abort();
    }
    close(file);
  }
  LargeBuffer(const LargeBuffer&) = delete;
  ~LargeBuffer() { munmap(data_, bytes_); }

  static constexpr std::size_t kBlock = std::size_t{16} << 20;
  unsigned char* data() const { return data_; }

 private:
  std::size_t bytes_;
  unsigned char* data_;
};

constexpr std::size_t kBytes = 2 * static_cast<std::size_t>(kLarge.numel());
constexpr std::size_t kPeriodBytes = 2 * kPeriod;

enum class Operation {
  kBatchNormForward,
  kBatchNormInference,
  kBatchNormBackward,
  kGroupNormForward,
  kGroupNormBackward,
};

struct Statistics {
  double mean[kChannels] = {0.25, -0.5};
  float rstd[kChannels] = {1.5f, 0.75f};
  float grad_scale[kChannels] = {}, grad_bias[kChannels] = {};
};

// One call of the operation: the result goes to `out`, the vectors beside it are returned.
Statistics run(Operation operation, const Extent& extent, Layout layout, const void* x,
               const void* grad_y, void* out) {
  static constexpr float kScale[kChannels] = {1.25f, -0.5f}, kBias[kChannels] = {0.5f, 1.0f},
                         kRunningMean[kChannels] = {0.25f, -0.5f},
                         kRunningVar[kChannels] = {0.5f, 2.0f};
  NormInput input;
  input.extent = extent;
  input.layout = layout;
  input.x = {x, DType::kBFloat16};
  input.scale = {kScale};
  input.bias = {kBias};
  Statistics saved;
  const ConstTensor dy{grad_y, DType::kBFloat16};
  const MutableTensor y{out, DType::kBFloat16}, rstd{saved.rstd};
  const NormGradients grad{y, {saved.grad_scale}, {saved.grad_bias}, {}};
  const CpuExecutor executor = thread_executor();
  const auto call = [&](const auto& args) {
    const CpuPlan plan = plan_cpu(problem_of(args), executor.num_threads);
    const GuardedBuffer workspace(plan.workspace_bytes, 64, Placement::kEnd);
    EXPECT_TRUE(kernels::run(args, plan, workspace.data(), executor).ok());
  };
  switch (operation) {
    case Operation::kBatchNormForward:
      call(BatchNormForwardArgs{input, {}, y, saved.mean, rstd});
      break;
    case Operation::kBatchNormInference:
      call(BatchNormInferenceArgs{input, {kRunningMean}, {kRunningVar}, y, rstd});
      break;
    case Operation::kBatchNormBackward:
      call(BatchNormBackwardArgs{input, dy, {saved.mean, DType::kFloat64}, rstd, true, grad});
      break;
    case Operation::kGroupNormForward:
      call(GroupNormForwardArgs{input, kChannels, y, saved.mean, rstd});
      break;
    case Operation::kGroupNormBackward:
      call(GroupNormBackwardArgs{input, kChannels, dy, saved.mean, rstd, grad});
      break;
  }
  return saved;
}

// Fills the block with random bfloat16 values of the period, again and again.
void fill(const LargeBuffer& buffer, unsigned seed) {
  for (std::int64_t i = 0; i < kPeriod; ++i) {
    seed = seed * 1664525u + 1013904223u;
    const double value = (static_cast<double>(seed >> 16) / 65536.0 - 0.5) * 4.0;
    reference::store({buffer.data(), DType::kBFloat16}, i, value);
  }
  for (std::size_t at = kPeriodBytes; at < LargeBuffer::kBlock; at += kPeriodBytes) {
    std::memcpy(buffer.data() + at, buffer.data(), kPeriodBytes);
  }
}

class Large : public ::testing::TestWithParam<std::tuple<Operation, Layout>> {};

std::string name_of_parameter(const ::testing::TestParamInfo<Large::ParamType>& parameter) {
  static constexpr const char* kNames[] = {"BatchNormForward", "BatchNormInference",
                                           "BatchNormBackward", "GroupNormForward",
                                           "GroupNormBackward"};
  const auto [operation, layout] = parameter.param;
  return std::string(kNames[static_cast<int>(operation)]) + "_" + name_of(layout);
}

INSTANTIATE_TEST_SUITE_P(All, Large,
                         ::testing::Combine(::testing::Values(Operation::kBatchNormForward,
                                                              Operation::kBatchNormInference,
                                                              Operation::kBatchNormBackward,
                                                              Operation::kGroupNormForward,
                                                              Operation::kGroupNormBackward),
                                            ::testing::ValuesIn(kBothLayouts)),
                         name_of_parameter);

TEST_P(Large, RepeatsWhatAShortTensorGives) {
  if (!has_memory()) GTEST_SKIP() << "needs 8 GiB of memory";
  const auto [operation, layout] = GetParam();
  const LargeBuffer x(LargeBuffer::Kind::kRepeated, kBytes),
      grad_y(LargeBuffer::Kind::kRepeated, kBytes), y(LargeBuffer::Kind::kPlain, kBytes);
  fill(x, 1);
  fill(grad_y, 2);
  const Extent small = small_extent(layout);
  const GuardedBuffer expected(2 * static_cast<std::size_t>(small.numel()), 64, Placement::kEnd);
  const Statistics few = run(operation, small, layout, x.data(), grad_y.data(), expected.data());
  const Statistics many = run(operation, kLarge, layout, x.data(), grad_y.data(), y.data());

  for (std::int64_t i = 0; i < kPeriod; ++i) {  // the statistics differ by their rounding
    const double want = reference::load({expected.data(), DType::kBFloat16}, i);
    const double got = reference::load({y.data(), DType::kBFloat16}, i);
    ASSERT_NEAR(got, want, 0x1p-7 * std::abs(want) + 1e-6) << i;
  }
  if (layout == Layout::kNSC) {
    EXPECT_EQ(std::memcmp(y.data(), y.data() + kPeriodBytes, kBytes - kPeriodBytes), 0);
  } else {  // the channels have parameters of their own
    const std::size_t plane = kBytes / kChannels;
    for (std::size_t channel = 0; channel < kChannels; ++channel) {
      const unsigned char* first = y.data() + channel * plane;
      EXPECT_EQ(std::memcmp(first, first + kPeriodBytes, plane - kPeriodBytes), 0) << channel;
    }
  }
  const double repetitions = static_cast<double>(kLarge.s) / static_cast<double>(small.s);
  for (std::int64_t c = 0; c < kChannels; ++c) {
    EXPECT_NEAR(many.mean[c], few.mean[c], 2 * 0x1p-22);  // float32 sums of values up to 2
    EXPECT_NEAR(many.rstd[c], few.rstd[c], 1e-6);
    const double bound = 1e-6 * static_cast<double>(kLarge.s);
    EXPECT_NEAR(many.grad_scale[c], repetitions * few.grad_scale[c], bound);
    EXPECT_NEAR(many.grad_bias[c], repetitions * few.grad_bias[c], bound);
  }
}

}  // namespace
}  // namespace normcore::kernels::testing
