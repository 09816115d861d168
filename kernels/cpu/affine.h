// Scale and bias in the arithmetic type: written once per call into the workspace where their dtype
// differs or they are absent.
#pragma once

#include <cstdint>

#include "cpu/element.h"
#include "normcore/kernels/norm_input.h"

namespace normcore::kernels {

template <class A>
class Affine {
 public:
  // `workspace` holds two arrays of the parameters' size.
  Affine(const NormInput& input, A* workspace)
      : Affine(input, input.scale, A{1}, input.bias, workspace) {}
  // Others of that size; absent ones are 0.
  Affine(const NormInput& input, ConstTensor scale, ConstTensor bias, A* workspace)
      : Affine(input, scale, A{0}, bias, workspace) {}

  // Of a sample, from a channel on: 1 and 0 where there are none.
  const A* scale(std::int64_t sample, std::int64_t channel) const {
    return scale_ + sample * row_stride_ + channel;
  }
  const A* bias(std::int64_t sample, std::int64_t channel) const {
    return bias_ + sample * row_stride_ + channel;
  }

 private:
  Affine(const NormInput& input, ConstTensor scale, A no_scale, ConstTensor bias, A* workspace)
      : row_stride_(input.affine_per_sample ? input.extent.c : 0) {
    const std::int64_t count = affine_count(input);
    scale_ = converted(scale, no_scale, count, workspace);
    bias_ = converted(bias, A{0}, count, workspace + count);
  }
  static const A* converted(ConstTensor tensor, A absent, std::int64_t count, A* out) {
    if (tensor && tensor.dtype == kArithmeticType<A>) return static_cast<const A*>(tensor.data);
    for (std::int64_t i = 0; i < count; ++i) {
      out[i] = tensor ? static_cast<A>(load_element(tensor, i)) : absent;
    }
    return out;
  }

  std::int64_t row_stride_;
  const A* scale_;
  const A* bias_;
};

}  // namespace normcore::kernels
