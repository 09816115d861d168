// DTensor, a tensor subclass that only Python knows, asks for more than the dispatcher gives it. The
// Python package sets these hooks; without them, as in C++ applications, there are none.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "normcore/export.h"

namespace normcore {

struct NamedTensor {
  const char* name;
  std::optional<at::Tensor> tensor;
};

// What a batch norm in training updates.
struct RunningState {
  std::optional<at::Tensor> mean, var, num_batches_tracked;
};

struct SubclassHooks {
  // Whether an input of a subclass is a DTensor. Then `others` have to be such as well, or it raises,
  // and DTensor knows the rules of the operators.
  bool (*is_dtensor)(const char* op, const at::Tensor& input,
                     const std::vector<NamedTensor>& others) = nullptr;
  // Whether the statistics of a batch norm in training are those of values on several devices, or
  // have to be moved to where the running ones are.
  bool (*is_spread)(const at::Tensor& dtensor, const RunningState& running,
                    at::IntArrayRef axis) = nullptr;
  // A sum over several devices, on all of them.
  at::Tensor (*gathered)(const at::Tensor& sum) = nullptr;
};

// Once, before any operator runs.
NORMCORE_API void set_subclass_hooks(const SubclassHooks& hooks);

}  // namespace normcore
