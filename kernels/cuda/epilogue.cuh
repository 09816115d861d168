// What happens to one vector once its statistics are known: y = activation(z + residual) with
// z = (x - center) * gain + shift on the way forward; on the way back the gradient g behind the
// activation, and grad_x = gain * g + slope * (x - center) + offset. Coefficients are per vector
// (planes) or per element of it (rows); the templates take either through operator[].
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
    const std::int64_t i = input.affine_per_sample ? sample * input.extent.c + channel : channel;
    const A scale = input.scale ? load_element<A>(input.scale, i) : A{1};
    const A bias = input.bias ? load_element<A>(input.bias, i) : A{0};
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

template <bool kPlain, class T, int kWidth, class Affines>
__device__ void apply_forward(const ForwardCall& call, const Vector<T, kWidth>& x,
                              std::int64_t index, Span span, const Affines& affine) {
  Arithmetic<T> z[kWidth];
  pre_activation<kPlain>(call.input, x, index, span, affine, z);
  activate_all<T>(call.input.activation, z);
  store_values<kPlain, T>(call.y, index, span, z);
}

// Vectors of grad_y, held as they are in memory where it has the dtype of x.
template <bool kPlain, class T, int kWidth>
using GradientVector = Vector<std::conditional_t<kPlain, T, Arithmetic<T>>, kWidth>;

// The gradient g behind the activation, from grad_y. A masked-out value whose grad_y is 0 passes
// nothing on, not even a NaN: its g is 0, and what has g = 0 and does not count is taken out of every
// sum.
template <bool kPlain, class T, int kWidth, class Affines>
__device__ void output_gradient(const BackwardCall& call, const Vector<T, kWidth>& x,
                                const GradientVector<kPlain, T, kWidth>& grad_y, std::int64_t index,
                                Span span, unsigned counting, const Affines& affine,
                                Arithmetic<T> (&g)[kWidth]) {
  using A = Arithmetic<T>;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) g[i] = convert_from<A>(grad_y[i]);
  if (call.input.activation == Activation::kNone) return;
  A z[kWidth];
  pre_activation<kPlain>(call.input, x, index, span, affine, z);
  derive_all<T>(call.input.activation, z);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const bool is_used = (counting >> i & 1) != 0 || g[i] != A{0};
    g[i] = is_used ? g[i] * z[i] : A{0};
  }
}

// Loads x and grad_y of a batch of vectors: for_each(f) calls f(k, index of the vector, span) for
// those that exist.
template <bool kPlain, class T, int kWidth, int kVectors, class ForEach>
__device__ void load_batch(const BackwardCall& call, Vector<T, kWidth> (&x)[kVectors],
                           GradientVector<kPlain, T, kWidth> (&grad_y)[kVectors],
                           ForEach for_each) {
  const T* const data = static_cast<const T*>(call.input.x.data);
  for_each([&](int k, std::int64_t index, Span span) {
    x[k] = load_vector<T, kWidth>(data, index, span);
    if constexpr (kPlain) {
      const T* const gradients = static_cast<const T*>(call.grad_y.data);
      grad_y[k] = load_vector<T, kWidth>(gradients, index, span);
    } else {
      Arithmetic<T> values[kWidth];
      load_values<kPlain, T>(call.grad_y, index, span, values);
      grad_y[k] = GradientVector<kPlain, T, kWidth>::from(values);
    }
  });
}

// How grad_x of a slice depends on x through the statistics. All 0 if they are given.
template <class A>
struct SliceGradient {
  A slope, offset;
  A is_constant;  // 1 for a slice of one value: y does not depend on x, grad_x is 0, or NaN with g
  __device__ const SliceGradient& operator[](int) const { return *this; }

  // The coefficients of y, of which grad_x = gain * g + ... takes the gain.
  __device__ Affine<A> of(Affine<A> affine) const {
    if (is_constant != A{0}) affine.gain = A{0};
    return affine;
  }
};

template <bool kPlain, class T, int kWidth, class Affines, class SliceGradients>
__device__ void apply_backward(const BackwardCall& call, const Vector<T, kWidth>& x,
                               const Arithmetic<T> (&g)[kWidth], std::int64_t index, Span span,
                               unsigned counting, const Affines& affine,
                               const SliceGradients& slice) {
  using A = Arithmetic<T>;
  if (call.grad.residual) store_values<kPlain, T>(call.grad.residual, index, span, g);
  if (!call.grad.x) return;
  A dx[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const bool counts = (counting >> i & 1) != 0, is_used = counts || g[i] != A{0};
    const A centered = convert_from<A>(x[i]) - affine[i].center;
    const A through = std::fma(slice[i].slope, centered, slice[i].offset);
    const A direct = g[i] * affine[i].gain;
    dx[i] = !is_used ? A{0} : call.batch_statistics && counts ? direct + through : direct;
  }
  store_values<kPlain, T>(call.grad.x, index, span, dx);
}

}  // namespace normcore::kernels::cuda
