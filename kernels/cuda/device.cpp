#include <cuda_runtime_api.h>

#include "cuda/error.h"
#include "normcore/kernels/cuda.h"

namespace normcore::kernels {

Status query_device(int ordinal, CudaDevice& device) {
  return cuda::to_status(
      cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, ordinal));
}

}  // namespace normcore::kernels
