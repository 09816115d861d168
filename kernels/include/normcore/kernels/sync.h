// Norms whose slices reach over several ranks (processes or devices, each with tensors of its own):
// a rank reduces its part of every slice, somebody adds the results of all ranks up element by
// element, and each rank goes on with the sums. num_groups = 0 is batch norm (batch_norm.h), else
// group norm (group_norm.h), whose samples are the same on every rank.
//   moments        x -> MomentSums of every slice
//   statistics     their sums over ranks -> mean, variance, running statistics
//   apply          x, mean, variance -> y
//   gradient sums  grad_y, x -> H = sum scale g and Hx = sum scale g (x - mean) of every slice, and
//                  the gradients of this rank's scale and bias
//   gradients      their sums over ranks -> grad_residual = g and
//                  grad_x = rstd (scale g - w_i (H + (x - mean) rstd^2 Hx))
// with w_i the weight of a value in the statistics, 0 where masked out: 1 / count of all ranks, or,
// by rank, 1 / (ranks * count of this one), for statistics that are means over ranks of those of a
// rank (Flax's pmean). A slice that no rank has a value of, or by rank one has none of, is NaN and
// leaves its running statistics alone. An empty tensor has nothing to reduce: all sums are 0, and
// by rank the weight is NaN.
#pragma once

#include "normcore/kernels/batch_norm.h"
#include "normcore/kernels/moment_sums.h"

namespace normcore::kernels {

struct SyncMomentsArgs {
  NormInput input;  // x and its mask
  std::int64_t num_groups = 0;
  bool by_rank = false;
  MomentSums* sums = nullptr;  // [slices]
};

struct SyncStatisticsArgs {
  const MomentSums* own = nullptr;    // [slices] of this rank
  const MomentSums* total = nullptr;  // [slices] of all ranks
  std::int64_t slices = 0;
  bool by_rank = false;
  RunningStatistics running;  // of batch norm; counts batches of which a value counts on any rank
  double* mean = nullptr;     // [slices]
  double* var = nullptr;      // [slices] biased
  double* share = nullptr;    // [slices] w_i of a value that counts
};

struct SyncApplyArgs {
  NormInput input;  // the mask is ignored
  std::int64_t num_groups = 0;
  ConstTensor mean, var;  // [slices]
  MutableTensor y;        // as of BatchNormForwardArgs
  MutableTensor rstd;     // [slices] dtype compute_type(x.dtype)
};

// H and Hx.
struct GradientSums {
  double h = 0.0, h_centered = 0.0;
};

struct SyncGradientSumsArgs {
  NormInput input;
  std::int64_t num_groups = 0;
  ConstTensor grad_y;
  ConstTensor mean, rstd;        // [slices] float64, and as SyncApplyArgs gave it
  GradientSums* sums = nullptr;  // [slices]; null: not wanted
  MutableTensor grad_scale, grad_bias;
};

struct SyncGradientArgs {
  NormInput input;
  std::int64_t num_groups = 0;
  ConstTensor grad_y;
  ConstTensor mean, rstd;
  const GradientSums* sums = nullptr;  // [slices] of all ranks; null: only grad_residual is wanted
  const double* share = nullptr;       // [slices]
  MutableTensor grad_x, grad_residual;
};

Problem problem_of(const SyncMomentsArgs& args);
Problem problem_of(const SyncApplyArgs& args);
Problem problem_of(const SyncGradientSumsArgs& args);
Problem problem_of(const SyncGradientArgs& args);

// On the CPU, as the entries of batch_norm.h.
Status run(const SyncMomentsArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor);
Status run(const SyncApplyArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor);
Status run(const SyncGradientSumsArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor);
Status run(const SyncGradientArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor);
Status run(const SyncStatisticsArgs& args, const CpuExecutor& executor);

}  // namespace normcore::kernels
