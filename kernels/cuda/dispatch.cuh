// From run-time choices to kernel instantiations. Every combination that plan_cuda() can choose is
// instantiated here, and no other: x stays in registers for 16- and 32-bit dtypes only, few vectors
// per thread exist only where a vector has several elements.
#pragma once

#include <type_traits>

#include "cuda/call.h"
#include "cuda/elements.cuh"
#include "cuda/error.h"
#include "cuda/launch.cuh"
#include "normcore/kernels/cuda_plan.h"
#include "normcore/kernels/status.h"
#include "plan/cuda_constants.h"

namespace normcore::kernels::cuda {

template <class... Parameters>
Status launch_blocks(void (*kernel)(Parameters...), const CudaPlan& plan, std::int64_t blocks,
                     CudaStream stream, std::type_identity_t<Parameters>... arguments) {
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(blocks));
  config.block = dim3(static_cast<unsigned>(plan.threads));
  config.dynamic_shared = plan.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  return to_status(launch(kernel, config, arguments...));
}

// Calls start.operator()<T, kWidth, kVectors, kStage>(blocks) for every launch of the plan.
template <int kFewVectors, int kManyVectors, class T, int kWidth, class Start>
Status for_each_stage_of(const CudaPlan& plan, const Start& start) {
  switch (plan.path) {
    case CudaPath::kPack:
    case CudaPath::kBlock:
      if constexpr (!std::is_same_v<T, double>) {
        if constexpr (kWidth > 1) {
          if (plan.vectors == kFewVectors) {
            return start.template operator()<T, kWidth, kFewVectors, Stage::kResident>(plan.blocks);
          }
        }
        return start.template operator()<T, kWidth, kManyVectors, Stage::kResident>(plan.blocks);
      }
      break;
    case CudaPath::kSplit: {
      const Status status =
          start.template operator()<T, kWidth, kManyVectors, Stage::kReduce>(plan.blocks);
      if (!status.ok() || plan.apply_blocks == 0) return status;
      return start.template operator()<T, kWidth, kManyVectors, Stage::kApply>(plan.apply_blocks);
    }
    case CudaPath::kStream:
      return start.template operator()<T, kWidth, kManyVectors, Stage::kApply>(plan.blocks);
  }
  return Status::invalid("the plan has no kernel");
}

template <int kFewVectors, int kManyVectors, class Start>
Status for_each_stage(DType x, const CudaPlan& plan, const Start& start) {
  return visit_dtype(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kWidth = static_cast<int>(kVectorBytes / sizeof(T));
    if (plan.width == kWidth) {
      return for_each_stage_of<kFewVectors, kManyVectors, T, kWidth>(plan, start);
    }
    return for_each_stage_of<kFewVectors, kManyVectors, T, 1>(plan, start);
  });
}

}  // namespace normcore::kernels::cuda
