// The public C++ interface of normcore: functions (ops.h), modules (modules.h), their options
// (options.h), plans for people (explain.h), settings (settings.h) and torch's own norms on the
// same kernels (override_aten.h). Including this header in any translation unit is also what makes
// the operators torch.ops.normcore.* available to a program that only loads TorchScript files.
#pragma once

#include "normcore/explain.h"
#include "normcore/export.h"
#include "normcore/modules.h"
#include "normcore/ops.h"
#include "normcore/options.h"
#include "normcore/override_aten.h"
#include "normcore/settings.h"

namespace normcore::detail {

// The operators register themselves when the library is loaded. A program that names no symbol of
// it would lose the dependency under -Wl,--as-needed (the default of some distributions); the
// reference kept here prevents that.
[[gnu::used]] inline auto* const keep_library = &batch_norm;

}  // namespace normcore::detail
