#include "norm_checks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "cpu/reference.h"
#include "positions.h"

namespace normcore::kernels::testing {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

Tensor clone(const Tensor& tensor, Placement placement) {
  Tensor copy(tensor.dtype(), tensor.count(), placement);
  for (std::int64_t i = 0; i < tensor.count(); ++i) copy.set(i, tensor.get(i));
  return copy;
}

void expect_intact(const Outputs& outputs) {
  for (const Output& output : outputs) {
    EXPECT_TRUE(output.tensor.buffer().intact()) << "written outside of " << output.name;
  }
}

using NamedBuffers = std::vector<std::pair<std::string, const GuardedBuffer*>>;

// A copy of the bytes of the inputs, to be compared after the calls.
class Snapshot {
 public:
  explicit Snapshot(NamedBuffers inputs) : inputs_(std::move(inputs)) {
    for (const auto& [name, buffer] : inputs_) {
      bytes_.emplace_back(buffer->data(), buffer->data() + buffer->bytes());
    }
  }
  void check() const {
    std::size_t i = 0;
    for (const auto& [name, buffer] : inputs_) {
      EXPECT_TRUE(buffer->intact()) << "written outside of " << name;
      EXPECT_TRUE(std::equal(bytes_[i].begin(), bytes_[i].end(), buffer->data()))
          << name << " was changed";
      ++i;
    }
  }

 private:
  NamedBuffers inputs_;
  std::vector<std::vector<unsigned char>> bytes_;
};

// The same call with every runner: what those of each kind agree on.
template <class Run>
std::vector<Outputs> run_everywhere(const Inputs& inputs, Run run,
                                    const NamedBuffers& others = {}) {
  NamedBuffers buffers = inputs.buffers();
  buffers.insert(buffers.end(), others.begin(), others.end());
  const Snapshot snapshot(std::move(buffers));
  std::vector<Outputs> results;
  for (const EqualRunners& runners : all_runners()) {
    Outputs first = run(*runners.front());
    if (first.empty()) continue;
    SCOPED_TRACE(runners.front()->name());
    expect_intact(first);
    for (std::size_t i = 1; inputs.norm_case.many_runners && i < runners.size(); ++i) {
      const Outputs other = run(*runners[i]);
      expect_intact(other);
      expect_same_bits(runners[i]->name(), other, first);
    }
    results.push_back(std::move(first));
  }
  snapshot.check();
  return results;
}

// Which elements belong to a slice without any valid value.
std::vector<bool> in_empty_slice(const NormInput& input, std::int64_t num_groups) {
  const Extent& e = input.extent;
  std::vector<bool> has_valid(static_cast<std::size_t>(num_groups == 0 ? e.c : e.n * num_groups));
  const auto slice = [&](std::int64_t n, std::int64_t c) {
    return static_cast<std::size_t>(slice_of(e, num_groups, n, c));
  };
  for_each_position(e, [&](std::int64_t n, std::int64_t c, std::int64_t s) {
    if (counts(input, n, c, s)) has_valid[slice(n, c)] = true;
  });
  std::vector<bool> result(static_cast<std::size_t>(e.numel()));
  for_each_position(e, [&](std::int64_t n, std::int64_t c, std::int64_t s) {
    result[static_cast<std::size_t>(index_of(e, input.layout, n, c, s))] = !has_valid[slice(n, c)];
  });
  return result;
}

// Running statistics after one call: a convex combination of the old value and the batch's, rounded
// once.
void check_running(const Inputs& inputs, const Outputs& actual, const Statistics& statistics,
                   const ForwardBounds& bounds) {
  const NormCase& c = inputs.norm_case;
  const NormInput input = inputs.norm_input();
  const double weight = c.cumulative ? 0.25 : 0.3;
  const auto compare = [&](const char* name, const Tensor& before, std::size_t i, double batch,
                           double batch_error) {
    const double old = before.get(static_cast<std::int64_t>(i));
    const double expected = (1.0 - weight) * old + weight * batch;
    const double error = weight * batch_error + 0x1p-50 * (std::abs(old) + std::abs(batch));
    expect_near(name, {find(actual, name).get(static_cast<std::int64_t>(i))}, {expected},
                {error + half_ulp(c.running, std::abs(expected) + error)});
  };
  std::vector<double> valid(statistics.mean.size());
  for_each_position(c.extent, [&](std::int64_t n, std::int64_t channel, std::int64_t s) {
    if (counts(input, n, channel, s)) valid[static_cast<std::size_t>(channel)] += 1.0;
  });
  for (std::size_t i = 0; i < valid.size(); ++i) {
    const double count = valid[i];
    if (count == 0.0) {
      EXPECT_EQ(find(actual, "running_mean").get(static_cast<std::int64_t>(i)),
                inputs.running_mean.get(static_cast<std::int64_t>(i)));
      EXPECT_EQ(find(actual, "running_var").get(static_cast<std::int64_t>(i)),
                inputs.running_var.get(static_cast<std::int64_t>(i)));
      continue;
    }
    const double rstd = statistics.rstd[i];
    const double correction = c.unbiased && count > 1.0 ? count / (count - 1.0) : 1.0;
    const double var = 1.0 / (rstd * rstd) - c.eps;
    // var is recovered from rstd: in float64 that costs a few roundings of var + eps.
    const double var_error = bounds.var[i] + 0x1p-49 * (var + c.eps);
    compare("running_mean", inputs.running_mean, i, statistics.mean[i], bounds.mean[i]);
    compare("running_var", inputs.running_var, i, var * correction, var_error * correction);
  }
}

}  // namespace

const Tensor& find(const Outputs& outputs, const std::string& name) {
  for (const Output& output : outputs) {
    if (output.name == name) return output.tensor;
  }
  throw std::runtime_error("no output " + name);
}

Outputs run_forward(const Inputs& inputs, const Runner& runner, std::uint8_t* relu_bits) {
  const NormCase& c = inputs.norm_case;
  Outputs out;
  out.push_back({"y", Tensor(c.y, c.extent.numel(), c.placement)});
  out.push_back({"mean", Tensor(DType::kFloat64, c.slice_count(), c.placement)});
  out.push_back({"rstd", Tensor(compute_type(c.x), c.slice_count(), c.placement)});
  auto* mean = static_cast<double*>(out[1].tensor.data());
  if (c.num_groups != 0) {
    const GroupNormForwardArgs args{inputs.norm_input(), c.num_groups, out[0].tensor.view(), mean,
                                    out[2].tensor.view()};
    if (!runner.run(args)) return {};
  } else {
    std::int64_t counter = 3;
    BatchNormForwardArgs args;
    args.input = inputs.norm_input();
    args.y = out[0].tensor.view();
    args.mean = mean;
    args.rstd = out[2].tensor.view();
    args.relu_bits = relu_bits;
    if (c.running_statistics) {
      out.push_back({"running_mean", clone(inputs.running_mean, c.placement)});
      out.push_back({"running_var", clone(inputs.running_var, c.placement)});
      args.running = {
          out[3].tensor.view(), out[4].tensor.view(), &counter, 0.3, c.cumulative, c.unbiased};
    }
    if (!runner.run(args)) return {};
    const bool counted = c.running_statistics && c.extent.numel() > 0;
    EXPECT_EQ(counter, counted ? 4 : 3);
  }
  return out;
}

Outputs run_inference(const Inputs& inputs, const Runner& runner) {
  const NormCase& c = inputs.norm_case;
  Outputs out;
  out.push_back({"y", Tensor(c.y, c.extent.numel(), c.placement)});
  out.push_back({"rstd", Tensor(compute_type(c.x), c.extent.c, c.placement)});
  const BatchNormInferenceArgs args{inputs.norm_input(), inputs.running_mean.view(),
                                    inputs.running_var.view(), out[0].tensor.view(),
                                    out[1].tensor.view()};
  return runner.run(args) ? std::move(out) : Outputs();
}

namespace {

// Without an activation the backward pass does not give the gradient of the residual.
Wanted wanted_of_backward(const NormCase& c, Wanted wanted) {
  wanted.residual = wanted.residual && c.activation != Activation::kNone;
  return wanted;
}

// Buffers of the gradients that are wanted, with the given dtypes.
NormGradients make_gradients(const NormCase& c, const Wanted& wanted, DType x, DType others,
                             Outputs& out) {
  NormGradients grad;
  const auto make = [&](bool want, const char* name, DType dtype, std::int64_t count) {
    if (!want) return MutableTensor{nullptr, dtype};
    out.push_back({name, Tensor(dtype, count, c.placement)});
    return out.back().tensor.view();
  };
  grad.x = make(wanted.x, "grad_x", x, c.extent.numel());
  grad.scale = make(wanted.scale, "grad_scale", others, c.affine_count());
  grad.bias = make(wanted.bias, "grad_bias", others, c.affine_count());
  grad.residual = make(wanted.residual, "grad_residual", others, c.extent.numel());
  return grad;
}

// Those and the gradient of grad_y.
struct DoubleBackwardTensors {
  DoubleBackwardTensors(const NormCase& c, const WantedOfDoubleBackward& wanted, DType x,
                        DType others, Outputs& out)
      : grad(make_gradients(c, wanted.grad, x, others, out)) {
    if (!wanted.grad_y) return;
    out.push_back({"grad_grad_y", Tensor(others, c.extent.numel(), c.placement)});
    grad_grad_y = out.back().tensor.view();
  }
  NormGradients grad;
  MutableTensor grad_grad_y;
};

// The statistics as the tensors that a backward call takes.
struct SavedStatistics {
  SavedStatistics(const Inputs& inputs, const Statistics& statistics)
      : mean(DType::kFloat64, inputs.norm_case.slice_count(), Placement::kEnd),
        rstd(compute_type(inputs.norm_case.x), inputs.norm_case.slice_count(), Placement::kEnd) {
    for (std::int64_t i = 0; i < mean.count(); ++i) {
      mean.set(i, statistics.mean[static_cast<std::size_t>(i)]);
      rstd.set(i, statistics.rstd[static_cast<std::size_t>(i)]);
    }
  }
  Tensor mean, rstd;
};

// Calls call(args) with what the case's norm takes.
template <class Call>
auto call_double_backward(const Inputs& inputs, const Cotangents& cotangents,
                          const Statistics& statistics, const SavedStatistics& saved,
                          const DoubleBackwardTensors& out, Call call) {
  const NormCase& c = inputs.norm_case;
  if (c.num_groups != 0) {
    return call(GroupNormDoubleBackwardArgs{inputs.norm_input(), c.num_groups, inputs.grad_y.view(),
                                            static_cast<double*>(saved.mean.data()),
                                            saved.rstd.view(), cotangents.view(), out.grad_grad_y,
                                            out.grad});
  }
  // Running statistics come in the dtype of their buffer, saved ones as float64.
  const ConstTensor mean = statistics.from_batch ? saved.mean.view() : inputs.running_mean.view();
  return call(BatchNormDoubleBackwardArgs{inputs.norm_input(), inputs.grad_y.view(), mean,
                                          saved.rstd.view(), statistics.from_batch,
                                          cotangents.view(), out.grad_grad_y, out.grad});
}

// The reference under the name of the kernels' entry.
void reference_call(const BatchNormDoubleBackwardArgs& args) {
  reference::batch_norm_double_backward(args);
}
void reference_call(const GroupNormDoubleBackwardArgs& args) {
  reference::group_norm_double_backward(args);
}

}  // namespace

Outputs run_backward(const Inputs& inputs, const Statistics& statistics, const Wanted& wanted,
                     const Runner& runner, const std::uint8_t* relu_bits) {
  const NormCase& c = inputs.norm_case;
  const SavedStatistics saved(inputs, statistics);
  Outputs out;
  const NormGradients grad = make_gradients(c, wanted_of_backward(c, wanted), c.x, c.y, out);
  if (c.num_groups == 0) {
    // Running statistics come in the dtype of their buffer, saved ones as float64.
    const ConstTensor mean = statistics.from_batch ? saved.mean.view() : inputs.running_mean.view();
    BatchNormBackwardArgs args{inputs.norm_input(), inputs.grad_y.view(),  mean,
                               saved.rstd.view(),   statistics.from_batch, grad};
    if (relu_bits != nullptr) {
      args.input.residual = {};
      args.input.relu_bits = relu_bits;
    }
    if (!runner.run(args)) return {};
  } else {
    const GroupNormBackwardArgs args{inputs.norm_input(),  c.num_groups,
                                     inputs.grad_y.view(), static_cast<double*>(saved.mean.data()),
                                     saved.rstd.view(),    grad};
    if (!runner.run(args)) return {};
  }
  return out;
}

Outputs run_double_backward(const Inputs& inputs, const Cotangents& cotangents,
                            const Statistics& statistics, const WantedOfDoubleBackward& wanted,
                            const Runner& runner) {
  const SavedStatistics saved(inputs, statistics);
  Outputs out;
  const DoubleBackwardTensors tensors(inputs.norm_case, wanted, inputs.norm_case.x,
                                      inputs.norm_case.y, out);
  const bool ran = call_double_backward(inputs, cotangents, statistics, saved, tensors,
                                        [&](const auto& args) { return runner.run(args); });
  return ran ? std::move(out) : Outputs();
}

Outputs reference_forward(const Inputs& inputs) {
  const NormCase& c = inputs.norm_case;
  const auto f64 = DType::kFloat64;
  Outputs out;
  out.push_back({"y", Tensor(f64, c.extent.numel(), Placement::kEnd)});
  out.push_back({"mean", Tensor(f64, c.slice_count(), Placement::kEnd)});
  out.push_back({"rstd", Tensor(f64, c.slice_count(), Placement::kEnd)});
  auto* mean = static_cast<double*>(out[1].tensor.data());
  if (c.num_groups == 0) {
    BatchNormForwardArgs args;
    args.input = inputs.norm_input();
    args.y = out[0].tensor.view();
    args.mean = mean;
    args.rstd = out[2].tensor.view();
    reference::batch_norm_forward(args);
  } else {
    reference::group_norm_forward(
        {inputs.norm_input(), c.num_groups, out[0].tensor.view(), mean, out[2].tensor.view()});
  }
  return out;
}

Outputs reference_backward(const Inputs& inputs, const Statistics& statistics,
                           const Wanted& wanted) {
  const NormCase& c = inputs.norm_case;
  const DType f64 = DType::kFloat64;
  const SavedStatistics saved(inputs, statistics);
  Outputs out;
  const NormGradients grad = make_gradients(c, wanted_of_backward(c, wanted), f64, f64, out);
  if (c.num_groups == 0) {
    reference::batch_norm_backward({inputs.norm_input(), inputs.grad_y.view(), saved.mean.view(),
                                    saved.rstd.view(), statistics.from_batch, grad});
  } else {
    reference::group_norm_backward({inputs.norm_input(), c.num_groups, inputs.grad_y.view(),
                                    static_cast<double*>(saved.mean.data()), saved.rstd.view(),
                                    grad});
  }
  return out;
}

Outputs reference_double_backward(const Inputs& inputs, const Cotangents& cotangents,
                                  const Statistics& statistics,
                                  const WantedOfDoubleBackward& wanted) {
  const SavedStatistics saved(inputs, statistics);
  Outputs out;
  const DType f64 = DType::kFloat64;
  const DoubleBackwardTensors tensors(inputs.norm_case, wanted, f64, f64, out);
  call_double_backward(inputs, cotangents, statistics, saved, tensors,
                       [](const auto& args) { reference_call(args); });
  return out;
}

Statistics batch_statistics(const Inputs& inputs, bool rounded) {
  const Outputs out = reference_forward(inputs);
  Statistics statistics{inputs.norm_case.num_groups, find(out, "mean").values(),
                        find(out, "rstd").values(), true};
  if (rounded) {
    statistics.rstd = SavedStatistics(inputs, statistics).rstd.values();
  }
  return statistics;
}

Statistics running_statistics(const Inputs& inputs, bool rounded) {
  Statistics statistics{0, inputs.running_mean.values(), inputs.running_var.values(), false};
  for (double& value : statistics.rstd) value = 1.0 / std::sqrt(value + inputs.norm_case.eps);
  if (rounded) {
    statistics.rstd = SavedStatistics(inputs, statistics).rstd.values();
  }
  return statistics;
}

void zero_undetermined_gradients(Inputs& inputs, const Statistics& statistics) {
  const NormCase& c = inputs.norm_case;
  const NormInput input = inputs.norm_input();
  if (c.activation == Activation::kReLU) {
    for (const std::int64_t i : kink_positions(input, statistics)) inputs.grad_y.set(i, 0.0);
  }
  // Without a valid value the statistics are NaN; upstream gradients of 0 keep that out of scale
  // and bias.
  const std::vector<bool> is_empty = in_empty_slice(input, c.num_groups);
  for (std::size_t i = 0; statistics.from_batch && i < is_empty.size(); ++i) {
    if (is_empty[i]) inputs.grad_y.set(static_cast<std::int64_t>(i), 0.0);
  }
}

void check_forward(const Inputs& inputs) {
  const NormCase& c = inputs.norm_case;
  SCOPED_TRACE("forward " + to_string(c));
  const std::vector<Outputs> results =
      run_everywhere(inputs, [&](const Runner& runner) { return run_forward(inputs, runner); });
  if (c.extent.numel() != 0) expect_forward(inputs, results);
}

void expect_forward(const Inputs& inputs, const std::vector<Outputs>& results) {
  const NormCase& c = inputs.norm_case;
  const Outputs expected = reference_forward(inputs);
  const Statistics statistics{c.num_groups, find(expected, "mean").values(),
                              find(expected, "rstd").values(), true};
  const ForwardBounds bounds = forward_bounds(inputs.norm_input(), statistics, c.y);
  for (const Outputs& actual : results) {
    const auto compare = [&](const char* name, const std::vector<double>& bound) {
      expect_near(name, find(actual, name).values(), find(expected, name).values(), bound);
    };
    compare("y", bounds.y);
    compare("rstd", bounds.rstd);
    // The mean of an empty slice is not defined; its rstd is NaN.
    std::vector<double> mean = find(actual, "mean").values();
    for (std::size_t i = 0; i < mean.size(); ++i) {
      if (std::isnan(statistics.mean[i])) mean[i] = kNaN;
    }
    expect_near("mean", mean, statistics.mean, bounds.mean);
    if (c.num_groups == 0 && c.running_statistics) {
      check_running(inputs, actual, statistics, bounds);
    }
  }
}

void check_inference(const Inputs& inputs) {
  const NormCase& c = inputs.norm_case;
  SCOPED_TRACE("inference " + to_string(c));
  const std::vector<Outputs> results =
      run_everywhere(inputs, [&](const Runner& runner) { return run_inference(inputs, runner); });
  if (c.extent.numel() == 0) return;
  const Statistics statistics = running_statistics(inputs, false);
  const Tensor y(DType::kFloat64, c.extent.numel(), Placement::kEnd);
  const Tensor rstd(DType::kFloat64, c.extent.c, Placement::kEnd);
  reference::batch_norm_inference({inputs.norm_input(), inputs.running_mean.view(),
                                   inputs.running_var.view(), y.view(), rstd.view()});
  const ForwardBounds bounds = forward_bounds(inputs.norm_input(), statistics, c.y);
  for (const Outputs& actual : results) {
    expect_near("y", find(actual, "y").values(), y.values(), bounds.y);
    expect_near("rstd", find(actual, "rstd").values(), rstd.values(), bounds.rstd);
  }
}

void check_backward(Inputs& inputs, bool from_batch, const Wanted& wanted) {
  const NormCase& c = inputs.norm_case;
  SCOPED_TRACE((from_batch ? "backward " : "backward, running statistics, ") + to_string(c));
  const Statistics statistics =
      from_batch ? batch_statistics(inputs, true) : running_statistics(inputs, true);
  zero_undetermined_gradients(inputs, statistics);
  expect_backward(inputs, statistics, wanted, run_everywhere(inputs, [&](const Runner& runner) {
                    return run_backward(inputs, statistics, wanted, runner);
                  }));
}

void expect_backward(const Inputs& inputs, const Statistics& statistics, const Wanted& wanted,
                     const std::vector<Outputs>& results) {
  const NormCase& c = inputs.norm_case;
  const Outputs expected = reference_backward(inputs, statistics, wanted);
  NormGradients stored;
  stored.x.dtype = c.x;
  stored.scale.dtype = stored.bias.dtype = stored.residual.dtype = c.y;
  const BackwardBounds bounds =
      backward_bounds(inputs.norm_input(), statistics, inputs.grad_y.view(), stored);
  for (const Output& output : expected) {
    const std::vector<double>& bound = output.name == "grad_x"       ? bounds.x
                                       : output.name == "grad_scale" ? bounds.scale
                                       : output.name == "grad_bias"  ? bounds.bias
                                                                     : bounds.residual;
    for (const Outputs& actual : results) {
      expect_near(output.name, find(actual, output.name).values(), output.tensor.values(), bound);
    }
  }
}

void check_double_backward(Inputs& inputs, const Cotangents& cotangents, bool from_batch,
                           const WantedOfDoubleBackward& wanted) {
  const NormCase& c = inputs.norm_case;
  SCOPED_TRACE((from_batch ? "double backward " : "double backward, running statistics, ") +
               to_string(c));
  const Statistics statistics =
      from_batch ? batch_statistics(inputs, true) : running_statistics(inputs, true);
  zero_undetermined_gradients(inputs, statistics);
  const std::vector<Outputs> results = run_everywhere(
      inputs,
      [&](const Runner& runner) {
        return run_double_backward(inputs, cotangents, statistics, wanted, runner);
      },
      cotangents.buffers());

  const Outputs expected = reference_double_backward(inputs, cotangents, statistics, wanted);
  ASSERT_FALSE(results.empty() && !expected.empty()) << "no runner";
  NormGradients stored;
  stored.x.dtype = c.x;
  stored.scale.dtype = stored.bias.dtype = stored.residual.dtype = c.y;
  const DoubleBackwardBounds bounds = double_backward_bounds(
      inputs.norm_input(), statistics, inputs.grad_y.view(), cotangents.view(), c.y, stored);
  for (const Output& output : expected) {
    const std::vector<double>& bound = output.name == "grad_grad_y"  ? bounds.grad_y
                                       : output.name == "grad_x"     ? bounds.x
                                       : output.name == "grad_scale" ? bounds.scale
                                       : output.name == "grad_bias"  ? bounds.bias
                                                                     : bounds.residual;
    for (const Outputs& actual : results) {
      expect_near(output.name, find(actual, output.name).values(), output.tensor.values(), bound);
    }
  }
}

void check_relu_bits(const NormCase& c) {
  const Inputs inputs(c);
  const std::int64_t per_byte = elements_per_relu_byte(c.x);
  const auto check = [&](const Runner& runner) {
    SCOPED_TRACE("relu_bits, " + runner.name() + ", " + to_string(c));
    const GuardedBuffer bits(static_cast<std::size_t>(c.extent.numel() / per_byte), 1,
                             Placement::kEnd);
    const Outputs forward = run_forward(inputs, runner);
    if (forward.empty()) return;
    expect_same_bits("forward", run_forward(inputs, runner, bits.data()), forward);
    EXPECT_TRUE(bits.intact());
    const Tensor& y = find(forward, "y");
    for (std::int64_t first = 0; first < y.count(); first += per_byte) {
      unsigned expected = 0;
      for (std::int64_t i = 0; i < per_byte; ++i) {
        expected |= y.get(first + i) <= 0.0 ? 0u : 1u << i;
      }
      ASSERT_EQ(bits.data()[first / per_byte], expected) << "of elements from " << first;
    }
    const Statistics statistics{0, find(forward, "mean").values(), find(forward, "rstd").values(),
                                true};
    std::vector<Wanted> choices = {Wanted{}, Wanted{true, false, false, false},
                                   Wanted{false, true, true, false}};
    // Beside a residual of another dtype, sums are taken in another order.
    if (c.residual.value_or(c.x) != c.x) choices = {Wanted{false, false, false, true}};
    for (const Wanted& wanted : choices) {
      expect_same_bits("backward", run_backward(inputs, statistics, wanted, runner, bits.data()),
                       run_backward(inputs, statistics, wanted, runner));
    }
  };
  for (const EqualRunners& equal : all_runners()) {
    for (const auto& runner : equal) {
      check(*runner);
      if (runners_are_slow()) break;  // schedules make no difference here
    }
  }
}

void expect_near(const std::string& name, const std::vector<double>& actual,
                 const std::vector<double>& expected, const std::vector<double>& bound) {
  ASSERT_EQ(actual.size(), expected.size()) << name;
  ASSERT_EQ(bound.size(), expected.size()) << name;
  std::size_t failures = 0;
  std::ostringstream first;
  first.precision(17);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const bool same =
        actual[i] == expected[i] || (std::isnan(actual[i]) && std::isnan(expected[i]));
    if (same || std::abs(actual[i] - expected[i]) <= bound[i]) continue;
    if (failures++ == 0) {
      first << name << "[" << i << "] = " << actual[i] << ", expected " << expected[i] << " within "
            << bound[i];
    }
  }
  EXPECT_EQ(failures, 0u) << first.str() << " (of " << expected.size() << " values)";
}

void expect_same_bits(const std::string& what, const Outputs& actual, const Outputs& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_TRUE(actual[i].tensor.buffer().same_bytes(expected[i].tensor.buffer()))
        << expected[i].name << " has other bits with " << what;
  }
}

double relative_norm_error(const std::vector<double>& actual, const std::vector<double>& expected) {
  double error = 0.0, norm = 0.0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    error += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(error / norm);
}

}  // namespace normcore::kernels::testing
