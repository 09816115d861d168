// Activations that may be fused behind a norm: y = act(z), z = norm(x) * scale + bias + residual.
//   kReLU      max(z, 0); NaN stays NaN, the derivative at 0 is 0
//   kSiLU      z * sigmoid(z)
//   kGelu      z * Phi(z), Phi the standard normal distribution function
//   kGeluTanh  0.5 * z * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3)))
// The last two are torch's gelu with approximate="none" and "tanh". The functions below are the
// float64 definitions; vector versions are tested against them.
#pragma once

#include <cmath>
#include <cstdint>

namespace normcore::kernels {

enum class Activation : std::uint8_t { kNone, kReLU, kSiLU, kGelu, kGeluTanh };

inline constexpr double kSqrtHalf = 0.70710678118654752440;       // 1 / sqrt(2)
inline constexpr double kInvSqrtTwoPi = 0.39894228040143267794;   // 1 / sqrt(2 pi)
inline constexpr double kSqrtTwoOverPi = 0.79788456080286535588;  // sqrt(2 / pi)
inline constexpr double kGeluTanhCubic = 0.044715;

inline double activate(Activation activation, double z) {
  switch (activation) {
    case Activation::kNone:
      return z;
    case Activation::kReLU:
      return z <= 0.0 ? 0.0 : z;
    case Activation::kSiLU:
      return z / (1.0 + std::exp(-z));
    case Activation::kGelu:
      return z * 0.5 * std::erfc(-z * kSqrtHalf);
    case Activation::kGeluTanh: {
      const double u = kSqrtTwoOverPi * (z + kGeluTanhCubic * z * z * z);
      return z / (1.0 + std::exp(-2.0 * u));
    }
  }
  return z;
}

inline double activate_derivative(Activation activation, double z) {
  switch (activation) {
    case Activation::kNone:
      return 1.0;
    case Activation::kReLU:
      return z <= 0.0 ? 0.0 : 1.0;
    case Activation::kSiLU: {
      const double sigmoid = 1.0 / (1.0 + std::exp(-z)), complement = 1.0 / (1.0 + std::exp(z));
      return sigmoid * (1.0 + z * complement);
    }
    case Activation::kGelu:
      return 0.5 * std::erfc(-z * kSqrtHalf) + z * kInvSqrtTwoPi * std::exp(-0.5 * z * z);
    case Activation::kGeluTanh: {
      const double u = kSqrtTwoOverPi * (z + kGeluTanhCubic * z * z * z);
      const double du = kSqrtTwoOverPi * (1.0 + 3.0 * kGeluTanhCubic * z * z);
      const double sigmoid = 1.0 / (1.0 + std::exp(-2.0 * u)),
                   complement = 1.0 / (1.0 + std::exp(2.0 * u));
      return sigmoid + z * sigmoid * complement * 2.0 * du;
    }
  }
  return 1.0;
}

}  // namespace normcore::kernels
