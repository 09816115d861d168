#include "normcore/kernels/moments.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "norm_checks.h"
#include "positions.h"

namespace normcore::kernels::testing {
namespace {

Moments moments_of(const std::vector<double>& values, double pivot) {
  double sum = 0.0, square_sum = 0.0;
  for (const double value : values) {
    sum += value - pivot;
    square_sum += (value - pivot) * (value - pivot);
  }
  return Moments::from_shifted_sums(static_cast<double>(values.size()), pivot, sum, square_sum);
}

TEST(Moments, OfShiftedSums) {
  for (const double pivot : {0.0, 2.5, 4.0}) {
    const Moments m = moments_of({1.0, 2.0, 3.0, 4.0}, pivot);
    EXPECT_EQ(m.count, 4.0);
    EXPECT_DOUBLE_EQ(m.mean, 2.5);
    EXPECT_DOUBLE_EQ(m.m2, 5.0);
    EXPECT_DOUBLE_EQ(m.variance(), 1.25);
  }
}

TEST(Moments, MergeIsTheMomentsOfTheUnion) {
  Moments merged = moments_of({1.0, 7.0, -2.0}, 1.0);
  merged.merge(moments_of({10.0, 11.0}, 10.0));
  const Moments whole = moments_of({1.0, 7.0, -2.0, 10.0, 11.0}, 5.0);
  EXPECT_EQ(merged.count, whole.count);
  EXPECT_DOUBLE_EQ(merged.mean, whole.mean);
  EXPECT_DOUBLE_EQ(merged.m2, whole.m2);
}

TEST(Moments, EmptySetIsNeutral) {
  const Moments m = moments_of({1.0, 2.0}, 1.0);
  Moments left = m, right;
  left.merge({});
  right.merge(m);
  for (const Moments& merged : {left, right}) {
    EXPECT_EQ(merged.count, m.count);
    EXPECT_EQ(merged.mean, m.mean);
    EXPECT_EQ(merged.m2, m.m2);
  }
  EXPECT_TRUE(std::isnan(Moments{}.variance()));
  EXPECT_EQ(Moments::from_shifted_sums(0.0, 3.0, 0.0, 0.0).count, 0.0);
}

TEST(Moments, RoundingNeverMakesTheVarianceNegative) {
  EXPECT_EQ(Moments::from_shifted_sums(3.0, 0.0, 3.0, 2.999999).m2, 0.0);
}

// Saved statistics of long slices. The chunks' errors are independent and merged in float64, so the
// mean is far better than one chunk's: 1e-7 of a standard deviation is more than ten times what is
// reached, and far less than float32 merging (6e-5 at mean/std = 1e2) or a float32 mean (2^-24
// mean/std) would give. rstd is less exact where x lies on a coarse grid, as it does far from 0:
// the squares of its multiples round with a bias.
TEST(Moments, OfLongSlicesWithLargeMeans) {
  for (const Layout layout : kBothLayouts) {
    for (const std::int64_t num_groups : {0, 1}) {
      for (const double mean : {0.0, 1e2, 1e4, 1e6}) {
        NormCase c;
        c.extent = {1, 2, 300007};
        c.layout = layout;
        c.num_groups = num_groups;
        c.mean = mean;
        c.eps = 0.0;
        const Inputs inputs(c);
        const Statistics expected = batch_statistics(inputs, false);
        const Outputs actual = run_forward(inputs, other_runner());
        for (std::size_t i = 0; i < expected.mean.size(); ++i) {
          const auto slice = static_cast<std::int64_t>(i);
          EXPECT_NEAR(find(actual, "mean").get(slice), expected.mean[i], 1e-7 / expected.rstd[i])
              << to_string(c);
          EXPECT_NEAR(find(actual, "rstd").get(slice) / expected.rstd[i], 1.0, 0x1p-20)
              << to_string(c);
        }
      }
    }
  }
}

// A value far from all others, anywhere in the first chunk: sums are taken relative to a pivot from
// the chunk's first eighth, which costs at most a factor 9 of a sum's error in the variance.
TEST(Moments, OfDataWithAnOutlier) {
  for (const Layout layout : kBothLayouts) {
    for (const std::int64_t position : {0, 1, 31, 500, 511, 512, 513, 3000, 4095, 4999}) {
      NormCase c;
      c.extent = {1, 1, 5000};
      c.layout = layout;
      Inputs inputs(c);
      inputs.x.set(position, 1e6);
      const Statistics expected = batch_statistics(inputs, false);
      const Outputs actual = run_forward(inputs);
      const double bound = 0.5 * 9.0 * sum_error(c.x, 5000.0);
      EXPECT_NEAR(find(actual, "rstd").get(0) / expected.rstd[0], 1.0, bound)
          << "at " << position << " " << name_of(layout);
      EXPECT_NEAR(find(actual, "mean").get(0), expected.mean[0], bound / expected.rstd[0])
          << "at " << position << " " << name_of(layout);
    }
  }
}

// Every slice of a tensor has its own offset, so that a pivot of a neighbour would be of no use.
TEST(Moments, OfSlicesWithDifferentOffsets) {
  for (const Layout layout : kBothLayouts) {
    for (const std::int64_t num_groups : {0, 3}) {
      for (const Extent extent : {Extent{3, 6, 7}, Extent{2, 6, 4100}, Extent{150, 6, 1}}) {
        NormCase c;
        c.extent = extent;
        c.layout = layout;
        c.num_groups = num_groups;
        Inputs inputs(c);
        for_each_position(extent, [&](std::int64_t n, std::int64_t channel, std::int64_t s) {
          const std::int64_t i = index_of(extent, layout, n, channel, s);
          const std::int64_t slice = slice_of(extent, num_groups, n, channel);
          inputs.x.set(i, inputs.x.get(i) + 1e3 * static_cast<double>(slice * slice));
        });
        check_forward(inputs);
        check_backward(inputs);
      }
    }
  }
}

}  // namespace
}  // namespace normcore::kernels::testing
