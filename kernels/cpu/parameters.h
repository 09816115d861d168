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

// partial: [blocks][channels] pairs for scale and bias, added in the order of the blocks.
inline void fold_parameters(const NormGradients& grad, const double* partial, std::int64_t blocks,
                            std::int64_t channels, const CpuExecutor& executor) {
  executor.parallel_for(channels, 1024, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t channel = begin; channel < end; ++channel) {
      double scale = 0.0, bias = 0.0;
      for (std::int64_t b = 0; b < blocks; ++b) {
        scale += partial[(b * channels + channel) * 2];
        bias += partial[(b * channels + channel) * 2 + 1];
      }
      store_parameters(grad, channel, scale, bias);
    }
  });
}

}  // namespace normcore::kernels
