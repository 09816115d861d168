// Bits of ReLU, beside the residual that they replace.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "norm_checks.h"

namespace normcore::kernels::testing {
namespace {

// `width`: of the neighbouring elements that have to be whole bytes. The other two extents are n and one
// that may be anything.
NormCase case_of(Layout layout, std::int64_t n, std::int64_t other, std::int64_t width, DType x) {
  NormCase c;
  c.extent = layout == Layout::kNCS ? Extent{n, other, width} : Extent{n, width, other};
  c.layout = layout;
  c.x = c.y = x;
  c.residual = x;
  c.activation = Activation::kReLU;
  return c;
}

using Param = std::tuple<Layout, DType>;
class ReluBits : public ::testing::TestWithParam<Param> {
 protected:
  Layout layout() const { return std::get<0>(GetParam()); }
  DType dtype() const { return std::get<1>(GetParam()); }
  std::int64_t byte() const { return elements_per_relu_byte(dtype()); }
};

INSTANTIATE_TEST_SUITE_P(All, ReluBits,
                         ::testing::Combine(::testing::ValuesIn(kBothLayouts),
                                            ::testing::Values(DType::kFloat32, DType::kBFloat16,
                                                              DType::kFloat16)),
                         [](const auto& info) {
                           return std::string(name_of(std::get<0>(info.param))) + "_" +
                                  name_of(std::get<1>(info.param));
                         });

TEST_P(ReluBits, OfEveryWidth) {
  const std::int64_t most = runners_are_slow() ? 5 : 20;
  for (std::int64_t bytes = 1; bytes <= most; ++bytes) {
    check_relu_bits(case_of(layout(), 3, 5, bytes * byte(), dtype()));
  }
}

TEST_P(ReluBits, OfSeveralChunksAndStrips) {
  const std::int64_t width = runners_are_slow() ? 160 : 4096 + 512;
  check_relu_bits(case_of(layout(), 2, 7, width + byte(), dtype()));
  check_relu_bits(case_of(layout(), 2, 150, 8 * byte(), dtype()));
  if (!runners_are_slow()) check_relu_bits(case_of(layout(), 1, 2, 70000 + 4 * byte(), dtype()));
}

TEST_P(ReluBits, BesideMasksAndOtherDTypes) {
  const std::int64_t width = 5 * byte();
  for (const MaskKind mask : {MaskKind::kRow, MaskKind::kElement}) {
    NormCase c = case_of(layout(), 2, 9, width, dtype());
    c.mask = mask;
    check_relu_bits(c);
  }
  NormCase c = case_of(layout(), 2, 9, width, dtype());
  c.y = DType::kFloat32;
  check_relu_bits(c);
  c.residual.reset();
  check_relu_bits(c);
  c.residual = DType::kBFloat16;
  check_relu_bits(c);
}

// Where no vector is: on the CPU only.
TEST_P(ReluBits, OfTensorsThatStartAnywhere) {
  if (runners_are_slow()) GTEST_SKIP();
  for (const std::int64_t bytes : {1, 3, 40}) {
    NormCase c = case_of(layout(), 2, 3, bytes * byte(), dtype());
    c.placement = Placement::kShift;
    check_relu_bits(c);
  }
}

TEST_P(ReluBits, OfValuesThatAreNotFinite) {
  NormCase c = case_of(layout(), 2, 8, 2 * byte(), dtype());
  Inputs inputs(c);
  const double infinity = std::numeric_limits<double>::infinity();
  inputs.residual.set(0, std::nan(""));
  inputs.residual.set(1, infinity);
  inputs.residual.set(2, -infinity);
  for (const EqualRunners& equal : all_runners()) {
    std::vector<std::uint8_t> bits(static_cast<std::size_t>(c.extent.numel() / byte()));
    if (run_forward(inputs, *equal.front(), bits.data()).empty()) continue;
    EXPECT_EQ(bits[0] & 7, 3) << equal.front()->name();
  }
}

}  // namespace
}  // namespace normcore::kernels::testing
