#include <cuda_runtime.h>

#include <array>
#include <mutex>

#include "cuda/error.h"
#include "normcore/kernels/cuda.h"
#include "plan/cuda_constants.h"

namespace normcore::kernels {
namespace {

__global__ void empty_kernel() {}

// Whether the present device has room for one cluster of so many blocks.
bool has_room(int blocks) {
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kMaxThreads);
  config.dynamicSmemBytes = kMaxDynamicShared;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  const auto shared = static_cast<int>(kMaxDynamicShared);
  return cuda::to_status(cudaFuncSetAttribute(empty_kernel,
                                              cudaFuncAttributeMaxDynamicSharedMemorySize, shared))
             .ok() &&
         cuda::to_status(
             cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1))
             .ok() &&
         cuda::to_status(cudaOccupancyMaxActiveClusters(&clusters, empty_kernel, &config)).ok() &&
         clusters > 0;
}

// The kernels of this build may be those for older devices, which have no clusters.
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
  for (int blocks = kMaxCluster; blocks > 1 && max_cluster == 1; blocks /= 2) {
    if (has_room(blocks)) max_cluster = blocks;
  }
  return cudaSuccess;
}

cudaError_t query(int ordinal, CudaDevice& device) {
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(&value, attribute, ordinal);
  };
  int present = 0, cooperative = 0, shared_bytes = 0;
  for (const cudaError_t error : {get(device.multiprocessors, cudaDevAttrMultiProcessorCount),
                                  get(cooperative, cudaDevAttrCooperativeLaunch),
                                  get(shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                                  cudaGetDevice(&present), cudaSetDevice(ordinal)}) {
    if (error != cudaSuccess) return error;
  }
  device.cooperative = cooperative != 0;
  device.shared_bytes = static_cast<std::size_t>(shared_bytes);
  const cudaError_t error = query_clusters(ordinal, device.max_cluster);
  const cudaError_t back = cudaSetDevice(present);
  return error != cudaSuccess ? error : back;
}

// What is known of a device; it does not change.
struct Known {
  std::once_flag once;
  CudaDevice device;
  Status status;
};

}  // namespace

Status query_device(int ordinal, CudaDevice& device) {
  static constexpr int kMost = 64;
  static std::array<Known, kMost> all;
  if (ordinal < 0 || ordinal >= kMost) return cuda::to_status(query(ordinal, device));
  Known& known = all[static_cast<std::size_t>(ordinal)];
  std::call_once(known.once, [&] { known.status = cuda::to_status(query(ordinal, known.device)); });
  if (known.status.ok()) device = known.device;
  return known.status;
}

}  // namespace normcore::kernels
