// The sums over ranks, and derivatives through them. A norm here is no operator of its own: it is
// composed of those of sync.cpp and of the functional collectives, below a graph node of its own,
// so that graphs that record it hold the collectives. Derivatives in forward mode and of higher
// order are those of the formulas, whose sums are over ranks as well (formulas.h).
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros_like.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "autograd.h"
#include "formulas.h"
#include "sync.h"

namespace normcore {
namespace {

namespace ta = autograd::ta;

using autograd::kInput;
using autograd::kMean;
using autograd::kRstd;
// Behind what every norm keeps.
constexpr std::size_t kShare = kRstd + 1;

struct SyncBackwardRule {
  static constexpr std::size_t kSaved = kShare + 1, kResults = 4;
  // The other ranks wait for the sums of this one, whether it has a gradient or not.
  static constexpr bool kConcernsOthers = true;
  static const char* name() { return "NormcoreSyncNormBackward"; }

  std::int64_t num_groups = 0;
  std::vector<std::int64_t> axis;
  std::optional<std::vector<std::int64_t>> reduction_axes;
  double eps = 0.0;
  kernels::Activation activation = kernels::Activation::kNone;
  std::string group;

  template <class Self, class F>
  static void for_each_member(Self& self, F&& f) {
    f(self.num_groups);
    f(self.axis);
    f(self.reduction_axes);
    f(self.eps);
    f(self.activation);
    f(self.group);
  }

  ta::variable_list backward(const ta::variable_list& gradients, const OutputMask& wanted,
                             const std::array<Tensor, kSaved>& t) const {
    const auto grad_output = gradients[0].defined() ? gradients[0] : at::zeros_like(t[kInput]);
    const autograd::SavedOperands saved(t);
    const auto operands = saved.get();
    const auto& [input, weight, bias, residual, mask] = operands;
    if (c10::GradMode::is_enabled() ||
        autograd::have_tangent(grad_output, input, weight, bias, residual)) {
      return by_formula(grad_output, operands, t, wanted);
    }
    const at::AutoDispatchBelowAutograd guard;
    const auto name = activation_name(activation);
    const bool has_activation = activation != kernels::Activation::kNone;
    const std::array<bool, 3> of_sums{wanted[0], wanted[1], wanted[2]};
    ta::variable_list result(kResults);
    OptionalTensor total;
    if (of_sums != std::array<bool, 3>{}) {
      auto [sums, grad_weight, grad_bias] = op::sync_gradient_sums().call(
          grad_output, input, weight, bias, residual, mask, t[kMean], t[kRstd], num_groups, axis,
          reduction(), eps, name, of_sums);
      if (wanted[0]) total = all_reduce(norm_name(num_groups), sums, group);
      result[1] = std::move(grad_weight);
      result[2] = std::move(grad_bias);
    }
    const std::array<bool, 2> of_elements{wanted[0], wanted[3] && has_activation};
    if (of_elements != std::array<bool, 2>{}) {
      std::tie(result[0], result[3]) = op::sync_gradient().call(
          grad_output, input, weight, bias, residual, mask, t[kMean], t[kRstd], total, t[kShare],
          num_groups, axis, reduction(), eps, name, of_elements);
    }
    if (wanted[3] && !has_activation) result[3] = grad_output;
    return result;
  }

 private:
  at::OptionalIntArrayRef reduction() const {
    return reduction_axes ? at::OptionalIntArrayRef(*reduction_axes) : std::nullopt;
  }

  ta::variable_list by_formula(const Tensor& grad_output, const Operands& operands,
                               const std::array<Tensor, kSaved>& t,
                               const OutputMask& wanted) const {
    const auto norm =
        Check<c10::SymInt>::sync(operands, num_groups, axis, reduction(), eps,
                                 activation_name(activation), std::nullopt, grad_output);
    auto gradients = norm_backward_formula(
        grad_output, operands, norm,
        {t[kMean], t[kRstd], /*are_constants=*/false, t[kShare], group}, wanted);
    return std::apply([](auto&... g) { return ta::variable_list{std::move(g)...}; }, gradients);
  }
};

using SyncNode = autograd::OperatorNode<SyncBackwardRule>;

}  // namespace

Tensor sync_norm(const Operands& operands, const Slices& slices, const RunningUpdate& running,
                 double eps, OptionalString activation, OptionalDType dtype, const Ranks& ranks) {
  // Not structured bindings, which not every compiler captures.
  const auto& input = operands.input;
  const auto &weight = operands.weight, &bias = operands.bias, &residual = operands.residual,
             &mask = operands.mask;
  const auto num_groups = slices.num_groups;
  const auto axis = slices.axis;
  const auto reduction_axes = slices.reduction_axes;
  decltype(autograd::make_node<SyncNode>(std::declval<SyncBackwardRule>())) node{};
  if (ta::compute_requires_grad(input, weight, bias, residual)) {
    SyncBackwardRule rule;
    rule.num_groups = num_groups;
    rule.axis = axis.vec();
    if (reduction_axes.has_value()) rule.reduction_axes = reduction_axes->vec();
    rule.eps = eps;
    rule.activation = parse_activation(norm_name(num_groups), activation);
    rule.group = ranks.group;
    const bool has_activation = rule.activation != kernels::Activation::kNone;
    node = autograd::make_node<SyncNode>(std::move(rule));
    node->set_next_edges(ta::collect_next_edges(input, weight, bias, residual));
    autograd::save_operands(*node, operands, has_activation);
  }
  const auto own = [&] {
    const at::AutoDispatchBelowAutograd guard;
    return op::sync_moments().call(input, mask, num_groups, axis, reduction_axes, ranks.by_rank);
  }();
  check_agreement(norm_name(num_groups), input, {/*training=*/true, num_groups, own.sym_size(0)},
                  ranks);
  const auto total = all_reduce(norm_name(num_groups), own, ranks.group);
  const auto& [running_mean, running_var, num_batches_tracked] = running.state;
  const auto statistics =
      op::sync_statistics().call(own, total, running_mean, running_var, num_batches_tracked,
                                 running.momentum, running.unbiased, ranks.by_rank);
  const auto &mean = std::get<0>(statistics), &var = std::get<1>(statistics),
             &share = std::get<2>(statistics);
  const auto [y, rstd] = [&] {
    const at::AutoDispatchBelowAutograd guard;
    return op::sync_apply().call(input, weight, bias, residual, mean, var, num_groups, axis,
                                 reduction_axes, eps, activation, dtype);
  }();
  if (node) {
    node->save(kMean, mean);
    node->save(kRstd, rstd);
    node->save(kShare, share);
    const autograd::NodePtr base(node);
    ta::set_history(y, base);
    autograd::announce(base);
  }
  autograd::propagate_tangents(y, operands,
                               [&](const Operands& primals) {
                                 return Check<c10::SymInt>::sync(primals, num_groups, axis,
                                                                 reduction_axes, eps, activation,
                                                                 dtype);
                               },
                               {mean, rstd, /*are_constants=*/false, share, ranks.group});
  return y;
}

}  // namespace normcore
