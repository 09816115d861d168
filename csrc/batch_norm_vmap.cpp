// Batching rules of batch norm. Statistics of its own for every index of the mapped axis: the axis
// becomes a feature axis.
#include <ATen/MemoryOverlap.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "relu_bits.h"
#include "vmap.h"

namespace normcore::vmap {
namespace {

// What a training call changes, with the mapped axis in front.
struct Running {
  OptionalTensor mean, var, count;
};

// Counts that are mapped: one of each index.
void check_counts(const OptionalTensor& of_an_index, const Tensor& counts) {
  TORCH_CHECK_TYPE(counts.scalar_type() == at::kLong,
                   "batch_norm: expected num_batches_tracked to have dtype int64, got ",
                   counts.scalar_type());
  TORCH_CHECK_VALUE(of_an_index->sym_numel() == 1,
                    "batch_norm: expected num_batches_tracked to have one element, got shape ",
                    of_an_index->sym_sizes());
  TORCH_CHECK_VALUE(at::has_internal_overlap(counts) != at::MemOverlap::Yes,
                    "batch_norm: expected num_batches_tracked not to be expanded, got strides ",
                    counts.sym_strides());
}

// The cumulative average of statistics whose counts differ: the statistics of the batch, as they
// are, go to copies first.
void blend(const Running& running, const OptionalTensor& batch_mean,
           const OptionalTensor& batch_var) {
  auto weight = (*running.count + 1).to(at::kDouble).reciprocal();
  while (weight.dim() < running.mean->dim()) weight = weight.unsqueeze(-1);
  running.mean->mul_(1 - weight).add_(*batch_mean * weight);
  running.var->mul_(1 - weight).add_(*batch_var * weight);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_train(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& mask, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    at::IntArrayRef axis, std::optional<double> momentum, double eps, bool unbiased,
    OptionalString activation, OptionalDType dtype, OptionalFormat relu_bits_format) {
  const auto norm = Check<c10::SymInt>::batch_norm_train({input, weight, bias, residual, mask},
                                                         std::nullopt, std::nullopt, std::nullopt,
                                                         axis, momentum, eps, activation, dtype);
  const Level level(input, weight, bias, residual, mask, running_mean, running_var,
                    num_batches_tracked);
  const auto call = [&](const Tensor& x, const OptionalTensor& w, const OptionalTensor& b,
                        const OptionalTensor& r, const OptionalTensor& m, const Running& running,
                        at::IntArrayRef axes, std::optional<double> decay,
                        OptionalFormat bits_format = {}) {
    return op::batch_norm_train().call(x, w, b, r, m, running.mean, running.var, running.count,
                                       axes, decay, eps, unbiased, activation, dtype, bits_format);
  };
  const auto is_same_for_all = !level.any_mapped(input, mask);
  Running running{running_mean, running_var, num_batches_tracked};
  if (is_same_for_all && !level.any_mapped(running_mean, running_var, num_batches_tracked)) {
    if (!level.any_mapped(weight, bias, residual)) {
      return call(input, weight, bias, residual, mask, running, axis, momentum, relu_bits_format);
    }
    if (has(running_mean) || has(num_batches_tracked)) {
      call(input, {}, {}, {}, mask, running, axis, momentum);
      running = {};
    }
  }
  TORCH_CHECK_VALUE(
      !has(running.mean) || (level.is_mapped(running.mean) && level.is_mapped(running.var)),
      "batch_norm: expected running_mean and running_var to be mapped by vmap like the input, "
      "since they are updated in place, got in_dims=None; batch_norm_functional returns new ones "
      "instead");
  auto own = running;  // what the operator updates
  for (auto* t : {&own.mean, &own.var}) *t = level.front(*t);
  auto decay = momentum;
  if (level.is_mapped(own.count)) {
    running = {own.mean, own.var, level.front(own.count)};
    own.count.reset();
    if (has(own.mean) && !momentum.has_value()) {
      own.mean = running.mean->clone();
      own.var = running.var->clone();
      decay = 1.0;
    }
  }
  const auto x = level.front(input);
  if (level.is_mapped(num_batches_tracked)) {
    check_counts(num_batches_tracked, *running.count);
    if (has(running.mean)) {
      Check<c10::SymInt>::batch_norm_train({x, {}, {}, {}, {}}, running.mean, running.var,
                                           std::nullopt, with_mapped_axis(axis),
                                           /*momentum=*/0.0, eps, activation, dtype);
    }
  }
  // Without bits, which have no mapped axis.
  const auto [y, mean, rstd, no_bits] =
      call(x, level.front(weight), level.front(bias), level.front(residual),
           level.front_of_rank(mask, input.dim()), own, with_mapped_axis(axis), decay);
  if (level.is_mapped(num_batches_tracked) && x.sym_numel() != 0) {
    if (has(own.mean) && !momentum.has_value()) blend(running, own.mean, own.var);
    running.count->add_(1);
  }
  return {level.wrap(y), level.wrap_flat(mean, norm.channels), level.wrap_flat(rstd, norm.channels),
          no_bits};
}

std::tuple<Tensor, Tensor> batch_norm_eval(const Tensor& input, const OptionalTensor& weight,
                                           const OptionalTensor& bias,
                                           const OptionalTensor& residual,
                                           const Tensor& running_mean, const Tensor& running_var,
                                           at::IntArrayRef axis, double eps,
                                           OptionalString activation, OptionalDType dtype) {
  const auto norm =
      Check<c10::SymInt>::batch_norm_eval({input, weight, bias, residual, std::nullopt},
                                          running_mean, running_var, axis, eps, activation, dtype);
  const Level level(input, weight, bias, residual, running_mean, running_var);
  const auto call = [&](const Tensor& x, const OptionalTensor& w, const OptionalTensor& b,
                        const OptionalTensor& r, const Tensor& mean, const Tensor& var,
                        at::IntArrayRef axes) {
    return op::batch_norm_eval().call(x, w, b, r, mean, var, axes, eps, activation, dtype);
  };
  if (level.any_mapped(weight, bias, running_mean, running_var)) {
    const auto [y, rstd] =
        call(level.front(input), level.front(weight), level.front(bias), level.front(residual),
             level.front(running_mean), level.front(running_var), with_mapped_axis(axis));
    return {level.wrap(y), level.wrap_flat(rstd, norm.channels)};
  }
  if (!level.any_mapped(input, residual)) {
    return call(input, weight, bias, residual, running_mean, running_var, axis);
  }
  // The same map for all: the mapped axis is reduced, and nothing is expanded.
  const auto [y, rstd] = call(level.front(input), weight, bias, level.front(residual), running_mean,
                              running_var, shifted(axis));
  return {level.wrap(y), rstd};
}

Gradients batch_norm_backward(const Tensor& grad_output, const Tensor& input,
                              const OptionalTensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& residual, const OptionalTensor& mask,
                              const Tensor& mean, const Tensor& rstd, at::IntArrayRef axis,
                              bool batch_statistics, double eps, OptionalString activation,
                              OutputMask output_mask, const OptionalTensor& relu_bits,
                              OptionalFormat relu_bits_format) {
  Check<c10::SymInt>::batch_norm_backward(grad_output, {input, weight, bias, residual, mask}, mean,
                                          rstd, axis, batch_statistics, eps, activation, relu_bits,
                                          relu_bits_format);
  const auto added =
      has(relu_bits) ? OptionalTensor(residual_of(*relu_bits, *relu_bits_format, input)) : residual;
  const Level level(grad_output, input, weight, bias, added, mask, mean, rstd);
  const auto call = [&](const Tensor& dy, const Tensor& x, const OptionalTensor& w,
                        const OptionalTensor& b, const OptionalTensor& r, const OptionalTensor& m,
                        const Tensor& mu, const Tensor& rs, at::IntArrayRef axes) {
    return op::batch_norm_backward().call(dy, x, w, b, r, m, mu, rs, axes, batch_statistics, eps,
                                          activation, output_mask, std::nullopt, std::nullopt);
  };
  if (!level.any_mapped(grad_output, input, weight, bias, added, mask, mean, rstd)) {
    return call(grad_output, input, weight, bias, added, mask, mean, rstd, axis);
  }
  const auto flat = [&](const Tensor& t) { return level.front(t).flatten(0, 1); };
  const auto [x, w, b, r] =
      call(level.front(grad_output), level.front(input), level.front(weight), level.front(bias),
           level.front(added), level.front_of_rank(mask, input.dim()),
           batch_statistics ? flat(mean) : level.front(mean), flat(rstd), with_mapped_axis(axis));
  return {level.wrap(x), level.wrap(w), level.wrap(b), level.wrap(r)};
}

}  // namespace

TORCH_LIBRARY_IMPL(normcore, FuncTorchBatched, m) {
  m.impl("_batch_norm_train", TORCH_FN(batch_norm_train));
  m.impl("_batch_norm_eval", TORCH_FN(batch_norm_eval));
  m.impl("_batch_norm_backward", TORCH_FN(batch_norm_backward));
}

}  // namespace normcore::vmap
