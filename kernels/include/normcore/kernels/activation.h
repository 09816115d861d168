// Activations that may be fused behind a norm: y = act(z), z = norm(x) * scale + bias + residual.
//   kReLU      max(z, 0); NaN stays NaN, the derivative at 0 is 0
//   kSiLU      z * sigmoid(z)
//   kGelu      z * Phi(z), Phi the standard normal distribution function
//   kGeluTanh  0.5 * z * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3)))
// The last two are torch's gelu with approximate="none" and "tanh". The functions below are the
// definitions: in float64 for the CPU, whose vector versions are tested against them, in float64 or
// float32 on CUDA devices.
#pragma once

#include <cmath>
#include <cstdint>

#include "normcore/kernels/host_device.h"

namespace normcore::kernels {

enum class Activation : std::uint8_t { kNone, kReLU, kSiLU, kGelu, kGeluTanh };

// Whether it has a second derivative beside kinks.
constexpr bool is_curved(Activation activation) {
  return activation != Activation::kNone && activation != Activation::kReLU;
}

inline constexpr double kSqrtHalf = 0.70710678118654752440;       // 1 / sqrt(2)
inline constexpr double kInvSqrtTwoPi = 0.39894228040143267794;   // 1 / sqrt(2 pi)
inline constexpr double kSqrtTwoOverPi = 0.79788456080286535588;  // sqrt(2 / pi)
inline constexpr double kGeluTanhCubic = 0.044715;

template <class A>
NORMCORE_HOST_DEVICE A activate(Activation activation, A z) {
  switch (activation) {
    case Activation::kNone:
      return z;
    case Activation::kReLU:
      return z <= A{0} ? A{0} : z;
    case Activation::kSiLU:
      return z / (A{1} + std::exp(-z));
    case Activation::kGelu:
      return z * A{0.5} * std::erfc(-z * static_cast<A>(kSqrtHalf));
    case Activation::kGeluTanh: {
      const A u = static_cast<A>(kSqrtTwoOverPi) * (z + static_cast<A>(kGeluTanhCubic) * z * z * z);
      return z / (A{1} + std::exp(A{-2} * u));
    }
  }
  return z;
}

template <class A>
NORMCORE_HOST_DEVICE A activate_derivative(Activation activation, A z) {
  switch (activation) {
    case Activation::kNone:
      return A{1};
    case Activation::kReLU:
      return z <= A{0} ? A{0} : A{1};
    case Activation::kSiLU: {
      const A sigmoid = A{1} / (A{1} + std::exp(-z)), complement = A{1} / (A{1} + std::exp(z));
      return sigmoid * (A{1} + z * complement);
    }
    case Activation::kGelu:
      return A{0.5} * std::erfc(-z * static_cast<A>(kSqrtHalf)) +
             z * static_cast<A>(kInvSqrtTwoPi) * std::exp(A{-0.5} * z * z);
    case Activation::kGeluTanh: {
      const A cubic = static_cast<A>(kGeluTanhCubic), scale = static_cast<A>(kSqrtTwoOverPi);
      const A u = scale * (z + cubic * z * z * z), du = scale * (A{1} + A{3} * cubic * z * z);
      const A sigmoid = A{1} / (A{1} + std::exp(A{-2} * u)),
              complement = A{1} / (A{1} + std::exp(A{2} * u));
      return sigmoid + z * sigmoid * complement * A{2} * du;
    }
  }
  return A{1};
}

template <class A>
NORMCORE_HOST_DEVICE A activate_second_derivative(Activation activation, A z) {
  switch (activation) {
    case Activation::kNone:
    case Activation::kReLU:
      return A{0};
    case Activation::kSiLU: {
      const A sigmoid = A{1} / (A{1} + std::exp(-z)), complement = A{1} / (A{1} + std::exp(z));
      return sigmoid * complement * (A{2} + z * (complement - sigmoid));
    }
    case Activation::kGelu: {
      const A density = static_cast<A>(kInvSqrtTwoPi) * std::exp(A{-0.5} * z * z);
      return A{2} * density - z * (z * density);
    }
    case Activation::kGeluTanh: {
      const A cubic = static_cast<A>(kGeluTanhCubic), scale = static_cast<A>(kSqrtTwoOverPi);
      const A u = scale * (z + cubic * z * z * z), du = scale * (A{1} + A{3} * cubic * z * z);
      const A sigmoid = A{1} / (A{1} + std::exp(A{-2} * u)),
              complement = A{1} / (A{1} + std::exp(A{2} * u));
      // of sigmoid(2 u): slope and, over it, curvature
      const A slope = sigmoid * complement * A{2} * du;
      const A curvature = A{2} * du * (complement - sigmoid) + A{6} * cubic * scale * z / du;
      return slope == A{0} ? A{0} : slope * (A{2} + z * curvature);
    }
  }
  return A{0};
}

}  // namespace normcore::kernels
