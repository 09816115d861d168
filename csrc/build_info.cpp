#include "normcore/build_info.h"

#include "normcore/kernels/plan.h"
#include "normcore/version.h"

namespace normcore {

BuildInfo build_info() {
  return {
      .version = NORMCORE_VERSION,
      .torch_version = NORMCORE_TORCH_VERSION,
#ifdef __clang__
      .cxx_compiler = __VERSION__,
#else
      .cxx_compiler = "GCC " __VERSION__,
#endif
      .simd_target = kernels::simd_target(),
#if defined(NORMCORE_CUDA)
      .cuda = true,
#else
      .cuda = false,
#endif
  };
}

}  // namespace normcore
