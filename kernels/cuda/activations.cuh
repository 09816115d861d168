// The activations of normcore/kernels/activation.h over a vector: which one is asked once, not per
// element. For 16-bit tensors they are made of the fast exponential and division: a relative error of
// about 1e-6, in the far tails below 1e-4, where the rounding of the result makes 5e-4 or 4e-3.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"
#include "normcore/kernels/activation.h"

namespace normcore::kernels::cuda {

template <Activation kActivation>
using ActivationConstant = std::integral_constant<Activation, kActivation>;

// Calls f(ActivationConstant<activation>) unless there is none.
template <class F>
__device__ void visit_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kReLU:
      return f(ActivationConstant<Activation::kReLU>{});
    case Activation::kSiLU:
      return f(ActivationConstant<Activation::kSiLU>{});
    case Activation::kGelu:
      return f(ActivationConstant<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(ActivationConstant<Activation::kGeluTanh>{});
  }
}

__device__ inline float fast_sigmoid(float z) { return fast_divide(1.0f, 1.0f + fast_exp(-z)); }

// 1 - erf(x) with a relative error below 1e-6 * (1 + x^2). Source: Press et al., Numerical Recipes in
// C, 2nd edition, section 6.2 (a Chebyshev fit of log(erfc(x) / t) + x^2 in t).
__device__ inline float fast_erfc(float x) {
  const float size = std::fabs(x), t = fast_divide(1.0f, std::fma(0.5f, size, 1.0f));
  float fit = 0.17087277f;
  for (const float coefficient :
       {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f,
        0.37409196f, 1.00002368f, -1.26551223f}) {
    fit = std::fma(fit, t, coefficient);
  }
  const float tail = t * fast_exp(std::fma(-size, size, fit));
  return x < 0.0f ? 2.0f - tail : tail;
}

// sigmoid(z) and sigmoid(-z): neither is the rest of the other, which would have no digits left.
struct SigmoidPair {
  float sigmoid, complement;

  __device__ explicit SigmoidPair(float z) {
    const float e = fast_exp(-std::fabs(z)), near = fast_divide(1.0f, 1.0f + e), far = e * near;
    sigmoid = z < 0.0f ? far : near;
    complement = z < 0.0f ? near : far;
  }
};

// The argument of the sigmoid in gelu's tanh form, and its derivative.
__device__ inline float gelu_tanh_argument(float z) {
  return 2.0f * static_cast<float>(kSqrtTwoOverPi) *
         (z + static_cast<float>(kGeluTanhCubic) * z * z * z);
}
__device__ inline float gelu_tanh_slope(float z) {
  return 2.0f * static_cast<float>(kSqrtTwoOverPi) *
         (1.0f + 3.0f * static_cast<float>(kGeluTanhCubic) * z * z);
}

// T: of the tensor, A: of z.
template <class T, Activation kActivation, class A>
__device__ A activation_of(A z) {
  if constexpr (sizeof(T) == 2 && kActivation == Activation::kSiLU) {
    return z * fast_sigmoid(z);
  } else if constexpr (sizeof(T) == 2 && kActivation == Activation::kGeluTanh) {
    return z * fast_sigmoid(gelu_tanh_argument(z));
  } else if constexpr (sizeof(T) == 2 && kActivation == Activation::kGelu) {
    return z * 0.5f * fast_erfc(-z * static_cast<float>(kSqrtHalf));
  } else {
    return activate(kActivation, z);
  }
}

template <class T, Activation kActivation, class A>
__device__ A activation_derivative_of(A z) {
  if constexpr (sizeof(T) == 2 && kActivation == Activation::kSiLU) {
    const A sigmoid = fast_sigmoid(z);
    return std::fma(z * sigmoid, A{1} - sigmoid, sigmoid);
  } else if constexpr (sizeof(T) == 2 && kActivation == Activation::kGeluTanh) {
    const A sigmoid = fast_sigmoid(gelu_tanh_argument(z));
    return std::fma(z * sigmoid * gelu_tanh_slope(z), A{1} - sigmoid, sigmoid);
  } else if constexpr (sizeof(T) == 2 && kActivation == Activation::kGelu) {
    const A density = static_cast<float>(kInvSqrtTwoPi) * fast_exp(-0.5f * z * z);
    return std::fma(z, density, 0.5f * fast_erfc(-z * static_cast<float>(kSqrtHalf)));
  } else {
    return activate_derivative(kActivation, z);
  }
}

// Both derivatives at z.
template <class T, Activation kActivation, class A>
__device__ void activation_derivatives_of(A z, A& first, A& second) {
  if constexpr (sizeof(T) == 2 && kActivation == Activation::kSiLU) {
    const SigmoidPair s(z);
    first = std::fma(z * s.sigmoid, s.complement, s.sigmoid);
    second = s.sigmoid * s.complement * std::fma(z, s.complement - s.sigmoid, A{2});
  } else if constexpr (sizeof(T) == 2 && kActivation == Activation::kGeluTanh) {
    const SigmoidPair s(gelu_tanh_argument(z));
    const A rate = gelu_tanh_slope(z), slope = s.sigmoid * s.complement;
    constexpr A kBend = static_cast<A>(12.0 * kSqrtTwoOverPi * kGeluTanhCubic);
    const A turn = std::fma(rate * rate, s.complement - s.sigmoid, kBend * z);
    first = std::fma(z * rate, slope, s.sigmoid);
    second = slope == A{0} ? A{0} : slope * std::fma(z, turn, A{2} * rate);
  } else if constexpr (sizeof(T) == 2 && kActivation == Activation::kGelu) {
    const A density = static_cast<float>(kInvSqrtTwoPi) * fast_exp(-0.5f * z * z);
    first = std::fma(z, density, 0.5f * fast_erfc(-z * static_cast<float>(kSqrtHalf)));
    second = A{2} * density - z * (z * density);
  } else {
    first = activate_derivative(kActivation, z);
    second = activate_second_derivative(kActivation, z);
  }
}

template <class T, class A, int kWidth>
__device__ void activate_all(Activation activation, A (&z)[kWidth]) {
  visit_activation(activation, [&](auto constant) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) z[i] = activation_of<T, decltype(constant)::value>(z[i]);
  });
}

// z becomes the derivatives at z.
template <class T, class A, int kWidth>
__device__ void derive_all(Activation activation, A (&z)[kWidth]) {
  visit_activation(activation, [&](auto constant) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      z[i] = activation_derivative_of<T, decltype(constant)::value>(z[i]);
    }
  });
}

template <class T, class A, int kWidth>
__device__ void derive_twice_all(Activation activation, const A (&z)[kWidth], A (&first)[kWidth],
                                 A (&second)[kWidth]) {
  visit_activation(activation, [&](auto constant) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      activation_derivatives_of<T, decltype(constant)::value>(z[i], first[i], second[i]);
    }
  });
}

}  // namespace normcore::kernels::cuda
