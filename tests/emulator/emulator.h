// Runs CUDA kernel sources on the host: every CUDA thread is a fiber of one host thread, blocks run
// one after another or a few at a time, in an order that the schedule decides. The build includes
// this header in front of every .cu file; it stands in for nvcc's built-ins. Kernels follow the rules
// in CONTRIBUTING.md ("CUDA kernels"): shared memory through block_shared() and dynamic_shared(),
// launches through launch(). What breaks CUDA's rules (divergent barriers, lanes that are missing,
// writes outside of shared memory, more of it than there is, deadlocks) ends the launch with an emulator::Error.
// It models neither occupancy nor speed, and memory ordering in a build with a race detector only:
// under ThreadSanitizer a launch without a race gives no report, and an Error ends the process.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <type_traits>

// The toolkit's headers define it as nothing: every thread would silently get its own copy.
#undef __shared__
#define __shared__ _Pragma("GCC error \"use block_shared<T>() instead of __shared__\"")
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The order of threads and blocks. A thread runs until it waits for others; where the schedule is
// not in order, also up to its next barrier or atomic operation.
class Schedule {
 public:
  constexpr explicit Schedule(std::uint64_t seed) : seed_(seed) {}
  // How many blocks (or clusters) run interleaved.
  constexpr Schedule window(unsigned blocks) const {
    Schedule result = *this;
    result.window_ = blocks;
    return result;
  }
  constexpr bool is_in_order() const { return seed_ == 0; }
  constexpr bool is_reversed() const { return seed_ == 1; }
  constexpr std::uint64_t seed() const { return seed_; }
  constexpr unsigned window() const { return window_; }

 private:
  std::uint64_t seed_;
  unsigned window_ = 1;
};
constexpr Schedule in_order() { return Schedule(0); }
constexpr Schedule reversed() { return Schedule(1); }
constexpr Schedule random(std::uint64_t seed) { return Schedule(seed + 2); }

// For all launches to come.
void use(const Schedule& schedule);

// Of a block, static and dynamic: without asking, and the most on every device from sm_80 on.
inline constexpr std::size_t kDefaultShared = 48 << 10, kOptInShared = 99 << 10;

struct Launch {
  dim3 grid, block;
  unsigned cluster = 1;      // blocks along x that run together and see each other's shared memory
  bool cooperative = false;  // all blocks run together
  std::size_t dynamic_shared = 0;
  // As which it was asked for (cudaFuncAttributeMaxDynamicSharedMemorySize); 0: not at all.
  std::size_t max_dynamic_shared = 0;
  // What the one who launches took for the most static memory of any kernel.
  std::size_t max_static_shared = kDefaultShared;
};
void run(const Launch& launch, const std::function<void()>& kernel);

// Where in the kernel a thread waits.
struct Site {
  const char* file;
  int line;
};
#define EMULATOR_SITE ::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

// What kernels/cuda/launch.cuh and the built-ins below need.
void* shared_memory(const void* key, std::size_t bytes);
void* dynamic_shared_memory();
void yield();               // others may run now
void pause(EMULATOR_SITE);  // in a loop that polls: nothing changes until others have run
void wait_for_block(Site site);
int count_in_block(bool predicate, Site site);
void cluster_arrive(EMULATOR_SITE);
void cluster_wait(EMULATOR_SITE);
unsigned cluster_rank();
// Where the block of that rank in the cluster has what `own` points to in shared memory.
void* cluster_peer(const void* own, unsigned rank);
// What the thread copies runs as late as it may: when it waits for its copies.
void copy_async(std::function<void()> copy);
void wait_for_copies();

// The lanes of `mask` meet; combine(values, arguments, mask) replaces the values of all of them.
enum class WarpOperation : std::uint8_t { kSync, kShuffle, kVote };
using Combine = void (*)(std::uint64_t values[32], const int arguments[32], unsigned mask);
std::uint64_t meet_in_warp(WarpOperation operation, unsigned mask, std::uint64_t value,
                           int argument, Combine combine, Site site);

template <class T>
std::uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t) && std::is_trivially_copyable_v<T>);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Source::lane(lane, argument, width) is the lane that a lane reads. One outside of the mask gives
// garbage: a NaN in float32 and in float64.
template <class Source, class T>
T shuffle(unsigned mask, T value, int argument, int width, Site site) {
  constexpr std::uint64_t kGarbage = 0xfff7dead7fb7dead;
  const auto combine = [](std::uint64_t* values, const int* arguments, unsigned lanes) {
    std::uint64_t in[32];
    std::memcpy(in, values, sizeof(in));
    for (int lane = 0; lane < 32; ++lane) {
      if ((lanes >> lane & 1) == 0) continue;
      const int from = Source::lane(lane, arguments[lane] & 0xffff, arguments[lane] >> 16);
      values[lane] = (lanes >> from & 1) != 0 ? in[from] : kGarbage;
    }
  };
  return from_bits<T>(meet_in_warp(WarpOperation::kShuffle, mask, to_bits(value),
                                   argument | width << 16, combine, site));
}
struct ShuffleXor {
  static int lane(int lane, int mask, int width) {
    const int from = lane ^ mask;
    return from < (lane & -width) + width ? from : lane;
  }
};
struct ShuffleDown {
  static int lane(int lane, int delta, int width) {
    return (lane & (width - 1)) + delta < width ? lane + delta : lane;
  }
};
struct ShuffleFrom {
  static int lane(int lane, int source, int width) {
    return (lane & -width) + (source & (width - 1));
  }
};

inline unsigned ballot(unsigned mask, bool predicate, Site site) {
  const auto combine = [](std::uint64_t* values, const int*, unsigned lanes) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if ((lanes >> lane & 1) != 0 && values[lane] != 0) bits |= 1u << lane;
    }
    std::fill_n(values, 32, bits);
  };
  return static_cast<unsigned>(
      meet_in_warp(WarpOperation::kVote, mask, predicate ? 1 : 0, 0, combine, site));
}

}  // namespace emulator

// ---- CUDA built-ins

inline void __syncthreads(EMULATOR_SITE) { emulator::wait_for_block(site); }
inline int __syncthreads_or(int predicate, EMULATOR_SITE) {
  return emulator::count_in_block(predicate != 0, site) != 0;
}
inline int __syncthreads_count(int predicate, EMULATOR_SITE) {
  return emulator::count_in_block(predicate != 0, site);
}
inline void __syncwarp(unsigned mask = ~0u, EMULATOR_SITE) {
  emulator::meet_in_warp(
      emulator::WarpOperation::kSync, mask, 0, 0, [](std::uint64_t*, const int*, unsigned) {},
      site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle<emulator::ShuffleXor>(mask, value, lane_mask, width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle<emulator::ShuffleDown>(mask, value, static_cast<int>(delta), width,
                                                  site);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle<emulator::ShuffleFrom>(mask, value, lane, width, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return emulator::ballot(mask, predicate != 0, site);
}
inline int __popc(unsigned value) { return std::popcount(value); }

// Relaxed: it orders nothing between blocks. Kernels use launch.cuh's instead.
template <class T>
T atomicAdd(T* address, T value) {
  emulator::yield();
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
