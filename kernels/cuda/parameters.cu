// Gradients of scale and bias of group norm: sums over blocks of samples, in an order that depends
// on their number only.
#include <cuda_runtime.h>

#include "cuda/dispatch.cuh"
#include "cuda/passes.h"
#include "cuda/reduce.cuh"
#include "plan/cuda_constants.h"

namespace normcore::kernels::cuda {
namespace {

constexpr unsigned kChannels = kParameterChannels, kLanes = kParameterLanes;

struct LaneSums {
  ParameterSums of[kLanes][kChannels];
};

__global__ void __launch_bounds__(kChannels* kLanes)
    sum_parameters_kernel(BackwardCall call, std::int64_t count, std::int64_t blocks) {
  const unsigned lane = threadIdx.x / kChannels, column = threadIdx.x % kChannels;
  const std::int64_t channel = static_cast<std::int64_t>(blockIdx.x) * kChannels + column;
  ParameterSums sums{0.0, 0.0};
#pragma unroll 4
  for (std::int64_t block = lane; channel < count && block < blocks; block += kLanes) {
    const ParameterSums part = call.parameters[block * count + channel];
    sums.scale += part.scale;
    sums.bias += part.bias;
  }
  auto& shared = block_shared<LaneSums>();
  shared.of[lane][column] = sums;
  for (unsigned half = kLanes / 2; half != 0; half /= 2) {
    __syncthreads();
    if (lane >= half) continue;
    sums.scale += shared.of[lane + half][column].scale;
    sums.bias += shared.of[lane + half][column].bias;
    shared.of[lane][column] = sums;
  }
  if (lane != 0 || channel >= count) return;
  if (call.grad.scale) store_element(call.grad.scale, channel, sums.scale);
  if (call.grad.bias) store_element(call.grad.bias, channel, sums.bias);
}

}  // namespace

Status sum_parameters(const BackwardCall& call, std::int64_t count, std::int64_t blocks,
                      CudaStream stream) {
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>((count + kChannels - 1) / kChannels));
  config.block = dim3(kChannels * kLanes);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  return to_status(launch(sum_parameters_kernel, config, call, count, blocks));
}

}  // namespace normcore::kernels::cuda
