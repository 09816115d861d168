#include "cuda/launch.cuh"
#include "planted_bugs.h"

namespace normcore::kernels::testing {
namespace {

using cuda::block_shared;

struct Values {
  float of[64];
};

// The sum of the block's values, in thread 0.
__device__ float sum_in_block(float value, Bug bug) {
  auto& shared = block_shared<Values>();
  const unsigned shift = bug == Bug::kWritesPastShared ? blockDim.x : 0;
  shared.of[threadIdx.x + shift] = value;
  if (bug == Bug::kBarrierInBranches) {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (bug == Bug::kBarrierInOneBranch) {
    if (threadIdx.x < 32) __syncthreads();
  } else if (bug != Bug::kNoBarrier) {
    __syncthreads();
  }
  float sum = 0.0f;
  for (unsigned i = 0; threadIdx.x == 0 && i < blockDim.x; ++i) sum += shared.of[i];
  if (bug == Bug::kLeavesEarly && threadIdx.x == 1) return sum;
  return sum;
}

__device__ float own_sum(const float* x, int n, Bug bug) {
  const int last = bug == Bug::kReadsPastTheEnd ? n : n - 1;
  float sum = 0.0f;
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i <= last;
       i += static_cast<int>(gridDim.x * blockDim.x)) {
    sum += x[i];
  }
  return sum;
}

__global__ void block_sum_kernel(const float* x, int n, float* sum, Bug bug) {
  if (bug == Bug::kLeavesEarly && threadIdx.x == 1) return;
  float value = own_sum(x, n, bug);
  if (bug == Bug::kLaneOutsideOfMask) value += __shfl_xor_sync(0xffffu, value, 1);
  const float total = sum_in_block(value, bug);
  if (threadIdx.x == 0) *sum = total;
}

struct LargeValues {
  float of[kMaxStaticShared / sizeof(float)];
};

__global__ void large_static_kernel(float* one) {
  auto& shared = block_shared<LargeValues>();
  shared.of[0] = 1.0f;
  auto* const own = cuda::dynamic_shared<float>();
  *own = shared.of[0];
  *one = *own;
}

__global__ void exchange_sum_kernel(const float* x, int n, float* sum, Bug bug) {
  auto& shared = block_shared<Values>();
  const unsigned neighbour = threadIdx.x ^ 1u;
  shared.of[threadIdx.x] = own_sum(x, n, bug);
  if (bug == Bug::kShuffleForBarrier) {
    __shfl_xor_sync(~0u, 0, 1);
  } else {
    __syncwarp();
  }
  float pair = shared.of[threadIdx.x & neighbour] + shared.of[threadIdx.x | neighbour];
  __syncwarp();
  shared.of[threadIdx.x] = pair;
  __syncthreads();
  // In order this one leaves the barrier when all others have arrived at the next one.
  const bool is_reader = threadIdx.x == blockDim.x - 2;
  if (is_reader) {
    pair = 0.0f;
    for (unsigned i = 0; i < blockDim.x; i += 2) pair += shared.of[i];
    *sum = pair;
  }
  if (bug != Bug::kOverwritesTooEarly) __syncthreads();
  if (!is_reader) shared.of[threadIdx.x] = pair;  // as it was
  __syncthreads();
}

__device__ unsigned take_ticket(unsigned* ticket, Bug bug) {
  if (bug == Bug::kTicketRelaxed) return atomicAdd(ticket, 1u);
  if (bug == Bug::kTicketReleaseOnly) return __atomic_fetch_add(ticket, 1, __ATOMIC_RELEASE);
  return cuda::fetch_add_acq_rel(ticket, 1);
}

__global__ void ticket_sum_kernel(const float* x, int n, double* partials, unsigned* ticket,
                                  float* sum, Bug bug) {
  const float own = sum_in_block(own_sum(x, n, bug), bug);
  if (threadIdx.x != 0) return;
  const unsigned blocks = gridDim.x;
  if (bug != Bug::kTicketBeforeWrite) partials[blockIdx.x] = own;
  const bool is_last = take_ticket(ticket, bug) == blocks - 1;
  if (bug == Bug::kTicketBeforeWrite) {
    emulator::yield();
    partials[blockIdx.x] = own;
  }
  if (!is_last) return;
  float total = 0.0f;
  const unsigned first = bug == Bug::kMergesFromItself ? blockIdx.x : 0;
  for (unsigned i = 0; i < blocks; ++i) total += static_cast<float>(partials[(first + i) % blocks]);
  *sum = total;
  if (bug != Bug::kTicketNotReset) cuda::store_relaxed(ticket, 0);
}

__global__ void cluster_sum_kernel(const float* x, int n, float* sums, Bug bug) {
  const float own = sum_in_block(own_sum(x, n, bug), bug);
  auto& mine = block_shared<float>();
  if (bug == Bug::kArrivesTooEarly) emulator::cluster_arrive();
  if (threadIdx.x == 0) mine = own;
  if (bug == Bug::kNoClusterBarrier) {
    __syncthreads();
  } else {
    if (bug != Bug::kArrivesTooEarly) emulator::cluster_arrive();
    emulator::cluster_wait();
  }
  float total = 0.0f;
  for (unsigned rank = 0; rank < gridDim.x; ++rank) {
    total += *static_cast<const float*>(emulator::cluster_peer(&mine, rank));
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
  if (bug == Bug::kLeavesCluster) return;
  emulator::cluster_arrive();
  emulator::cluster_wait();
}

__global__ void team_sum_kernel(const float* x, int n, double* partials, unsigned* counter,
                                float* sums, Bug bug) {
  const float own = sum_in_block(own_sum(x, n, bug), bug);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = own;
    cuda::fetch_add_acq_rel(counter, 1);
    while (bug != Bug::kNoTeamBarrier && __atomic_load_n(counter, __ATOMIC_ACQUIRE) < gridDim.x) {
      emulator::pause();
    }
  }
  __syncthreads();
  float total = 0.0f;
  for (unsigned i = 0; i < gridDim.x; ++i) total += static_cast<float>(partials[i]);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

}  // namespace

void block_sum(const float* x, int n, float* sum, Bug bug) {
  emulator::Launch launch{1, 64};
  launch.dynamic_shared = emulator::kDefaultShared - sizeof(Values);
  if (bug == Bug::kSharedUnasked) ++launch.dynamic_shared;
  if (bug == Bug::kSharedOverAsked) {
    launch.max_dynamic_shared = launch.dynamic_shared - 1;
  }
  if (bug == Bug::kSharedOverDevice) {
    launch.max_dynamic_shared = emulator::kOptInShared - sizeof(Values) + 1;
  }
  if (bug == Bug::kStaticOverExpected) launch.max_static_shared = sizeof(Values) - 1;
  emulator::run(launch, [=] { block_sum_kernel(x, n, sum, bug); });
}

float large_static(std::size_t dynamic_shared) {
  float one = 0.0f;
  cuda::LaunchConfig config;
  config.dynamic_shared = dynamic_shared;
  cuda::launch(large_static_kernel, config, &one);
  return one;
}

void exchange_sum(const float* x, int n, float* sum, Bug bug) {
  emulator::run({1, 64}, [=] { exchange_sum_kernel(x, n, sum, bug); });
}

void ticket_sum(const float* x, int n, int blocks, double* partials, unsigned* ticket, float* sum,
                Bug bug) {
  emulator::run({static_cast<unsigned>(blocks), 32},
                [=] { ticket_sum_kernel(x, n, partials, ticket, sum, bug); });
}

void cluster_sum(const float* x, int n, float* sums, Bug bug) {
  emulator::run({4, 32, 4}, [=] { cluster_sum_kernel(x, n, sums, bug); });
}

void team_sum(const float* x, int n, int blocks, double* partials, unsigned* counter, float* sums,
              Bug bug) {
  const bool is_cooperative = bug != Bug::kNotCooperative;
  emulator::run({static_cast<unsigned>(blocks), 32, 1, is_cooperative},
                [=] { team_sum_kernel(x, n, partials, counter, sums, bug); });
}

}  // namespace normcore::kernels::testing
