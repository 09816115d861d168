// Parameterised by a shape of tests/shapes/shapes.txt and a layout; for_each_variant() runs a check on
// every dtype, and on every epilogue, mask and parameter that variants() makes of it, or on one of them
// that differs by shape, layout and dtype.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "norm_checks.h"
#include "runner.h"

namespace normcore::kernels::testing {

class ShapeTest : public ::testing::TestWithParam<std::tuple<Shape, Layout>> {
 protected:
  // All variants of tensors of up to so many values; fewer of slow runners.
  explicit ShapeTest(std::int64_t all_up_to = std::numeric_limits<std::int64_t>::max(),
                     std::int64_t slow_up_to = 128)
      : all_up_to_(runners_are_slow() ? slow_up_to : all_up_to) {}

  template <class Check>
  void for_each_variant(bool group_norm, Check check) {
    const auto& [shape, layout] = GetParam();
    for (const DType x : kAllDTypes) {
      const std::vector<NormCase> cases = variants(shape, layout, x, group_norm);
      const std::size_t number = index_of_shape() + 2 * static_cast<std::size_t>(x) +
                                 (layout == Layout::kNCS ? 0 : 5) + (group_norm ? 3 : 0);
      for (std::size_t i = 0; i < cases.size(); ++i) {
        if (shape.extent.numel() > all_up_to_ && i != number % cases.size()) continue;
        Inputs inputs(cases[i]);
        check(inputs);
      }
    }
  }

 private:
  // In the list of shapes, or behind it.
  static std::size_t index_of_shape() {
    const std::string& name = std::get<0>(GetParam()).name;
    const auto found = std::find_if(shapes().begin(), shapes().end(),
                                    [&](const Shape& shape) { return shape.name == name; });
    return static_cast<std::size_t>(found - shapes().begin());
  }

  std::int64_t all_up_to_;
};

inline auto all_shapes() {
  return ::testing::Combine(::testing::ValuesIn(shapes()), ::testing::ValuesIn(kBothLayouts));
}

inline std::string name_of_shape(const ::testing::TestParamInfo<ShapeTest::ParamType>& parameter) {
  return std::get<0>(parameter.param).name + "_" + name_of(std::get<1>(parameter.param));
}

}  // namespace normcore::kernels::testing
