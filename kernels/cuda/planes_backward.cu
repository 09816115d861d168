// The backward pass over kNCS tensors.
#include "cuda/backward_pass.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/passes.h"
#include "cuda/planes_gradient.cuh"

namespace normcore::kernels::cuda {

Status planes_gradient(const BackwardCall& call, const PlanesTiling& tiling, const CudaPlan& plan,
                       CudaStream stream) {
  return for_each_stage<kBackwardKernels>(
      call.input.x.dtype, plan, [&] { return merge_chunks(call, tiling.merge, stream); },
      [&]<class T, int kWidth, int kVectors, Stage kStage, bool kPlain>(std::int64_t blocks) {
        using Pass = BackwardPass<T, kWidth, kPlain>;
        return launch_blocks(planes_gradient_kernel<Pass, kVectors, kStage>, plan, blocks, stream,
                             call, tiling);
      });
}

}  // namespace normcore::kernels::cuda
