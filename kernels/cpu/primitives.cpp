#include "cpu/primitives.h"

// clang-format off: before Highway
#include "cpu/targets.h"
// clang-format on
#include <hwy/highway.h>

#include <type_traits>

#include "cpu/primitives_export.h"
#include "normcore/kernels/plan.h"

namespace normcore::kernels {

template <class A>
Primitives<A> primitives() {
  Primitives<float> f;
  Primitives<double> d;
  add_forward_primitives(f, d);
  add_backward_primitives(f, d);
  add_double_backward_outputs(f, d);
  add_double_backward_sums(f, d);
  add_sample_double_backward(f, d);
  add_sample_primitives(f, d);
  if constexpr (std::is_same_v<A, double>) {
    return d;
  } else {
    return f;
  }
}

template Primitives<float> primitives<float>();
template Primitives<double> primitives<double>();

const char* simd_target() {
  // Targets are numbered so that better ones have lower bits.
  const auto supported = hwy::SupportedTargets() & HWY_TARGETS;
  return hwy::TargetName(supported & -supported);
}

}  // namespace normcore::kernels
