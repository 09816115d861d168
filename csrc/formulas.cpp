#include "formulas.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/group_norm.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/nan_to_num.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "context.h"
#include "process_group.h"
#include "subclass.h"

namespace normcore {
namespace {

at::DimVector inverse(const at::DimVector& order) {
  at::DimVector result(order.size());
  for (std::size_t d = 0; d < order.size(); ++d) result[order[d]] = static_cast<std::int64_t>(d);
  return result;
}

// Axes of what has the input's memory format, outermost first.
at::DimVector memory_order(const Tensor& input) {
  const auto like = at::empty_like(input, input.options().device(at::kMeta));
  const auto strides = like.sym_strides();
  at::DimVector order(strides.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](auto a, auto b) { return strides[a] > strides[b]; });
  return order;
}

// In the memory format of the input, as the kernels write outputs and gradients.
Tensor in_memory_format_of(const Tensor& input, const Tensor& t) {
  const auto order = memory_order(input);
  if (std::is_sorted(order.begin(), order.end())) return t.contiguous();
  return t.permute(order).contiguous().permute(inverse(order));
}

// The input as [sample, group, member, position], or, where every channel has statistics of all
// samples, as it is: DTensor does not flatten axes that are sharded unevenly.
class SliceView {
 public:
  SliceView(const Tensor& input, const CheckedNorm<c10::SymInt>& norm)
      : norm_(norm),
        input_(input),
        is_as_given_(norm.axes.kept.empty() && norm.group_size.maybe_as_int() == 1) {
    for (const auto& axes : {norm.axes.kept, norm.axes.feature, norm.axes.reduced}) {
      for (const auto axis : axes) {
        order_.push_back(axis);
        permuted_.push_back(input.sym_size(axis));
      }
    }
    inverse_ = inverse(order_);
    for (const auto axis : norm.axes.reduced) positions_ = positions_ * input.sym_size(axis);
    if (is_as_given_) {
      sizes_.assign(input.dim(), 1);
      for (const auto axis : norm.axes.feature) sizes_[axis] = input.sym_size(axis);
      reduced_ = norm.axes.reduced;
    } else {
      sizes_ = {norm.samples, norm.num_groups, norm.group_size, positions_};
      reduced_ = {2, 3};
    }
  }

  // Values in a slice.
  c10::SymInt slice_size() const { return norm_.group_size * positions_; }

  Tensor of_elements(const Tensor& t) const {
    return is_as_given_ ? t : t.permute(order_).reshape_symint(sizes_);
  }

  Tensor of_parameter(const Tensor& t) const {
    if (is_as_given_) return t.reshape_symint(sizes_);
    return t.reshape_symint(
        {norm_.affine_per_sample ? sizes_[0] : c10::SymInt(1), sizes_[1], sizes_[2], 1});
  }

  Tensor of_statistic(const Tensor& t) const {
    if (is_as_given_) return t.reshape_symint(sizes_);
    return t.reshape_symint({sizes_[0], sizes_[1], 1, 1});
  }
  // From one value per channel to the shape of its parameters.
  Tensor to_vector(const Tensor& t) const {
    c10::SymDimVector sizes;
    for (const auto axis : norm_.axes.feature) sizes.push_back(input_.sym_size(axis));
    return t.reshape_symint(sizes);
  }

  Tensor to_elements(const Tensor& t) const {
    return in_memory_format_of(input_,
                               is_as_given_ ? t : t.reshape_symint(permuted_).permute(inverse_));
  }

  Tensor sum_over_slices(const Tensor& t) const {
    // Once, while it is small: DTensor would add up what follows from it, values and gradients.
    return reduced_.empty() ? t : gathered(t.sum(reduced_, /*keepdim=*/true));
  }
  Tensor sum_to_parameter(const Tensor& t, const Tensor& parameter) const {
    if (is_as_given_) return to_vector(sum_over_slices(t));
    const auto sum = norm_.affine_per_sample ? t.sum(3) : t.sum(at::IntArrayRef({0, 3}));
    return sum.reshape_symint(parameter.sym_sizes());
  }

 private:
  const CheckedNorm<c10::SymInt>& norm_;
  const Tensor& input_;
  bool is_as_given_;
  at::DimVector order_, inverse_, reduced_;
  c10::SymDimVector permuted_, sizes_;
  c10::SymInt positions_ = 1;
};

Tensor activate(const Tensor& z, kernels::Activation activation) {
  switch (activation) {
    case kernels::Activation::kNone:
      return z;
    case kernels::Activation::kReLU:
      return at::relu(z);
    case kernels::Activation::kSiLU:
      return at::silu(z);
    case kernels::Activation::kGelu:
      return at::gelu(z, "none");
    case kernels::Activation::kGeluTanh:
      return at::gelu(z, "tanh");
  }
  TORCH_INTERNAL_ASSERT(false, "unknown activation");
}

// gelu's tanh form as z * sigmoid(u(z)), at z moved to where the sigmoid is not yet 0 or 1 in every
// digit: aten's own has derivatives that are NaN beyond.
struct GeluTanh {
  Tensor z, rate, sigmoid, complement;  // rate: u'(z); sigmoid(u), sigmoid(-u)

  explicit GeluTanh(const Tensor& far) : z(far.clamp(-40, 40)) {
    const auto u = 2 * kernels::kSqrtTwoOverPi * (z + kernels::kGeluTanhCubic * z.pow(3));
    rate = 2 * kernels::kSqrtTwoOverPi * (1 + 3 * kernels::kGeluTanhCubic * z * z);
    sigmoid = at::sigmoid(u);
    complement = at::sigmoid(-u);
  }
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
    case kernels::Activation::kGeluTanh: {
      const GeluTanh g(z);
      return grad * g.sigmoid * (1 + g.z * g.complement * g.rate);
    }
  }
  TORCH_INTERNAL_ASSERT(false, "unknown activation");
}

// The second derivative; 0 at kinks.
Tensor activation_curvature(const Tensor& z, kernels::Activation activation) {
  switch (activation) {
    case kernels::Activation::kNone:
    case kernels::Activation::kReLU:
      return at::zeros_like(z);
    case kernels::Activation::kSiLU: {
      const auto sigmoid = at::sigmoid(z), complement = at::sigmoid(-z);
      return sigmoid * complement * (2 + z * (complement - sigmoid));
    }
    case kernels::Activation::kGelu: {
      const auto near = z.clamp(-40, 40),
                 density = kernels::kInvSqrtTwoPi * (-0.5 * near * near).exp();
      return density * (2 - near * near);
    }
    case kernels::Activation::kGeluTanh: {
      const GeluTanh g(z);
      const auto turn = g.rate * g.rate * (g.complement - g.sigmoid) +
                        12 * kernels::kSqrtTwoOverPi * kernels::kGeluTanhCubic * g.z;
      return g.sigmoid * g.complement * (2 * g.rate + g.z * turn);
    }
  }
  TORCH_INTERNAL_ASSERT(false, "unknown activation");
}

Tensor zero_unless(const Tensor& condition, const Tensor& t) {
  return at::where(condition, t, at::zeros_like(t));
}

// A norm as functions of its operands, all of them as SliceView shows them and in `dtype`.
class Formula {
 public:
  Formula(const Operands& operands, const CheckedNorm<c10::SymInt>& norm,
          const SavedStatistics& saved)
      : norm_(norm),
        saved_(saved),
        dtype_(compute_dtype(operands.input.scalar_type())),
        view_(operands.input, norm),
        x_(elements(operands.input)),
        scale_(parameter(operands.weight)),
        bias_(parameter(operands.bias)) {
    if (has(operands.residual)) added_ = elements(*operands.residual);
    if (has(operands.mask)) {
      mask_ =
          view_.of_elements(operands.mask->to(at::kBool).expand_symint(operands.input.sym_sizes()));
    }
  }

  const SliceView& view() const { return view_; }
  Tensor elements(const Tensor& t) const { return view_.of_elements(t.to(dtype_)); }
  Tensor parameter(const OptionalTensor& t) const {
    return has(t) ? view_.of_parameter(t->to(dtype_)) : Tensor();
  }

  // Masked-out values that no gradient comes from, whatever they hold.
  void drop_unused(const Tensor& grad_y) {
    if (mask_.defined()) drop_where(~mask_ & (grad_y == 0));
  }
  // Of the output, which is NaN there: all that are masked out.
  void drop_masked_out() {
    if (!mask_.defined()) return;
    is_lost_ = ~mask_ & ~at::isfinite(added_.defined() ? x_ + added_ : x_);
    drop_where(~mask_);
  }

  void normalize() {
    if (saved_.are_constants) {
      rstd_ = view_.of_statistic(saved_.rstd);
      xhat_ = (x_ - view_.of_statistic(saved_.mean.to(dtype_))) * rstd_;
      return;
    }
    if (saved_.share.defined()) {
      share_ = view_.of_statistic(saved_.share.to(dtype_));
      is_empty_ = share_ == 0;
      if (mask_.defined()) share_ = share_ * mask_.to(dtype_);
    } else if (mask_.defined()) {
      share_ = mask_.to(dtype_);
      count_ = sum_over_slices(share_);
      is_empty_ = count_ == 0;
      share_ = share_ / count_.clamp_min(1);  // without a valid value all shares are 0
    }
    // A constant near the mean is taken off first: a large mean costs no digits of what follows.
    const auto constant = constant_near_the_mean();
    const auto x = x_ - constant;
    const auto rest = mean_of_slice(x);
    const auto centred = x - rest;
    mean_ = constant + rest;
    var_ = mean_of_slice(centred, centred);
    rstd_ = (var_ + norm_.eps).rsqrt();
    if (is_empty_.defined()) rstd_ = zero_unless(~is_empty_, rstd_);
    xhat_ = centred * rstd_;
    if (dropped_.defined()) xhat_ = zero_unless(~dropped_, xhat_);
  }

  const Tensor& xhat() const { return xhat_; }
  const Tensor& rstd() const { return rstd_; }
  bool has_constant_statistics() const { return saved_.are_constants; }
  BatchMoments moments(bool unbiased) const {
    auto var = var_;
    if (unbiased && count_.defined()) {
      var = var * count_ / (count_ - 1).clamp_min(1);
    } else if (unbiased) {
      const auto count = view_.slice_size();
      var = var * at::Scalar(count) / at::Scalar((count - 1).max(1));
    }
    const auto vector = [&](const Tensor& t) {
      return t.defined() ? view_.to_vector(t.detach()) : t;
    };
    return {vector(mean_), vector(var), vector(is_empty_)};
  }
  Tensor output() const {
    auto y = poisoned(activate(z(), norm_.activation));
    if (is_lost_.defined()) y = at::where(is_lost_, std::nan(""), y);
    return view_.to_elements(y).to(norm_.dtype);
  }
  Tensor times_scale(const Tensor& t) const { return scale_.defined() ? t * scale_ : t; }

  // grad_y * activation'(z): the derivative is the same in both directions.
  Tensor through_activation(const Tensor& t) const {
    return has_activation() ? activation_backward(t, z(), norm_.activation) : t;
  }

  bool is_curved() const { return kernels::is_curved(norm_.activation); }
  // t * activation''(z)
  Tensor times_curvature(const Tensor& t) const {
    return t * activation_curvature(z(), norm_.activation);
  }

  // That of z.
  Tensor tangent(const Tangents& tangents) const {
    auto tangent = at::zeros_like(xhat_);
    if (tangents.input.defined()) {
      const auto of_xhat = forward_through_statistics(elements(tangents.input));
      tangent = tangent + times_scale(of_xhat);
    }
    if (tangents.weight.defined()) tangent = tangent + xhat_ * parameter(tangents.weight);
    if (tangents.bias.defined()) tangent = tangent + parameter(tangents.bias);
    if (tangents.residual.defined()) tangent = tangent + elements(tangents.residual);
    return tangent;
  }

  // Means over what counts in a slice.
  Tensor mean_of_slice(const Tensor& t) const {
    return share_.defined() ? shared_sum(t) : mean_over_slices(t);
  }
  Tensor mean_of_slice(const Tensor& a, const Tensor& b) const {
    return share_.defined() ? shared_sum(a, b) : mean_over_slices(a * b);
  }
  // The transpose: sums of slices, in shares of those that count.
  Tensor shared(const Tensor& t) const {
    return share_.defined() ? share_ * sum_over_slices(t) : mean_over_slices(t);
  }

  // The derivative of xhat with respect to x, applied to a tangent ...
  Tensor forward_through_statistics(const Tensor& t) const {
    if (saved_.are_constants) return t * rstd_;
    return (t - mean_of_slice(t) - xhat_ * mean_of_slice(t, xhat_)) * rstd_;
  }
  // ... and its transpose, applied to a gradient.
  Tensor backward_through_statistics(const Tensor& t) const {
    if (saved_.are_constants) return t * rstd_;
    return (t - shared(t) - xhat_ * shared(t * xhat_)) * rstd_;
  }

  // The output of a slice without a valid value is NaN; so is all that follows from it.
  Tensor poisoned(const Tensor& t) const {
    return is_empty_.defined() ? at::where(is_empty_, std::nan(""), t) : t;
  }
  Tensor poisoned_where(const Tensor& incoming, const Tensor& t) const {
    return is_empty_.defined() ? at::where(is_empty_ & incoming, std::nan(""), t) : t;
  }

 private:
  bool has_activation() const { return norm_.activation != kernels::Activation::kNone; }
  void drop_where(const Tensor& unused) {
    for (auto* t : {&x_, &added_}) {
      if (!t->defined()) continue;
      const auto is_dropped = unused & ~at::isfinite(*t);
      if (t == &x_) dropped_ = is_dropped;
      *t = zero_unless(~is_dropped, *t);
    }
  }
  Tensor z() const {
    auto z = times_scale(xhat_);
    if (bias_.defined()) z = z + bias_;
    if (added_.defined()) z = z + added_;
    return z;
  }
  Tensor constant_near_the_mean() const {
    if (saved_.mean.defined()) {
      return view_.of_statistic(at::nan_to_num(saved_.mean.detach(), 0.0, 0.0, 0.0).to(dtype_));
    }
    return mean_of_slice(x_.detach());
  }
  // Not mean(), whose shares DTensor would weigh alike.
  Tensor mean_over_slices(const Tensor& t) const {
    return sum_over_slices(t) / at::Scalar(view_.slice_size());
  }
  // Means over what counts. Zero before products: 0 * NaN would poison derivatives.
  Tensor counted(const Tensor& t) const { return mask_.defined() ? zero_unless(mask_, t) : t; }
  Tensor shared_sum(const Tensor& t) const { return sum_over_slices(counted(t) * share_); }
  Tensor shared_sum(const Tensor& a, const Tensor& b) const {
    return sum_over_slices(counted(a) * counted(b) * share_);
  }
  // Over whole slices, which may reach over several ranks.
  Tensor sum_over_slices(const Tensor& t) const {
    const auto own = view_.sum_over_slices(t);
    return saved_.group.empty() ? own : differentiable_all_reduce(own, saved_.group);
  }

  const CheckedNorm<c10::SymInt>& norm_;
  const SavedStatistics saved_;
  at::ScalarType dtype_;
  SliceView view_;
  Tensor x_, scale_, bias_, added_, mask_;
  Tensor xhat_, rstd_;
  Tensor mean_, var_;
  Tensor count_;  // of what the mask leaves; undefined without one
  Tensor share_;  // weight of each element in the statistics, 1 / count; undefined without a mask
  Tensor is_empty_, is_lost_;
  Tensor dropped_;  // values of x that count as the mean
};

// What aten's norms take as it is, and give back in the same memory format.
bool is_plain(const Operands& operands, const CheckedNorm<c10::SymInt>& norm) {
  const auto& input = operands.input;
  return norm.axes.feature == at::DimVector{1} && !has(operands.mask) &&
         input.is_contiguous(input.suggest_memory_format());
}

OptionalTensor to(const OptionalTensor& t, at::ScalarType dtype) {
  return has(t) ? OptionalTensor(t->to(dtype)) : std::nullopt;
}

Tensor with_epilogue(Tensor z, const Operands& operands, const CheckedNorm<c10::SymInt>& norm) {
  if (has(operands.residual)) z = z + operands.residual->to(z.scalar_type());
  return activate(z, norm.activation).to(norm.dtype);
}

}  // namespace

Tensor group_norm_formula(const Operands& operands, const CheckedNorm<c10::SymInt>& norm) {
  const auto& [input, weight, bias, residual, mask] = operands;
  const bool is_atens = is_plain(operands, norm) && operands.input.is_contiguous() &&
                        norm.axes.kept == at::DimVector{0} && !norm.affine_per_sample;
  if (!is_atens) {
    const Tensor none;
    Formula formula(operands, norm, {none, none});
    formula.drop_masked_out();
    formula.normalize();
    return formula.output();
  }
  const auto dtype = compute_dtype(input.scalar_type());
  const auto z =
      at::group_norm(input.to(dtype), norm.num_groups.guard_int(__FILE__, __LINE__),
                     to(weight, dtype), to(bias, dtype), norm.eps, /*cudnn_enabled=*/false);
  return with_epilogue(z, operands, norm);
}

std::tuple<Tensor, BatchMoments> batch_norm_train_formula(const Operands& operands,
                                                          const CheckedNorm<c10::SymInt>& norm,
                                                          bool unbiased) {
  const Tensor none;
  Formula formula(operands, norm, {none, none});
  formula.drop_masked_out();
  formula.normalize();
  return {formula.output(), formula.moments(unbiased)};
}

Tensor batch_norm_eval_formula(const Operands& operands, const CheckedNorm<c10::SymInt>& norm,
                               const Tensor& running_mean, const Tensor& running_var) {
  const auto& [input, weight, bias, residual, mask] = operands;
  const auto dtype = compute_dtype(input.scalar_type());
  const auto mean = running_mean.to(dtype), var = running_var.to(dtype);
  // vmap would run aten's batch norm sample by sample.
  if (!is_plain(operands, norm) || is_transformed()) {
    const auto rstd = (var + norm.eps).rsqrt();
    Formula formula(operands, norm, {mean, rstd, /*are_constants=*/true});
    formula.normalize();
    return formula.output();
  }
  const auto z = at::batch_norm(input.to(dtype), to(weight, dtype), to(bias, dtype), mean, var,
                                /*training=*/false, /*momentum=*/0.0, norm.eps,
                                /*cudnn_enabled=*/false);
  return with_epilogue(z, operands, norm);
}

Gradients norm_backward_formula(const Tensor& grad_output, const Operands& operands,
                                const CheckedNorm<c10::SymInt>& norm, const SavedStatistics& saved,
                                const OutputMask& output_mask) {
  const auto& [input, weight, bias, residual, mask] = operands;
  Formula formula(operands, norm, saved);
  const auto grad_y = formula.elements(grad_output);
  formula.drop_unused(grad_y);
  formula.normalize();
  const auto poisoned = [&](const Tensor& t) { return formula.poisoned_where(grad_y != 0, t); };
  const auto has_activation = norm.activation != kernels::Activation::kNone;
  const auto grad = has_activation ? poisoned(formula.through_activation(grad_y)) : grad_y;

  Gradients result;
  auto& [grad_input, grad_weight, grad_bias, grad_residual] = result;
  const auto& view = formula.view();
  if (output_mask[0]) {
    const auto grad_x = formula.backward_through_statistics(formula.times_scale(grad));
    grad_input = view.to_elements(poisoned(grad_x)).to(input.scalar_type());
  }
  if (output_mask[1] && has(weight)) {
    grad_weight =
        view.sum_to_parameter(poisoned(grad * formula.xhat()), *weight).to(weight->scalar_type());
  }
  if (output_mask[2] && has(bias)) {
    grad_bias = view.sum_to_parameter(grad, *bias).to(bias->scalar_type());
  }
  if (output_mask[3] && has(residual)) {
    grad_residual = view.to_elements(grad).to(residual->scalar_type());
  }
  return result;
}

Tensor norm_tangent_formula(const Operands& operands, const Tangents& tangents,
                            const CheckedNorm<c10::SymInt>& norm, const SavedStatistics& saved) {
  Formula formula(operands, norm, saved);
  formula.normalize();
  const auto tangent = formula.poisoned(formula.through_activation(formula.tangent(tangents)));
  return formula.view().to_elements(tangent).to(norm.dtype);
}

DoubleGradients norm_double_backward_formula(const Cotangents& cotangents,
                                             const Tensor& grad_output, const Operands& operands,
                                             const CheckedNorm<c10::SymInt>& norm,
                                             const SavedStatistics& saved,
                                             const DoubleOutputMask& output_mask) {
  const auto& [input, weight, bias, residual, mask] = operands;
  Formula formula(operands, norm, saved);
  const auto grad_y = formula.elements(grad_output);
  formula.drop_unused(grad_y);
  formula.normalize();
  const auto& xhat = formula.xhat();
  const auto& rstd = formula.rstd();
  const auto& view = formula.view();
  const auto poisoned = [&](const Tensor& t) { return formula.poisoned_where(grad_y != 0, t); };

  // Names of norm_input.h.
  const auto u = has(cotangents.input) ? formula.elements(*cotangents.input) : at::zeros_like(xhat);
  const auto v = formula.parameter(cotangents.weight);
  const auto q = formula.tangent(
      {value_or_undefined(cotangents.input), value_or_undefined(cotangents.weight),
       value_or_undefined(cotangents.bias), value_or_undefined(cotangents.residual)});
  const auto g = formula.through_activation(grad_y);
  const auto k = formula.is_curved() ? formula.times_curvature(grad_y * q) : at::zeros_like(grad_y);
  const auto grad_z = formula.is_curved() ? poisoned(k) : k;

  DoubleGradients result;
  auto& [grad_grad_output, grad_input, grad_weight, grad_bias, grad_residual] = result;
  if (output_mask[0]) {
    grad_grad_output =
        view.to_elements(poisoned(formula.through_activation(q))).to(grad_output.scalar_type());
  }
  if (output_mask[1]) {
    const auto h = formula.times_scale(g), e = formula.times_scale(k);
    auto grad_x = formula.backward_through_statistics(v.defined() ? e + v * g : e);
    if (!formula.has_constant_statistics()) {
      const auto p0 = formula.mean_of_slice(u), p1 = formula.mean_of_slice(u, xhat);
      const auto sum = formula.shared(h), hx = formula.shared(h * xhat);
      const auto l = formula.shared(h * u) - p0 * sum - p1 * hx;
      grad_x =
          grad_x + rstd * rstd * (p0 * hx + p1 * sum + xhat * (2 * p1 * hx - l) - p1 * h - hx * u);
    }
    grad_input = view.to_elements(poisoned(grad_x)).to(input.scalar_type());
  }
  if (output_mask[2] && has(weight)) {
    const auto sum = g * formula.forward_through_statistics(u) + k * xhat;
    grad_weight = view.sum_to_parameter(poisoned(sum), *weight).to(weight->scalar_type());
  }
  if (output_mask[3] && has(bias)) {
    grad_bias = view.sum_to_parameter(grad_z, *bias).to(bias->scalar_type());
  }
  if (output_mask[4] && has(residual)) {
    grad_residual = view.to_elements(grad_z).to(residual->scalar_type());
  }
  return result;
}

}  // namespace normcore
