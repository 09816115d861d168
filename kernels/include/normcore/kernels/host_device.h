// NORMCORE_HOST_DEVICE marks what CUDA kernels call as well as host code: formulas that exist once.
#pragma once

#if defined(__CUDACC__)
#define NORMCORE_HOST_DEVICE __host__ __device__
#else
#define NORMCORE_HOST_DEVICE
#endif
