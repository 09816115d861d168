// Gradients of scale and bias: how they are stored, and summed over blocks of samples.
#pragma once

#include <cstdint>

#include "cpu/element.h"
#include "normcore/kernels/executor.h"
#include "normcore/kernels/norm_input.h"
#include "plan/cpu_geometry.h"

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

// Gradients of the parameters while slices are finished: stored, or, where samples share parameters
// and have slices of their own, summed over blocks of samples, in order.
class ParameterGradients {
 public:
  ParameterGradients(const NormInput& input, std::int64_t num_groups, const NormGradients& grad,
                     double* partial)
      : input_(input),
        grad_(grad),
        partial_(num_groups != 0 && !input.affine_per_sample && (grad.scale || grad.bias)
                     ? partial
                     : nullptr),
        block_(num_groups == 0 ? 1 : samples_per_block(input.extent.n)) {}

  // Of `channels` channels of a sample from `first` on; value(i) is a pair: scale, bias. It is called
  // once for each channel, in order, whatever is stored.
  template <class Value>
  void store(std::int64_t sample, std::int64_t first, std::int64_t channels,
             const Value& value) const {
    const std::int64_t c = input_.extent.c;
    if (partial_ == nullptr) {
      for (std::int64_t i = 0; i < channels; ++i) {
        const auto [scale, bias] = value(i);
        store_parameters(grad_, sample * c + first + i, scale, bias);
      }
      return;
    }
    const PartialParameters out(partial_, sample / block_, c, first);
    const bool is_first = sample % block_ == 0;  // a block's samples come in order
    for (std::int64_t i = 0; i < channels; ++i) {
      const auto [scale, bias] = value(i);
      out.scale[i] = (is_first ? 0.0 : out.scale[i]) + scale;
      out.bias[i] = (is_first ? 0.0 : out.bias[i]) + bias;
    }
  }

  // The sums over the blocks of samples.
  void fold(const CpuExecutor& executor) const {
    if (partial_ == nullptr) return;
    fold_parameters(grad_, partial_, ceil_div(input_.extent.n, block_), input_.extent.c, executor);
  }

 private:
  const NormInput& input_;
  const NormGradients& grad_;
  double* partial_;
  std::int64_t block_;
};

// Zero gradients of the parameters: the input is empty.
inline void zero_parameters(const NormInput& input, const NormGradients& grad) {
  for (std::int64_t i = 0; i < affine_count(input); ++i) store_parameters(grad, i, 0.0, 0.0);
}

}  // namespace normcore::kernels
