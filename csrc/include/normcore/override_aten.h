// torch's own norms on the kernels of this library: models that call at::batch_norm,
// at::instance_norm, at::group_norm or their native_* operators run them without being changed.
#pragma once

#include <cstdint>

#include "normcore/export.h"

namespace normcore {

/// Registers the kernels of this library for aten's batch and group norms, in the whole process, on
/// CPU and, where they are part of the library, CUDA devices. Results, saved statistics, updates of
/// the running ones and errors are those of aten; so are derivatives beyond the first.
///
/// Calls nest: each one needs its disable_aten_override(). No other thread may run a norm
/// meanwhile.
NORMCORE_API void enable_aten_override();

/// Undoes one enable_aten_override(); the last one gives aten its own kernels back.
///
/// Errors: c10::Error where nothing is enabled.
NORMCORE_API void disable_aten_override();

/// How many calls of the overridden operators ran where, since the library was loaded.
struct AtenOverrideCalls {
  std::int64_t normcore = 0;  // on kernels of this library
  std::int64_t aten = 0;      // on those of aten, which take what the others do not
};
NORMCORE_API AtenOverrideCalls aten_override_calls();

}  // namespace normcore
