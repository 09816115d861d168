#include "normcore/kernels/batch_norm.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "norm_checks.h"
#include "positions.h"
#include "shape_test.h"

namespace normcore::kernels::testing {
namespace {

class BatchNormShapes : public ShapeTest {};

INSTANTIATE_TEST_SUITE_P(All, BatchNormShapes, all_shapes(), name_of_shape);

TEST_P(BatchNormShapes, Forward) {
  for_each_variant(false, [](Inputs& inputs) { check_forward(inputs); });
}

TEST_P(BatchNormShapes, Inference) {
  for_each_variant(false, [](Inputs& inputs) { check_inference(inputs); });
}

TEST_P(BatchNormShapes, Backward) {
  for_each_variant(false, [](Inputs& inputs) { check_backward(inputs); });
}

TEST_P(BatchNormShapes, BackwardOfRunningStatistics) {
  for_each_variant(false, [](Inputs& inputs) { check_backward(inputs, false); });
}

NormCase small_case(Layout layout, DType x = DType::kFloat32) {
  NormCase c;
  c.extent = {4, 5, 37};
  c.layout = layout;
  c.x = c.y = x;
  return c;
}

TEST(BatchNorm, RunningStatisticsOfEveryKind) {
  for (const Layout layout : kBothLayouts) {
    for (const DType running : kAllDTypes) {
      for (const bool cumulative : {false, true}) {
        for (const bool unbiased : {false, true}) {
          NormCase c = small_case(layout);
          c.running = running;
          c.cumulative = cumulative;
          c.unbiased = unbiased;
          check_forward(Inputs(c));
          c.extent = {1, 5, 1};  // one value: its variance 0 is not corrected by 1 / 0
          check_forward(Inputs(c));
        }
      }
    }
  }
}

TEST(BatchNorm, CumulativeAverageOfTheFirstBatchIsTheBatch) {
  NormCase c = small_case(Layout::kNCS);
  c.running = DType::kFloat64;
  const Inputs inputs(c);
  const Statistics statistics = batch_statistics(inputs, false);
  Tensor y(c.y, c.extent.numel(), Placement::kEnd), rstd(c.x, c.extent.c, Placement::kEnd);
  std::vector<double> mean(statistics.mean.size());
  std::int64_t counter = 0;
  BatchNormForwardArgs args;
  args.input = inputs.norm_input();
  args.running = {
      inputs.running_mean.view(), inputs.running_var.view(), &counter, 0.1, true, false};
  args.y = y.view();
  args.mean = mean.data();
  args.rstd = rstd.view();
  ASSERT_TRUE(default_runner().run(args));
  EXPECT_EQ(counter, 1);
  EXPECT_EQ(inputs.running_mean.values(), mean);
}

TEST(BatchNorm, ConstantInputGivesExactlyBias) {
  for (const Layout layout : kBothLayouts) {
    for (const DType dtype : kAllDTypes) {
      for (const Extent extent : {Extent{3, 5, 37}, Extent{2, 3, 9001}, Extent{700, 20, 1}}) {
        for (const double value : {0.1, 1.0, -1234.5, 3e4}) {
          NormCase c = small_case(layout, dtype);
          c.extent = extent;
          c.scale = c.bias = dtype;
          Inputs inputs(c);
          inputs.x.fill(value);
          const Outputs out = run_forward(inputs);
          const Tensor& y = find(out, "y");
          std::int64_t failures = 0;
          for_each_position(extent, [&](std::int64_t n, std::int64_t channel, std::int64_t s) {
            const std::int64_t i = index_of(extent, layout, n, channel, s);
            if (y.get(i) != inputs.bias.get(channel)) ++failures;
          });
          EXPECT_EQ(failures, 0) << value << " in " << to_string(c);
          EXPECT_EQ(find(out, "mean").get(0), inputs.x.get(0));
        }
      }
    }
  }
}

TEST(BatchNorm, OneValuePerChannelGivesActivationOfBias) {
  for (const Layout layout : kBothLayouts) {
    for (const DType dtype : kAllDTypes) {
      NormCase c = small_case(layout, dtype);
      c.extent = {1, 37, 1};
      c.activation = Activation::kReLU;
      c.scale = c.bias = dtype;
      const Inputs inputs(c);
      const Outputs out = run_forward(inputs);
      for (std::int64_t i = 0; i < 37; ++i) {
        EXPECT_EQ(find(out, "y").get(i), std::max(0.0, inputs.bias.get(i))) << to_string(c);
      }
    }
  }
}

TEST(BatchNorm, ChannelWithoutValidValueIsNaNAndKeepsItsRunningStatistics) {
  for (const Layout layout : kBothLayouts) {
    for (const Activation activation : {Activation::kNone, Activation::kReLU}) {
      NormCase c = small_case(layout);
      c.mask = MaskKind::kElement;
      c.garbage_under_mask = false;
      c.activation = activation;
      Inputs inputs(c);
      for_each_position(c.extent, [&](std::int64_t n, std::int64_t channel, std::int64_t s) {
        if (channel == 3) inputs.mask.data()[index_of(c.extent, layout, n, channel, s)] = 0;
      });
      check_forward(inputs);
      check_backward(inputs);
      const Outputs out = run_forward(inputs);
      const Tensor& y = find(out, "y");
      for_each_position(c.extent, [&](std::int64_t n, std::int64_t channel, std::int64_t s) {
        const double value = y.get(index_of(c.extent, layout, n, channel, s));
        EXPECT_EQ(std::isnan(value), channel == 3);
      });
    }
  }
}

TEST(BatchNorm, WholeBatchMaskedOut) {
  for (const Layout layout : kBothLayouts) {
    for (const MaskKind mask : {MaskKind::kRow, MaskKind::kElement}) {
      NormCase c = small_case(layout);
      c.mask = mask;
      Inputs inputs(c);
      std::memset(inputs.mask.data(), 0, inputs.mask.bytes());
      check_forward(inputs);
      check_backward(inputs);
    }
  }
}

// float32 against float64 for data whose mean is up to a million standard deviations away from 0.
TEST(BatchNorm, LargeMeans) {
  for (const Layout layout : kBothLayouts) {
    for (const double mean : {0.0, 1e2, 1e4, 1e6}) {
      for (const Extent extent : {Extent{4, 3, 2500}, Extent{64, 12, 49}}) {
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

TEST(BatchNorm, GradientsNobodyAskedForChangeNothing) {
  for (const Layout layout : kBothLayouts) {
    for (const bool from_batch : {true, false}) {
      NormCase c = small_case(layout);
      c.activation = Activation::kSiLU;
      c.residual = DType::kFloat32;
      const Inputs inputs(c);
      const Statistics statistics =
          from_batch ? batch_statistics(inputs, true) : running_statistics(inputs, true);
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

TEST(BatchNorm, NonFiniteValuesStayInTheirChannel) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (const Layout layout : kBothLayouts) {
    for (const DType dtype : kAllDTypes) {
      for (const double value : {std::nan(""), kInfinity, -kInfinity}) {
        for (const std::int64_t position : {0, 18, 36}) {
          const NormCase c = small_case(layout, dtype);
          Inputs inputs(c);
          const Outputs clean = run_forward(inputs);
          inputs.x.set(index_of(c.extent, layout, 2, 1, position), value);
          const Outputs dirty = run_forward(inputs);
          for_each_position(c.extent, [&](std::int64_t n, std::int64_t channel, std::int64_t s) {
            const std::int64_t i = index_of(c.extent, layout, n, channel, s);
            const double y = find(dirty, "y").get(i);
            if (channel == 1) {
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

// All bits set: rounding such a NaN to 16 bits by adding half a unit would make it 0.
TEST(BatchNorm, ParametersOfAnyNaNGiveNaN) {
  for (const Layout layout : kBothLayouts) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const Extent extent : {Extent{4, 5, 37}, Extent{2, 48, 600}}) {
        NormCase c = small_case(layout, dtype);
        c.extent = extent;
        Inputs inputs(c);
        const Statistics statistics = batch_statistics(inputs, true);
        std::memset(inputs.scale.data(), 0xff, inputs.scale.buffer().bytes());
        for (const auto& [name, out] :
             {std::pair{"y", run_forward(inputs)}, std::pair{"y", run_inference(inputs)},
              std::pair{"grad_x", run_backward(inputs, statistics)}}) {
          const auto values = find(out, name).values();
          const auto is_nan = [](double v) { return std::isnan(v); };
          EXPECT_TRUE(std::all_of(values.begin(), values.end(), is_nan))
              << name << " of " << to_string(c);
        }
      }
    }
  }
}

TEST(BatchNorm, EmptyInputChangesNothingAndHasZeroParameterGradients) {
  for (const Layout layout : kBothLayouts) {
    for (const Extent extent : {Extent{0, 4, 5}, Extent{3, 0, 5}, Extent{3, 4, 0}}) {
      NormCase c = small_case(layout);
      c.extent = extent;
      const Inputs inputs(c);
      const Outputs out = run_forward(inputs);
      EXPECT_EQ(find(out, "running_mean").values(), inputs.running_mean.values());
      EXPECT_EQ(find(out, "running_var").values(), inputs.running_var.values());
      run_inference(inputs);
      const Statistics statistics{0, inputs.running_mean.values(), inputs.running_var.values(),
                                  true};
      const Outputs gradients = run_backward(inputs, statistics);
      const std::vector<double> zeros(static_cast<std::size_t>(extent.c));
      EXPECT_EQ(find(gradients, "grad_scale").values(), zeros);
      EXPECT_EQ(find(gradients, "grad_bias").values(), zeros);

      // The tensors of an empty input may well have no memory at all.
      BatchNormForwardArgs args;
      args.input.extent = extent;
      args.input.layout = layout;
      EXPECT_TRUE(other_runner().run(args));
    }
  }
}

// Every sample alone gives the bits that it has in a batch.
TEST(BatchNorm, InferenceDoesNotDependOnTheBatchSize) {
  for (const Layout layout : kBothLayouts) {
    for (const DType dtype : kAllDTypes) {
      for (const Extent extent : {Extent{5, 7, 33}, Extent{3, 65, 1}, Extent{2, 3, 9000}}) {
        NormCase c = small_case(layout, dtype);
        c.extent = extent;
        c.activation = Activation::kGelu;
        const Inputs batch(c);
        const Outputs together = run_inference(batch, other_runner());
        NormCase one = c;
        one.extent.n = 1;
        Inputs sample(one);
        for (std::int64_t i = 0; i < extent.c; ++i) {
          sample.scale.set(i, batch.scale.get(i));
          sample.bias.set(i, batch.bias.get(i));
          sample.running_mean.set(i, batch.running_mean.get(i));
          sample.running_var.set(i, batch.running_var.get(i));
        }
        for (std::int64_t n = 0; n < extent.n; ++n) {
          const std::int64_t size = one.extent.numel();
          for (std::int64_t i = 0; i < size; ++i) sample.x.set(i, batch.x.get(n * size + i));
          const Outputs alone = run_inference(sample);
          const auto bytes = static_cast<std::size_t>(size) * size_of(dtype);
          EXPECT_EQ(
              std::memcmp(find(alone, "y").buffer().data(),
                          find(together, "y").buffer().data() + static_cast<std::size_t>(n) * bytes,
                          bytes),
              0)
              << "sample " << n << " of " << to_string(c);
        }
      }
    }
  }
}

// Of the size that leaves a split CUDA kernel a piece of a slice behind the slice's end.
TEST(BatchNorm, ReadsNothingBehindTheInput) {
  const std::pair<Extent, DType> cases[] = {{{1, 1, 2046}, DType::kFloat32},
                                            {{1, 5, 4090}, DType::kBFloat16}};
  for (const auto& [extent, dtype] : cases) {
    NormCase c;
    c.extent = extent;
    c.x = c.y = dtype;
    c.placement = Placement::kBegin;
    const Inputs inputs(c);
    check_forward(inputs);
  }
}

}  // namespace
}  // namespace normcore::kernels::testing
