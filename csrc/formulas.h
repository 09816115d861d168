// Derivatives written in differentiable aten operations, for derivatives of any order. They agree
// with the kernels (norm_input.h, batch_norm.h, group_norm.h) up to rounding: computed in float64
// for a float64 input, else in float32; a masked-out value whose grad_output is 0 reaches no
// gradient, even if it is NaN or infinite.
#pragma once

#include "checks.h"

namespace normcore {

// Statistics as the forward pass saved them. Those of the input are computed from it again, so that
// they are differentiated as well; running statistics are constants.
struct SavedStatistics {
  const Tensor& mean;
  const Tensor& rstd;
  bool are_constants = false;
};

Gradients norm_backward_formula(const Tensor& grad_output, const Operands& operands,
                                const CheckedNorm<c10::SymInt>& norm, const SavedStatistics& saved,
                                const OutputMask& output_mask);

}  // namespace normcore
