// Whole samples of short slices (CpuPath::kSample) where float32 squares are not enough.
#include <gtest/gtest.h>

#include <cmath>
#include <optional>

#include "norm_checks.h"

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

}  // namespace
}  // namespace normcore::kernels::testing
