// Instruction sets that the kernels are compiled for: the compiler's baseline, AVX2, AVX-512, NEON.
// The others would add compile time for no measured gain (SSSE3, AVX3_DL), for machines that hardly
// exist any more (SSE4 without AVX2), or need vectors of unknown size as struct members (SVE).
// Include before any Highway header.
#pragma once

// Builds that check the code take less time with the baseline and AVX2 alone.
#if defined(NORMCORE_FEW_TARGETS)
#define NORMCORE_LEFT_OUT_TARGETS HWY_AVX3
#else
#define NORMCORE_LEFT_OUT_TARGETS 0
#endif

#define HWY_DISABLED_TARGETS                                                              \
  (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | \
   NORMCORE_LEFT_OUT_TARGETS)
