// The activations of the CUDA kernels for 16-bit tensors against the float64 definitions. Here the
// fast exponential and division are those of the host: what the device's add is tests/gpu's to see.
#include "cuda/activations.cuh"

#include <cuda_bf16.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace normcore::kernels::cuda {
namespace {

std::vector<float> arguments() {
  std::vector<float> values;
  for (int i = -16 * 512; i <= 16 * 512; ++i) values.push_back(static_cast<float>(i) * 0x1p-9f);
  for (float v = 16.0f; v < 1e6f; v *= 1.3f) values.insert(values.end(), {v, -v});
  return values;
}

// A result below this may be flushed to 0.
constexpr double kUnderflow = 1e-36, kRelative = 2e-5;

// Sum of the sizes of the terms of the second derivative, which cancel where it is 0.
template <Activation kActivation>
double terms_of_second(double z) {
  const auto decay = [](double u) { return 1.0 / ((1.0 + std::exp(-u)) * (1.0 + std::exp(u))); };
  if constexpr (kActivation == Activation::kSiLU) {
    return decay(z) * (2.0 + std::fabs(z));
  } else if constexpr (kActivation == Activation::kGelu) {
    return kInvSqrtTwoPi * std::exp(-0.5 * z * z) * (2.0 + z * z);
  } else {
    const double argument = 2.0 * kSqrtTwoOverPi * (z + kGeluTanhCubic * z * z * z);
    const double rate = 2.0 * kSqrtTwoOverPi * (1.0 + 3.0 * kGeluTanhCubic * z * z);
    const double turn = rate * rate + 12.0 * kSqrtTwoOverPi * kGeluTanhCubic * std::fabs(z);
    return decay(argument) * (2.0 * rate + std::fabs(z) * turn);
  }
}

template <Activation kActivation>
void expect_close() {
  for (const float z : arguments()) {
    const double want = activate(kActivation, static_cast<double>(z));
    const double got = activation_of<__nv_bfloat16, kActivation>(z);
    EXPECT_LE(std::fabs(got - want), kRelative * std::fabs(want) + kUnderflow) << z;
    // The derivative is a sum of two terms, which cancel where it is 0; the first is act(z) / z.
    const double slope = activate_derivative(kActivation, static_cast<double>(z));
    const double term = z == 0.0f ? 0.5 : want / z, terms = std::fabs(term) + std::fabs(slope);
    const double got_slope = activation_derivative_of<__nv_bfloat16, kActivation>(z);
    EXPECT_LE(std::fabs(got_slope - slope), kRelative * terms + kUnderflow) << z;
    float first, second;
    activation_derivatives_of<__nv_bfloat16, kActivation>(z, first, second);
    EXPECT_LE(std::fabs(first - slope), kRelative * terms + kUnderflow) << z;
    const double curvature = activate_second_derivative(kActivation, static_cast<double>(z));
    EXPECT_LE(std::fabs(second - curvature),
              kRelative * terms_of_second<kActivation>(z) + kUnderflow)
        << z;
  }
}

TEST(CudaActivations, SiLU) { expect_close<Activation::kSiLU>(); }
TEST(CudaActivations, Gelu) { expect_close<Activation::kGelu>(); }
TEST(CudaActivations, GeluTanh) { expect_close<Activation::kGeluTanh>(); }

TEST(CudaActivations, NaNAndInfinityAreThoseOfTheDefinition) {
  for (const float z : {std::nanf(""), INFINITY, -INFINITY}) {
    const auto expect_same = [&](double got, double want) {
      EXPECT_TRUE(got == want || (std::isnan(got) && std::isnan(want))) << z << ": " << got;
    };
    const auto expect_all = [&](auto constant) {
      constexpr Activation kActivation = decltype(constant)::value;
      expect_same(activation_of<__nv_bfloat16, kActivation>(z), activate(kActivation, double{z}));
      expect_same(activation_derivative_of<__nv_bfloat16, kActivation>(z),
                  activate_derivative(kActivation, double{z}));
    };
    visit_activation(Activation::kReLU, expect_all);
    visit_activation(Activation::kSiLU, expect_all);
    visit_activation(Activation::kGelu, expect_all);
    visit_activation(Activation::kGeluTanh, expect_all);
  }
}

}  // namespace
}  // namespace normcore::kernels::cuda
