// CUDA errors as Status. Internal to kernels/cuda.
#pragma once

#include <cuda_runtime_api.h>

#include "normcore/kernels/status.h"

namespace normcore::kernels::cuda {

inline Status to_status(cudaError_t error) {
  if (error == cudaSuccess) return Status::success();
  // Whoever asks the runtime next must not find an error that the caller was told about.
  static_cast<void>(cudaGetLastError());
  return {StatusCode::kDeviceError, static_cast<int>(error), cudaGetErrorString(error)};
}

}  // namespace normcore::kernels::cuda
