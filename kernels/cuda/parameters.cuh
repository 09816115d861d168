// Parameters of channels, as a pass needs them: the tensors are named by its Parameters (backward_pass.cuh).
#pragma once

#include <cstdint>

#include "cuda/elements.cuh"

namespace normcore::kernels::cuda {

// Of one channel, entry i of each tensor.
template <class Parameters, class Call>
__device__ Parameters parameters_at(const Call& call, std::int64_t i) {
  Parameters out;
  Parameters::for_each(call, [&](ConstTensor tensor, auto absent, auto member) {
    out.*member = load_or(tensor, i, absent);
  });
  return out;
}

// Of kWidth neighbouring channels, from entry i on, which is a multiple of kWidth. Parameters may start
// anywhere in memory.
template <class Parameters, int kWidth, class Call>
__device__ void load_parameters(const Call& call, std::int64_t i, Parameters (&out)[kWidth]) {
  Parameters::for_each(call, [&](ConstTensor tensor, auto absent, auto member) {
    if (!tensor) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) out[k].*member = absent;
      return;
    }
    visit_dtype(tensor.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const T* const data = static_cast<const T*>(tensor.data) + i;
      const Span span{0, kWidth,
                      reinterpret_cast<std::uintptr_t>(data) % alignof(Vector<T, kWidth>) == 0};
      const auto vector = load_vector<T, kWidth>(data, 0, span);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        out[k].*member = convert_from<decltype(absent)>(vector[k]);
      }
    });
  });
}

}  // namespace normcore::kernels::cuda
