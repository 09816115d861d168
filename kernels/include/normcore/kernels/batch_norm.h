// Batch norm over an Extent {n, c, s}: one slice per channel, reduced over n and s (m = n * s
// values, or the masked count). The biased variance normalises.
//   forward    mean_c and var_c of the batch; y as in norm_input.h;
//              running = (1 - momentum) * running + momentum * batch
//   inference  y with given running mean and variance; the mask is ignored
//   backward   g = grad_y * activation'(z), S1 = sum g, S2 = sum g * xhat over all positions of a
//              channel; grad_x = scale * rstd * (g - w_i * (S1 + xhat * S2)) with w_i = 1 / m, or
//              0 where masked out and for running statistics;
//              grad_scale = S2, grad_bias = S1, grad_residual = g
// A masked-out value with grad_y = 0 reaches no gradient, even if it is NaN or infinite.
// A channel with no valid element: y is NaN, its running statistics do not change.
// One value per channel: var = 0, y = activation(bias + residual), grad_x = 0.
// n, c or s = 0: parameter gradients are 0, nothing else happens.
// Sources: Ioffe and Szegedy 2015; flax.linen.BatchNorm for mask and decay.
#pragma once

#include "normcore/kernels/executor.h"
#include "normcore/kernels/norm_input.h"
#include "normcore/kernels/plan.h"
#include "normcore/kernels/status.h"

namespace normcore::kernels {

struct RunningStatistics {
  MutableTensor mean;                           // [c] or absent; both or none
  MutableTensor var;                            // [c]
  std::int64_t* num_batches_tracked = nullptr;  // incremented by 1 when given
  double momentum = 0.1;                        // weight of the new batch
  bool cumulative =
      false;  // weight is 1 / num_batches_tracked (after the increment), momentum is ignored
  bool unbiased = true;  // running var takes var * m / (m - 1) when m > 1
};

struct BatchNormForwardArgs {
  NormInput input;
  RunningStatistics running;
  MutableTensor y;         // extent and layout of x, any DType (float64 only with float64 x)
  double* mean = nullptr;  // [c] saved mean of the batch
  MutableTensor rstd;      // [c] saved 1 / sqrt(var + eps), dtype compute_type(x.dtype)
  std::uint8_t* relu_bits =
      nullptr;  // norm_input.h; on CUDA x, residual and y are then aligned to 16 bytes
};

struct BatchNormInferenceArgs {
  NormInput input;
  ConstTensor running_mean;  // [c]
  ConstTensor running_var;   // [c]
  MutableTensor y;
  MutableTensor rstd;  // [c] dtype compute_type(x.dtype)
};

struct BatchNormBackwardArgs {
  NormInput input;
  ConstTensor grad_y;            // extent and layout of x, any DType
  ConstTensor mean;              // [c] any DType: saved mean (float64), or the running mean
  ConstTensor rstd;              // [c] dtype compute_type(x.dtype)
  bool batch_statistics = true;  // false: mean and rstd are constants
  NormGradients grad;
};

// norm_input.h has the formula.
struct BatchNormDoubleBackwardArgs {
  NormInput input;
  ConstTensor grad_y;
  ConstTensor mean;
  ConstTensor rstd;
  bool batch_statistics = true;
  GradientCotangents cotangents;
  MutableTensor grad_grad_y;  // extent and layout of x, any DType; absent: not wanted
  NormGradients grad;
};

Problem problem_of(const BatchNormForwardArgs& args);
Problem problem_of(const BatchNormInferenceArgs& args);
Problem problem_of(const BatchNormBackwardArgs& args);
Problem problem_of(const BatchNormDoubleBackwardArgs& args);

// On the CPU. The plan is that of problem_of(args); `workspace` holds plan.workspace_bytes, aligned
// to 64 bytes.
Status run(const BatchNormForwardArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor);
Status run(const BatchNormInferenceArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor);
Status run(const BatchNormBackwardArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor);
Status run(const BatchNormDoubleBackwardArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor);

}  // namespace normcore::kernels
