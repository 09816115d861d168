// Count, mean and centred sum of squares of a set of values, merged by Chan's formula in float64:
//   n = na + nb,  d = mean_b - mean_a,  mean = mean_a + d * nb / n,
//   m2 = m2_a + m2_b + d^2 * na * nb / n
// Merging is exact enough in any order, but not associative in floating point: callers merge in a
// fixed order. An empty set is {0, 0, 0}. Source: Chan, Golub and LeVeque 1983.
#pragma once

#include "normcore/kernels/host_device.h"

namespace normcore::kernels {

struct Moments {
  double count = 0.0, mean = 0.0, m2 = 0.0;

  // The values of a chunk, given sum(x - pivot) and sum((x - pivot)^2).
  NORMCORE_HOST_DEVICE static Moments from_shifted_sums(double count, double pivot, double sum,
                                                        double sum_of_squares) {
    if (count == 0.0) return {};
    const double m2 = sum_of_squares - sum * sum / count;
    return {count, pivot + sum / count, m2 < 0.0 ? 0.0 : m2};
  }

  NORMCORE_HOST_DEVICE void merge(const Moments& other) {
    if (other.count == 0.0) return;
    if (count == 0.0) {
      *this = other;
      return;
    }
    const double total = count + other.count;
    const double delta = other.mean - mean;
    const double weight = other.count / total;
    mean += delta * weight;
    m2 += other.m2 + delta * delta * (count * weight);
    count = total;
  }

  NORMCORE_HOST_DEVICE double variance() const {
    return m2 / count;
  }  // biased; NaN for an empty set
};

}  // namespace normcore::kernels
