#include "target_test.h"

#include "norm_checks.h"

namespace normcore::kernels::testing {
namespace {

class Target : public TargetTest {};
INSTANTIATE_TEST_SUITE_P(All, Target, all_targets(), name_of_target);

constexpr const char* kShapes[] = {"one_channel", "channels_65_rows", "run_4097", "run_65",
                                   "odd_all",     "rows_64",          "rows_256"};

TEST_P(Target, IsTheOneInUse) { EXPECT_STREQ(simd_target(), hwy::TargetName(GetParam())); }

TEST_P(Target, BatchNorm) {
  for (const char* name : kShapes) {
    for (const Layout layout : kBothLayouts) {
      for (const DType x : kAllDTypes) {
        for (const NormCase& c : variants(shape(name), layout, x, false)) {
          Inputs inputs(c);
          check_forward(inputs);
          check_inference(inputs);
          check_backward(inputs);
          check_double_backward(inputs, Cotangents(c));
        }
      }
    }
  }
}

TEST_P(Target, ReluBits) {
  for (const Layout layout : kBothLayouts) {
    for (const DType x : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (std::int64_t bytes = 1; bytes <= 17; ++bytes) {
        const std::int64_t width = bytes * elements_per_relu_byte(x);
        NormCase c;
        c.extent = layout == Layout::kNCS ? Extent{3, 2, width} : Extent{3, width, 2};
        c.layout = layout;
        c.x = c.y = x;
        c.residual = x;
        c.activation = Activation::kReLU;
        check_relu_bits(c);
        c.mask = MaskKind::kElement;
        check_relu_bits(c);
      }
    }
  }
}

TEST_P(Target, GroupNorm) {
  for (const char* name : kShapes) {
    for (const Layout layout : kBothLayouts) {
      for (const DType x : kAllDTypes) {
        for (const NormCase& c : variants(shape(name), layout, x, true)) {
          Inputs inputs(c);
          check_forward(inputs);
          check_backward(inputs);
          check_double_backward(inputs, Cotangents(c));
        }
      }
    }
  }
}

}  // namespace
}  // namespace normcore::kernels::testing
