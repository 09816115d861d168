// The vector activations against the float64 definitions of activation.h. Batch norm with mean 0,
// variance 1 and eps = 0 hands x itself to the activation.
//
// Bound: an error of some u in the result and of a few u in the argument, then the rounding of the
// store: |dy| <= kActivationUlps u |y| + kArgumentUlps u |z act'(z)| + ulp / 2, and likewise for
// the derivatives. In the far tails exp() leaves the range of the arithmetic: below 1e-41 (float64:
// 1e-300) results may be flushed to 0.
#include "normcore/kernels/activation.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "norm_checks.h"
#include "target_test.h"

namespace normcore::kernels::testing {
namespace {

class Activations : public TargetTest {};
INSTANTIATE_TEST_SUITE_P(All, Activations, all_targets(), name_of_target);

constexpr double kArgumentUlps = 4.0;

double unit_roundoff(DType x) { return x == DType::kFloat64 ? 0x1p-52 : 0x1p-24; }

double underflow(DType x) { return x == DType::kFloat64 ? 1e-300 : 1e-41; }

// The second derivatives have factors of 1 - sigmoid(z) that are 0 from 70 on, times up to 4000.
double second_underflow(DType x) { return x == DType::kFloat64 ? 1e-296 : 2e-27; }

// Dense where the activations bend, then ever larger magnitudes, and the ends of the range of
// exp().
std::vector<double> arguments() {
  std::vector<double> values;
  for (int i = -40000; i <= 40000; ++i) values.push_back(i * 0x1p-11);
  for (double v = 1e-30; v < 1e9; v *= 1.07) values.insert(values.end(), {v, -v});
  for (double v = 80.0; v < 110.0; v += 0.0625) values.insert(values.end(), {v, -v});
  for (double v = 690.0; v < 760.0; v += 0.5) values.insert(values.end(), {v, -v});
  return values;
}

Inputs identity_norm(const std::vector<double>& values, Activation activation, Layout layout,
                     DType x, DType y) {
  NormCase c;
  c.extent = {1, 1, static_cast<std::int64_t>(values.size())};
  c.layout = layout;
  c.x = x;
  c.y = y;
  c.scale = c.bias = std::nullopt;
  c.activation = activation;
  c.eps = 0.0;
  Inputs inputs(c);
  for (std::size_t i = 0; i < values.size(); ++i) {
    inputs.x.set(static_cast<std::int64_t>(i), values[i]);
  }
  inputs.grad_y.fill(1.0);
  inputs.running_mean.fill(0.0);
  inputs.running_var.fill(1.0);
  return inputs;
}

// Of f at z, a central difference.
template <class F>
double slope_of(F f, Activation activation, double z) {
  const double h = 1e-5 * std::max(1.0, std::abs(z));
  return (f(activation, z + h) - f(activation, z - h)) / (2.0 * h);
}

// Arguments whose squares and cubes are far from the end of the range.
std::vector<double> moderate_arguments() {
  std::vector<double> values;
  for (const double value : arguments()) {
    if (std::abs(value) < 1e5) values.push_back(value);
  }
  return values;
}

TEST(ActivationDefinitions, SecondDerivativeIsTheSlopeOfTheDerivative) {
  for (const Activation activation : kAllActivations) {
    double largest = 0.0;
    for (const double z : moderate_arguments()) {
      const double value = activate_second_derivative(activation, z);
      largest = std::max(largest, std::abs(value));
      if (activation == Activation::kReLU && std::abs(z) < 1e-4) {
        EXPECT_EQ(value, 0.0) << z;
        continue;
      }
      const double slope = slope_of(activate_derivative<double>, activation, z);
      if (std::isnan(slope)) {
        EXPECT_EQ(value, 0.0) << name_of(activation) << " at " << z;
      } else {
        ASSERT_NEAR(value, slope, 1e-9) << name_of(activation) << " at " << z;
      }
    }
    const bool is_linear = activation == Activation::kNone || activation == Activation::kReLU;
    EXPECT_EQ(largest > 0.4, !is_linear) << name_of(activation);
  }
}

TEST_P(Activations, OfEveryArgument) {
  for (const Activation activation : kAllActivations) {
    for (const Layout layout : kBothLayouts) {
      for (const DType x : {DType::kFloat64, DType::kFloat32}) {
        for (const DType y : {x, DType::kFloat32, DType::kBFloat16}) {
          SCOPED_TRACE(std::string(name_of(activation)) + " " + name_of(x) + " to " + name_of(y));
          const double u = unit_roundoff(x);
          const Inputs inputs = identity_norm(arguments(), activation, layout, x, y);
          const Outputs out = run_inference(inputs);
          std::vector<double> expected, bound;
          for (const double z : inputs.x.values()) {
            expected.push_back(activate(activation, z));
            const double value = expected.back();
            double slope = activate_derivative(activation, z);
            if (std::isnan(slope))
              slope = 0.0;  // 0 * infinity far out, where the derivative is 0 or 1
            const double error = kActivationUlps * u * std::abs(value) +
                                 kArgumentUlps * u * std::abs(z * slope) + underflow(x);
            bound.push_back(error + half_ulp(y, std::abs(value) + error));
          }
          expect_near("y", find(out, "y").values(), expected, bound);
        }
      }
    }
  }
}

TEST_P(Activations, DerivativeOfEveryArgument) {
  const std::vector<double> values = moderate_arguments();
  for (const Activation activation :
       {Activation::kReLU, Activation::kSiLU, Activation::kGelu, Activation::kGeluTanh}) {
    for (const Layout layout : kBothLayouts) {
      for (const DType x : {DType::kFloat64, DType::kFloat32}) {
        SCOPED_TRACE(std::string(name_of(activation)) + " " + name_of(x));
        const double u = unit_roundoff(x);
        const Inputs inputs = identity_norm(values, activation, layout, x, x);
        const Statistics statistics{0, {0.0}, {1.0}, false};
        const Outputs out = run_backward(inputs, statistics, {false, false, false, true});
        std::vector<double> expected, bound;
        for (const double z : inputs.x.values()) {
          const double value = activate_derivative(activation, z);
          double curvature = activation == Activation::kReLU
                                 ? 0.0
                                 : slope_of(activate_derivative<double>, activation, z);
          if (std::isnan(curvature)) curvature = 0.0;
          expected.push_back(std::isnan(value) ? (z > 0.0 ? 1.0 : 0.0) : value);
          bound.push_back(kDerivativeUlps * u * std::abs(value) +
                          kArgumentUlps * u * std::abs(z * curvature) + underflow(x) +
                          half_ulp(x, expected.back()));
        }
        expect_near("derivative", find(out, "grad_residual").values(), expected, bound);
      }
    }
  }
}

// With q = 1 and grad_y = 1 grad_grad_y and grad_residual are the two derivatives.
Outputs both_derivatives(const Inputs& inputs) {
  Cotangents cotangents(inputs.norm_case);
  for (Tensor* other : {&cotangents.x, &cotangents.scale, &cotangents.residual}) *other = Tensor();
  cotangents.bias.fill(1.0);
  const Statistics statistics{0, {0.0}, {1.0}, false};
  return run_double_backward(inputs, cotangents, statistics, {true, {false, false, false, true}});
}

TEST_P(Activations, BothDerivativesOfEveryArgument) {
  const std::vector<double> values = moderate_arguments();
  for (const Activation activation :
       {Activation::kReLU, Activation::kSiLU, Activation::kGelu, Activation::kGeluTanh}) {
    for (const Layout layout : kBothLayouts) {
      for (const DType x : {DType::kFloat64, DType::kFloat32}) {
        SCOPED_TRACE(std::string(name_of(activation)) + " " + name_of(x));
        const double u = unit_roundoff(x);
        const Inputs inputs = identity_norm(values, activation, layout, x, x);
        const Outputs out = both_derivatives(inputs);
        const auto expect = [&](const char* name, auto derivative, double least) {
          std::vector<double> expected, bound;
          for (const double z : inputs.x.values()) {
            double value = derivative(activation, z);
            if (std::isnan(value)) value = z > 0.0 ? 1.0 : 0.0;
            double slope =
                activation == Activation::kReLU ? 0.0 : slope_of(derivative, activation, z);
            if (std::isnan(slope)) slope = 0.0;
            expected.push_back(value);
            bound.push_back(kDerivativeUlps * u * std::abs(value) +
                            kArgumentUlps * u * std::abs(z * slope) + least + half_ulp(x, value));
          }
          expect_near(name, find(out, name).values(), expected, bound);
        };
        expect("grad_grad_y", activate_derivative<double>, underflow(x));
        expect("grad_residual", activate_second_derivative<double>, second_underflow(x));
      }
    }
  }
}

TEST_P(Activations, DerivativesOfNaN) {
  for (const Activation activation :
       {Activation::kSiLU, Activation::kGelu, Activation::kGeluTanh}) {
    for (const Layout layout : kBothLayouts) {
      for (const DType x : kAllDTypes) {
        std::vector<double> values(67, 0.5);
        values[0] = values[40] = values[66] = std::nan("");
        const Inputs inputs = identity_norm(values, activation, layout, x, x);
        for (const Output& output : both_derivatives(inputs)) {
          for (std::int64_t i = 0; i < 67; ++i) {
            EXPECT_EQ(std::isnan(output.tensor.get(i)), i == 0 || i == 40 || i == 66)
                << output.name << "[" << i << "] of " << name_of(activation);
          }
        }
      }
    }
  }
}

TEST_P(Activations, OfNaNAndInfinity) {
  for (const Activation activation : kAllActivations) {
    for (const Layout layout : kBothLayouts) {
      for (const DType x : kAllDTypes) {
        std::vector<double> values(67, 0.5);
        values[0] = values[66] = std::nan("");
        values[1] = values[40] = HUGE_VAL;
        values[2] = values[65] = -HUGE_VAL;
        const Inputs inputs = identity_norm(values, activation, layout, x, x);
        const Outputs out = run_inference(inputs);
        const Tensor& y = find(out, "y");
        for (const int i : {0, 66}) EXPECT_TRUE(std::isnan(y.get(i))) << name_of(activation);
        for (const int i : {1, 40}) EXPECT_EQ(y.get(i), HUGE_VAL) << name_of(activation);
        if (activation == Activation::kReLU) {
          for (const int i : {2, 65}) EXPECT_EQ(y.get(i), 0.0);
        }
      }
    }
  }
}

}  // namespace
}  // namespace normcore::kernels::testing
