// Parameterised by an instruction set: the kernels run on that one. Every set that they are compiled
// for and that this CPU has, the baseline included.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <string>

// clang-format off: before Highway
#include "cpu/targets.h"
// clang-format on
#include <hwy/highway.h>

namespace normcore::kernels::testing {

class TargetTest : public ::testing::TestWithParam<std::int64_t> {
 protected:
  void SetUp() override { choose(GetParam()); }
  void TearDown() override { choose(0); }

 private:
  static void choose(std::int64_t target) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};

inline auto all_targets() { return ::testing::ValuesIn(hwy::SupportedAndGeneratedTargets()); }

inline std::string name_of_target(const ::testing::TestParamInfo<std::int64_t>& parameter) {
  return hwy::TargetName(parameter.param);
}

}  // namespace normcore::kernels::testing
