#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <mutex>

#include "cuda/error.h"
#include "normcore/kernels/cuda.h"
#include "plan/cuda_constants.h"

namespace normcore::kernels {
namespace {

__global__ void empty_kernel() {}

// Whether the present device has room for one cluster of so many blocks, each with a multiprocessor to
// itself, as those of kernels that are not plain may need.
bool has_room(int blocks, int shared_bytes) {
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kMaxThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  const auto set = [](cudaFuncAttribute attribute, int value) {
    return cuda::to_status(cudaFuncSetAttribute(empty_kernel, attribute, value)).ok();
  };
  return set(cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes) &&
         set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1) &&
         cuda::to_status(cudaOccupancyMaxActiveClusters(&clusters, empty_kernel, &config)).ok() &&
         clusters > 0;
}

// Of the present device. The kernels of this build may be those for older ones, which have no clusters.
cudaError_t query_clusters(int shared_bytes, int& max_cluster) {
  max_cluster = 1;
  cudaFuncAttributes kernel{};
  const auto error = cudaFuncGetAttributes(&kernel, empty_kernel);
  constexpr int kFirst = 90;
  if (error != cudaSuccess || kernel.ptxVersion < kFirst) return error;
  for (int blocks = kMaxCluster; blocks > 1 && max_cluster == 1; blocks /= 2) {
    if (has_room(blocks, shared_bytes)) max_cluster = blocks;
  }
  return cudaSuccess;
}

cudaError_t query(int ordinal, CudaDevice& device) {
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(&value, attribute, ordinal);
  };
  int present = 0, cooperative = 0, clusters = 0, shared_bytes = 0, block_shared_bytes = 0;
  for (const cudaError_t error :
       {get(device.multiprocessors, cudaDevAttrMultiProcessorCount),
        get(cooperative, cudaDevAttrCooperativeLaunch), get(clusters, cudaDevAttrClusterLaunch),
        get(shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor),
        get(block_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin),
        cudaGetDevice(&present)}) {
    if (error != cudaSuccess) return error;
  }
  device.cooperative = cooperative != 0;
  device.shared_bytes = static_cast<std::size_t>(shared_bytes);
  device.max_cluster = 1;
  if (clusters == 0) return cudaSuccess;
  if (const auto error = cudaSetDevice(ordinal); error != cudaSuccess) return error;
  const cudaError_t error = query_clusters(block_shared_bytes, device.max_cluster);
  const cudaError_t back = cudaSetDevice(present);
  return error != cudaSuccess ? error : back;
}

// What is known of a device; it does not change.
struct Known {
  std::mutex mutex;
  std::atomic<bool> is_asked{false};
  CudaDevice device;
};

}  // namespace

Status query_device(int ordinal, CudaDevice& device) {
  constexpr std::size_t kMost = 64;
  static std::array<Known, kMost> all;
  const auto index = static_cast<std::size_t>(ordinal);
  if (index >= kMost) return cuda::to_status(query(ordinal, device));
  Known& known = all[index];
  if (!known.is_asked) {
    const std::lock_guard lock(known.mutex);
    if (!known.is_asked) {
      CudaDevice asked;
      if (const Status status = cuda::to_status(query(ordinal, asked)); !status.ok()) return status;
      known.device = asked;
      known.is_asked = true;
    }
  }
  device = known.device;
  return Status::success();
}

}  // namespace normcore::kernels
