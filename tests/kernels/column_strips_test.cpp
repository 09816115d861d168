// Rows of more columns than a strip of the CPU's loops (kColumnStrip), the second strip of which is no
// whole number of vectors. Such a shape would take the emulator minutes and show nothing there.
#include <gtest/gtest.h>

#include "norm_checks.h"
#include "shape_test.h"

namespace normcore::kernels::testing {
namespace {

class ColumnStrips : public ShapeTest {};

INSTANTIATE_TEST_SUITE_P(All, ColumnStrips,
                         ::testing::Combine(::testing::Values(Shape{
                                                "columns_2312", {3, 2312, 2}, 8}),
                                            ::testing::Values(Layout::kNSC)),
                         name_of_shape);

TEST_P(ColumnStrips, BatchNorm) {
  for_each_variant(false, [](Inputs& inputs) {
    check_forward(inputs);
    check_inference(inputs);
    check_backward(inputs);
    check_backward(inputs, false);
  });
}

TEST_P(ColumnStrips, GroupNorm) {
  for_each_variant(true, [](Inputs& inputs) {
    check_forward(inputs);
    check_backward(inputs);
  });
}

}  // namespace
}  // namespace normcore::kernels::testing
