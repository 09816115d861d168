// The kernels on every instruction set that they are compiled for and this CPU has, the baseline
// included.
#include <gtest/gtest.h>

#include <string>
#include <vector>

// clang-format off: before Highway
#include "cpu/targets.h"
// clang-format on
#include <hwy/highway.h>

#include "norm_checks.h"

namespace normcore::kernels::testing {
namespace {

class Target : public ::testing::TestWithParam<std::int64_t> {
 protected:
  void SetUp() override { choose(GetParam()); }
  void TearDown() override { choose(0); }

 private:
  static void choose(std::int64_t target) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};

INSTANTIATE_TEST_SUITE_P(All, Target, ::testing::ValuesIn(hwy::SupportedAndGeneratedTargets()),
                         [](const auto& parameter) {
                           return std::string(hwy::TargetName(parameter.param));
                         });

constexpr const char* kShapes[] = {"one_channel", "channels_65_rows", "run_4097", "run_65",
                                   "odd_all"};

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
        }
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
        }
      }
    }
  }
}

}  // namespace
}  // namespace normcore::kernels::testing
