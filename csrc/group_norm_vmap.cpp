// Batching rules of group norm: the mapped axis is another kept axis. Parameters that are mapped,
// or whose gradient is wanted for every index, are given for every sample.
#include <torch/library.h>

#include "vmap.h"

namespace normcore::vmap {
namespace {

// The axes of a call, with the mapped one in front.
class MappedAxes {
 public:
  MappedAxes(const CheckedNorm<c10::SymInt>& norm, const Tensor& input)
      : kept_(norm.axes.kept.size()) {
    for (const auto d : norm.axes.feature) feature.push_back(d + 1);
    reduction = feature;
    for (const auto d : norm.axes.reduced) reduction.push_back(d + 1);
    for (const auto d : norm.axes.kept) samples_.push_back(input.sym_size(d));
  }

  at::DimVector feature, reduction;

  // A parameter [B, *features] or [B, *kept, *features], as the latter.
  OptionalTensor per_sample(const OptionalTensor& t) const {
    if (!has(t) || is_per_sample(*t)) return t;
    auto shape = c10::SymDimVector{t->sym_size(0)};
    for (const auto& size : samples_) shape.push_back(size);
    auto result = *t;
    for (std::size_t i = 0; i < kept_; ++i) result = result.unsqueeze(1);
    for (std::size_t i = 0; i < feature.size(); ++i) shape.push_back(t->sym_size(1 + i));
    return result.expand_symint(shape);
  }
  // The gradient of a parameter [B, ...] from that of every sample.
  Tensor sum_to(const Tensor& gradient, const OptionalTensor& t) const {
    if (!gradient.defined() || is_per_sample(*t) || kept_ == 0) return gradient;
    at::DimVector axes;
    for (std::size_t i = 0; i < kept_; ++i) axes.push_back(static_cast<std::int64_t>(1 + i));
    return gradient.sum(axes);
  }

 private:
  bool is_per_sample(const Tensor& t) const {
    return t.dim() == static_cast<std::int64_t>(1 + kept_ + feature.size());
  }

  std::size_t kept_;
  c10::SymDimVector samples_;
};

std::tuple<Tensor, Tensor, Tensor> group_norm_forward(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& mask, std::int64_t num_groups,
    at::IntArrayRef axis, at::OptionalIntArrayRef reduction_axes, double eps,
    OptionalString activation, OptionalDType dtype) {
  const auto norm =
      Check<c10::SymInt>::group_norm({input, weight, bias, residual, mask}, num_groups, axis,
                                     reduction_axes, eps, activation, dtype);
  const MappedAxes axes(norm, input);
  const Level level(input, weight, bias, residual, mask);
  if (!level.any_mapped(input, weight, bias, residual, mask)) {
    return op::group_norm_forward().call(input, weight, bias, residual, mask, num_groups, axis,
                                         reduction_axes, eps, activation, dtype);
  }
  const auto shares_parameters = !level.any_mapped(weight, bias) && !norm.affine_per_sample;
  const auto parameter = [&](const OptionalTensor& t) {
    return shares_parameters ? t : axes.per_sample(level.front(t));
  };
  const auto [y, mean, rstd] = op::group_norm_forward().call(
      level.front(input), parameter(weight), parameter(bias), level.front(residual),
      level.front_of_rank(mask, input.dim()), num_groups, axes.feature,
      at::IntArrayRef(axes.reduction), eps, activation, dtype);
  return {level.wrap(y), level.wrap_flat(mean, norm.samples), level.wrap_flat(rstd, norm.samples)};
}

Gradients group_norm_backward(const Tensor& grad_output, const Tensor& input,
                              const OptionalTensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& residual, const OptionalTensor& mask,
                              const Tensor& mean, const Tensor& rstd, std::int64_t num_groups,
                              at::IntArrayRef axis, at::OptionalIntArrayRef reduction_axes,
                              double eps, OptionalString activation, OutputMask output_mask) {
  const auto norm = Check<c10::SymInt>::group_norm_backward(
      grad_output, {input, weight, bias, residual, mask}, mean, rstd, num_groups, axis,
      reduction_axes, eps, activation);
  const MappedAxes axes(norm, input);
  const Level level(grad_output, input, weight, bias, residual, mask, mean, rstd);
  if (!level.any_mapped(grad_output, input, weight, bias, residual, mask, mean, rstd)) {
    return op::group_norm_backward().call(grad_output, input, weight, bias, residual, mask, mean,
                                          rstd, num_groups, axis, reduction_axes, eps, activation,
                                          output_mask);
  }
  const auto w = level.front(weight), b = level.front(bias);
  const auto flat = [&](const Tensor& t) { return level.front(t).flatten(0, 1); };
  const auto [grad_input, grad_weight, grad_bias, grad_residual] = op::group_norm_backward().call(
      level.front(grad_output), level.front(input), axes.per_sample(w), axes.per_sample(b),
      level.front(residual), level.front_of_rank(mask, input.dim()), flat(mean), flat(rstd),
      num_groups, axes.feature, at::IntArrayRef(axes.reduction), eps, activation, output_mask);
  return {level.wrap(grad_input), level.wrap(axes.sum_to(grad_weight, w)),
          level.wrap(axes.sum_to(grad_bias, b)), level.wrap(grad_residual)};
}

}  // namespace

TORCH_LIBRARY_IMPL(normcore, FuncTorchBatched, m) {
  m.impl("_group_norm", TORCH_FN(group_norm_forward));
  m.impl("_group_norm_backward", TORCH_FN(group_norm_backward));
}

}  // namespace normcore::vmap
