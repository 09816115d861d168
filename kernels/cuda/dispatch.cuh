// From run-time choices to kernel instantiations. Every combination that plan_cuda() can choose is
// instantiated here, and no other: kPack and kBlock are for 16- and 32-bit dtypes only, few vectors
// per thread exist only where a vector has several elements. kPlain kernels are for the common calls:
// no mask, whole vectors only, all tensors but parameters in the dtype of x. They take a third to a
// sixth of the instructions.
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

inline bool has_dtype(const auto& tensor, DType dtype) { return !tensor || tensor.dtype == dtype; }

inline bool is_plain(const ForwardCall& call) {
  const DType dtype = call.input.x.dtype;
  return !call.input.mask && has_dtype(call.input.residual, dtype) && has_dtype(call.y, dtype);
}

inline bool is_plain(const BackwardCall& call) {
  const DType dtype = call.input.x.dtype;
  return !call.input.mask && has_dtype(call.input.residual, dtype) &&
         has_dtype(call.grad_y, dtype) && has_dtype(call.grad.x, dtype) &&
         has_dtype(call.grad.residual, dtype);
}

inline bool is_plain(const DoubleBackwardCall& call) {
  const DType dtype = call.input.x.dtype;
  return is_plain(static_cast<const BackwardCall&>(call)) && has_dtype(call.cotangents.x, dtype) &&
         has_dtype(call.cotangents.residual, dtype) && has_dtype(call.grad_grad_y, dtype);
}

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

// Calls start.operator()<T, kWidth, kVectors, kStage, kPlain>(blocks) for every launch of the plan.
template <CudaKernels kKernels, class T, int kWidth, bool kPlain, class Start>
Status for_each_stage_of(const CudaPlan& plan, const Start& start) {
  constexpr int kVectors = kKernels.vectors, kFewVectors = kKernels.few_vectors,
                kManyVectors = kKernels.resident_vectors;
  switch (plan.path) {
    case CudaPath::kPack:
    case CudaPath::kBlock:
      if constexpr (!std::is_same_v<T, double>) {
        if constexpr (kWidth > 1) {
          if (plan.vectors == kFewVectors) {
            return start.template operator()<T, kWidth, kFewVectors, Stage::kResident, kPlain>(
                plan.blocks);
          }
        }
        return start.template operator()<T, kWidth, kManyVectors, Stage::kResident, kPlain>(
            plan.blocks);
      }
      break;
    case CudaPath::kSplit: {
      const Status status =
          start.template operator()<T, kWidth, kVectors, Stage::kReduce, kPlain>(plan.blocks);
      if (!status.ok() || plan.apply_blocks == 0) return status;
      return start.template operator()<T, kWidth, kVectors, Stage::kApply, kPlain>(
          plan.apply_blocks);
    }
    case CudaPath::kStream:
      return start.template operator()<T, kWidth, kVectors, Stage::kApply, kPlain>(plan.blocks);
    case CudaPath::kRun:
      break;
  }
  return Status::invalid("the plan has no kernel");
}

template <CudaKernels kKernels, class Start>
Status for_each_stage(DType x, const CudaPlan& plan, bool is_plain, const Start& start) {
  return visit_dtype(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr auto kWidth = static_cast<int>(kKernels.width(sizeof(T)));
    if (plan.width != kWidth) return for_each_stage_of<kKernels, T, 1, false>(plan, start);
    if constexpr (!std::is_same_v<T, double>) {
      if (is_plain) return for_each_stage_of<kKernels, T, kWidth, true>(plan, start);
    }
    return for_each_stage_of<kKernels, T, kWidth, false>(plan, start);
  });
}

// Calls start.operator()<T, kWidth, kPlain>() for the one launch of kRun.
template <CudaKernels kKernels, class Start>
Status for_each_run_kernel(DType x, const CudaPlan& plan, bool is_plain, const Start& start) {
  return visit_dtype(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr auto kWidth = static_cast<int>(kKernels.width(sizeof(T)));
    if (plan.width != kWidth) return Status::invalid("the plan has no kernel");
    if constexpr (!std::is_same_v<T, double>) {
      if (is_plain) return start.template operator()<T, kWidth, true>();
    }
    return start.template operator()<T, kWidth, false>();
  });
}

}  // namespace normcore::kernels::cuda
