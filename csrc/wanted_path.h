// The path of settings.h that CUDA kernels should take, for those who plan them.
#pragma once

#include <normcore/kernels/cuda_plan.h>

#include <optional>

namespace normcore {

std::optional<kernels::CudaPath> wanted_cuda_path();

}  // namespace normcore
