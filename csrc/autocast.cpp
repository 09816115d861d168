// Autocast policy: none of the operators casts. A half input gives a half output, parameters and
// statistics keep their dtypes, and all arithmetic is float32 inside of the kernels anyway; a
// float32 input stays float32. Saying so explicitly keeps a change of torch's default for
// unregistered operators from changing it.
#include <torch/library.h>

namespace {

void fall_through(torch::Library& m) {
  for (const auto* name : {"_batch_norm_train", "_batch_norm_eval", "_batch_norm_backward",
                           "_batch_norm_double_backward", "_group_norm", "_group_norm_backward",
                           "_group_norm_double_backward", "_sync_moments", "_sync_apply",
                           "_sync_gradient_sums", "_sync_gradient"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(normcore, AutocastCPU, m) { fall_through(m); }

TORCH_LIBRARY_IMPL(normcore, AutocastCUDA, m) { fall_through(m); }
