// Moments of values whose squares float32 cannot sum although their variance is representable.
#pragma once

#include <cmath>

#include "normcore/kernels/moments.h"

namespace normcore::kernels {

// The given moments if they are finite; otherwise those of the values in float64, in two passes, unless
// a value is not finite itself. visit(f) calls f(value) for each value that counts.
template <class Visit>
Moments finite_moments(const Moments& moments, Visit&& visit) {
  if (std::isfinite(moments.mean) && std::isfinite(moments.m2)) return moments;
  Moments wide;
  visit([&](double value) {
    wide.count += 1.0;
    wide.mean += value;
  });
  wide.mean /= wide.count;
  if (!std::isfinite(wide.mean)) return moments;
  visit([&](double value) { wide.m2 += (value - wide.mean) * (value - wide.mean); });
  return std::isfinite(wide.m2) ? wide : moments;
}

}  // namespace normcore::kernels
