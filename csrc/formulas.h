// The norms and their derivatives written in differentiable aten operations: for derivatives of any
// order, and for graphs that have to do without the library. They agree with the kernels
// (norm_input.h, batch_norm.h, group_norm.h) up to rounding: computed in float64 for a float64
// input, else in float32; a masked-out value whose grad_output is 0 reaches no gradient, even if it
// is NaN or infinite.
#pragma once

#include <string>

#include "checks.h"

namespace normcore {

// Statistics as the forward pass saved them. Those of the input are computed from it again, so that
// they are differentiated as well; running statistics are constants.
struct SavedStatistics {
  const Tensor& mean;
  const Tensor& rstd;
  bool are_constants = false;
  // Slices that several ranks share: the weight of a value in them, and the process group.
  Tensor share = {};
  std::string group = {};
};

// y of group norm.
Tensor group_norm_formula(const Operands& operands, const CheckedNorm<c10::SymInt>& norm);

// What a batch adds to running statistics, [feature axes].
struct BatchMoments {
  Tensor mean, var;
  Tensor is_empty;  // no value counts; undefined: some does everywhere
};

// y of batch norm in training.
std::tuple<Tensor, BatchMoments> batch_norm_train_formula(const Operands& operands,
                                                          const CheckedNorm<c10::SymInt>& norm,
                                                          bool unbiased);

// y of batch norm with running statistics.
Tensor batch_norm_eval_formula(const Operands& operands, const CheckedNorm<c10::SymInt>& norm,
                               const Tensor& running_mean, const Tensor& running_var);

Gradients norm_backward_formula(const Tensor& grad_output, const Operands& operands,
                                const CheckedNorm<c10::SymInt>& norm, const SavedStatistics& saved,
                                const OutputMask& output_mask);

// norm_input.h has the formula.
DoubleGradients norm_double_backward_formula(const Cotangents& cotangents,
                                             const Tensor& grad_output, const Operands& operands,
                                             const CheckedNorm<c10::SymInt>& norm,
                                             const SavedStatistics& saved,
                                             const DoubleOutputMask& output_mask);

// Undefined: none.
struct Tangents {
  Tensor input, weight, bias, residual;
};

// The tangent of y.
Tensor norm_tangent_formula(const Operands& operands, const Tangents& tangents,
                            const CheckedNorm<c10::SymInt>& norm, const SavedStatistics& saved);

// The double backward operators by formula, arguments checked: where there is no kernel, and where
// a derivative of theirs is wanted.
DoubleGradients batch_norm_double_backward_formula(
    const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
    const OptionalTensor& grad_grad_bias, const OptionalTensor& grad_grad_residual,
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask,
    const Tensor& mean, const Tensor& rstd, at::IntArrayRef axis, bool batch_statistics, double eps,
    OptionalString activation, DoubleOutputMask output_mask);

DoubleGradients group_norm_double_backward_formula(
    const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
    const OptionalTensor& grad_grad_bias, const OptionalTensor& grad_grad_residual,
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask,
    const Tensor& mean, const Tensor& rstd, std::int64_t num_groups, at::IntArrayRef axis,
    at::OptionalIntArrayRef reduction_axes, double eps, OptionalString activation,
    DoubleOutputMask output_mask);

}  // namespace normcore
