// The passes over planes (kNCS), rows (kNSC) and runs (kRun). Each launches the stages of plan.path.
// Internal to kernels/cuda.
#pragma once

#include "cuda/call.h"
#include "plan/cuda_tiling.h"

namespace normcore::kernels::cuda {

Status planes_forward(const ForwardCall& call, const PlanesTiling& tiling, const CudaPlan& plan,
                      CudaStream stream);
Status planes_gradient(const BackwardCall& call, const PlanesTiling& tiling, const CudaPlan& plan,
                       CudaStream stream);
Status planes_gradient(const DoubleBackwardCall& call, const PlanesTiling& tiling,
                       const CudaPlan& plan, CudaStream stream);
Status rows_forward(const ForwardCall& call, const RowsTiling& tiling, const CudaPlan& plan,
                    CudaStream stream);
Status rows_gradient(const BackwardCall& call, const RowsTiling& tiling, const CudaPlan& plan,
                     CudaStream stream);
Status rows_gradient(const DoubleBackwardCall& call, const RowsTiling& tiling, const CudaPlan& plan,
                     CudaStream stream);
Status runs_forward(const ForwardCall& call, const RunsTiling& tiling, const CudaPlan& plan,
                    CudaStream stream);
Status runs_gradient(const BackwardCall& call, const RunsTiling& tiling, const CudaPlan& plan,
                     CudaStream stream);
Status runs_gradient(const DoubleBackwardCall& call, const RunsTiling& tiling, const CudaPlan& plan,
                     CudaStream stream);

// Between the stages of kSplit: statistics of slices, or what a backward pass knows of them and gradients
// of parameters, from the records of their chunks.
Status merge_chunks(const ForwardCall& call, const MergeTiling& tiling, CudaStream stream);
Status merge_chunks(const BackwardCall& call, const MergeTiling& tiling, CudaStream stream);
Status merge_chunks(const DoubleBackwardCall& call, const MergeTiling& tiling, CudaStream stream);

// The slices of a backward pass, from sums of whole ones (sync.h).
Status sync_slices(const BackwardCall& call, std::int64_t slices, CudaStream stream);
Status sync_statistics(const SyncStatisticsArgs& args, CudaStream stream);

// Stores `count` gradients of scale and bias: sums of call.parameters over `blocks` blocks of
// samples, in order. Without a block they are 0.
Status sum_parameters(const BackwardCall& call, std::int64_t count, std::int64_t blocks,
                      CudaStream stream);

}  // namespace normcore::kernels::cuda
