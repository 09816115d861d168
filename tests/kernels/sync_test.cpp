// Slices that ranks share: the parts of a tensor, each on a rank of its own, give together what the
// whole tensor gives on one.
#include "normcore/kernels/sync.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "norm_checks.h"
#include "positions.h"
#include "shape_test.h"

namespace normcore::kernels::testing {
namespace {

// Part of a tensor along n or s, on a rank, with the parameters of the whole.
class Part {
 public:
  Part(const Inputs& whole, bool along_n, std::int64_t first, std::int64_t size)
      : whole_(whole.norm_case.extent),
        along_n_(along_n),
        first_(first),
        inputs_(case_of(whole.norm_case, along_n, size)) {
    for (std::int64_t i = 0; i < inputs_.scale.count(); ++i) {
      inputs_.scale.set(i, whole.scale.get(i));
    }
    for (std::int64_t i = 0; i < inputs_.bias.count(); ++i) inputs_.bias.set(i, whole.bias.get(i));
    for_each([&](std::int64_t own, std::int64_t at) {
      inputs_.x.set(own, whole.x.get(at));
      inputs_.grad_y.set(own, whole.grad_y.get(at));
      if (inputs_.residual.count() != 0) inputs_.residual.set(own, whole.residual.get(at));
    });
    const Extent& e = extent();
    for_each_position(e, [&](std::int64_t n, std::int64_t c, std::int64_t s) {
      const std::int64_t n_at = along_n_ ? n + first_ : n, s_at = along_n_ ? s : s + first_;
      switch (inputs_.norm_case.mask) {
        case MaskKind::kNone:
          break;
        case MaskKind::kRow:
          inputs_.mask.data()[n * e.s + s] = whole.mask.data()[n_at * whole_.s + s_at];
          break;
        case MaskKind::kElement:
          inputs_.mask.data()[index_of(e, layout(), n, c, s)] =
              whole.mask.data()[index_of(whole_, layout(), n_at, c, s_at)];
          break;
      }
    });
  }

  const Inputs& inputs() const { return inputs_; }

  // Calls f(index here, index in the whole) for every element.
  template <class F>
  void for_each(F f) const {
    for_each_position(extent(), [&](std::int64_t n, std::int64_t c, std::int64_t s) {
      f(index_of(extent(), layout(), n, c, s),
        index_of(whole_, layout(), along_n_ ? n + first_ : n, c, along_n_ ? s : s + first_));
    });
  }

 private:
  static NormCase case_of(NormCase c, bool along_n, std::int64_t size) {
    (along_n ? c.extent.n : c.extent.s) = size;
    return c;
  }
  const Extent& extent() const { return inputs_.norm_case.extent; }
  Layout layout() const { return inputs_.norm_case.layout; }

  Extent whole_;
  bool along_n_;
  std::int64_t first_;
  Inputs inputs_;
};

// Three ranks: a part, nothing, and the rest.
std::vector<Part> split(const Inputs& whole) {
  const auto& [n, c, s] = whole.norm_case.extent;
  const bool along_n = whole.norm_case.num_groups == 0 && n > 1;
  const std::int64_t size = along_n ? n : s, first = (size + 2) / 3;
  std::vector<Part> parts;
  parts.emplace_back(whole, along_n, 0, first);
  parts.emplace_back(whole, along_n, first, 0);
  parts.emplace_back(whole, along_n, first, size - first);
  return parts;
}

template <class T>
std::vector<T> sum_over_ranks(const std::vector<std::vector<T>>& ranks) {
  constexpr std::size_t kNumbers = sizeof(T) / sizeof(double);
  std::vector<T> total(ranks.front().size());
  auto* const out = reinterpret_cast<double*>(total.data());
  for (const auto& rank : ranks) {
    const auto* const in = reinterpret_cast<const double*>(rank.data());
    for (std::size_t i = 0; i < kNumbers * total.size(); ++i) out[i] += in[i];
  }
  return total;
}

// The passes over all parts, by one runner.
class SyncedNorm {
 public:
  SyncedNorm(const Inputs& whole, const Runner& runner)
      : whole_(whole), parts_(split(whole)), runner_(runner), slices_(norm_case().slice_count()) {}

  // Outputs as of run_forward(); none if the runner cannot run a call.
  Outputs forward() {
    const NormCase& c = norm_case();
    const auto slices = static_cast<std::size_t>(slices_);
    std::vector<std::vector<MomentSums>> moments;
    for (const Part& part : parts_) {
      moments.emplace_back(slices);
      SyncMomentsArgs args;
      args.input = part.inputs().norm_input();
      args.num_groups = c.num_groups;
      args.sums = moments.back().data();
      if (!runner_.run(args)) return {};
    }
    const std::vector<MomentSums> total = sum_over_ranks(moments);
    Outputs out;
    out.push_back({"y", Tensor(c.y, c.extent.numel(), c.placement)});
    out.push_back({"mean", Tensor(DType::kFloat64, slices_, c.placement)});
    out.push_back({"rstd", Tensor(compute_type(c.x), slices_, c.placement)});
    if (c.num_groups == 0) {
      for (const auto& [name, old] : {std::pair("running_mean", &whole_.running_mean),
                                      std::pair("running_var", &whole_.running_var)}) {
        out.push_back({name, Tensor(c.running, old->count(), c.placement)});
        for (std::int64_t i = 0; i < old->count(); ++i) out.back().tensor.set(i, old->get(i));
      }
    }
    std::int64_t counter = 3;
    const Tensor var(DType::kFloat64, slices_, c.placement);
    share_ = Tensor(DType::kFloat64, slices_, c.placement);
    SyncStatisticsArgs args;
    args.own = moments.front().data();
    args.total = total.data();
    args.slices = slices_;
    if (c.num_groups == 0) {
      args.running = {
          out[3].tensor.view(), out[4].tensor.view(), &counter, 0.3, c.cumulative, c.unbiased};
    }
    args.mean = static_cast<double*>(out[1].tensor.data());
    args.var = static_cast<double*>(var.data());
    args.share = static_cast<double*>(share_.data());
    runner_.run(args);
    const bool counts = c.num_groups == 0 && std::any_of(total.begin(), total.end(),
                                                         [](auto& t) { return t.count != 0.0; });
    EXPECT_EQ(counter, counts ? 4 : 3);
    for (const Part& part : parts_) {
      const NormCase& p = part.inputs().norm_case;
      const Tensor y(c.y, p.extent.numel(), c.placement);
      SyncApplyArgs apply;
      apply.input = part.inputs().norm_input();
      apply.num_groups = c.num_groups;
      apply.mean = out[1].tensor.view();
      apply.var = var.view();
      apply.y = y.view();
      apply.rstd = out[2].tensor.view();
      if (!runner_.run(apply)) return {};
      EXPECT_TRUE(y.buffer().intact() && out[2].tensor.buffer().intact());
      part.for_each([&](auto own, auto at) { out[0].tensor.set(at, y.get(own)); });
    }
    EXPECT_TRUE(var.buffer().intact() && share_.buffer().intact());
    return out;
  }

  // Outputs as of run_backward(), with the shares of forward().
  Outputs backward(const Statistics& statistics) {
    const NormCase& c = norm_case();
    const DType f64 = DType::kFloat64;
    Tensor mean(f64, slices_, c.placement), rstd(compute_type(c.x), slices_, c.placement);
    for (std::int64_t i = 0; i < slices_; ++i) {
      mean.set(i, statistics.mean[static_cast<std::size_t>(i)]);
      rstd.set(i, statistics.rstd[static_cast<std::size_t>(i)]);
    }
    std::vector<double> scale(static_cast<std::size_t>(c.affine_count())), bias(scale);
    std::vector<std::vector<GradientSums>> sums;
    for (const Part& part : parts_) {
      sums.emplace_back(static_cast<std::size_t>(slices_));
      const Tensor grad_scale(f64, c.affine_count(), c.placement);
      const Tensor grad_bias(f64, c.affine_count(), c.placement);
      SyncGradientSumsArgs args;
      args.input = part.inputs().norm_input();
      args.num_groups = c.num_groups;
      args.grad_y = part.inputs().grad_y.view();
      args.mean = mean.view();
      args.rstd = rstd.view();
      args.sums = sums.back().data();
      args.grad_scale = grad_scale.view();
      args.grad_bias = grad_bias.view();
      if (!runner_.run(args)) return {};
      for (std::size_t i = 0; i < scale.size(); ++i) {
        scale[i] += grad_scale.get(static_cast<std::int64_t>(i));
        bias[i] += grad_bias.get(static_cast<std::int64_t>(i));
      }
    }
    const std::vector<GradientSums> total = sum_over_ranks(sums);
    Outputs out;
    const auto add = [&](const char* name, DType dtype, std::int64_t count) -> Tensor& {
      out.push_back({name, Tensor(dtype, count, c.placement)});
      return out.back().tensor;
    };
    add("grad_x", c.x, c.extent.numel());
    const bool has_residual = c.activation != Activation::kNone;
    Tensor& of_scale = add("grad_scale", c.y, c.affine_count());
    for (std::size_t i = 0; i < scale.size(); ++i) {
      of_scale.set(static_cast<std::int64_t>(i), scale[i]);
    }
    Tensor& of_bias = add("grad_bias", c.y, c.affine_count());
    for (std::size_t i = 0; i < bias.size(); ++i)
      of_bias.set(static_cast<std::int64_t>(i), bias[i]);
    if (has_residual) add("grad_residual", c.y, c.extent.numel());
    for (const Part& part : parts_) {
      const std::int64_t size = part.inputs().norm_case.extent.numel();
      const Tensor grad_x(c.x, size, c.placement), grad_residual(c.y, size, c.placement);
      SyncGradientArgs args;
      args.input = part.inputs().norm_input();
      args.num_groups = c.num_groups;
      args.grad_y = part.inputs().grad_y.view();
      args.mean = mean.view();
      args.rstd = rstd.view();
      args.sums = total.data();
      args.share = static_cast<const double*>(share_.data());
      args.grad_x = grad_x.view();
      if (has_residual) args.grad_residual = grad_residual.view();
      if (!runner_.run(args)) return {};
      EXPECT_TRUE(grad_x.buffer().intact() && grad_residual.buffer().intact());
      part.for_each([&](auto own, auto at) {
        out[0].tensor.set(at, grad_x.get(own));
        if (has_residual) out[3].tensor.set(at, grad_residual.get(own));
      });
    }
    return out;
  }

 private:
  const NormCase& norm_case() const { return whole_.norm_case; }

  const Inputs& whole_;
  std::vector<Part> parts_;
  const Runner& runner_;
  std::int64_t slices_;
  Tensor share_;
};

void check_sync(Inputs& inputs) {
  const NormCase& c = inputs.norm_case;
  SCOPED_TRACE("synchronized " + to_string(c));
  inputs.norm_case.cumulative = false;
  const Statistics statistics = batch_statistics(inputs, true);
  zero_undetermined_gradients(inputs, statistics);
  std::vector<Outputs> forward, backward;
  // The first two ways run every call; others are of paths that only reduce, or only apply.
  const std::size_t ways = std::min<std::size_t>(all_runners().size(), 2);
  for (std::size_t i = 0; i < ways; ++i) {
    const EqualRunners& runners = all_runners()[i];
    SCOPED_TRACE(runners.front()->name());
    SyncedNorm norm(inputs, *runners.front());
    Outputs y = norm.forward();
    ASSERT_FALSE(y.empty());
    Outputs gradients = norm.backward(statistics);
    ASSERT_FALSE(gradients.empty());
    SyncedNorm other(inputs, *runners.back());
    expect_same_bits(runners.back()->name(), other.forward(), y);
    expect_same_bits(runners.back()->name(), other.backward(statistics), gradients);
    forward.push_back(std::move(y));
    backward.push_back(std::move(gradients));
  }
  expect_forward(inputs, forward);
  // The gradients of scale and bias of parts are rounded by themselves, in float64.
  expect_backward(inputs, statistics, {}, backward);
}

class SyncShapes : public ShapeTest {
 protected:
  SyncShapes() : ShapeTest(4096) {}
};

// Whatever the size, the passes are those of other tests: these are about what is between them.
std::vector<Shape> small_shapes() {
  const std::int64_t largest = runners_are_slow() ? 2600 : 20000;
  std::vector<Shape> chosen;
  std::copy_if(shapes().begin(), shapes().end(), std::back_inserter(chosen),
               [&](const Shape& shape) {
                 const std::int64_t size = shape.extent.numel();
                 return size != 0 && size <= largest;
               });
  return chosen;
}

INSTANTIATE_TEST_SUITE_P(Small, SyncShapes,
                         ::testing::Combine(::testing::ValuesIn(small_shapes()),
                                            ::testing::ValuesIn(kBothLayouts)),
                         name_of_shape);

TEST_P(SyncShapes, PartsTogetherAreTheWhole) {
  for_each_variant(false, check_sync);
  for_each_variant(true, check_sync);
}

// Moments of sets of random sizes around means of very different magnitudes.
std::vector<Moments> random_sets(std::mt19937_64& random, int count, double largest_mean) {
  std::normal_distribution<double> normal;
  std::vector<Moments> sets;
  for (int i = 0; i < count; ++i) {
    const auto values = static_cast<double>(random() % 1000);
    const double mean = normal(random) * std::pow(largest_mean, normal(random) / 3.0);
    sets.push_back(values == 0.0 ? Moments{}
                                 : Moments{values, mean, values * normal(random) * normal(random)});
    sets.back().m2 = std::abs(sets.back().m2);
  }
  return sets;
}

MomentSums sum_of(const std::vector<Moments>& sets, bool by_set = false) {
  std::vector<std::vector<MomentSums>> sums;
  for (const Moments& set : sets) sums.push_back({MomentSums::of(set, by_set)});
  return sum_over_ranks(sums).front();
}

bool have_same_bits(const MomentSums& a, const MomentSums& b) {
  return std::equal(a.sum.part, a.sum.part + ExactSum::kParts, b.sum.part) &&
         std::equal(a.square.part, a.square.part + ExactSum::kParts, b.square.part) &&
         a.count == b.count && a.weight == b.weight;
}

TEST(MomentSums, HaveTheSameBitsInAnyOrder) {
  std::mt19937_64 random(1);
  for (const double largest_mean : {1.0, 1e3, 1e9}) {
    for (int round = 0; round < 50; ++round) {
      auto sets = random_sets(random, 100, largest_mean);
      const MomentSums expected = sum_of(sets);
      for (int i = 0; i < 5; ++i) {
        std::shuffle(sets.begin(), sets.end(), random);
        EXPECT_TRUE(have_same_bits(sum_of(sets), expected));
      }
      // The sums of sums as well.
      const std::vector<Moments> first(sets.begin(), sets.begin() + 40),
          rest(sets.begin() + 40, sets.end());
      EXPECT_TRUE(have_same_bits(
          sum_over_ranks<MomentSums>({{sum_of(rest)}, {sum_of(first)}}).front(), expected));
    }
  }
}

TEST(MomentSums, AreThoseOfChansFormula) {
  std::mt19937_64 random(2);
  for (const double largest_mean : {1.0, 1e3, 1e6}) {
    for (int round = 0; round < 100; ++round) {
      const auto sets = random_sets(random, 20, largest_mean);
      Moments expected;
      for (const Moments& set : sets) expected.merge(set);
      const Moments actual = sum_of(sets).moments();
      EXPECT_EQ(actual.count, expected.count);
      EXPECT_NEAR(actual.mean, expected.mean, 1e-14 * std::abs(largest_mean) * 100);
      EXPECT_NEAR(actual.m2, expected.m2, 1e-12 * expected.m2);
    }
  }
}

// Sets of the same mean: the variance between them is 0, whatever the mean.
TEST(MomentSums, KeepTheVarianceBesideLargeMeans) {
  for (const double mean : {1.0, -1e3, 1e6 + 0.1, 1e9 + 0.3}) {
    const Moments sum =
        sum_of({{1000.0, mean, 500.0}, {7.0, mean, 3.5}, {123456.0, mean, 61728.0}}).moments();
    EXPECT_EQ(sum.mean, mean);
    EXPECT_NEAR(sum.variance(), 0.5, 1e-6 * std::pow(mean / 1e9, 2.0) + 1e-15) << mean;
    EXPECT_LE(sum_of({{3.0, mean, 0.0}, {5.0, mean, 0.0}}).moments().m2, 1e-23 * mean * mean);
  }
}

TEST(MomentSums, OfConstantsHaveNoVariance) {
  for (const float value : {0.1f, 1.0f, -1234.5f, 3e4f, 1e-20f, 1e19f}) {
    const double mean = value;
    const Moments sum = sum_of({{1.0, mean, 0.0}, {4096.0, mean, 0.0}, {1e7, mean, 0.0}}).moments();
    EXPECT_EQ(sum.mean, mean);
    EXPECT_EQ(sum.m2, 0.0) << value;
  }
}

// Flax: ranks 0, 2 and 10 have the means 1 and 10, whatever their sizes.
// Sums that share an index: of the smaller one 2^-80 of the larger ones may be lost, and shows where
// those cancel.
TEST(MomentSums, OfVeryDifferentMagnitudes) {
  for (const double large : {1.5, 1e10, 0x1p40}) {
    for (const double small : {1.1 * 0x1p-20, 1.1 * 0x1p-40, 1.1 * 0x1p-70}) {
      std::vector<Moments> sets{{1.0, large, 0.0}, {1.0, large * small, 0.0}, {1.0, -large, 0.0}};
      for (int i = 0; i < 6; ++i) {
        EXPECT_NEAR(sum_of(sets).sum.value().high, large * small, 0x1p-79 * large);
        std::rotate(sets.begin(), sets.begin() + 1, sets.end());
        if (i == 2) std::swap(sets[0], sets[1]);
      }
    }
  }
}

TEST(MomentSums, BySetAreMeansOverSets) {
  const std::vector<Moments> sets{{2.0, 1.0, 2.0}, {1.0, 10.0, 0.0}};
  const MomentSums by_count = sum_of(sets), by_set = sum_of(sets, true);
  EXPECT_DOUBLE_EQ(by_count.moments().mean, 4.0);
  EXPECT_DOUBLE_EQ(by_count.moments().variance(), 56.0 / 3.0);
  EXPECT_DOUBLE_EQ(by_set.moments().mean, 5.5);
  EXPECT_DOUBLE_EQ(by_set.moments().variance(), 20.75);
  const auto own = MomentSums::of(sets.front(), true);
  EXPECT_DOUBLE_EQ(SyncStatistics::of(own, by_set, true).share, 0.25);
  EXPECT_DOUBLE_EQ(SyncStatistics::of(own, by_set, true).batch.count, 3.0);
}

TEST(MomentSums, EmptySets) {
  const std::vector<Moments> sets{{2.0, 1.0, 2.0}, {}};
  EXPECT_EQ(sum_of(sets).moments().mean, 1.0);
  EXPECT_TRUE(sum_of({{}, {}}).is_empty());
  EXPECT_TRUE(sum_of(sets, true).is_empty());
  const auto statistics = SyncStatistics::of({}, {}, false);
  EXPECT_TRUE(std::isnan(statistics.mean) && std::isnan(statistics.var));
  EXPECT_EQ(statistics.share, 0.0);
  EXPECT_EQ(statistics.batch.count, 0.0);
}

TEST(MomentSums, NaNAndInfinityStay) {
  for (const double value :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    const Moments sum = sum_of({{2.0, value, 1.0}, {3.0, 1.0, 1.0}}).moments();
    EXPECT_FALSE(std::isfinite(sum.mean));
    EXPECT_FALSE(std::isfinite(sum.m2));
  }
}

}  // namespace
}  // namespace normcore::kernels::testing
