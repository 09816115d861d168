// Tensor subclasses that only Python knows, of which DTensor asks for more than the dispatcher gives
// it. The Python package sets the hooks; without them, as in C++ applications, there are none.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "normcore/export.h"

namespace normcore {

struct SubclassHooks {
  // Called with every input of a subclass, before any operator sees it.
  void (*prepare)(const at::Tensor& input) = nullptr;
  // Whether the statistics of a batch norm in training are those of values on several devices, or
  // have to be moved to where the running ones are.
  bool (*is_spread)(const at::Tensor& input, const std::optional<at::Tensor>& running_mean,
                    at::IntArrayRef axis) = nullptr;
};

// Once, before any operator runs.
NORMCORE_API void set_subclass_hooks(const SubclassHooks& hooks);

}  // namespace normcore
