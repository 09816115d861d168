#include "normcore/kernels/group_norm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "norm_checks.h"
#include "positions.h"
#include "shape_test.h"

namespace normcore::kernels::testing {
namespace {

class GroupNormShapes : public ShapeTest {};

INSTANTIATE_TEST_SUITE_P(All, GroupNormShapes, all_shapes(), name_of_shape);

TEST_P(GroupNormShapes, Forward) {
  for_each_variant(true, [](Inputs& inputs) { check_forward(inputs); });
}

TEST_P(GroupNormShapes, Backward) {
  for_each_variant(true, [](Inputs& inputs) { check_backward(inputs); });
}

NormCase small_case(Layout layout, DType x = DType::kFloat32) {
  NormCase c;
  c.extent = {4, 6, 37};
  c.layout = layout;
  c.num_groups = 3;
  c.x = c.y = x;
  return c;
}

// One group is layer norm, a group per channel is instance norm.
TEST(GroupNorm, EveryNumberOfGroups) {
  for (const Layout layout : kBothLayouts) {
    for (const bool affine_per_sample : {false, true}) {
      for (const MaskKind mask : {MaskKind::kNone, MaskKind::kRow, MaskKind::kElement}) {
        for (const std::int64_t num_groups : {1, 2, 3, 4, 6, 8, 12, 24}) {
          NormCase c = small_case(layout);
          c.extent = {3, 24, 21};
          c.num_groups = num_groups;
          c.affine_per_sample = affine_per_sample;
          c.mask = mask;
          Inputs inputs(c);
          check_forward(inputs);
          check_backward(inputs);
        }
      }
    }
  }
}

// The partial sums of all channels together nearly fill what shared memory a CUDA block gets without
// asking.
TEST(GroupNorm, GroupsOfManyShortChannels) {
  const std::pair<Extent, DType> cases[] = {{{2, 1280, 4}, DType::kFloat32},
                                            {{2, 1280, 8}, DType::kBFloat16},
                                            {{2, 1024, 2}, DType::kFloat64}};
  for (const auto& [extent, dtype] : cases) {
    NormCase c = small_case(Layout::kNCS, dtype);
    c.extent = extent;
    c.num_groups = 1;
    Inputs inputs(c);
    check_forward(inputs);
    check_backward(inputs);
  }
}

// As layer norm: in a CUDA block as many columns as fit, and more.
TEST(GroupNorm, RowsOfOneGroup) {
  for (const DType x : {DType::kFloat32, DType::kBFloat16}) {
    for (const Extent extent : {Extent{3, 1024, 1}, Extent{2, 2048, 1}, Extent{2, 512, 4}}) {
      NormCase c = small_case(Layout::kNSC, x);
      c.extent = extent;
      c.num_groups = 1;
      Inputs inputs(c);
      check_forward(inputs);
      check_backward(inputs);
    }
  }
}

// Parameters are no multiple of a vector from each other, or from anything.
TEST(GroupNorm, ParametersMayStartAnywhere) {
  for (const DType x : kAllDTypes) {
    for (const bool per_sample : {false, true}) {
      NormCase c = small_case(Layout::kNSC, x);
      c.extent = {5, 96, 1};
      c.affine_per_sample = per_sample;
      Inputs inputs(c);
      for (Tensor* parameter : {&inputs.scale, &inputs.bias}) {
        Tensor shifted(parameter->dtype(), c.affine_count(), Placement::kShift);
        for (std::int64_t i = 0; i < c.affine_count(); ++i) shifted.set(i, parameter->get(i));
        *parameter = std::move(shifted);
      }
      check_forward(inputs);
      check_backward(inputs);
    }
  }
}

TEST(GroupNorm, ConstantInputGivesExactlyBias) {
  for (const Layout layout : kBothLayouts) {
    for (const DType dtype : kAllDTypes) {
      for (const Extent extent : {Extent{3, 6, 37}, Extent{2, 3, 9001}, Extent{70, 24, 1}}) {
        for (const double value : {0.1, 1.0, -1234.5, 3e4}) {
          NormCase c = small_case(layout, dtype);
          c.extent = extent;
          c.scale = c.bias = dtype;
          c.affine_per_sample = value > 0.0;
          Inputs inputs(c);
          inputs.x.fill(value);
          const Outputs out = run_forward(inputs);
          std::int64_t failures = 0;
          for_each_position(extent, [&](std::int64_t n, std::int64_t channel, std::int64_t s) {
            const double bias =
                inputs.bias.get(c.affine_per_sample ? n * extent.c + channel : channel);
            if (find(out, "y").get(index_of(extent, layout, n, channel, s)) != bias) ++failures;
          });
          EXPECT_EQ(failures, 0) << value << " in " << to_string(c);
          EXPECT_EQ(find(out, "mean").get(0), inputs.x.get(0));
        }
      }
    }
  }
}

TEST(GroupNorm, OneValuePerGroupGivesBias) {
  for (const Layout layout : kBothLayouts) {
    for (const DType dtype : kAllDTypes) {
      NormCase c = small_case(layout, dtype);
      c.extent = {3, 37, 1};
      c.num_groups = 37;
      c.scale = c.bias = dtype;
      const Inputs inputs(c);
      const Outputs out = run_forward(inputs);
      for (std::int64_t i = 0; i < 3 * 37; ++i) {
        EXPECT_EQ(find(out, "y").get(i), inputs.bias.get(i % 37)) << to_string(c);
      }
    }
  }
}

// There y does not depend on x: the gradient is 0, but a NaN that comes in is seen.
TEST(GroupNorm, OneValuePerGroupHasNoGradientButNaN) {
  for (const Layout layout : kBothLayouts) {
    for (const DType dtype : kAllDTypes) {
      NormCase c = small_case(layout, dtype);
      c.extent = {3, 37, 1};
      c.num_groups = 37;
      Inputs inputs(c);
      constexpr std::int64_t kDirty = 40;
      inputs.grad_y.set(kDirty, std::nan(""));
      const Outputs out = run_backward(inputs, batch_statistics(inputs, true));
      for (std::int64_t i = 0; i < 3 * 37; ++i) {
        const double grad_x = find(out, "grad_x").get(i);
        if (i == kDirty) {
          EXPECT_TRUE(std::isnan(grad_x)) << to_string(c);
        } else {
          EXPECT_EQ(grad_x, 0.0) << i << " of " << to_string(c);
        }
      }
    }
  }
}

// A padded sample: its outputs are NaN, and as long as nobody uses them every parameter gradient
// stays clean.
TEST(GroupNorm, SampleWithoutValidValue) {
  for (const Layout layout : kBothLayouts) {
    for (const MaskKind mask : {MaskKind::kRow, MaskKind::kElement}) {
      for (const Activation activation :
           {Activation::kNone, Activation::kReLU, Activation::kSiLU}) {
        for (const bool affine_per_sample : {false, true}) {
          NormCase c = small_case(layout);
          c.mask = mask;
          c.activation = activation;
          c.affine_per_sample = affine_per_sample;
          Inputs inputs(c);
          const std::size_t sample = inputs.mask.bytes() / static_cast<std::size_t>(c.extent.n);
          std::memset(inputs.mask.data() + sample, 0, sample);
          check_forward(inputs);
          check_backward(inputs);
          const Outputs out = run_forward(inputs);
          for_each_position(c.extent, [&](std::int64_t n, std::int64_t channel, std::int64_t s) {
            if (n != 1) return;
            const double y = find(out, "y").get(index_of(c.extent, layout, n, channel, s));
            EXPECT_TRUE(std::isnan(y));
          });
        }
      }
    }
  }
}

// float32 against float64 for data whose mean is up to a million standard deviations away from 0.
TEST(GroupNorm, LargeMeans) {
  for (const Layout layout : kBothLayouts) {
    for (const double mean : {0.0, 1e2, 1e4, 1e6}) {
      for (const Extent extent : {Extent{4, 3, 2500}, Extent{64, 12, 49}, Extent{50, 96, 1}}) {
        NormCase c = small_case(layout);
        c.extent = extent;
        c.mean = mean;
        Inputs inputs(c);
        check_forward(inputs);
        check_backward(inputs);
        const Outputs expected = reference_forward(inputs);
        const Outputs actual = run_forward(inputs);
        EXPECT_LE(relative_norm_error(find(actual, "y").values(), find(expected, "y").values()),
                  1e-6)
            << to_string(c);
        const Statistics statistics = batch_statistics(inputs, true);
        const Outputs gradients = run_backward(inputs, statistics);
        for (const Output& output : reference_backward(inputs, statistics, {})) {
          EXPECT_LE(
              relative_norm_error(find(gradients, output.name).values(), output.tensor.values()),
              1e-6)
              << output.name << " of " << to_string(c);
        }
      }
    }
  }
}

TEST(GroupNorm, GradientsNobodyAskedForChangeNothing) {
  for (const Layout layout : kBothLayouts) {
    for (const bool affine_per_sample : {false, true}) {
      NormCase c = small_case(layout);
      c.activation = Activation::kGeluTanh;
      c.residual = DType::kFloat32;
      c.affine_per_sample = affine_per_sample;
      const Inputs inputs(c);
      const Statistics statistics = batch_statistics(inputs, true);
      const Outputs all = run_backward(inputs, statistics);
      for (int bits = 0; bits < 16; ++bits) {
        const Wanted wanted{(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0};
        for (const Output& output : run_backward(inputs, statistics, wanted)) {
          EXPECT_TRUE(output.tensor.buffer().same_bytes(find(all, output.name).buffer()))
              << output.name << " with gradients " << bits;
        }
      }
    }
  }
}

TEST(GroupNorm, NonFiniteValuesStayInTheirGroup) {
  for (const Layout layout : kBothLayouts) {
    for (const DType dtype : kAllDTypes) {
      for (const double value : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
        for (const std::int64_t position : {0, 18, 36}) {
          const NormCase c = small_case(layout, dtype);
          Inputs inputs(c);
          const Outputs clean = run_forward(inputs);
          inputs.x.set(index_of(c.extent, layout, 2, 3, position), value);
          const Outputs dirty = run_forward(inputs);
          for_each_position(c.extent, [&](std::int64_t n, std::int64_t channel, std::int64_t s) {
            const std::int64_t i = index_of(c.extent, layout, n, channel, s);
            const double y = find(dirty, "y").get(i);
            if (n == 2 && channel / 2 == 1) {
              EXPECT_TRUE(std::isnan(y)) << value << " at " << position << " " << to_string(c);
            } else {
              EXPECT_EQ(y, find(clean, "y").get(i));
            }
          });
        }
      }
    }
  }
}

TEST(GroupNorm, EmptyInputHasZeroParameterGradients) {
  for (const Layout layout : kBothLayouts) {
    for (const Extent extent : {Extent{0, 6, 5}, Extent{3, 6, 0}, Extent{3, 0, 5}}) {
      NormCase c = small_case(layout);
      c.extent = extent;
      const Inputs inputs(c);
      const auto slices = static_cast<std::size_t>(c.slice_count());
      const Statistics statistics{c.num_groups, std::vector<double>(slices),
                                  std::vector<double>(slices), true};
      const Outputs out = run_backward(inputs, statistics);
      const std::vector<double> zeros(static_cast<std::size_t>(extent.c));
      EXPECT_EQ(find(out, "grad_scale").values(), zeros);
      EXPECT_EQ(find(out, "grad_bias").values(), zeros);

      // The tensors of an empty input may well have no memory at all.
      GroupNormForwardArgs args;
      args.input.extent = extent;
      args.input.layout = layout;
      args.num_groups = c.num_groups;
      EXPECT_TRUE(other_runner().run(args));
    }
  }
}

// Every sample alone gives the bits that it has in a batch, forward and backward.
// Samples that start within a vector of memory among them: those of odd size, where the batch is
// aligned.
TEST(GroupNorm, DoesNotDependOnTheBatchSize) {
  const std::pair<Extent, Placement> cases[] = {
      {{5, 6, 33}, Placement::kEnd},   {{5, 6, 33}, Placement::kBegin},
      {{70, 66, 1}, Placement::kEnd},  {{70, 192, 1}, Placement::kEnd},
      {{2, 3, 9000}, Placement::kEnd}, {{2, 3, 9001}, Placement::kBegin}};
  for (const Layout layout : kBothLayouts) {
    for (const DType dtype : kAllDTypes) {
      for (const auto& [extent, placement] : cases) {
        NormCase c = small_case(layout, dtype);
        c.extent = extent;
        c.placement = placement;
        c.activation = Activation::kSiLU;
        const Inputs batch(c);
        const Outputs together = run_forward(batch, other_runner());
        const Statistics statistics = batch_statistics(batch, true);
        const Outputs gradients = run_backward(batch, statistics, {}, other_runner());

        NormCase one = c;
        one.extent.n = 1;
        Inputs sample(one);
        for (std::int64_t i = 0; i < extent.c; ++i) {
          sample.scale.set(i, batch.scale.get(i));
          sample.bias.set(i, batch.bias.get(i));
        }
        const std::int64_t size = one.extent.numel();
        const auto expect_part = [&](const Outputs& alone, const Outputs& all, const char* name,
                                     std::int64_t n) {
          const GuardedBuffer& part = find(alone, name).buffer();
          const unsigned char* whole = find(all, name).buffer().data();
          EXPECT_EQ(std::memcmp(part.data(), whole + static_cast<std::size_t>(n) * part.bytes(),
                                part.bytes()),
                    0)
              << name << " of sample " << n << " of " << to_string(c);
        };
        for (std::int64_t n = 0; n < extent.n; ++n) {
          for (std::int64_t i = 0; i < size; ++i) {
            sample.x.set(i, batch.x.get(n * size + i));
            sample.grad_y.set(i, batch.grad_y.get(n * size + i));
          }
          const Outputs alone = run_forward(sample);
          for (const char* name : {"y", "mean", "rstd"}) expect_part(alone, together, name, n);
          const Outputs alone_gradients = run_backward(sample, batch_statistics(sample, true));
          expect_part(alone_gradients, gradients, "grad_x", n);
        }
      }
    }
  }
}

}  // namespace
}  // namespace normcore::kernels::testing
