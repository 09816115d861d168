// Group norm over an Extent {n, c, s}: one slice per (sample, group) of d = c / num_groups
// neighbouring channels, reduced over its channels and s (m = d * s values, or the masked count).
// num_groups = 1 is layer norm over all but n, num_groups = c is instance norm.
//   forward    mean and var of each slice; y as in norm_input.h
//   backward   g = grad_y * activation'(z), h = g * scale, H1 = sum h, H2 = sum h * xhat over a
//              slice; grad_x = rstd * (h - w_i * (H1 + xhat * H2)) with w_i = 1 / m, or 0 where
//              masked out; grad_scale = sum g * xhat and grad_bias = sum g over n and s (over s
//              with affine_per_sample); grad_residual = g
// A masked-out value with grad_y = 0 reaches no gradient, even if it is NaN or infinite. A slice
// with no valid element gives NaN. n, c or s = 0: parameter gradients are 0, nothing else happens.
// Source: Wu and He 2018.
#pragma once

#include "normcore/kernels/executor.h"
#include "normcore/kernels/norm_input.h"
#include "normcore/kernels/plan.h"
#include "normcore/kernels/status.h"

namespace normcore::kernels {

struct GroupNormForwardArgs {
  NormInput input;
  std::int64_t num_groups = 1;  // divides c
  MutableTensor y;              // extent and layout of x, any DType (float64 only with float64 x)
  double* mean = nullptr;       // [n][num_groups] saved mean
  MutableTensor rstd;           // [n][num_groups] saved rstd, dtype compute_type(x.dtype)
};

struct GroupNormBackwardArgs {
  NormInput input;
  std::int64_t num_groups = 1;
  ConstTensor grad_y;  // extent and layout of x, any DType
  const double* mean = nullptr;
  ConstTensor rstd;
  NormGradients grad;
};

// norm_input.h has the formula.
struct GroupNormDoubleBackwardArgs {
  NormInput input;
  std::int64_t num_groups = 1;
  ConstTensor grad_y;
  const double* mean = nullptr;
  ConstTensor rstd;
  GradientCotangents cotangents;
  MutableTensor grad_grad_y;  // extent and layout of x, any DType; absent: not wanted
  NormGradients grad;
};

Problem problem_of(const GroupNormForwardArgs& args);
Problem problem_of(const GroupNormBackwardArgs& args);
Problem problem_of(const GroupNormDoubleBackwardArgs& args);

// On the CPU. The plan is that of problem_of(args); `workspace` holds plan.workspace_bytes, aligned
// to 64 bytes.
Status run(const GroupNormForwardArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor);
Status run(const GroupNormBackwardArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor);
Status run(const GroupNormDoubleBackwardArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor);

}  // namespace normcore::kernels
