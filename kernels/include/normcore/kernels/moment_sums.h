// Moments of a set of values as numbers that add up: the moments of several sets together follow
// from the sums of theirs, element by element, in any order.
//   weight    how much the set counts: its number of values, or 1
//   count     its number of values
//   sum       weight * mean
//   square    weight * (mean^2 + variance)
// sum and square are the textbook sums of x and x^2, whose difference cancels for a large mean. So
// each is kept to 80 bits or more, as three numbers: multiples of 2^40k below 2^40(k+1) in absolute
// value for three neighbouring k, the one of k at index k mod 3. Such numbers of up to 2^13 sets
// add up in float64 without a rounding: the result has the same bits in any order. Where sums of
// sets differ by more than 2^40 they may share an index, and 2^-80 of the largest may be lost,
// which shows (and depends on the order) only if the largest cancel. The variance is as good as
// means in float64 allow: a set's mean of k standard deviations has an error of k 2^-53 of one.
// Means above 1e154, whose squares float64 does not hold, give NaN. Source: binned sums of Demmel
// and Nguyen 2013, here with a ring of three bins.
#pragma once

#include <cmath>
#include <limits>

#include "normcore/kernels/host_device.h"
#include "normcore/kernels/moments.h"

namespace normcore::kernels {

// A number as the unevaluated sum of two.
struct DoubleDouble {
  double high = 0.0, low = 0.0;

  NORMCORE_HOST_DEVICE static DoubleDouble sum(double a, double b) {
    const double high = a + b, of_b = high - a;
    return {high, (a - (high - of_b)) + (b - of_b)};
  }
  NORMCORE_HOST_DEVICE static DoubleDouble product(double a, double b) {
    const double high = a * b;
    return {high, std::fma(a, b, -high)};
  }
  NORMCORE_HOST_DEVICE DoubleDouble plus(double value) const {
    const DoubleDouble total = sum(high, value);
    return sum(total.high, total.low + low);
  }
  NORMCORE_HOST_DEVICE DoubleDouble times(double value) const {
    const DoubleDouble total = product(high, value);
    return sum(total.high, std::fma(low, value, total.low));
  }
};

// The three numbers.
struct ExactSum {
  static constexpr int kParts = 3, kBits = 40;
  double part[kParts] = {};

  NORMCORE_HOST_DEVICE static ExactSum of(const DoubleDouble& value) {
    ExactSum out;
    if (value.high == 0.0) return out;
    if (!(std::fabs(value.high) < std::numeric_limits<double>::infinity())) {
      out.part[0] = value.high;
      return out;
    }
    const int exponent = std::ilogb(value.high);
    int bin = exponent >= 0 ? exponent / kBits : -((kBits - 1 - exponent) / kBits);
    DoubleDouble rest = value;
    for (int i = 0; i < kParts; ++i, --bin) {
      const double part = std::scalbn(std::rint(std::scalbn(rest.high, -bin * kBits)), bin * kBits);
      // No array is indexed by a variable: on a device that would be memory instead of registers.
      const int index = ((bin % kParts) + kParts) % kParts;
      out.part[0] = index == 0 ? part : out.part[0];
      out.part[1] = index == 1 ? part : out.part[1];
      out.part[2] = index == 2 ? part : out.part[2];
      rest = DoubleDouble::sum(rest.high - part, rest.low);
    }
    return out;
  }

  NORMCORE_HOST_DEVICE DoubleDouble value() const {
    return DoubleDouble::sum(part[0], part[1]).plus(part[2]);
  }
};

struct MomentSums {
  double weight = 0.0, count = 0.0;
  ExactSum sum, square;

  // `by_set`: every set counts alike, and one without a value makes the result empty.
  NORMCORE_HOST_DEVICE static MomentSums of(const Moments& set, bool by_set) {
    MomentSums out;
    out.count = set.count;
    out.weight = by_set ? 1.0 : set.count;
    if (set.count == 0.0) {
      if (by_set) out.weight = std::numeric_limits<double>::quiet_NaN();
      return out;
    }
    out.sum = ExactSum::of(DoubleDouble::product(set.mean, out.weight));
    const DoubleDouble squares = DoubleDouble::product(set.mean, set.mean).times(out.weight);
    out.square = ExactSum::of(squares.plus(by_set ? set.variance() : set.m2));
    return out;
  }

  NORMCORE_HOST_DEVICE bool is_empty() const { return !(weight > 0.0); }

  // Mean and biased variance are those of the sets together; `count` is the weight.
  NORMCORE_HOST_DEVICE Moments moments() const {
    if (is_empty()) return {};
    const DoubleDouble total = sum.value(), squares = square.value();
    const double mean = total.high / weight;
    const double rest = (std::fma(-mean, weight, total.high) + total.low) / weight;
    DoubleDouble of_mean = DoubleDouble::product(mean, mean);
    of_mean.low = std::fma(2.0 * mean, rest, of_mean.low);
    of_mean = of_mean.times(weight);
    const double m2 = (squares.high - of_mean.high) + (squares.low - of_mean.low);
    return {weight, mean + rest, m2 < 0.0 ? 0.0 : m2};
  }
};
static_assert(sizeof(MomentSums) == 8 * sizeof(double));

// What follows from the sums of all sets for the set of one rank (sync.h).
struct SyncStatistics {
  double mean, var, share;
  Moments
      batch;  // of all values, for running statistics; empty: none, or by rank not of every rank

  NORMCORE_HOST_DEVICE static SyncStatistics of(const MomentSums& own, const MomentSums& total,
                                                bool by_rank) {
    constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
    if (total.is_empty()) return {kNaN, kNaN, 0.0, {}};
    const Moments moments = total.moments();
    const double var = moments.variance();
    if (!by_rank) return {moments.mean, var, 1.0 / total.weight, moments};
    return {moments.mean,
            var,
            1.0 / (total.weight * own.count),
            {total.count, moments.mean, var * total.count}};
  }
};

}  // namespace normcore::kernels
