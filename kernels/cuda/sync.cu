// What ranks do with the sums of all of them (sync.h): a thread per slice.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/backward_pass.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/passes.h"
#include "cuda/reduce.cuh"
#include "cuda/statistics.cuh"
#include "plan/cuda_constants.h"

namespace normcore::kernels::cuda {
namespace {

template <class Kernel, class... Arguments>
Status launch_threads(Kernel kernel, std::int64_t blocks, CudaStream stream,
                      const Arguments&... arguments) {
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(blocks));
  config.block = dim3(kMaxThreads);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  return to_status(launch(kernel, config, arguments...));
}

// As many blocks as a grid may have; threads take several slices beyond.
std::int64_t blocks_of(std::int64_t slices) {
  constexpr std::int64_t kMaxBlocks = 1 << 16;
  return std::min((slices + kMaxThreads - 1) / kMaxThreads, kMaxBlocks);
}

template <class F>
__device__ void for_each_slice(std::int64_t slices, F f) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t slice = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       slice < slices; slice += step) {
    f(slice);
  }
}

// A single block if it counts the batch.
__global__ void __launch_bounds__(kMaxThreads)
    sync_statistics_kernel(const __grid_constant__ SyncStatisticsArgs args) {
  double has_values[1] = {0.0};
  for_each_slice(args.slices, [&](std::int64_t slice) {
    const MomentSums total = args.total[slice];
    const auto statistics = SyncStatistics::of(args.own[slice], total, args.by_rank);
    args.mean[slice] = statistics.mean;
    args.var[slice] = statistics.var;
    args.share[slice] = statistics.share;
    update_running(args.running, slice, statistics.batch);
    if (total.count != 0.0) has_values[0] = 1.0;
  });
  if (args.running.num_batches_tracked == nullptr) return;
  double slices_with_values[1];
  sum_over_lanes(has_values, blockDim.x, slices_with_values);
  if (threadIdx.x == 0 && slices_with_values[0] != 0.0) ++*args.running.num_batches_tracked;
}

template <class A>
__global__ void __launch_bounds__(kMaxThreads)
    sync_slices_kernel(const __grid_constant__ BackwardCall call, std::int64_t slices) {
  for_each_slice(slices, [&](std::int64_t slice) {
    const auto statistics = load_statistics<A>(call, slice);
    static_cast<BackwardSlice<A>*>(call.slices)[slice] = BackwardSlice<A>::of(
        static_cast<double>(statistics.rstd), static_cast<double>(statistics.rounding),
        call.share[slice], call.whole[slice]);
  });
}

}  // namespace

Status sync_statistics(const SyncStatisticsArgs& args, CudaStream stream) {
  const std::int64_t blocks =
      args.running.num_batches_tracked == nullptr ? blocks_of(args.slices) : 1;
  return launch_threads(sync_statistics_kernel, blocks, stream, args);
}

Status sync_slices(const BackwardCall& call, std::int64_t slices, CudaStream stream) {
  return compute_type(call.input.x.dtype) == DType::kFloat64
             ? launch_threads(sync_slices_kernel<double>, blocks_of(slices), stream, call, slices)
             : launch_threads(sync_slices_kernel<float>, blocks_of(slices), stream, call, slices);
}

}  // namespace normcore::kernels::cuda
