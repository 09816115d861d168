// Loads and stores of every DType. Batch norm with mean 0, variance 1, eps = 0 and no parameters
// computes y = x, so that what is left is the conversion: loads and widening stores are exact,
// narrowing stores round to nearest even, once.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/reference.h"
#include "norm_checks.h"
#include "target_test.h"

namespace normcore::kernels::testing {
namespace {

class Convert : public TargetTest {};
INSTANTIATE_TEST_SUITE_P(All, Convert, all_targets(), name_of_target);

Inputs identity_norm(std::int64_t count, Layout layout, DType x, DType y) {
  NormCase c;
  c.extent = {1, 1, count};
  c.layout = layout;
  c.x = x;
  c.y = y;
  c.scale = c.bias = std::nullopt;
  c.eps = 0.0;
  Inputs inputs(c);
  inputs.running_mean.fill(0.0);
  inputs.running_var.fill(1.0);
  return inputs;
}

// Expects y to be x rounded by the reference: the same value, and the same sign except of 0 (x - 0
// + 0 may lose it).
void expect_rounded(const Inputs& inputs) {
  const NormCase& c = inputs.norm_case;
  const Outputs out = run_inference(inputs);
  const Tensor& y = find(out, "y");
  Tensor expected(c.y, 1, Placement::kEnd);
  std::int64_t failures = 0;
  for (std::int64_t i = 0; i < y.count(); ++i) {
    expected.set(0, inputs.x.get(i));
    const double a = y.get(i), b = expected.get(0);
    if (a == b || (std::isnan(a) && std::isnan(b))) continue;
    if (failures++ < 3) {
      ADD_FAILURE() << std::hexfloat << inputs.x.get(i) << " gives " << a << ", not " << b << ": "
                    << name_of(c.x) << " to " << name_of(c.y) << " " << name_of(c.layout);
    }
  }
  EXPECT_EQ(failures, 0);
}

TEST_P(Convert, EverySixteenBitValue) {
  for (const Layout layout : kBothLayouts) {
    for (const DType x : {DType::kBFloat16, DType::kFloat16}) {
      for (const DType y : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        const Inputs inputs = identity_norm(0x10000, layout, x, y);
        for (int bits = 0; bits < 0x10000; ++bits) {
          const auto half = static_cast<std::uint16_t>(bits);
          std::memcpy(inputs.x.buffer().data() + 2 * bits, &half, 2);
        }
        expect_rounded(inputs);
      }
    }
  }
}

// float32 bit patterns: every sign, exponent and upper mantissa with the lower bits just below, at
// and above a tie.
TEST_P(Convert, Float32TiesToBFloat16) {
  std::vector<std::uint32_t> patterns;
  for (std::uint32_t upper = 0; upper < 0x10000u; ++upper) {
    for (const std::uint32_t lower : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      patterns.push_back(upper << 16 | lower);
    }
  }
  for (const Layout layout : kBothLayouts) {
    for (const DType y : {DType::kBFloat16, DType::kFloat32}) {
      const Inputs inputs =
          identity_norm(static_cast<std::int64_t>(patterns.size()), layout, DType::kFloat32, y);
      std::memcpy(inputs.x.buffer().data(), patterns.data(), 4 * patterns.size());
      expect_rounded(inputs);
    }
  }
}

// Values at and beside the middle between neighbouring float16 values, subnormals and the border to
// infinity included.
std::vector<float> float16_ties() {
  std::vector<float> values;
  for (int bits = 0; bits < 0x7c00; ++bits) {
    const std::uint16_t pair[] = {static_cast<std::uint16_t>(bits),
                                  static_cast<std::uint16_t>(bits + 1)};
    const double low = reference::load({pair, DType::kFloat16}, 0);
    const double high = bits == 0x7bff ? 65536.0 : reference::load({pair, DType::kFloat16}, 1);
    const auto tie = static_cast<float>(0.5 * (low + high));
    for (const float value : {tie, std::nextafter(tie, 0.0f), std::nextafter(tie, HUGE_VALF)}) {
      values.insert(values.end(), {value, -value});
    }
  }
  for (const float value : {0x1p-25f, 0x1p-26f, 0x1p-126f, 0x1p-149f, 1e30f, HUGE_VALF}) {
    values.insert(values.end(), {value, -value});
  }
  return values;
}

TEST_P(Convert, Float32TiesToFloat16) {
  const std::vector<float> values = float16_ties();
  for (const Layout layout : kBothLayouts) {
    const Inputs inputs = identity_norm(static_cast<std::int64_t>(values.size()), layout,
                                        DType::kFloat32, DType::kFloat16);
    std::memcpy(inputs.x.buffer().data(), values.data(), 4 * values.size());
    expect_rounded(inputs);
  }
}

// float64 values a little beside a tie: rounding to float32 first would make them ties.
TEST_P(Convert, Float64RoundsOnce) {
  std::vector<double> values;
  for (const float tie : float16_ties()) {
    if (!std::isfinite(tie)) continue;
    values.insert(values.end(), {tie, tie * (1.0 + 0x1p-40), tie * (1.0 - 0x1p-40)});
  }
  for (std::uint32_t upper = 0; upper < 0x7f80u; upper += 3) {
    const double tie = std::bit_cast<float>(upper << 16 | 0x8000u);
    values.insert(values.end(), {tie, tie * (1.0 + 0x1p-40), -tie * (1.0 - 0x1p-40)});
  }
  values.insert(values.end(), {1e300, -1e300, 1e-300, HUGE_VAL, std::nan("")});
  for (const Layout layout : kBothLayouts) {
    for (const DType y : kAllDTypes) {
      Inputs inputs =
          identity_norm(static_cast<std::int64_t>(values.size()), layout, DType::kFloat64, y);
      for (std::size_t i = 0; i < values.size(); ++i) {
        inputs.x.set(static_cast<std::int64_t>(i), values[i]);
      }
      expect_rounded(inputs);
    }
  }
}

TEST_P(Convert, NaNOfAnyPayloadStaysNaN) {
  std::vector<std::uint32_t> patterns;
  for (const std::uint32_t payload :
       {1u, 0x1fffu, 0x2000u, 0xffffu, 0x10000u, 0x400000u, 0x7fffffu}) {
    patterns.insert(patterns.end(), {0x7f800000u | payload, 0xff800000u | payload});
  }
  for (const DType y : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const Inputs inputs =
        identity_norm(static_cast<std::int64_t>(patterns.size()), Layout::kNCS, DType::kFloat32, y);
    std::memcpy(inputs.x.buffer().data(), patterns.data(), 4 * patterns.size());
    const Outputs out = run_inference(inputs);
    for (const double value : find(out, "y").values()) EXPECT_TRUE(std::isnan(value));
  }
}

}  // namespace
}  // namespace normcore::kernels::testing
