// Gradients of scale and bias: how they are stored, and summed over blocks of samples.
#pragma once

#include <cstdint>

#include "cpu/element.h"
#include "normcore/kernels/executor.h"
#include "normcore/kernels/norm_input.h"

namespace normcore::kernels {

inline void store_parameters(const NormGradients& grad, std::int64_t index, double scale,
                             double bias) {
  if (grad.scale) store_element(grad.scale, index, scale);
  if (grad.bias) store_element(grad.bias, index, bias);
}

// The sums of one block of samples, from a channel on: [blocks][scale, bias][channels].
struct PartialParameters {
  double* scale;
  double* bias;

  PartialParameters(double* partial, std::int64_t block, std::int64_t channels,
                    std::int64_t first_channel)
      : scale(partial + block * channels * 2 + first_channel), bias(scale + channels) {}
};

// Adds the sums of the blocks in order, into the first ones.
inline void fold_parameters(const NormGradients& grad, double* partial, std::int64_t blocks,
                            std::int64_t channels, const CpuExecutor& executor) {
  executor.parallel_for(channels, 1024, [&](std::int64_t begin, std::int64_t end) {
    const PartialParameters total(partial, 0, channels, begin);
    const std::int64_t count = end - begin;
    for (std::int64_t b = 1; b < blocks; ++b) {
      const PartialParameters sums(partial, b, channels, begin);
      for (std::int64_t i = 0; i < count; ++i) total.scale[i] += sums.scale[i];
      for (std::int64_t i = 0; i < count; ++i) total.bias[i] += sums.bias[i];
    }
    for (std::int64_t i = 0; i < count; ++i) {
      store_parameters(grad, begin + i, total.scale[i], total.bias[i]);
    }
  });
}

}  // namespace normcore::kernels
