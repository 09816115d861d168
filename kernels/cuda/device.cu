#include <cuda_runtime.h>

#include "cuda/error.h"
#include "normcore/kernels/cuda.h"

namespace normcore::kernels {
namespace {

__global__ void empty_kernel() {}

// Whether the kernels of this build use clusters: devices also run code for older ones.
cudaError_t query_clusters(int ordinal, bool& has_clusters) {
  int has_launch = 0;
  if (const auto error = cudaDeviceGetAttribute(&has_launch, cudaDevAttrClusterLaunch, ordinal);
      error != cudaSuccess) {
    return error;
  }
  cudaFuncAttributes kernel{};
  const auto error = cudaFuncGetAttributes(&kernel, empty_kernel);
  constexpr int kFirst = 90;
  has_clusters = has_launch != 0 && kernel.ptxVersion >= kFirst;
  return error;
}

cudaError_t query(int ordinal, CudaDevice& device) {
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(&value, attribute, ordinal);
  };
  int cooperative = 0, shared_bytes = 0;
  bool has_clusters = false;
  for (const cudaError_t error : {get(device.multiprocessors, cudaDevAttrMultiProcessorCount),
                                  get(cooperative, cudaDevAttrCooperativeLaunch),
                                  get(shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                                  query_clusters(ordinal, has_clusters)}) {
    if (error != cudaSuccess) return error;
  }
  constexpr int kPortableCluster = 8;
  device.max_cluster = has_clusters ? kPortableCluster : 1;
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
