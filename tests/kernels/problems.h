// Problems for the tests of plans.
#pragma once

#include <cstdint>
#include <set>
#include <sstream>
#include <string>

#include "norm_case.h"
#include "normcore/kernels/plan.h"

namespace normcore::kernels::testing {

inline std::string to_string(const Problem& p) {
  std::ostringstream text;
  text << "{" << p.extent.n << ", " << p.extent.c << ", " << p.extent.s << "} " << name_of(p.layout)
       << " " << name_of(p.dtype) << " groups=" << p.num_groups
       << " mask=" << static_cast<int>(p.mask) << " pass=" << static_cast<int>(p.pass);
  return text.str();
}

inline constexpr Pass kAllPasses[] = {Pass::kForward, Pass::kInference, Pass::kBackward,
                                      Pass::kDoubleBackward};

// Calls body(problem) for some thousand problems, tiny to beyond 2^31 elements.
template <class Body>
void for_each_problem(Body body) {
  struct Channels {
    std::int64_t c, groups;  // with some of the channels, where c divides
  };
  constexpr Channels kChannels[] = {{1, 1},    {3, 1},     {64, 32}, {65, 5},
                                    {320, 32}, {2048, 32}, {5000, 8}};
  for (const std::int64_t n : {1, 2, 7, 64, 65, 1000, 4096, 4097, 70000}) {
    for (const auto& [c, groups] : kChannels) {
      for (const std::int64_t s : {1, 2, 4, 5, 7, 64, 65, 1000, 4096, 4097, 70000}) {
        for (const Layout layout : kBothLayouts) {
          for (const std::int64_t num_groups : std::set<std::int64_t>{0, 1, groups, c}) {
            for (const Pass pass : kAllPasses) {
              if (num_groups != 0 && pass == Pass::kInference) continue;
              Problem problem;
              problem.extent = {n, c, s};
              problem.layout = layout;
              problem.num_groups = num_groups;
              problem.pass = pass;
              problem.mask = static_cast<MaskKind>((n + s) % 3);
              problem.dtype = kAllDTypes[(n + c) % 4];
              problem.affine_per_sample = num_groups != 0 && (c + s) % 2 == 1;
              body(problem);
            }
          }
        }
      }
    }
  }
}

}  // namespace normcore::kernels::testing
