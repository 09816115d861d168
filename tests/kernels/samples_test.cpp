// Whole samples of short slices (CpuPath::kSample).
#include <gtest/gtest.h>

#include <cmath>
#include <optional>
#include <utility>

#include "norm_checks.h"
#include "normcore/kernels/plan.h"

namespace normcore::kernels::testing {
namespace {

// Short slices whose squared deviations are infinite or 0 in float32.
TEST(Samples, SlicesOfAnyMagnitude) {
  for (const Layout layout : kBothLayouts) {
    for (const double magnitude : {1e-24, 1e-18, 1e18, 1e30, 5e37}) {
      NormCase c;
      c.layout = layout;
      c.extent = {4, 32, 1};
      c.num_groups = 4;
      c.scale = c.bias = std::nullopt;
      c.eps = 0.0;
      Inputs inputs(c);
      for (std::int64_t i = 0; i < c.extent.numel(); ++i) {
        inputs.x.set(i, magnitude * std::sin(static_cast<double>(i)));
      }
      const Outputs expected = reference_forward(inputs);
      const Outputs actual = run_forward(inputs);
      EXPECT_LE(relative_norm_error(find(actual, "y").values(), find(expected, "y").values()), 1e-6)
          << magnitude << " in " << to_string(c);
    }
  }
}

// Slices around the widths of vectors, of one sample and of more than a block, and more columns
// than a part of a sample has.
TEST(Samples, DoubleBackwardOfEveryShape) {
  constexpr std::pair<Extent, std::int64_t> kShapes[] = {
      {{3, 7, 1}, 7},    {{70, 3, 2}, 3},   {{5, 12, 1}, 6},   {{2, 9, 1}, 3},     {{140, 8, 1}, 2},
      {{3, 5, 4}, 5},    {{2, 10, 4}, 5},   {{1, 40, 1}, 5},   {{3, 5, 8}, 5},     {{2, 14, 8}, 7},
      {{4, 6, 16}, 6},   {{1, 16, 1}, 1},   {{3, 51, 1}, 3},   {{2, 34, 1}, 2},    {{5, 33, 1}, 1},
      {{2, 70, 16}, 70}, {{130, 64, 1}, 8}, {{2, 2049, 1}, 3}, {{1, 1300, 1}, 650}};
  int variant = 0;
  for (const auto& [extent, num_groups] : kShapes) {
    for (const Layout layout : kBothLayouts) {
      if (layout == Layout::kNSC && extent.s != 1) continue;
      for (const DType x : kAllDTypes) {
        for (const Activation activation : kAllActivations) {
          NormCase c;
          c.extent = extent;
          c.layout = layout;
          c.num_groups = num_groups;
          c.x = x;
          c.activation = activation;
          ++variant;
          if (variant % 2 == 0) c.residual = x;
          c.y = variant % 3 == 0 ? x : DType::kBFloat16;
          if (variant % 5 == 0) c.bias = std::nullopt;
          if (variant % 7 == 0) c.scale = x;
          c.affine_per_sample = extent.s == 1 && variant % 4 < 2;
          c.placement = static_cast<Placement>(variant % 3);
          Inputs inputs(c);
          const Problem problem(inputs.norm_input(), num_groups, Pass::kDoubleBackward);
          ASSERT_EQ(plan_cpu(problem, 1).path, CpuPath::kSample) << to_string(c);
          check_double_backward(inputs, Cotangents(c));
        }
      }
    }
  }
}

}  // namespace
}  // namespace normcore::kernels::testing
