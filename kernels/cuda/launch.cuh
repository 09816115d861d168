// What kernels use beyond plain CUDA C++: launches, shared memory, clusters, counters between blocks.
// Each has a second body for the emulator, where a CUDA thread is a fiber of one host thread. T of
// shared memory is trivially default-constructible; two functions that use the same T share the memory.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <type_traits>

#include "plan/cuda_constants.h"

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>

#include <cuda/atomic>
#endif

namespace normcore::kernels::cuda {

struct LaunchConfig {
  dim3 grid = 1, block = 1;
  std::size_t dynamic_shared = 0;
  unsigned cluster = 1;      // blocks of a cluster (sm_90 on)
  bool cooperative = false;  // all blocks run together
  cudaStream_t stream = nullptr;
};

// Whether the kernel has to ask for that much, whatever its static part.
inline bool asks_for_shared(const LaunchConfig& config) {
  return config.dynamic_shared > kDefaultDynamicShared;
}

#if defined(__CUDACC__)

// One object per block.
template <class T>
__device__ T& block_shared() {
  static_assert(std::is_trivially_default_constructible_v<T>);
  __shared__ T storage;
  return storage;
}

// An array of LaunchConfig::dynamic_shared bytes per block.
template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(kVectorBytes) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}

// Publishes what this thread wrote or saw, counts, and sees what earlier arrivals published.
__device__ inline unsigned fetch_add_acq_rel(unsigned* counter, unsigned value) {
  return ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device>(*counter).fetch_add(
      value, ::cuda::memory_order_acq_rel);
}

__device__ inline void store_relaxed(unsigned* counter, unsigned value) {
  ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device>(*counter).store(
      value, ::cuda::memory_order_relaxed);
}

__device__ inline unsigned load_acquire(unsigned* counter) {
  return ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device>(*counter).load(
      ::cuda::memory_order_acquire);
}

// In a loop that waits for other blocks.
__device__ inline void pause() {}

// The barrier of a cluster, which orders what its threads write to any memory; and where the block of
// that rank has what `own` points to in shared memory.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline void cluster_arrive() { cooperative_groups::this_cluster().barrier_arrive(); }
__device__ inline void cluster_wait() { cooperative_groups::this_cluster().barrier_wait(); }
// Orders nothing but what the thread has read and used.
__device__ inline void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
template <class T>
__device__ T* cluster_peer(T* own, unsigned rank) {
  return cooperative_groups::this_cluster().map_shared_rank(own, rank);
}
#else  // no plan has clusters there
__device__ inline void cluster_arrive() { __trap(); }
__device__ inline void cluster_wait() { __trap(); }
__device__ inline void cluster_arrive_relaxed() { __trap(); }
template <class T>
__device__ T* cluster_peer(T* own, unsigned) {
  __trap();
  return own;
}
#endif

// From global to shared memory, 4, 8 or 16 bytes that are aligned to as many; the thread may read them
// behind its next wait_for_copies().
template <class T>
__device__ void copy_async(T* shared, const T* global) {
  __pipeline_memcpy_async(shared, global, sizeof(T));
}
__device__ inline void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

// From here on the compiler knows nothing about the value.
__device__ inline void keep(unsigned& value) { asm volatile("" : "+r"(value)); }

// What is loaded behind it is not loaded earlier, where it would take registers.
__device__ inline void keep_order() { asm volatile("" ::: "memory"); }

// With a relative error of about 1e-7 * (1 + |x|); of 2 ulp, or 0 for a divisor above 2^126.
__device__ inline float fast_exp(float x) { return __expf(x); }
__device__ inline float fast_divide(float a, float b) { return __fdividef(a, b); }

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchConfig& config,
                   std::type_identity_t<Parameters>... arguments) {
  if (asks_for_shared(config)) {
    // The same for every call: another thread may be about to launch the kernel.
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kMaxDynamicShared));
    if (error != cudaSuccess) return error;
  }
  if (config.cluster > 1 || config.cooperative) {
    // As plans count on: otherwise the driver may leave room for one block in a multiprocessor.
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             static_cast<int>(cudaSharedmemCarveoutMaxShared));
    if (error != cudaSuccess) return error;
  }
  if (config.cluster > kPortableCluster) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (config.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {config.cluster, 1, 1};
  }
  if (config.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  cudaLaunchConfig_t launch_config = {};
  launch_config.attrs = attributes;
  launch_config.numAttrs = count;
  launch_config.gridDim = config.grid;
  launch_config.blockDim = config.block;
  launch_config.dynamicSmemBytes = config.dynamic_shared;
  launch_config.stream = config.stream;
  return cudaLaunchKernelEx(&launch_config, kernel, arguments...);
}

#else  // the emulator, whose header the build includes first

template <class T>
T& block_shared() {
  static_assert(std::is_trivially_default_constructible_v<T>);
  static const char key = 0;
  return *static_cast<T*>(emulator::shared_memory(&key, sizeof(T)));
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(emulator::dynamic_shared_memory());
}

inline unsigned fetch_add_acq_rel(unsigned* counter, unsigned value) {
  emulator::yield();
  return __atomic_fetch_add(counter, value, __ATOMIC_ACQ_REL);
}

inline void store_relaxed(unsigned* counter, unsigned value) {
  __atomic_store_n(counter, value, __ATOMIC_RELAXED);
}

inline unsigned load_acquire(unsigned* counter) {
  return __atomic_load_n(counter, __ATOMIC_ACQUIRE);
}

inline void pause(EMULATOR_SITE) { emulator::pause(site); }

inline void cluster_arrive(EMULATOR_SITE) { emulator::cluster_arrive(site); }
inline void cluster_wait(EMULATOR_SITE) { emulator::cluster_wait(site); }
inline void cluster_arrive_relaxed(EMULATOR_SITE) { emulator::cluster_arrive(site); }
template <class T>
T* cluster_peer(T* own, unsigned rank) {
  return static_cast<T*>(emulator::cluster_peer(own, rank));
}

template <class T>
void copy_async(T* shared, const T* global) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  emulator::copy_async([=] { *shared = *global; });
}
inline void wait_for_copies() { emulator::wait_for_copies(); }

inline void keep(unsigned&) {}
inline void keep_order() {}

inline float fast_exp(float x) { return std::exp(x); }
inline float fast_divide(float a, float b) { return a / b; }

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchConfig& config,
                   std::type_identity_t<Parameters>... arguments) {
  emulator::Launch launch{config.grid, config.block};
  launch.dynamic_shared = config.dynamic_shared;
  launch.max_dynamic_shared = asks_for_shared(config) ? kMaxDynamicShared : 0;
  launch.max_static_shared = kMaxStaticShared;
  launch.cluster = config.cluster;
  launch.cooperative = config.cooperative;
  emulator::run(launch, [&] { kernel(arguments...); });
  return cudaSuccess;
}

#endif

}  // namespace normcore::kernels::cuda
