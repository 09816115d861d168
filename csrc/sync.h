// Norms whose statistics are those of several ranks.
#pragma once

#include "checks.h"
#include "process_group.h"

namespace normcore {

// Which values share statistics; num_groups 0: batch norm.
struct Slices {
  std::int64_t num_groups;
  at::IntArrayRef axis;
  at::OptionalIntArrayRef reduction_axes;
};

// How running statistics take those of a batch.
struct RunningUpdate {
  RunningState state;
  std::optional<double> momentum;
  bool unbiased = true;
};

// y, with one sum over ranks here, and one in the backward pass if the input has a gradient there.
// The arguments have been checked.
Tensor sync_norm(const Operands& operands, const Slices& slices, const RunningUpdate& running,
                 double eps, OptionalString activation, OptionalDType dtype, const Ranks& ranks);

}  // namespace normcore
