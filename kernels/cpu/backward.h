// The backward pass of every norm on the CPU, over slices of either layout. Internal to
// kernels/cpu.
#pragma once

#include "normcore/kernels/executor.h"
#include "normcore/kernels/norm_input.h"
#include "normcore/kernels/plan.h"
#include "normcore/kernels/status.h"
#include "normcore/kernels/sync.h"
#include "normcore/kernels/types.h"

namespace normcore::kernels {

struct BackwardCall {
  const NormInput& input;
  std::int64_t num_groups;  // 0: batch norm
  ConstTensor grad_y;
  ConstTensor mean, rstd;  // per slice
  bool batch_statistics;   // false: mean and rstd are constants (batch norm)
  NormGradients grad;
  // Of slices that are parts of longer ones (sync.h): where their sums go, or those of the whole
  // slices and the weight of a value in the statistics.
  bool is_partial = false;
  GradientSums* sums = nullptr;
  const GradientSums* whole = nullptr;
  const double* share = nullptr;
};

// An empty input gives zero gradients of the parameters.
Status run_backward(const BackwardCall& call, const CpuPlan& plan, void* workspace,
                    const CpuExecutor& executor);

}  // namespace normcore::kernels
