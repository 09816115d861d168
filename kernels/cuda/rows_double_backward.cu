// The double backward pass over kNSC tensors.
#include "cuda/dispatch.cuh"
#include "cuda/double_backward_pass.cuh"
#include "cuda/passes.h"
#include "cuda/rows_gradient.cuh"

namespace normcore::kernels::cuda {

Status rows_gradient(const DoubleBackwardCall& call, const RowsTiling& tiling, const CudaPlan& plan,
                     CudaStream stream) {
  return for_each_stage<kDoubleBackwardKernels>(
      call.input.x.dtype, plan, [&] { return merge_chunks(call, tiling.merge, stream); },
      [&]<class T, int kWidth, int kVectors, Stage kStage, bool kPlain>(std::int64_t blocks) {
        return with_double_backward_pass<T, kWidth, kStage, kPlain>(call, [&]<class Pass>() {
          return launch_blocks(rows_gradient_kernel<Pass, kVectors, kStage>, plan, blocks, stream,
                               call, tiling);
        });
      });
}

}  // namespace normcore::kernels::cuda
