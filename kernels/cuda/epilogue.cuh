// What happens to one vector once its statistics are known: y = activation(z + residual) with
// z = (x - center) * gain + shift. Coefficients are per vector (planes) or per element of it (rows, runs);
// the templates take either through operator[].
#pragma once

#include <cmath>

#include "cuda/activations.cuh"
#include "cuda/call.h"
#include "cuda/elements.cuh"
#include "cuda/statistics.cuh"

namespace normcore::kernels::cuda {

// Of one channel. What the rounding of the mean lost is put back through shift.
template <class A>
struct Affine {
  A center, gain, shift;

  __device__ static Affine of(const NormInput& input, const SliceStatistics<A>& statistics,
                              std::int64_t sample, std::int64_t channel) {
    const std::int64_t i = affine_index(input, sample, channel);
    return of(statistics, load_or<A>(input.scale, i, A{1}), load_or<A>(input.bias, i, A{0}));
  }
  __device__ static Affine of(const SliceStatistics<A>& statistics, A scale, A bias) {
    const A gain = statistics.rstd * scale;
    return {statistics.center, gain, std::fma(-statistics.rounding, gain, bias)};
  }
  __device__ const Affine& operator[](int) const { return *this; }
};

template <class A>
__device__ A normalise(A x, const Affine<A>& affine) {
  return std::fma(x - affine.center, affine.gain, affine.shift);
}

// What the activation is applied to: the normalised vector and the residual.
template <bool kPlain, class T, int kWidth, class Affines>
__device__ void pre_activation(const NormInput& input, const Vector<T, kWidth>& x,
                               std::int64_t index, Span span, const Affines& affine,
                               Arithmetic<T> (&z)[kWidth]) {
  using A = Arithmetic<T>;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) z[i] = normalise(convert_from<A>(x[i]), affine[i]);
  if (!input.residual) return;
  A residual[kWidth];
  load_values<kPlain, T>(input.residual, index, span, residual);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) z[i] += residual[i];
}

// One byte for a vector, which is of 16 bytes.
template <class T, int kWidth>
__device__ void store_relu_bits(std::uint8_t* bits, std::int64_t index,
                                const Arithmetic<T> (&z)[kWidth]) {
  if constexpr (kWidth == kPerReluByte<T>) {
    unsigned byte = 0;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) byte |= z[i] <= Arithmetic<T>{0} ? 0u : 1u << i;
    bits[index / kWidth] = static_cast<std::uint8_t>(byte);
  }
}

template <bool kPlain, class T, int kWidth, class Affines>
__device__ void apply_forward(const ForwardCall& call, const Vector<T, kWidth>& x,
                              std::int64_t index, Span span, const Affines& affine) {
  Arithmetic<T> z[kWidth];
  pre_activation<kPlain>(call.input, x, index, span, affine, z);
  if (call.relu_bits != nullptr) store_relu_bits<T>(call.relu_bits, index, z);
  activate_all<T>(call.input.activation, z);
  store_values<kPlain, T>(call.y, index, span, z);
}

}  // namespace normcore::kernels::cuda
