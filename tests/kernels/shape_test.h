// Parameterised by a shape of tests/shapes/shapes.txt and a layout; for_each_variant() runs a check on
// every dtype, epilogue, mask and parameter that variants() makes of it.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <tuple>

#include "norm_checks.h"

namespace normcore::kernels::testing {

class ShapeTest : public ::testing::TestWithParam<std::tuple<Shape, Layout>> {
 protected:
  template <class Check>
  void for_each_variant(bool group_norm, Check check) {
    const auto& [shape, layout] = GetParam();
    for (const DType x : kAllDTypes) {
      for (const NormCase& c : variants(shape, layout, x, group_norm)) {
        Inputs inputs(c);
        check(inputs);
      }
    }
  }
};

inline auto all_shapes() {
  return ::testing::Combine(::testing::ValuesIn(shapes()), ::testing::ValuesIn(kBothLayouts));
}

inline std::string name_of_shape(const ::testing::TestParamInfo<ShapeTest::ParamType>& parameter) {
  return std::get<0>(parameter.param).name + "_" + name_of(std::get<1>(parameter.param));
}

}  // namespace normcore::kernels::testing
