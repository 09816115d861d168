// From run-time choices to kernel instantiations. Every combination that plan_cuda() can choose is
// instantiated here, and no other: kPack, kBlock, kCluster and kTeam are for 16- and 32-bit dtypes only,
// few vectors per thread, and the latter two, only where a vector has several elements. kPlain kernels
// are for the common calls: no mask, whole vectors only, all tensors but parameters in the dtype of x.
// They take a third to a sixth of the instructions.
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
  if (plan.path == CudaPath::kCluster) config.cluster = static_cast<unsigned>(plan.team);
  config.cooperative = plan.path == CudaPath::kTeam;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  const cudaError_t error = launch(kernel, config, arguments...);
  Status status = to_status(error);
  const bool is_together = config.cooperative || config.cluster > 1;
  if (is_together &&
      (error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorInvalidClusterSize ||
       error == cudaErrorLaunchOutOfResources)) {
    status.code = StatusCode::kNoRoom;
  }
  return status;
}

// Calls start.operator()<T, kWidth, kVectors, kStage, kPlain>(blocks) for every launch of the plan, and
// merge() between those of kSplit.
template <CudaKernels kKernels, class T, int kWidth, bool kPlain, class Merge, class Start>
Status for_each_stage_of(const CudaPlan& plan, const Merge& merge, const Start& start) {
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
    case CudaPath::kCluster:
    case CudaPath::kTeam:
      if constexpr (constexpr int kTeamVectors = kKernels.team_vectors(kPlain);
                    !std::is_same_v<T, double> && kWidth > 1 && kTeamVectors > 0) {
        return start.template operator()<T, kWidth, kTeamVectors, Stage::kTeam, kPlain>(
            plan.blocks);
      }
      break;
    case CudaPath::kSplit: {
      Status status =
          start.template operator()<T, kWidth, kVectors, Stage::kReduce, kPlain>(plan.blocks);
      if (status.ok()) status = merge();
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

template <CudaKernels kKernels, class Merge, class Start>
Status for_each_stage(DType x, const CudaPlan& plan, const Merge& merge, const Start& start) {
  return visit_dtype(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr auto kWidth = static_cast<int>(kKernels.width(sizeof(T)));
    if (plan.width != kWidth) return for_each_stage_of<kKernels, T, 1, false>(plan, merge, start);
    if constexpr (!std::is_same_v<T, double>) {
      if (plan.is_plain) return for_each_stage_of<kKernels, T, kWidth, true>(plan, merge, start);
    }
    return for_each_stage_of<kKernels, T, kWidth, false>(plan, merge, start);
  });
}

// Calls start.operator()<T, kWidth, kPlain>() for the one launch of kRun.
template <CudaKernels kKernels, class Start>
Status for_each_run_kernel(DType x, const CudaPlan& plan, const Start& start) {
  return visit_dtype(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr auto kWidth = static_cast<int>(kKernels.width(sizeof(T)));
    if (plan.width != kWidth) return Status::invalid("the plan has no kernel");
    if constexpr (!std::is_same_v<T, double>) {
      if (plan.is_plain) return start.template operator()<T, kWidth, true>();
    }
    return start.template operator()<T, kWidth, false>();
  });
}

}  // namespace normcore::kernels::cuda
