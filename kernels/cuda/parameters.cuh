// Parameters of channels. What a pass needs of them is a struct with a member for each tensor, whose
// for_each(call, f) calls f(tensor, value where it is absent, pointer to the member).
#pragma once

#include <cstdint>

#include "cuda/elements.cuh"

namespace normcore::kernels::cuda {

template <class A>
struct AffineParameters {
  A scale, bias;

  template <class Call, class F>
  __device__ static void for_each(const Call& call, F f) {
    f(call.input.scale, A{1}, &AffineParameters::scale);
    f(call.input.bias, A{0}, &AffineParameters::bias);
  }
};

// Of one channel, entry i of each tensor.
template <class Parameters, class Call>
__device__ Parameters parameters_at(const Call& call, std::int64_t i) {
  Parameters out;
  Parameters::for_each(call, [&](ConstTensor tensor, auto absent, auto member) {
    out.*member = load_or(tensor, i, absent);
  });
  return out;
}

// Of kWidth neighbouring channels, from entry i on. Parameters may start anywhere in memory.
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
