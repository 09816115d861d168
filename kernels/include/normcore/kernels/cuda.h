// The norms on a CUDA device: the args structs of batch_norm.h and group_norm.h with device pointers.
// A call enqueues one launch, or three where the plan splits slices, and one more that sums parameter
// gradients of group norm over several samples; it neither allocates nor synchronises, and results do
// not depend on the stream. The plan must be that of the same args. Only in builds with CUDA.
#pragma once

#include "normcore/kernels/batch_norm.h"
#include "normcore/kernels/cuda_plan.h"
#include "normcore/kernels/group_norm.h"
#include "normcore/kernels/sync.h"

namespace normcore::kernels {

// Memory of one call on the device. `data`: plan.workspace_bytes, aligned to 256 bytes, any content.
// `counters`: plan.counters zeros, which no other call uses until this one has run; zeros again then.
struct CudaWorkspace {
  void* data = nullptr;
  unsigned* counters = nullptr;
};

// A cudaStream_t.
struct CudaStream {
  void* handle = nullptr;
};

// Facts about a device of this machine, asked for once. May create its context.
Status query_device(int ordinal, CudaDevice& device);

Status run(const BatchNormForwardArgs& args, const CudaPlan& plan, const CudaWorkspace& workspace,
           CudaStream stream);
Status run(const BatchNormInferenceArgs& args, const CudaPlan& plan, const CudaWorkspace& workspace,
           CudaStream stream);
Status run(const BatchNormBackwardArgs& args, const CudaPlan& plan, const CudaWorkspace& workspace,
           CudaStream stream);
Status run(const BatchNormDoubleBackwardArgs& args, const CudaPlan& plan,
           const CudaWorkspace& workspace, CudaStream stream);
Status run(const GroupNormForwardArgs& args, const CudaPlan& plan, const CudaWorkspace& workspace,
           CudaStream stream);
Status run(const GroupNormBackwardArgs& args, const CudaPlan& plan, const CudaWorkspace& workspace,
           CudaStream stream);
Status run(const GroupNormDoubleBackwardArgs& args, const CudaPlan& plan,
           const CudaWorkspace& workspace, CudaStream stream);
Status run(const SyncMomentsArgs& args, const CudaPlan& plan, const CudaWorkspace& workspace,
           CudaStream stream);
Status run(const SyncApplyArgs& args, const CudaPlan& plan, const CudaWorkspace& workspace,
           CudaStream stream);
Status run(const SyncGradientSumsArgs& args, const CudaPlan& plan, const CudaWorkspace& workspace,
           CudaStream stream);
Status run(const SyncGradientArgs& args, const CudaPlan& plan, const CudaWorkspace& workspace,
           CudaStream stream);
Status run(const SyncStatisticsArgs& args, CudaStream stream);

}  // namespace normcore::kernels
