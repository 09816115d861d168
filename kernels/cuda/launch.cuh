// What kernels use beyond plain CUDA C++: launches, shared memory, counters between blocks. Each has
// a second body for the emulator, where a CUDA thread is a fiber of one host thread. T of shared
// memory is trivially default-constructible; two functions that use the same T share the memory.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <type_traits>

#include "plan/cuda_constants.h"

#if defined(__CUDACC__)
#include <cuda/atomic>
#endif

namespace normcore::kernels::cuda {

struct LaunchConfig {
  dim3 grid = 1, block = 1;
  std::size_t dynamic_shared = 0;
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
  cudaLaunchConfig_t launch_config = {};
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
  emulator::run(launch, [&] { kernel(arguments...); });
  return cudaSuccess;
}

#endif

}  // namespace normcore::kernels::cuda
