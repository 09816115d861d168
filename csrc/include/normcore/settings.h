// Settings of the library, for the whole process.
#pragma once

#include <string>

#include "normcore/export.h"

namespace normcore {

// Whether CUDA kernels may look at the number of samples to fill the device: by default they do.
// With `enabled` the results of group norm, and of batch norm with running statistics, have the same
// bits for every batch size, which may cost speed for few samples. On the CPU that is so anyway.
// Results are the same from run to run either way.
NORMCORE_API void set_batch_invariant(bool enabled);
NORMCORE_API bool batch_invariant();

// For tests and benchmarks: how norms run on CUDA devices where they can run in this way, by a name of
// normcore/kernels/cuda_plan.h. Empty, the default: as planned. Throws c10::ValueError for other names.
NORMCORE_API void set_cuda_path(const std::string& name);
NORMCORE_API std::string cuda_path();

// Multiprocessors that grids of norms whose blocks all run together (the path "team") leave to other
// kernels, e.g. of collectives, which otherwise would wait for them. Default: 0.
NORMCORE_API void set_spare_multiprocessors(int count);
NORMCORE_API int spare_multiprocessors();

// Whether calls of norms with a process group first compare what the ranks are about to do, in
// training and in evaluation: a disagreement, which otherwise ends in a timeout, is an error at
// once that lists the ranks. Graphs that have been recorded compare nothing. It costs a collective
// and waits for the device. Off by default; the Python package switches it on if
// NORMCORE_DEBUG_SYNC=1 is in the environment when it is imported.
NORMCORE_API void set_debug_sync(bool enabled);
NORMCORE_API bool debug_sync();

}  // namespace normcore
