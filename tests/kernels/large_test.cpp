// More than 2^31 elements. The output takes 4 GiB: skipped on machines with less than 8 GiB of free
// memory and under sanitizers. The input is one block of memory mapped again and again.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

#include "executors.h"
#include "norm_checks.h"

namespace normcore::kernels::testing {
namespace {

constexpr std::int64_t kPeriod = 1024;
constexpr Extent kExtent{1, 2, (std::int64_t{1} << 30) + kPeriod};

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

constexpr std::size_t kBytes = 2 * static_cast<std::size_t>(kExtent.numel());
constexpr std::size_t kPeriodBytes = 2 * kPeriod;

void expect_periodic(const LargeBuffer& y) {
  EXPECT_EQ(std::memcmp(y.data(), y.data() + kPeriodBytes, kBytes - kPeriodBytes), 0);
}

void check_inference(const Inputs& period, const LargeBuffer& x, const LargeBuffer& y) {
  SCOPED_TRACE("batch norm inference, NSC");
  BatchNormInferenceArgs args;
  args.input = period.norm_input();
  args.input.extent = kExtent;
  args.input.x.data = x.data();
  args.running_mean = period.running_mean.view();
  args.running_var = period.running_var.view();
  args.y = {y.data(), DType::kBFloat16};
  float rstd[2];
  args.rstd = {rstd, DType::kFloat32};
  const CpuExecutor executor = thread_executor();
  const CpuPlan plan = plan_cpu(Problem(args.input, 0, Pass::kInference), executor.num_threads);
  const GuardedBuffer workspace(plan.workspace_bytes, 64, Placement::kEnd);
  ASSERT_TRUE(batch_norm_inference(args, plan, workspace.data(), executor).ok());

  const Outputs expected = run_inference(period, serial_executor());
  EXPECT_EQ(std::memcmp(y.data(), find(expected, "y").data(), kPeriodBytes), 0);
  expect_periodic(y);
}

// Both channels are one group, so that every value has the same statistics: those of the period.
void check_group_norm(NormCase c, const LargeBuffer& x, const LargeBuffer& y) {
  SCOPED_TRACE("group norm, NCS");
  GroupNormForwardArgs args;
  args.input.extent = kExtent;
  args.input.layout = Layout::kNCS;
  args.input.x = {x.data(), DType::kBFloat16};
  args.num_groups = 1;
  args.y = {y.data(), DType::kBFloat16};
  double mean = 0.0;
  float rstd = 0.0f;
  args.mean = &mean;
  args.rstd = {&rstd, DType::kFloat32};
  const CpuExecutor executor = thread_executor();
  const CpuPlan plan = plan_cpu(Problem(args.input, 1, Pass::kForward), executor.num_threads);
  const GuardedBuffer workspace(plan.workspace_bytes, 64, Placement::kEnd);
  ASSERT_TRUE(group_norm_forward(args, plan, workspace.data(), executor).ok());

  c.num_groups = 1;
  c.scale = c.bias = std::nullopt;
  const Inputs period(c);
  const Statistics statistics = batch_statistics(period, false);
  const ForwardBounds bounds = forward_bounds(period.norm_input(), statistics, c.y);
  EXPECT_NEAR(mean, statistics.mean[0], bounds.mean[0]);
  EXPECT_NEAR(rstd, statistics.rstd[0], bounds.rstd[0]);
  Tensor first(c.y, kPeriod, Placement::kEnd);
  std::memcpy(first.data(), y.data(), kPeriodBytes);
  expect_near("y", first.values(), find(reference_forward(period), "y").values(), bounds.y);
  expect_periodic(y);
}

// x repeats a short tensor, so y must repeat as well: in its first period as computed from the
// short tensor alone, and everywhere else as in its first period.
TEST(Large, BatchNormInferenceAndGroupNorm) {
  if (!has_memory()) GTEST_SKIP() << "needs 8 GiB of memory";
  NormCase c;
  c.extent = {1, 2, kPeriod / 2};
  c.layout = Layout::kNSC;
  c.x = c.y = DType::kBFloat16;
  const Inputs period(c);
  const LargeBuffer x(LargeBuffer::Kind::kRepeated, kBytes), y(LargeBuffer::Kind::kPlain, kBytes);
  for (std::size_t at = 0; at < LargeBuffer::kBlock; at += kPeriodBytes) {
    std::memcpy(x.data() + at, period.x.data(), kPeriodBytes);
  }
  check_inference(period, x, y);
  std::memset(y.data(), 0xff, kBytes);
  check_group_norm(c, x, y);
}

}  // namespace
}  // namespace normcore::kernels::testing
