// Element types as the CPU kernels see them, their exact scalar conversions, and the one visitor
// that turns a DType into a type. BFloat16 and Float16 are bit patterns; stores round to nearest,
// ties to even, and keep NaN a NaN.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "normcore/kernels/norm_input.h"
#include "normcore/kernels/types.h"

namespace normcore::kernels {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

template <class T>
struct TypeTag {
  using type = T;
};

template <class A>
inline constexpr DType kArithmeticType =
    std::is_same_v<A, double> ? DType::kFloat64 : DType::kFloat32;

// Calls f(TypeTag<T>) with the element type of `dtype`.
template <class F>
decltype(auto) visit_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(TypeTag<double>{});
    case DType::kBFloat16:
      return f(TypeTag<BFloat16>{});
    case DType::kFloat16:
      return f(TypeTag<Float16>{});
    case DType::kFloat32:
      break;
  }
  return f(TypeTag<float>{});
}

inline double to_double(double v) { return v; }
inline double to_double(float v) { return v; }
inline double to_double(BFloat16 v) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(v.bits) << 16);
}
inline double to_double(Float16 v) {
  const int exponent = (v.bits >> 10) & 31, mantissa = v.bits & 1023;
  double magnitude;
  if (exponent == 31) {
    magnitude = mantissa != 0 ? std::nan("") : HUGE_VAL;
  } else if (exponent == 0) {
    magnitude = std::ldexp(mantissa, -24);
  } else {
    magnitude = std::ldexp(mantissa + 1024, exponent - 25);
  }
  return (v.bits & 0x8000) != 0 ? -magnitude : magnitude;
}

namespace detail {

// float32 nearest to v but rounded to odd: rounding it again to 16 bits equals rounding v once.
inline std::uint32_t float_bits_rounded_to_odd(double v) {
  const float nearest = static_cast<float>(v);
  std::uint32_t bits = std::bit_cast<std::uint32_t>(nearest);
  if (std::isnan(v) || static_cast<double>(nearest) == v) return bits;
  if (std::fabs(static_cast<double>(nearest)) > std::fabs(v)) --bits;  // towards zero
  return bits | 1u;
}

inline std::uint16_t bfloat16_bits(std::uint32_t u) {
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((u >> 16) | 0x40u);
  return static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline std::uint16_t float16_bits(std::uint32_t u) {
  const std::uint32_t sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (u >= 0x47800000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 2^16 and above
  if (u < 0x38800000u) {  // subnormal: let the float adder align and round the mantissa
    const float shifted = std::bit_cast<float>(u) + 0.5f;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3f000000u));
  }
  return static_cast<std::uint16_t>(sign | ((u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13));
}

}  // namespace detail

template <class T>
T from_double(double v);
template <>
inline double from_double<double>(double v) {
  return v;
}
template <>
inline float from_double<float>(double v) {
  return static_cast<float>(v);
}
template <>
inline BFloat16 from_double<BFloat16>(double v) {
  return {detail::bfloat16_bits(detail::float_bits_rounded_to_odd(v))};
}
template <>
inline Float16 from_double<Float16>(double v) {
  return {detail::float16_bits(detail::float_bits_rounded_to_odd(v))};
}

inline double load_element(ConstTensor tensor, std::int64_t index) {
  return visit_dtype(tensor.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return to_double(static_cast<const T*>(tensor.data)[index]);
  });
}

inline void store_element(MutableTensor tensor, std::int64_t index, double value) {
  visit_dtype(tensor.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    static_cast<T*>(tensor.data)[index] = from_double<T>(value);
  });
}

// The tensor that starts `elements` further on; absent tensors stay absent.
inline ConstTensor advance(ConstTensor tensor, std::int64_t elements) {
  if (!tensor) return tensor;
  const auto bytes = elements * static_cast<std::int64_t>(size_of(tensor.dtype));
  return {static_cast<const char*>(tensor.data) + bytes, tensor.dtype};
}
inline MutableTensor advance(MutableTensor tensor, std::int64_t elements) {
  if (!tensor) return tensor;
  const auto bytes = elements * static_cast<std::int64_t>(size_of(tensor.dtype));
  return {static_cast<char*>(tensor.data) + bytes, tensor.dtype};
}

// To the byte of an element that begins one.
template <class Byte>
Byte* advance_relu_bits(Byte* bits, DType dtype, std::int64_t elements) {
  return bits == nullptr ? bits : bits + elements / elements_per_relu_byte(dtype);
}

}  // namespace normcore::kernels
