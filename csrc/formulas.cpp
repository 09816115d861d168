#include "formulas.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/nan_to_num.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace normcore {
namespace {

// The input as [sample, group, member, position]: statistics are taken over the last two axes.
class SliceView {
 public:
  SliceView(const Tensor& input, const CheckedNorm<c10::SymInt>& norm) : norm_(norm) {
    for (const auto& axes : {norm.axes.kept, norm.axes.feature, norm.axes.reduced}) {
      for (const auto axis : axes) {
        order_.push_back(axis);
        permuted_.push_back(input.sym_size(axis));
      }
    }
    inverse_ = inverse(order_);
    memory_order_ = memory_order(input);
    c10::SymInt positions = 1;
    for (const auto axis : norm.axes.reduced) positions = positions * input.sym_size(axis);
    sizes_ = {norm.samples, norm.num_groups, norm.group_size, positions};
  }

  Tensor of_elements(const Tensor& t) const { return t.permute(order_).reshape_symint(sizes_); }

  Tensor of_parameter(const Tensor& t) const {
    return t.reshape_symint(
        {norm_.affine_per_sample ? sizes_[0] : c10::SymInt(1), sizes_[1], sizes_[2], 1});
  }

  Tensor of_statistic(const Tensor& t) const {
    return t.reshape_symint({sizes_[0], sizes_[1], 1, 1});
  }

  // In the memory format of the input, as the kernels write gradients.
  Tensor to_elements(const Tensor& t) const {
    return t.reshape_symint(permuted_)
        .permute(inverse_)
        .permute(memory_order_)
        .contiguous()
        .permute(inverse(memory_order_));
  }

  Tensor sum_to_parameter(const Tensor& t, const Tensor& parameter) const {
    const auto sum = norm_.affine_per_sample ? t.sum(3) : t.sum(at::IntArrayRef({0, 3}));
    return sum.reshape_symint(parameter.sym_sizes());
  }

 private:
  static at::DimVector inverse(const at::DimVector& order) {
    at::DimVector result(order.size());
    for (std::size_t d = 0; d < order.size(); ++d) result[order[d]] = static_cast<std::int64_t>(d);
    return result;
  }

  // Axes of what has the input's memory format, outermost first.
  static at::DimVector memory_order(const Tensor& input) {
    const auto like = at::empty_like(input, input.options().device(at::kMeta));
    const auto strides = like.sym_strides();
    at::DimVector order(strides.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](auto a, auto b) { return strides[a] > strides[b]; });
    return order;
  }

  const CheckedNorm<c10::SymInt>& norm_;
  at::DimVector order_, inverse_, memory_order_;
  c10::SymDimVector permuted_, sizes_;
};

Tensor activation_backward(const Tensor& grad, const Tensor& z, kernels::Activation activation) {
  switch (activation) {
    case kernels::Activation::kNone:
      return grad;
    case kernels::Activation::kReLU:
      return at::threshold_backward(grad, z, 0);
    case kernels::Activation::kSiLU: {
      const auto sigmoid = at::sigmoid(z);
      return grad * sigmoid * (1 + z * (1 - sigmoid));
    }
    case kernels::Activation::kGelu:
      return at::gelu_backward(grad, z, "none");
    case kernels::Activation::kGeluTanh:
      return at::gelu_backward(grad, z, "tanh");
  }
  TORCH_INTERNAL_ASSERT(false, "unknown activation");
}

Tensor mean_over_slices(const Tensor& t) { return t.mean({2, 3}, /*keepdim=*/true); }
Tensor sum_over_slices(const Tensor& t) { return t.sum({2, 3}, /*keepdim=*/true); }

}  // namespace

Gradients norm_backward_formula(const Tensor& grad_output, const Operands& operands,
                                const CheckedNorm<c10::SymInt>& norm, const SavedStatistics& saved,
                                const OutputMask& output_mask) {
  const auto& [input, weight, bias, residual, mask_of_user] = operands;
  const auto dtype = compute_dtype(input.scalar_type());
  const SliceView view(input, norm);
  const bool has_activation = norm.activation != kernels::Activation::kNone;

  const auto grad_y = view.of_elements(grad_output.to(dtype));
  auto x = view.of_elements(input.to(dtype));
  auto added = has(residual) && has_activation ? view.of_elements(residual->to(dtype)) : Tensor();
  Tensor mask;
  if (has(mask_of_user)) {
    mask = view.of_elements(mask_of_user->to(at::kBool).expand_symint(input.sym_sizes()));
    const auto unused = ~mask & (grad_y == 0);
    const auto drop = [&](const Tensor& t) {
      return at::where(unused & ~at::isfinite(t), at::zeros_like(t), t);
    };
    x = drop(x);
    if (added.defined()) added = drop(added);
  }

  // share: weight of each element in the statistics, 1 / count.
  // invalid: gradients that come in where a slice has no valid value, and its output is NaN.
  Tensor centred, rstd, share, invalid;
  if (saved.are_constants) {
    centred = x - view.of_statistic(saved.mean.to(dtype));
    rstd = view.of_statistic(saved.rstd);
  } else {
    // A constant near the mean is taken off first: a large mean costs no digits of what follows.
    x = x - view.of_statistic(at::nan_to_num(saved.mean.detach(), 0.0, 0.0, 0.0).to(dtype));
  }
  if (!saved.are_constants && mask.defined()) {
    share = mask.to(dtype);
    const auto count = sum_over_slices(share);
    share = share / count.clamp_min(1);  // a slice without a valid value: all of its shares are 0
    const auto valid = at::where(mask, x, at::zeros_like(x));
    centred = x - sum_over_slices(valid * share);
    const auto valid_centred = at::where(mask, centred, at::zeros_like(x));
    const auto var = sum_over_slices(valid_centred * valid_centred * share);
    rstd = at::where(count > 0, (var + norm.eps).rsqrt(), at::zeros_like(var));
    invalid = (count == 0) & (grad_y != 0);
  } else if (!saved.are_constants) {
    centred = x - mean_over_slices(x);
    rstd = (mean_over_slices(centred * centred) + norm.eps).rsqrt();
  }
  const auto poison = [&](const Tensor& t) {
    return invalid.defined() ? at::where(invalid, std::nan(""), t) : t;
  };
  const auto xhat = centred * rstd;
  const auto scale = has(weight) ? view.of_parameter(weight->to(dtype)) : Tensor();

  auto grad = grad_y;
  if (has_activation) {
    auto z = scale.defined() ? xhat * scale : xhat;
    if (has(bias)) z = z + view.of_parameter(bias->to(dtype));
    if (added.defined()) z = z + added;
    grad = poison(activation_backward(grad_y, z, norm.activation));
  }

  Gradients result;
  auto& [grad_input, grad_weight, grad_bias, grad_residual] = result;
  if (output_mask[0]) {
    const auto h = scale.defined() ? grad * scale : grad;
    auto grad_x = h;
    if (share.defined()) {
      grad_x = h - share * (sum_over_slices(h) + xhat * sum_over_slices(h * xhat));
    } else if (!saved.are_constants) {
      grad_x = h - mean_over_slices(h) - xhat * mean_over_slices(h * xhat);
    }
    grad_input = view.to_elements(poison(grad_x * rstd)).to(input.scalar_type());
  }
  if (output_mask[1] && has(weight)) {
    grad_weight = view.sum_to_parameter(poison(grad * xhat), *weight).to(weight->scalar_type());
  }
  if (output_mask[2] && has(bias)) {
    grad_bias = view.sum_to_parameter(grad, *bias).to(bias->scalar_type());
  }
  if (output_mask[3] && has(residual)) {
    grad_residual = view.to_elements(grad).to(residual->scalar_type());
  }
  return result;
}

}  // namespace normcore
