#include <cuda_runtime.h>

#include "cuda/error.h"
#include "normcore/kernels/cuda.h"
#include "plan/cuda_constants.h"

namespace normcore::kernels {
namespace {

__global__ void empty_kernel() {}

// Whether the device has room for one cluster of so many blocks.
bool has_room(unsigned blocks) {
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {blocks, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kMaxThreads);
  config.dynamicSmemBytes = kMaxDynamicShared;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  for (const cudaError_t error :
       {cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(kMaxDynamicShared)),
        cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        cudaOccupancyMaxActiveClusters(&clusters, empty_kernel, &config)}) {
    if (cuda::to_status(error).ok()) continue;
    return false;
  }
  return clusters > 0;
}

// Of the present device, on which the kernels of this build may be those for older ones.
cudaError_t query_clusters(int ordinal, int& max_cluster) {
  max_cluster = 1;
  int has_launch = 0;
  if (const auto error = cudaDeviceGetAttribute(&has_launch, cudaDevAttrClusterLaunch, ordinal);
      error != cudaSuccess || has_launch == 0) {
    return error;
  }
  cudaFuncAttributes kernel{};
  constexpr int kFirst = 90;
  if (const auto error = cudaFuncGetAttributes(&kernel, empty_kernel);
      error != cudaSuccess || kernel.ptxVersion < kFirst) {
    return error;
  }
  max_cluster = has_room(kMaxCluster) ? kMaxCluster : kPortableCluster;
  return cudaSuccess;
}

cudaError_t query(int ordinal, CudaDevice& device) {
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(&value, attribute, ordinal);
  };
  int cooperative = 0, shared_bytes = 0;
  for (const cudaError_t error : {get(device.multiprocessors, cudaDevAttrMultiProcessorCount),
                                  get(cooperative, cudaDevAttrCooperativeLaunch),
                                  get(shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                                  query_clusters(ordinal, device.max_cluster)}) {
    if (error != cudaSuccess) return error;
  }
  device.cooperative = cooperative != 0;
  device.shared_bytes = static_cast<std::size_t>(shared_bytes);
  return cudaSuccess;
}

}  // namespace

Status query_device(int ordinal, CudaDevice& device) {
  // Asked for before every call.
  struct Known {
    int ordinal = -1;
    CudaDevice device;
  };
  thread_local Known known;
  if (known.ordinal != ordinal) {
    CudaDevice asked;
    if (const Status status = cuda::to_status(query(ordinal, asked)); !status.ok()) return status;
    known = {ordinal, asked};
  }
  device = known.device;
  return Status::success();
}

}  // namespace normcore::kernels
