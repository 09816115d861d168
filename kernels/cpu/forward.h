// The forward pass of every norm on the CPU, over slices of either layout. Internal to kernels/cpu.
#pragma once

#include "cpu/statistics.h"
#include "normcore/kernels/executor.h"
#include "normcore/kernels/plan.h"

namespace normcore::kernels {

struct ForwardOutputs {
  MutableTensor y;
  std::uint8_t* relu_bits = nullptr;  // beside y
};

// Reduces x (unless the problem is inference), turns the moments of each slice into statistics
// through `statistics(slice, moments)`, and writes what is wanted. Statistics is
// BatchStatistics<A>, GivenStatistics<A> or PartStatistics<A>.
template <class Statistics>
void run_forward(const NormInput& input, std::int64_t num_groups, Pass pass,
                 const Statistics& statistics, const ForwardOutputs& outputs, const CpuPlan& plan,
                 void* workspace, const CpuExecutor& executor);

}  // namespace normcore::kernels
