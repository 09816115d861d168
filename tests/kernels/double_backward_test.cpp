// The double backward passes of batch norm and group norm against the reference.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "norm_checks.h"
#include "positions.h"
#include "shape_test.h"

namespace normcore::kernels::testing {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

void check(const NormCase& c, bool from_batch = true, const WantedOfDoubleBackward& wanted = {}) {
  Inputs inputs(c);
  check_double_backward(inputs, Cotangents(c), from_batch, wanted);
}

class DoubleBackwardShapes : public ShapeTest {
 protected:
  DoubleBackwardShapes() : ShapeTest(400, 100) {}
};

INSTANTIATE_TEST_SUITE_P(All, DoubleBackwardShapes, all_shapes(), name_of_shape);

TEST_P(DoubleBackwardShapes, BatchNorm) {
  for_each_variant(
      false, [](Inputs& inputs) { check_double_backward(inputs, Cotangents(inputs.norm_case)); });
}

// For given statistics there is no mask.
TEST_P(DoubleBackwardShapes, BatchNormOfRunningStatistics) {
  for_each_variant(false, [](Inputs& inputs) {
    if (inputs.norm_case.mask == MaskKind::kNone) {
      check_double_backward(inputs, Cotangents(inputs.norm_case), false);
      return;
    }
    NormCase c = inputs.norm_case;
    c.garbage_under_mask = false;
    check(c, false);
  });
}

TEST_P(DoubleBackwardShapes, GroupNorm) {
  for_each_variant(
      true, [](Inputs& inputs) { check_double_backward(inputs, Cotangents(inputs.norm_case)); });
}

NormCase small_case(Layout layout, std::int64_t num_groups, DType x = DType::kFloat32) {
  NormCase c;
  c.extent = {4, 6, 37};
  c.layout = layout;
  c.num_groups = num_groups;
  c.x = c.y = x;
  return c;
}

// Calls body(case, from_batch) for batch norm with both kinds of statistics and group norm, in both
// layouts.
template <class Body>
void for_each_norm(Body body, DType x = DType::kFloat32) {
  for (const Layout layout : kBothLayouts) {
    body(small_case(layout, 0, x), true);
    body(small_case(layout, 0, x), false);
    body(small_case(layout, 3, x), true);
  }
}

// And for group norm of short slices in a row (CpuPath::kSample), which have loops of their own.
template <class Body>
void for_each_norm_and_short_slices(Body body, DType x = DType::kFloat32) {
  for_each_norm(body, x);
  for (const auto& [layout, positions] :
       {std::pair(Layout::kNCS, 4), std::pair(Layout::kNSC, 1), std::pair(Layout::kNCS, 8)}) {
    NormCase c = small_case(layout, 3, x);
    c.extent.s = positions;
    body(c, true);
  }
}

Statistics statistics_of(const Inputs& inputs, bool from_batch) {
  return from_batch ? batch_statistics(inputs, true) : running_statistics(inputs, true);
}

constexpr Activation kTwoActivations[] = {Activation::kNone, Activation::kSiLU};

TEST(DoubleBackward, GradientsNobodyAskedForChangeNothing) {
  for_each_norm_and_short_slices([](NormCase c, bool from_batch) {
    for (const Activation activation : kTwoActivations) {
      c.activation = activation;
      c.residual = DType::kFloat32;
      c.affine_per_sample = c.num_groups != 0 && activation == Activation::kSiLU;
      const Inputs inputs(c);
      const Cotangents cotangents(c);
      const Statistics statistics = statistics_of(inputs, from_batch);
      const Outputs all = run_double_backward(inputs, cotangents, statistics);
      for (int bits = 0; bits < 32; ++bits) {
        const auto bit = [&](int i) { return (bits >> i & 1) != 0; };
        const WantedOfDoubleBackward wanted{bit(0), {bit(1), bit(2), bit(3), bit(4)}};
        if ((bits & (bits - 1)) == 0 && bits != 0) check(c, from_batch, wanted);
        const Outputs some = run_double_backward(inputs, cotangents, statistics, wanted);
        EXPECT_EQ(some.size(),
                  static_cast<std::size_t>(std::popcount(static_cast<unsigned>(bits))));
        for (const Output& output : some) {
          EXPECT_TRUE(output.tensor.buffer().same_bytes(find(all, output.name).buffer()))
              << output.name << " with gradients " << bits << " of " << to_string(c);
        }
      }
    }
  });
}

TEST(DoubleBackward, AnyCotangentMayBeAbsent) {
  for_each_norm_and_short_slices([](NormCase c, bool from_batch) {
    for (const Activation activation : kAllActivations) {
      c.activation = activation;
      Inputs inputs(c);
      for (int bits = 0; bits < 16; ++bits) {
        SCOPED_TRACE("cotangents " + std::to_string(bits));
        Cotangents cotangents(c);
        if ((bits & 1) == 0) cotangents.x = Tensor();
        if ((bits & 2) == 0) cotangents.scale = Tensor();
        if ((bits & 4) == 0) cotangents.bias = Tensor();
        if ((bits & 8) == 0) cotangents.residual = Tensor();
        check_double_backward(inputs, cotangents, from_batch);
        if (bits != 0) continue;
        const Outputs out =
            run_double_backward(inputs, cotangents, statistics_of(inputs, from_batch));
        for (const Output& output : out) {
          for (const double value : output.tensor.values()) ASSERT_EQ(value, 0.0) << output.name;
        }
      }
    }
  });
}

TEST(DoubleBackward, TensorsOfAnyDType) {
  for (const DType x : kAllDTypes) {
    for (const DType first : kAllDTypes) {
      for (const DType second : kAllDTypes) {
        const bool has_float64 = first == DType::kFloat64 || second == DType::kFloat64;
        if (has_float64 && x != DType::kFloat64) continue;
        for_each_norm_and_short_slices(
            [&](NormCase c, bool from_batch) {
              c.extent.n = 2;
              if (c.extent.s > 19) c.extent.s = 19;
              c.activation = Activation::kGelu;
              c.y = first;
              c.residual = second;
              Inputs inputs(c);
              Cotangents cotangents(c);
              const auto convert = [&](Tensor& tensor) {
                Tensor other(second, tensor.count(), c.placement);
                for (std::int64_t i = 0; i < other.count(); ++i) other.set(i, tensor.get(i));
                tensor = std::move(other);
              };
              SCOPED_TRACE(std::string("cotangents ") + name_of(second));
              convert(cotangents.x);
              convert(cotangents.bias);
              check_double_backward(inputs, cotangents, from_batch);
              convert(cotangents.residual);
              convert(cotangents.scale);
              check_double_backward(inputs, cotangents, from_batch);
            },
            x);
      }
    }
  }
}

// One group is layer norm, a group per channel is instance norm.
TEST(DoubleBackward, EveryNumberOfGroups) {
  for (const Layout layout : kBothLayouts) {
    for (const bool affine_per_sample : {false, true}) {
      for (const MaskKind mask : {MaskKind::kNone, MaskKind::kRow, MaskKind::kElement}) {
        for (const std::int64_t num_groups : {1, 2, 3, 4, 6, 8, 12, 24}) {
          NormCase c = small_case(layout, num_groups);
          c.extent = {3, 24, 11};
          c.affine_per_sample = affine_per_sample;
          c.mask = mask;
          c.activation = num_groups % 2 == 0 ? Activation::kGeluTanh : Activation::kNone;
          check(c);
        }
      }
    }
  }
}

// As layer norm: in a CUDA block as many columns as fit, and more.
TEST(DoubleBackward, RowsOfOneGroup) {
  for (const DType x : {DType::kFloat32, DType::kBFloat16}) {
    for (const Activation activation : kTwoActivations) {
      for (const Extent extent : {Extent{3, 1024, 1}, Extent{2, 512, 2}, Extent{2, 2052, 1}}) {
        NormCase c = small_case(Layout::kNSC, 1, x);
        c.extent = extent;
        c.activation = activation;
        check(c);
      }
    }
  }
}

// What is not finite under a mask is not seen: the other positions have the bits that they have
// with finite values there.
TEST(DoubleBackward, MaskedOutValuesOfAnyKind) {
  for_each_norm([](NormCase c, bool from_batch) {
    if (!from_batch) return;
    for (const MaskKind mask : {MaskKind::kRow, MaskKind::kElement}) {
      for (const Activation activation : kAllActivations) {
        c.mask = mask;
        c.activation = activation;
        c.residual = DType::kFloat32;
        Inputs inputs(c), finite(c);
        std::vector<bool> is_replaced(static_cast<std::size_t>(c.extent.numel()));
        std::int64_t replaced = 0;
        constexpr double kNotFinite[] = {kInfinity, kNaN, -kInfinity};
        for (std::int64_t i = 0; i < c.extent.numel(); ++i) {
          if (!std::isnan(inputs.x.get(i))) continue;
          is_replaced[static_cast<std::size_t>(i)] = true;
          inputs.x.set(i, kNotFinite[replaced % 3]);
          inputs.residual.set(i, kNotFinite[replaced / 3 % 3]);
          finite.x.set(i, 1.5);
          ++replaced;
        }
        ASSERT_GT(replaced, 20);
        const Cotangents cotangents(c);
        check_double_backward(inputs, cotangents);
        check_double_backward(finite, cotangents);
        const Statistics statistics = batch_statistics(inputs, true);
        const Outputs out = run_double_backward(inputs, cotangents, statistics);
        const Outputs expected = run_double_backward(finite, cotangents, statistics);
        for (const Output& output : out) {
          const Tensor& other = find(expected, output.name);
          const bool is_parameter = output.tensor.count() == c.affine_count();
          for (std::int64_t i = 0; i < output.tensor.count(); ++i) {
            const double value = output.tensor.get(i);
            ASSERT_TRUE(std::isfinite(value)) << output.name << " of " << to_string(c);
            if (!is_parameter && is_replaced[static_cast<std::size_t>(i)]) continue;
            ASSERT_EQ(value, other.get(i)) << output.name << "[" << i << "] of " << to_string(c);
          }
        }
      }
    }
  });
}

// Nothing that counts, in one channel or one sample: as with rstd = 0 where grad_y is 0.
TEST(DoubleBackward, SliceWithoutValidValue) {
  for_each_norm([](NormCase c, bool from_batch) {
    if (!from_batch) return;
    for (const MaskKind mask : {MaskKind::kRow, MaskKind::kElement}) {
      for (const Activation activation : kAllActivations) {
        for (const bool is_whole_batch : {false, true}) {
          if (!is_whole_batch && mask == MaskKind::kRow && c.num_groups == 0) continue;
          c.mask = mask;
          c.activation = activation;
          c.residual = DType::kFloat32;
          Inputs inputs(c);
          const auto is_empty = [&](std::int64_t n, std::int64_t channel) {
            return is_whole_batch || (c.num_groups == 0 ? channel == 3 : n == 1);
          };
          for_each_position(c.extent, [&](std::int64_t n, std::int64_t channel, std::int64_t s) {
            const std::int64_t entry = mask == MaskKind::kRow
                                           ? n * c.extent.s + s
                                           : index_of(c.extent, c.layout, n, channel, s);
            if (is_empty(n, channel)) inputs.mask.data()[entry] = 0;
          });
          const Cotangents cotangents(c);
          check_double_backward(inputs, cotangents);  // zeroes grad_y there
          const Statistics statistics = batch_statistics(inputs, true);
          const Outputs clean = run_double_backward(inputs, cotangents, statistics);
          for (const Output& output : clean) {
            for (const double value : output.tensor.values()) {
              ASSERT_TRUE(std::isfinite(value)) << output.name << " of " << to_string(c);
            }
          }

          // A grad_y that is not 0 gives NaN in its own position.
          const std::int64_t position = index_of(c.extent, c.layout, 1, 3, 5);
          inputs.grad_y.set(position, -1.0);
          const Outputs dirty = run_double_backward(inputs, cotangents, statistics);
          for (const Output& output : dirty) {
            if (output.tensor.count() == c.affine_count()) continue;
            // Without a second derivative grad_residual may be 0.
            const double value = output.tensor.get(position);
            const bool may_be_zero =
                output.name == "grad_residual" &&
                (activation == Activation::kNone || activation == Activation::kReLU);
            EXPECT_TRUE(std::isnan(value) || (may_be_zero && value == 0.0))
                << output.name << " of " << to_string(c);
            for (std::int64_t i = 0; i < output.tensor.count(); ++i) {
              if (i == position) continue;
              ASSERT_EQ(output.tensor.get(i), find(clean, output.name).get(i))
                  << output.name << "[" << i << "] of " << to_string(c);
            }
          }
        }
      }
    }
  });
}

// There y does not depend on x, nor do its gradients.
TEST(DoubleBackward, SlicesOfOneValue) {
  for (const Layout layout : kBothLayouts) {
    for (const DType dtype : kAllDTypes) {
      for (const Activation activation : kAllActivations) {
        for (const std::int64_t num_groups : {0, 37}) {
          NormCase c = small_case(layout, num_groups, dtype);
          c.extent = {num_groups == 0 ? 1 : 3, 37, 1};
          c.activation = activation;
          Inputs inputs(c);
          const Cotangents cotangents(c);
          check_double_backward(inputs, cotangents);
          const Outputs out =
              run_double_backward(inputs, cotangents, batch_statistics(inputs, true));
          for (const char* name : {"grad_x", "grad_scale"}) {
            for (const double value : find(out, name).values()) {
              ASSERT_EQ(value, 0.0) << name << " of " << to_string(c);
            }
          }
        }
      }
    }
  }
}

// float32 against float64 for data whose mean is up to 10^4 standard deviations away from 0.
TEST(DoubleBackward, LargeMeans) {
  for_each_norm([](NormCase c, bool from_batch) {
    for (const double mean : {0.0, 1e2, 1e4}) {
      for (const Extent extent :
           {Extent{2, 3, 2500}, Extent{20, 12, 49}, Extent{50, 96, 1}, Extent{40, 12, 4}}) {
        c.extent = extent;
        c.mean = c.cotangent_mean = mean;
        c.running = DType::kFloat64;
        c.activation = mean == 1e2 ? Activation::kSiLU : Activation::kNone;
        Inputs inputs(c);
        const Cotangents cotangents(c);
        check_double_backward(inputs, cotangents, from_batch);
        const Statistics statistics = statistics_of(inputs, from_batch);
        const Outputs out = run_double_backward(inputs, cotangents, statistics);
        for (const Output& output : reference_double_backward(inputs, cotangents, statistics)) {
          const bool is_zero = c.activation == Activation::kNone &&
                               (output.name == "grad_bias" || output.name == "grad_residual");
          if (is_zero) continue;
          EXPECT_LE(relative_norm_error(find(out, output.name).values(), output.tensor.values()),
                    1e-5)
              << output.name << " of " << to_string(c);
        }
      }
    }
  });
}

// As sequences that are padded at the left: nothing cancels for want of a value near the mean.
TEST(DoubleBackward, LargeMeansBehindManyMaskedOutValues) {
  for (const Layout layout : kBothLayouts) {
    for (const std::int64_t num_groups : {0, 3}) {
      for (const std::int64_t valid : {700, 1250, 2400}) {
        NormCase c = small_case(layout, num_groups);
        c.extent = {2, 3, 2500};
        c.mean = c.cotangent_mean = 1e4;
        c.mask = MaskKind::kRow;
        c.garbage_under_mask = false;
        Inputs inputs(c);
        for (std::int64_t row = 0; row < c.extent.n * c.extent.s; ++row) {
          inputs.mask.data()[row] = row % c.extent.s >= c.extent.s - valid ? 1 : 0;
        }
        const Cotangents cotangents(c);
        check_double_backward(inputs, cotangents);
        const Statistics statistics = batch_statistics(inputs, true);
        const Outputs out = run_double_backward(inputs, cotangents, statistics);
        for (const Output& output : reference_double_backward(inputs, cotangents, statistics)) {
          if (output.name == "grad_bias" || output.name == "grad_residual") continue;  // 0
          EXPECT_LE(relative_norm_error(find(out, output.name).values(), output.tensor.values()),
                    1e-5)
              << output.name << " of " << to_string(c) << " valid " << valid;
        }
      }
    }
  }
}

TEST(DoubleBackward, NonFiniteValuesStayInTheirSlice) {
  for_each_norm_and_short_slices([](NormCase c, bool from_batch) {
    c.activation = Activation::kGelu;
    for (const double value : {kNaN, kInfinity}) {
      for (const std::int64_t position : {std::int64_t{0}, c.extent.s / 2, c.extent.s - 1}) {
        Inputs inputs(c);
        const Cotangents cotangents(c);
        const Outputs clean =
            run_double_backward(inputs, cotangents, statistics_of(inputs, from_batch));
        const std::int64_t at = index_of(c.extent, c.layout, 2, 3, position);
        inputs.x.set(at, value);
        const Outputs dirty =
            run_double_backward(inputs, cotangents, statistics_of(inputs, from_batch));
        for (const Output& output : dirty) {
          if (output.tensor.count() == c.affine_count()) continue;
          for_each_position(c.extent, [&](std::int64_t n, std::int64_t channel, std::int64_t s) {
            const std::int64_t i = index_of(c.extent, c.layout, n, channel, s);
            if (slice_of(c.extent, c.num_groups, n, channel) ==
                slice_of(c.extent, c.num_groups, 2, 3)) {
              return;
            }
            ASSERT_EQ(output.tensor.get(i), find(clean, output.name).get(i))
                << output.name << "[" << i << "] of " << to_string(c);
          });
        }
        for (const char* name : {"grad_grad_y", "grad_x", "grad_residual"}) {
          EXPECT_TRUE(std::isnan(find(dirty, name).get(at))) << name << " of " << to_string(c);
        }
        // Group norm sums parameter gradients over slices.
        const std::int64_t first = c.num_groups == 0 ? 3 : 2, last = 4;
        for (const char* name : {"grad_scale", "grad_bias"}) {
          for (std::int64_t channel = 0; channel < c.extent.c; ++channel) {
            const double gradient = find(dirty, name).get(channel);
            if (channel == 3) {
              EXPECT_TRUE(std::isnan(gradient)) << name << " of " << to_string(c);
            }
            if (channel >= first && channel < last) continue;
            EXPECT_EQ(gradient, find(clean, name).get(channel)) << name << " of " << to_string(c);
          }
        }
      }
    }
  });
}

// There k is 0, whatever the tangent is.
TEST(DoubleBackward, WithoutSecondDerivative) {
  for_each_norm_and_short_slices([](NormCase c, bool from_batch) {
    for (const Activation activation : {Activation::kNone, Activation::kReLU}) {
      c.activation = activation;
      const Inputs inputs(c);
      for (const double value : {kNaN, kInfinity}) {
        Cotangents cotangents(c);
        cotangents.x.set(index_of(c.extent, c.layout, 2, 3, 0), value);
        cotangents.bias.set(1, value);
        const Outputs out =
            run_double_backward(inputs, cotangents, statistics_of(inputs, from_batch));
        for (const char* name : {"grad_bias", "grad_residual"}) {
          for (const double k : find(out, name).values()) {
            ASSERT_EQ(k, 0.0) << name << " of " << to_string(c);
          }
        }
      }
    }
  });
}

TEST(DoubleBackward, EmptyInputHasZeroParameterGradients) {
  for (const Extent extent : {Extent{0, 6, 5}, Extent{3, 6, 0}, Extent{3, 0, 5}}) {
    for_each_norm([&](NormCase c, bool from_batch) {
      for (const bool affine_per_sample : {false, true}) {
        if (affine_per_sample && c.num_groups == 0) continue;
        c.extent = extent;
        c.affine_per_sample = affine_per_sample;
        const Inputs inputs(c);
        const auto slices = static_cast<std::size_t>(c.slice_count());
        const Statistics statistics{c.num_groups, std::vector<double>(slices),
                                    std::vector<double>(slices), from_batch};
        const Outputs out = run_double_backward(inputs, Cotangents(c), statistics);
        const std::vector<double> zeros(static_cast<std::size_t>(c.affine_count()));
        EXPECT_EQ(find(out, "grad_scale").values(), zeros);
        EXPECT_EQ(find(out, "grad_bias").values(), zeros);
      }

      // The tensors of an empty input may well have no memory at all.
      BatchNormDoubleBackwardArgs batch_norm;
      batch_norm.input.extent = extent;
      batch_norm.input.layout = c.layout;
      batch_norm.batch_statistics = from_batch;
      EXPECT_TRUE(other_runner().run(batch_norm));
      GroupNormDoubleBackwardArgs group_norm;
      group_norm.input = batch_norm.input;
      EXPECT_TRUE(other_runner().run(group_norm));
    });
  }
}

// Every sample alone gives the bits that it has in a batch.
TEST(DoubleBackward, GroupNormDoesNotDependOnTheBatchSize) {
  const std::pair<Extent, Placement> cases[] = {{{5, 6, 33}, Placement::kEnd},
                                                {{5, 6, 33}, Placement::kBegin},
                                                {{70, 66, 1}, Placement::kEnd},
                                                {{70, 192, 1}, Placement::kEnd},
                                                {{2, 3, 9001}, Placement::kBegin}};
  for (const Layout layout : kBothLayouts) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const auto& [extent, placement] : cases) {
        NormCase c = small_case(layout, 3, dtype);
        c.extent = extent;
        c.placement = placement;
        c.activation = Activation::kSiLU;
        const Inputs batch(c);
        const Cotangents batch_cotangents(c);
        const Outputs together = run_double_backward(
            batch, batch_cotangents, batch_statistics(batch, true), {}, other_runner());

        NormCase one = c;
        one.extent.n = 1;
        Inputs sample(one);
        Cotangents cotangents(one);
        const auto copy = [](Tensor& to, const Tensor& from, std::int64_t n) {
          const std::size_t bytes = to.buffer().bytes();
          std::memcpy(to.data(), from.buffer().data() + static_cast<std::size_t>(n) * bytes, bytes);
        };
        copy(sample.scale, batch.scale, 0);
        copy(sample.bias, batch.bias, 0);
        copy(cotangents.scale, batch_cotangents.scale, 0);
        copy(cotangents.bias, batch_cotangents.bias, 0);
        for (std::int64_t n = 0; n < extent.n; ++n) {
          copy(sample.x, batch.x, n);
          copy(sample.grad_y, batch.grad_y, n);
          copy(cotangents.x, batch_cotangents.x, n);
          copy(cotangents.residual, batch_cotangents.residual, n);
          const Outputs alone =
              run_double_backward(sample, cotangents, batch_statistics(sample, true));
          for (const char* name : {"grad_grad_y", "grad_x", "grad_residual"}) {
            const GuardedBuffer& part = find(alone, name).buffer();
            const unsigned char* whole = find(together, name).buffer().data();
            EXPECT_EQ(std::memcmp(part.data(), whole + static_cast<std::size_t>(n) * part.bytes(),
                                  part.bytes()),
                      0)
                << name << " of sample " << n << " of " << to_string(c);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace normcore::kernels::testing
