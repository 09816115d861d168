// The backward pass over runs.
#include "cuda/backward_pass.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/passes.h"
#include "cuda/runs_gradient.cuh"

namespace normcore::kernels::cuda {

Status runs_gradient(const BackwardCall& call, const RunsTiling& tiling, const CudaPlan& plan,
                     CudaStream stream) {
  return for_each_run_kernel<kBackwardKernels>(
      call.input.x.dtype, plan, [&]<class T, int kWidth, bool kPlain>() {
        using Pass = BackwardPass<T, kWidth, kPlain>;
        return launch_blocks(runs_gradient_kernel<Pass>, plan, plan.blocks, stream, call, tiling);
      });
}

}  // namespace normcore::kernels::cuda
