// The reference itself: its conversions against their definition, its forward pass against worked
// numbers, its backward pass against central differences of the forward pass, its double backward
// pass against those of the backward pass.
#include "cpu/reference.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "norm_checks.h"
#include "positions.h"

namespace normcore::kernels::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double rounded(DType dtype, double value) {
  Tensor tensor(dtype, 1, Placement::kEnd);
  tensor.set(0, value);
  return tensor.get(0);
}

TEST(Reference, SixteenBitValuesSurviveARoundTrip) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (unsigned bits = 0; bits < 0x10000u; ++bits) {
      const auto half = static_cast<std::uint16_t>(bits);
      std::uint16_t back = 0;
      const double value = reference::load({&half, dtype}, 0);
      reference::store({&back, dtype}, 0, value);
      if (std::isnan(value)) {
        EXPECT_TRUE(std::isnan(reference::load({&back, dtype}, 0))) << bits;
      } else {
        EXPECT_EQ(back, half) << name_of(dtype);
      }
    }
  }
}

TEST(Reference, DecodesFloat16AndBFloat16) {
  const std::uint16_t float16[] = {0x3c00, 0xc000, 0x7bff, 0x0001, 0x0400, 0x7c00, 0x3555};
  const double values[] = {1.0, -2.0, 65504.0, 0x1p-24, 0x1p-14, kInfinity, 0x1.554p-2};
  for (int i = 0; i < 7; ++i) EXPECT_EQ(reference::load({float16, DType::kFloat16}, i), values[i]);
  const std::uint16_t bfloat16[] = {0x3f80, 0xc049, 0x0001, 0x7f7f};
  const double others[] = {1.0, -3.140625, 0x1p-133, 0x1.fep127};
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(reference::load({bfloat16, DType::kBFloat16}, i), others[i]);
  }
}

TEST(Reference, RoundsToNearestEven) {
  const DType f16 = DType::kFloat16, bf16 = DType::kBFloat16;
  EXPECT_EQ(rounded(f16, 1.0 + 0x1p-11), 1.0);
  EXPECT_EQ(rounded(f16, 1.0 + 3 * 0x1p-11), 1.0 + 0x1p-9);
  EXPECT_EQ(rounded(f16, 1.0 + 0x1p-11 + 0x1p-50), 1.0 + 0x1p-10);
  EXPECT_EQ(rounded(f16, 65519.999), 65504.0);
  EXPECT_EQ(rounded(f16, -65520.0), -kInfinity);
  EXPECT_EQ(rounded(f16, 0x1p-25), 0.0);
  EXPECT_EQ(rounded(f16, 0x1.001p-25), 0x1p-24);
  EXPECT_EQ(rounded(f16, 0x1.ffep-15), 0x1p-14);  // the largest subnormal's neighbour above
  EXPECT_EQ(rounded(bf16, 1.0 + 0x1p-8), 1.0);
  EXPECT_EQ(rounded(bf16, 1.0 + 3 * 0x1p-8), 1.0 + 0x1p-6);
  EXPECT_EQ(rounded(bf16, 0x1.ffp127), kInfinity);
  EXPECT_EQ(rounded(bf16, 0x1p-134), 0.0);
  EXPECT_EQ(rounded(bf16, 0x1.8p-133), 0x1p-132);
  EXPECT_TRUE(std::isnan(rounded(f16, std::nan("")))) << "NaN stays NaN";
}

// x = 0, 1, ..., 11 as [2][3][2]; numbers of the normalizations of two JAX libraries in float64.
struct Golden {
  Golden() : y(12), mean(3), rstd(3) {
    std::iota(x, x + 12, 0.0);
    input.extent = {2, 2, 3};
    input.layout = Layout::kNSC;
    input.x = {x, DType::kFloat64};
  }
  BatchNormForwardArgs forward() {
    BatchNormForwardArgs args;
    args.input = input;
    args.y = {y.data(), DType::kFloat64};
    args.mean = mean.data();
    args.rstd = {rstd.data(), DType::kFloat64};
    return args;
  }
  double x[12];
  std::vector<double> y, mean, rstd;
  NormInput input;
};

TEST(Reference, BatchNormGoldenNumbers) {
  Golden golden;
  double running_mean[] = {0.0, 0.0}, running_var[] = {1.0, 1.0};
  std::int64_t counter = 0;
  BatchNormForwardArgs args = golden.forward();
  args.running = {
      {running_mean, DType::kFloat64}, {running_var, DType::kFloat64}, &counter, 0.1, false, false};
  reference::batch_norm_forward(args);
  EXPECT_DOUBLE_EQ(golden.mean[0], 5.0);
  EXPECT_DOUBLE_EQ(golden.mean[1], 6.0);
  EXPECT_DOUBLE_EQ(golden.y[0], -1.4638494820588708);
  EXPECT_DOUBLE_EQ(golden.y[11], 1.4638494820588708);
  EXPECT_DOUBLE_EQ(running_mean[1], 0.6);
  EXPECT_NEAR(running_var[0], 2.0666666667, 1e-9);
  EXPECT_EQ(counter, 1);
}

TEST(Reference, MaskedBatchNormGoldenNumbers) {
  Golden golden;
  const std::uint8_t mask[] = {1, 1, 0, 1, 0, 0};
  golden.input.mask = {mask, MaskKind::kRow};
  reference::batch_norm_forward(golden.forward());
  EXPECT_DOUBLE_EQ(golden.mean[0], 8.0 / 3.0);
  EXPECT_NEAR(golden.y[0], -1.0690441085967410, 1e-14);
  EXPECT_NEAR(golden.y[10], 2.9398712986410382, 1e-14);
}

// loss = sum k y_k^2
TEST(Reference, BatchNormBackwardGoldenNumbers) {
  Golden golden;
  const double scale[] = {2.0, 0.5}, bias[] = {1.0, -1.0};
  golden.input.scale = {scale, DType::kFloat64};
  golden.input.bias = {bias, DType::kFloat64};
  reference::batch_norm_forward(golden.forward());
  double grad_y[12], grad_x[12], grad_scale[2], grad_bias[2];
  for (int k = 0; k < 12; ++k) grad_y[k] = 2.0 * k * golden.y[static_cast<std::size_t>(k)];
  BatchNormBackwardArgs args;
  args.input = golden.input;
  args.grad_y = {grad_y, DType::kFloat64};
  args.mean = {golden.mean.data(), DType::kFloat64};
  args.rstd = {golden.rstd.data(), DType::kFloat64};
  args.grad.x = {grad_x, DType::kFloat64};
  args.grad.scale = {grad_scale, DType::kFloat64};
  args.grad.bias = {grad_bias, DType::kFloat64};
  reference::batch_norm_backward(args);
  EXPECT_NEAR(grad_scale[0], 160.98768264059373, 1e-11);
  EXPECT_NEAR(grad_scale[1], -4.987816354764775, 1e-12);
  EXPECT_NEAR(grad_bias[0], 141.97557099529678, 1e-11);
  EXPECT_NEAR(grad_bias[1], -51.506107251175806, 1e-12);
  const double expected[] = {9.142829593368612, 0.5714282343211979, -1.828581688882167,
                             -0.11428552471373976};
  for (int i = 0; i < 4; ++i) EXPECT_NEAR(grad_x[i], expected[i], 1e-11);
}

TEST(Reference, GroupNormGoldenNumbers) {
  double x[16], mean[4], rstd[4];
  std::vector<double> y(16);
  std::iota(x, x + 16, 0.0);
  NormInput input;
  input.extent = {2, 4, 2};
  input.layout = Layout::kNSC;
  input.x = {x, DType::kFloat64};
  input.eps = 1e-6;
  reference::group_norm_forward(
      {input, 2, {y.data(), DType::kFloat64}, mean, {rstd, DType::kFloat64}});
  EXPECT_DOUBLE_EQ(mean[0], 2.5);
  EXPECT_DOUBLE_EQ(mean[1], 4.5);
  EXPECT_NEAR(y[0], -1.2126779825136753, 1e-13);
  EXPECT_NEAR(y[1], -0.7276067895082052, 1e-13);
}

// sum grad_y * y with batch or running statistics.
double loss(const Inputs& inputs, bool from_batch) {
  const NormCase& c = inputs.norm_case;
  const Tensor y(DType::kFloat64, c.extent.numel(), Placement::kEnd);
  const Tensor mean(DType::kFloat64, c.slice_count(), Placement::kEnd);
  const Tensor rstd(DType::kFloat64, c.slice_count(), Placement::kEnd);
  auto* mean_data = static_cast<double*>(mean.data());
  if (c.num_groups != 0) {
    reference::group_norm_forward(
        {inputs.norm_input(), c.num_groups, y.view(), mean_data, rstd.view()});
  } else if (from_batch) {
    BatchNormForwardArgs args;
    args.input = inputs.norm_input();
    args.y = y.view();
    args.mean = mean_data;
    args.rstd = rstd.view();
    reference::batch_norm_forward(args);
  } else {
    reference::batch_norm_inference({inputs.norm_input(), inputs.running_mean.view(),
                                     inputs.running_var.view(), y.view(), rstd.view()});
  }
  double sum = 0.0;
  for (std::int64_t i = 0; i < y.count(); ++i) {
    const double grad_y = inputs.grad_y.get(i);
    if (grad_y != 0.0) sum += grad_y * y.get(i);
  }
  return sum;
}

// Compares the reference's gradients with (loss(+h) - loss(-h)) / 2h, whose error is about h^2.
void check_gradients(const NormCase& norm_case, bool from_batch) {
  SCOPED_TRACE(to_string(norm_case));
  Inputs inputs(norm_case);
  const Statistics statistics =
      from_batch ? batch_statistics(inputs, true) : running_statistics(inputs, true);
  const Outputs gradients = reference_backward(inputs, statistics, {});
  const auto check = [&](const std::string& name, Tensor& tensor) {
    const Tensor& gradient = find(gradients, "grad_" + name);
    for (std::int64_t i = 0; i < tensor.count(); ++i) {
      const double value = tensor.get(i), h = 1e-4;
      if (std::isnan(value)) {
        EXPECT_EQ(gradient.get(i), 0.0) << name << "[" << i << "]";
        continue;
      }
      tensor.set(i, value + h);
      const double above = loss(inputs, from_batch);
      tensor.set(i, value - h);
      const double below = loss(inputs, from_batch);
      tensor.set(i, value);
      EXPECT_NEAR(gradient.get(i), (above - below) / (2.0 * h), 1e-5) << name << "[" << i << "]";
    }
  };
  check("x", inputs.x);
  check("scale", inputs.scale);
  check("bias", inputs.bias);
  if (norm_case.activation != Activation::kNone) check("residual", inputs.residual);
}

TEST(Reference, GradientsAgreeWithCentralDifferences) {
  for (const Layout layout : kBothLayouts) {
    for (const Activation activation : kAllActivations) {
      for (const MaskKind mask : {MaskKind::kNone, MaskKind::kRow, MaskKind::kElement}) {
        NormCase c;
        c.extent = {3, 4, 5};
        c.layout = layout;
        c.x = c.y = c.running = DType::kFloat64;
        c.scale = c.bias = c.residual = DType::kFloat64;
        c.activation = activation;
        c.mask = mask;
        check_gradients(c, true);
        if (mask == MaskKind::kNone) check_gradients(c, false);
        c.num_groups = 2;
        check_gradients(c, true);
        c.affine_per_sample = true;
        check_gradients(c, true);
      }
    }
  }
}

// <cotangent, gradient> for each gradient of the backward pass, with the statistics of the inputs.
constexpr std::size_t kGradients = 4;
using Pairings = std::array<double, kGradients>;

Pairings pairings(const Inputs& inputs, const Cotangents& cotangents, bool from_batch) {
  const Statistics statistics =
      from_batch ? batch_statistics(inputs, false) : running_statistics(inputs, false);
  const Outputs gradients = reference_backward(inputs, statistics, {});
  const auto pairing = [](const Tensor& gradient, const Tensor& cotangent) {
    double sum = 0.0;
    for (std::int64_t i = 0; i < cotangent.count(); ++i) sum += cotangent.get(i) * gradient.get(i);
    return sum;
  };
  const bool is_plain = inputs.norm_case.activation == Activation::kNone;
  const Tensor& grad_residual = is_plain ? inputs.grad_y : find(gradients, "grad_residual");
  return {pairing(find(gradients, "grad_x"), cotangents.x),
          pairing(find(gradients, "grad_scale"), cotangents.scale),
          pairing(find(gradients, "grad_bias"), cotangents.bias),
          pairing(grad_residual, cotangents.residual)};
}

// The cotangents with one of them alone.
Cotangents only(const NormCase& c, std::size_t gradient) {
  Cotangents cotangents(c);
  Tensor* const tensors[kGradients] = {&cotangents.x, &cotangents.scale, &cotangents.bias,
                                       &cotangents.residual};
  for (std::size_t i = 0; i < kGradients; ++i) {
    if (i != gradient) *tensors[i] = Tensor();
  }
  return cotangents;
}

// z of every position.
std::vector<double> arguments(const Inputs& inputs, const Statistics& statistics) {
  const NormCase& c = inputs.norm_case;
  std::vector<double> z(static_cast<std::size_t>(c.extent.numel()));
  for_each_position(c.extent, [&](std::int64_t n, std::int64_t channel, std::int64_t s) {
    const std::int64_t i = index_of(c.extent, c.layout, n, channel, s);
    const auto slice = static_cast<std::size_t>(slice_of(c.extent, c.num_groups, n, channel));
    const std::int64_t affine = c.affine_per_sample ? n * c.extent.c + channel : channel;
    const double xhat = (inputs.x.get(i) - statistics.mean[slice]) * statistics.rstd[slice];
    z[static_cast<std::size_t>(i)] =
        xhat * inputs.scale.get(affine) + inputs.bias.get(affine) + inputs.residual.get(i);
  });
  return z;
}

// Compares the gradients of the double backward pass with central differences of the pairings. What
// counts as xhat = 0 where it is not finite has the differences of x = mean and a residual of 0.
void check_double_gradients(const NormCase& norm_case, bool from_batch = true) {
  SCOPED_TRACE((from_batch ? "batch statistics " : "running statistics ") + to_string(norm_case));
  const NormCase& c = norm_case;
  Inputs inputs(c), finite(c);
  const Statistics statistics =
      from_batch ? batch_statistics(inputs, true) : running_statistics(inputs, true);
  constexpr double kNotFinite[] = {kInfinity, std::numeric_limits<double>::quiet_NaN(), -kInfinity};
  std::int64_t replaced = 0;
  for_each_position(c.extent, [&](std::int64_t n, std::int64_t channel, std::int64_t s) {
    const std::int64_t i = index_of(c.extent, c.layout, n, channel, s);
    if (!std::isnan(inputs.x.get(i))) return;
    const auto slice = static_cast<std::size_t>(slice_of(c.extent, c.num_groups, n, channel));
    finite.x.set(i, statistics.mean[slice]);
    finite.residual.set(i, 0.0);
    inputs.x.set(i, kNotFinite[replaced % 3]);
    inputs.residual.set(i, kNotFinite[replaced / 3 % 3]);
    ++replaced;
  });
  EXPECT_EQ(replaced > 0, c.mask != MaskKind::kNone && c.garbage_under_mask);
  if (c.activation == Activation::kReLU) {
    std::vector<double> z = arguments(finite, statistics);
    for (std::size_t i = 0; i < z.size(); ++i) {
      const auto index = static_cast<std::int64_t>(i);
      if (std::abs(z[i]) > 1e-2 || finite.residual.get(index) == 0.0) continue;
      for (Inputs* both : {&inputs, &finite}) {
        both->residual.set(index, both->residual.get(index) + 0.1);
      }
    }
    z = arguments(finite, statistics);
    const auto closest = std::min_element(
        z.begin(), z.end(), [](double a, double b) { return std::abs(a) < std::abs(b); });
    ASSERT_GT(std::abs(*closest), 1e-3) << "at a kink";
  }

  const Cotangents cotangents(c);
  std::vector<Outputs> alone;
  for (std::size_t k = 0; k < kGradients; ++k) {
    alone.push_back(reference_double_backward(inputs, only(c, k), statistics));
  }
  const Outputs together = reference_double_backward(inputs, cotangents, statistics);
  double largest = 0.0;
  const auto check = [&](const std::string& name, Tensor& tensor) {
    for (std::int64_t i = 0; i < tensor.count(); ++i) {
      const double value = tensor.get(i), h = 1e-5;
      tensor.set(i, value + h);
      const Pairings above = pairings(finite, cotangents, from_batch);
      tensor.set(i, value - h);
      const Pairings below = pairings(finite, cotangents, from_batch);
      tensor.set(i, value);
      const auto expect = [&](const Outputs& gradients, double difference) {
        EXPECT_NEAR(find(gradients, name).get(i), difference, 1e-6 * (1.0 + std::abs(difference)))
            << name << "[" << i << "]";
      };
      double sum = 0.0;
      for (std::size_t k = 0; k < kGradients; ++k) {
        const double difference = (above[k] - below[k]) / (2.0 * h);
        expect(alone[k], difference);
        sum += difference;
      }
      expect(together, sum);
      largest = std::max(largest, std::abs(sum));
    }
  };
  check("grad_grad_y", finite.grad_y);
  check("grad_x", finite.x);
  check("grad_scale", finite.scale);
  check("grad_bias", finite.bias);
  check("grad_residual", finite.residual);
  EXPECT_GT(largest, 0.1) << "nothing to compare";
}

NormCase float64_case(const Extent& extent, Layout layout) {
  NormCase c;
  c.extent = extent;
  c.layout = layout;
  c.x = c.y = c.running = DType::kFloat64;
  c.scale = c.bias = c.residual = DType::kFloat64;
  return c;
}

TEST(Reference, DoubleBackwardAgreesWithCentralDifferences) {
  for (const Layout layout : kBothLayouts) {
    for (const Activation activation : kAllActivations) {
      for (const MaskKind mask : {MaskKind::kNone, MaskKind::kRow, MaskKind::kElement}) {
        NormCase c = float64_case({3, 4, 5}, layout);
        c.activation = activation;
        c.mask = mask;
        check_double_gradients(c);
        NormCase given = c;
        given.garbage_under_mask = false;  // there is no mask for given statistics
        check_double_gradients(given, false);
        c.num_groups = 2;
        check_double_gradients(c);
        c.affine_per_sample = true;
        check_double_gradients(c);
      }
    }
  }
}

// There the gradients do not depend on x.
TEST(Reference, DoubleBackwardOfSlicesOfOneValue) {
  for (const std::int64_t num_groups : {0, 6}) {
    NormCase c = float64_case({num_groups == 0 ? 1 : 2, 6, 1}, Layout::kNCS);
    c.num_groups = num_groups;
    c.activation = Activation::kSiLU;
    check_double_gradients(c);
    const Inputs inputs(c);
    const Outputs out =
        reference_double_backward(inputs, Cotangents(c), batch_statistics(inputs, true));
    for (const char* name : {"grad_x", "grad_scale"}) {
      for (const double value : find(out, name).values()) EXPECT_EQ(value, 0.0) << name;
    }
  }
}

// One sample of two has nothing that counts. There xhat = 0 and no other position is seen; where
// grad_y is not 0, NaN.
TEST(Reference, DoubleBackwardWithoutValidValue) {
  for (const Activation activation : kAllActivations) {
    NormCase c = float64_case({2, 2, 3}, Layout::kNCS);
    c.num_groups = 1;
    c.activation = activation;
    c.mask = MaskKind::kRow;
    Inputs inputs(c);
    std::fill_n(inputs.mask.data(), 3, std::uint8_t{1});
    std::fill_n(inputs.mask.data() + 3, 3, std::uint8_t{0});
    inputs.x.fill(0.5);
    inputs.x.set(1, 1.5);
    for (std::int64_t i = 6; i < 12; ++i) inputs.grad_y.set(i, 0.0);
    const Statistics statistics = batch_statistics(inputs, true);
    const Cotangents cotangents(c);
    const Outputs clean = reference_double_backward(inputs, cotangents, statistics);
    for (std::int64_t i = 6; i < 12; ++i) {
      const std::int64_t channel = i < 9 ? 0 : 1;
      const double z = inputs.bias.get(channel) + inputs.residual.get(i);
      const double q = cotangents.bias.get(channel) + cotangents.residual.get(i);
      EXPECT_DOUBLE_EQ(find(clean, "grad_grad_y").get(i), activate_derivative(activation, z) * q);
      EXPECT_EQ(find(clean, "grad_x").get(i), 0.0);
      EXPECT_EQ(find(clean, "grad_residual").get(i), 0.0);
    }
    for (const char* name : {"grad_scale", "grad_bias"}) {
      for (const double value : find(clean, name).values()) EXPECT_FALSE(std::isnan(value)) << name;
    }

    inputs.grad_y.set(8, 1.0);
    const Outputs dirty = reference_double_backward(inputs, cotangents, statistics);
    const bool is_smooth = activation != Activation::kNone && activation != Activation::kReLU;
    for (const auto& [name, is_nan] :
         {std::pair{"grad_grad_y", true}, {"grad_x", true}, {"grad_residual", is_smooth}}) {
      for (std::int64_t i = 0; i < 12; ++i) {
        const double value = find(dirty, name).get(i);
        EXPECT_EQ(std::isnan(value), i == 8 && is_nan) << name << "[" << i << "]";
        if (i != 8) {
          EXPECT_EQ(value, find(clean, name).get(i)) << name << "[" << i << "]";
        }
      }
    }
  }
}

}  // namespace
}  // namespace normcore::kernels::testing
