#include <cuda_runtime_api.h>

#include "cuda/error.h"
#include "normcore/kernels/cuda.h"

namespace normcore::kernels {

Status query_device(int ordinal, CudaDevice& device) {
  return cuda::to_status(
      cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, ordinal));
}

Status query_capture(CudaStream stream, bool& is_capturing) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error =
      cudaStreamIsCapturing(static_cast<cudaStream_t>(stream.handle), &status);
  is_capturing = status != cudaStreamCaptureStatusNone;
  return cuda::to_status(error);
}

}  // namespace normcore::kernels
