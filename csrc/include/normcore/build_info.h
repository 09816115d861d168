// How this copy of the library was built, and what it runs with on this machine.
#pragma once

#include <string>

#include "normcore/export.h"

namespace normcore {

struct BuildInfo {
  std::string version;  // of normcore, e.g. "0.1.0"
  std::string
      torch_version;  // major and minor version of the torch it was built against, e.g. "2.15"
  std::string cxx_compiler;
  std::string simd_target;  // instruction set of the CPU kernels, e.g. "AVX2"
  bool cuda = false;        // whether CUDA kernels are part of the library
};

NORMCORE_API BuildInfo build_info();

}  // namespace normcore
