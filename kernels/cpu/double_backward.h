// The double backward pass of every norm on the CPU, over slices of either layout. Internal to
// kernels/cpu.
#pragma once

#include "cpu/backward.h"

namespace normcore::kernels {

struct DoubleBackwardCall {
  BackwardCall backward;  // its grad: those of x, scale, bias and residual
  GradientCotangents cotangents;
  MutableTensor grad_grad_y;
};

// An empty input gives zero gradients of the parameters.
Status run_double_backward(const DoubleBackwardCall& call, const CpuPlan& plan, void* workspace,
                           const CpuExecutor& executor);

}  // namespace normcore::kernels
