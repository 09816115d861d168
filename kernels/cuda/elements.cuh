// Elements as the CUDA kernels see them: conversion to and from the arithmetic type, and vectors of
// kWidth neighbouring elements. A vector of x holds up to kVectorBytes; the tensors beside it may have other
// dtypes, whose vectors of as many elements are narrower or wider. At the ends of a run only a part
// of a vector exists: a Span says which, and what lies outside of it is not used, and not written.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/launch.cuh"
#include "normcore/kernels/host_device.h"
#include "normcore/kernels/types.h"
#include "plan/cuda_constants.h"

namespace normcore::kernels::cuda {

template <class T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
inline constexpr int kPerReluByte = kVectorBytes / sizeof(T);

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>) with the element type of `dtype`.
template <class F>
NORMCORE_HOST_DEVICE decltype(auto) visit_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(TypeTag<double>{});
    case DType::kBFloat16:
      return f(TypeTag<__nv_bfloat16>{});
    case DType::kFloat16:
      return f(TypeTag<__half>{});
    case DType::kFloat32:
      break;
  }
  return f(TypeTag<float>{});
}

template <class A, class T>
__device__ A convert_from(T value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return static_cast<A>(__bfloat162float(value));
  } else if constexpr (std::is_same_v<T, __half>) {
    return static_cast<A>(__half2float(value));
  } else {
    return static_cast<A>(value);
  }
}

// Rounds once, to nearest, ties to even.
template <class T, class A>
__device__ T convert_to(A value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if constexpr (std::is_same_v<A, double>) return __double2bfloat16(value);
    return __float2bfloat16_rn(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, __half>) {
    if constexpr (std::is_same_v<A, double>) return __double2half(value);
    return __float2half_rn(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

// Two neighbours of 16 bits in a word, the first in its lower half; each rounds once.
template <class T>
__device__ unsigned convert_pair(float first, float second) {
  const auto pair = [&] {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __floats2bfloat162_rn(first, second);
    } else {
      static_assert(std::is_same_v<T, __half>);
      return __floats2half2_rn(first, second);
    }
  }();
  unsigned word;
  static_assert(sizeof(word) == sizeof(pair));
  std::memcpy(&word, &pair, sizeof(word));
  return word;
}

template <class A>
__device__ A load_element(ConstTensor tensor, std::int64_t index) {
  return visit_dtype(tensor.dtype, [&](auto tag) {
    return convert_from<A>(static_cast<const typename decltype(tag)::type*>(tensor.data)[index]);
  });
}

template <class A>
__device__ A load_or(ConstTensor tensor, std::int64_t index, A absent) {
  return tensor ? load_element<A>(tensor, index) : absent;
}

template <class A>
__device__ void store_element(MutableTensor tensor, std::int64_t index, A value) {
  visit_dtype(tensor.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    static_cast<T*>(tensor.data)[index] = convert_to<T>(value);
  });
}

// Which elements of a vector exist: [begin, end). It is read as a whole where all of it lies in the
// tensor, aligned; else element by element.
struct Span {
  int begin, end;
  bool is_whole_load = true;
  __device__ bool contains(int i) const { return begin <= i && i < end; }
  __device__ bool is_empty() const { return begin >= end; }
};

// 16-bit elements stay packed in words: a load of halves would be unpacked right behind it, so that
// the next one waits for it, and take twice the registers.
template <class T, int kWidth>
class alignas(std::min<std::int64_t>(sizeof(T) * kWidth, kVectorBytes)) Vector {
 public:
  __device__ static Vector zero() {
    Vector result;
#pragma unroll
    for (Word& word : result.words_) word = Word(0);
    return result;
  }

  // All elements, each rounded once.
  template <class A>
  __device__ static Vector from(const A (&values)[kWidth]) {
    Vector result;
    if constexpr (kIsPacked && std::is_same_v<A, float>) {
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) {
        result.words_[i] = convert_pair<T>(values[2 * i], values[2 * i + 1]);
      }
    } else {
      result = zero();
#pragma unroll
      for (int i = 0; i < kWidth; ++i) result.set(i, convert_to<T>(values[i]));
    }
    return result;
  }

  __device__ T operator[](int i) const {
    if constexpr (kIsPacked) {
      return std::bit_cast<T>(static_cast<unsigned short>(words_[i / 2] >> i % 2 * 16));
    } else {
      return words_[i];
    }
  }

  __device__ void set(int i, T value) {
    if constexpr (kIsPacked) {
      const auto bits = std::bit_cast<unsigned short>(value);
      unsigned& word = words_[i / 2];
      word = i % 2 == 0 ? (word & 0xffff0000u) | bits : (word & 0xffffu) | unsigned{bits} << 16;
    } else {
      words_[i] = value;
    }
  }

 private:
  static constexpr bool kIsPacked = sizeof(T) == 2 && kWidth % 2 == 0;
  using Word = std::conditional_t<kIsPacked, unsigned, T>;
  Word words_[kIsPacked ? kWidth / 2 : kWidth];
};

// `index` is that of the vector's first element, which may lie before the span. Elements outside of
// the span have any value.
template <class T, int kWidth>
__device__ Vector<T, kWidth> load_vector(const T* data, std::int64_t index, Span span) {
  if (span.is_whole_load) return *reinterpret_cast<const Vector<T, kWidth>*>(data + index);
  auto out = Vector<T, kWidth>::zero();
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (span.contains(i)) out.set(i, data[index + i]);
  }
  return out;
}

// load_vector() to shared memory, where the same thread may read it behind wait_for_copies(). A vector that
// is read as a whole (all are, if kPlain) does not pass through registers.
template <bool kPlain, class T, int kWidth>
__device__ void hold_vector(Vector<T, kWidth>* to, const T* data, std::int64_t index, Span span) {
  if (kPlain || span.is_whole_load) {
    copy_async(to, reinterpret_cast<const Vector<T, kWidth>*>(data + index));
  } else {
    *to = load_vector<T, kWidth>(data, index, span);
  }
}

// Calls f(TypeTag) with the element type of a tensor beside x: with T, that of x, if kPlain.
template <bool kPlain, class T, class F>
__device__ void visit_dtype_beside(DType dtype, F&& f) {
  if constexpr (kPlain) {
    f(TypeTag<T>{});
  } else {
    visit_dtype(dtype, f);
  }
}

template <bool kPlain, class X, class A, int kWidth>
__device__ void load_values(ConstTensor tensor, std::int64_t index, Span span, A (&out)[kWidth]) {
  visit_dtype_beside<kPlain, X>(tensor.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto vector = load_vector<T, kWidth>(static_cast<const T*>(tensor.data), index, span);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out[i] = convert_from<A>(vector[i]);
  });
}

template <bool kPlain, class X, class A, int kWidth>
__device__ void store_values(MutableTensor tensor, std::int64_t index, Span span,
                             const A (&values)[kWidth]) {
  visit_dtype_beside<kPlain, X>(tensor.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* const data = static_cast<T*>(tensor.data);
    if (span.begin == 0 && span.end == kWidth) {
      *reinterpret_cast<Vector<T, kWidth>*>(data + index) = Vector<T, kWidth>::from(values);
      return;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (span.contains(i)) data[index + i] = convert_to<T>(values[i]);
    }
  });
}

// Forbids the compiler to keep converted copies of the values in registers: what was loaded is
// converted again by its next user, which costs less than the registers.
template <class T, int kWidth>
__device__ void keep_packed(Vector<T, kWidth>& vector) {
  if constexpr (sizeof(vector) % sizeof(unsigned) == 0) {
    auto* const words = reinterpret_cast<unsigned*>(&vector);
#pragma unroll
    for (unsigned i = 0; i < sizeof(vector) / sizeof(unsigned); ++i) keep(words[i]);
  }
}

// Bit i is set if element i of a vector exists.
__device__ inline unsigned existing_elements(Span span) {
  return span.is_empty() ? 0 : (1u << span.end) - (1u << span.begin);
}

// Bit i is set if element i of the vector exists and counts for the statistics. `row` indexes a mask
// [n][s], `index` one of the extent of x; both are those of the vector's first element.
template <int kWidth>
__device__ unsigned counting_elements(const Mask& mask, std::int64_t index, std::int64_t row,
                                      bool row_per_element, Span span) {
  if (!mask) return existing_elements(span);
  unsigned counting = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (!span.contains(i)) continue;
    const std::int64_t at =
        mask.kind == MaskKind::kElement ? index + i : row + (row_per_element ? i : 0);
    counting |= mask.data[at] != 0 ? 1u << i : 0u;
  }
  return counting;
}

}  // namespace normcore::kernels::cuda
