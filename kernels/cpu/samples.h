// Group norm of samples that hold many short slices (CpuPath::kSample). Internal to kernels/cpu.
#pragma once

#include "cpu/backward.h"
#include "cpu/double_backward.h"
#include "normcore/kernels/executor.h"
#include "normcore/kernels/group_norm.h"
#include "normcore/kernels/plan.h"

namespace normcore::kernels {

template <class A>
void run_samples(const GroupNormForwardArgs& args, const CpuPlan& plan, void* workspace,
                 const CpuExecutor& executor);

template <class A>
void run_samples(const BackwardCall& call, const CpuPlan& plan, void* workspace,
                 const CpuExecutor& executor);

template <class A>
void run_samples(const DoubleBackwardCall& call, const CpuPlan& plan, void* workspace,
                 const CpuExecutor& executor);

}  // namespace normcore::kernels
