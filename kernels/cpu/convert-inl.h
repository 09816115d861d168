// Vectors of arithmetic type A from and to elements of any dtype. Per-target code: included once
// for each instruction set.
#if defined(NORMCORE_KERNELS_CPU_CONVERT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMCORE_KERNELS_CPU_CONVERT_INL_H_
#undef NORMCORE_KERNELS_CPU_CONVERT_INL_H_
#else
#define NORMCORE_KERNELS_CPU_CONVERT_INL_H_
#endif

#include <hwy/highway.h>

#include <type_traits>

#include "cpu/element.h"

// x86 before F16C and the emulated baseline convert float16 by truncation (Highway 1.0): there we
// round by integers.
#undef NORMCORE_NATIVE_FLOAT16
#if (HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2) || HWY_TARGET == HWY_NEON
#define NORMCORE_NATIVE_FLOAT16 1
#else
#define NORMCORE_NATIVE_FLOAT16 0
#endif

// A lambda that is part of the loop around it: a call per row would cost as much as a short row.
#undef NORMCORE_INLINE_LAMBDA
#define NORMCORE_INLINE_LAMBDA HWY_ATTR __attribute__((always_inline))

HWY_BEFORE_NAMESPACE();
namespace normcore::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <class A>
using Tag = hn::ScalableTag<A>;
template <class A>
using Vector = hn::Vec<Tag<A>>;

template <class A>
HWY_INLINE std::int64_t lanes() {
  return static_cast<std::int64_t>(hn::Lanes(Tag<A>()));
}

// ---- 16-bit formats <-> float32 lanes. DF: any float tag; bits travel as uint32 lanes.

template <class DF, class VU>
HWY_INLINE hn::Vec<DF> float_from_bfloat16(DF df, VU bits) {
  return hn::BitCast(df, hn::ShiftLeft<16>(bits));
}

// How values are written. canonical_nan: the low halves of NaN lanes are 0, so that rounding them
// to bfloat16 by integer addition keeps them NaN. stream: past the caches, to aligned addresses.
struct StoreOptions {
  bool canonical_nan = false;
  bool stream = false;
};

// The rounded value in the high halves; the low halves are left over.
template <bool kCanonicalNaN, class DF, class V>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<DF>> round_to_high_half(DF, V v) {
  const hn::RebindToUnsigned<DF> du;
  const auto u = hn::BitCast(du, v);
  const auto odd = hn::And(hn::ShiftRight<16>(u), hn::Set(du, 1u));
  const auto rounded = hn::Add(hn::Add(u, hn::Set(du, 0x7fffu)), odd);
  if constexpr (kCanonicalNaN) return rounded;
  const auto quiet = hn::Or(u, hn::Set(du, 0x400000u));
  return hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), quiet, rounded);
}

template <class DF, class V>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<DF>> bfloat16_from_float(DF df, V v) {
  return hn::ShiftRight<16>(round_to_high_half<false>(df, v));
}

template <class DF, class VU>
HWY_INLINE hn::Vec<DF> float_from_float16(DF df, VU bits) {
  const hn::RebindToUnsigned<DF> du;
  const auto exponent_mask = hn::Set(du, 0x7c00u << 13);
  const auto magnitude = hn::ShiftLeft<13>(hn::And(bits, hn::Set(du, 0x7fffu)));
  const auto exponent = hn::And(magnitude, exponent_mask);
  const auto rebased = hn::Add(magnitude, hn::Set(du, 112u << 23));
  const auto special = hn::Add(magnitude, hn::Set(du, 224u << 23));  // infinity, NaN
  // subnormal: one more in the exponent, then subtract the implicit bit as a float
  const auto subnormal =
      hn::BitCast(du, hn::Sub(hn::BitCast(df, hn::Add(magnitude, hn::Set(du, 113u << 23))),
                              hn::BitCast(df, hn::Set(du, 113u << 23))));
  auto result = hn::IfThenElse(hn::Eq(exponent, exponent_mask), special, rebased);
  result = hn::IfThenElse(hn::Eq(exponent, hn::Zero(du)), subnormal, result);
  return hn::BitCast(df, hn::Or(result, hn::ShiftLeft<16>(hn::And(bits, hn::Set(du, 0x8000u)))));
}

template <class DF, class V>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<DF>> float16_from_float(DF df, V v) {
  const hn::RebindToUnsigned<DF> du;
  const hn::RebindToSigned<DF> di;
  const auto all = hn::BitCast(du, v);
  const auto sign = hn::And(hn::ShiftRight<16>(all), hn::Set(du, 0x8000u));
  const auto u = hn::And(all, hn::Set(du, 0x7fffffffu));
  const auto odd = hn::And(hn::ShiftRight<13>(u), hn::Set(du, 1u));
  const auto normal = hn::ShiftRight<13>(
      hn::Add(hn::Sub(u, hn::Set(du, 0x38000000u)), hn::Add(hn::Set(du, 0xfffu), odd)));
  const auto subnormal = hn::Sub(hn::BitCast(du, hn::Add(hn::BitCast(df, u), hn::Set(df, 0.5f))),
                                 hn::Set(du, 0x3f000000u));
  const auto iu = hn::BitCast(di, u);  // magnitudes compare alike as signed integers
  const auto is_small = hn::RebindMask(du, hn::Lt(iu, hn::Set(di, 0x38800000)));
  const auto is_large = hn::RebindMask(du, hn::Gt(iu, hn::Set(di, 0x477fffff)));
  const auto is_nan = hn::RebindMask(du, hn::Gt(iu, hn::Set(di, 0x7f800000)));
  auto bits = hn::IfThenElse(is_small, subnormal, normal);
  bits = hn::IfThenElse(is_large, hn::Set(du, 0x7c00u), bits);
  bits = hn::IfThenElse(is_nan, hn::Set(du, 0x7e00u), bits);
  return hn::Or(bits, sign);
}

// The emulated targets of Highway turn what overflows float32 into the largest float, not infinity.
inline constexpr bool kDemotionSaturates = HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128;

// ---- one vector of A from and to memory

// float32 lanes (as many as D has) from any dtype but float64.
template <class DF>
HWY_INLINE hn::Vec<DF> load_float(DF df, const float* p) {
  return hn::LoadU(df, p);
}
template <class DF>
HWY_INLINE hn::Vec<DF> load_float(DF df, const BFloat16* p) {
  const hn::Rebind<std::uint16_t, DF> d16;
  const hn::RebindToUnsigned<DF> du;
  return float_from_bfloat16(
      df, hn::PromoteTo(du, hn::LoadU(d16, reinterpret_cast<const std::uint16_t*>(p))));
}
template <class DF>
HWY_INLINE hn::Vec<DF> load_float(DF df, const Float16* p) {
#if NORMCORE_NATIVE_FLOAT16
  const hn::Rebind<hwy::float16_t, DF> d16;
  return hn::PromoteTo(df, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(p)));
#else
  const hn::Rebind<std::uint16_t, DF> d16;
  const hn::RebindToUnsigned<DF> du;
  return float_from_float16(
      df, hn::PromoteTo(du, hn::LoadU(d16, reinterpret_cast<const std::uint16_t*>(p))));
#endif
}

template <class DF, class V>
HWY_INLINE void store_float(V v, DF df, float* p) {
  hn::StoreU(v, df, p);
}
// Stores the low halves of uint32 lanes whose high halves are 0.
template <class DF, class VU>
HWY_INLINE void store_low_halves(VU bits, DF, std::uint16_t* p) {
  const hn::Rebind<std::uint16_t, DF> d16;
  const hn::RebindToSigned<DF> di;
  hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di, bits)), d16, p);
}
template <class DF, class V>
HWY_INLINE void store_float(V v, DF df, BFloat16* p) {
  store_low_halves(bfloat16_from_float(df, v), df, reinterpret_cast<std::uint16_t*>(p));
}
template <class DF, class V>
HWY_INLINE void store_float(V v, [[maybe_unused]] DF df, Float16* p) {
#if NORMCORE_NATIVE_FLOAT16
  const hn::Rebind<hwy::float16_t, DF> d16;
  hn::StoreU(hn::DemoteTo(d16, v), d16, reinterpret_cast<hwy::float16_t*>(p));
#else
  store_low_halves(float16_from_float(df, v), df, reinterpret_cast<std::uint16_t*>(p));
#endif
}

template <class A, class T>
HWY_INLINE Vector<A> load_vector(const T* p) {
  const Tag<A> d;
  if constexpr (std::is_same_v<A, T>) {
    return hn::LoadU(d, p);
  } else if constexpr (std::is_same_v<A, double>) {
    const hn::Rebind<float, Tag<double>> df;
    return hn::PromoteTo(d, load_float(df, p));
  } else {
    static_assert(!std::is_same_v<T, double>, "float64 tensors are computed in float64");
    return load_float(d, p);
  }
}

template <class A, StoreOptions kOptions = StoreOptions{}, class T>
HWY_INLINE void store_vector(Vector<A> v, T* p) {
  const Tag<A> d;
  if constexpr (std::is_same_v<A, T> && kOptions.stream) {
    hn::Stream(v, d, p);
  } else if constexpr (std::is_same_v<A, T>) {
    hn::StoreU(v, d, p);
  } else if constexpr (std::is_same_v<A, double> && std::is_same_v<T, float> &&
                       !kDemotionSaturates) {
    const hn::Rebind<float, Tag<double>> df;
    hn::StoreU(hn::DemoteTo(df, v), df, p);
  } else if constexpr (std::is_same_v<A, double>) {  // rare: one exact rounding matters more than
                                                     // speed
    HWY_ALIGN double lane[HWY_MAX_BYTES / sizeof(double)];
    hn::Store(v, d, lane);
    for (std::int64_t i = 0; i < lanes<double>(); ++i) p[i] = from_double<T>(lane[i]);
  } else {
    static_assert(!std::is_same_v<T, double>, "float64 results need float64 arithmetic");
    store_float(v, d, p);
  }
}

template <class A>
HWY_INLINE A sum_of_lanes(Vector<A> v) {
  return hn::GetLane(hn::SumOfLanes(Tag<A>(), v));
}

// The sums of the lanes of `count` <= kRows vectors at `rows`, added like a tree of neighbours:
// lane k is that of vector k, whatever the others hold. kRows: the number of lanes, but for the
// recursion.
template <class A, int kRows = static_cast<int>(hn::MaxLanes(Tag<A>()))>
HWY_INLINE Vector<A> sums_of_lanes(const A* rows, [[maybe_unused]] std::int64_t count) {
  const Tag<A> d;
#if HWY_TARGET != HWY_SCALAR  // which has one lane
  if constexpr (kRows > 1) {
    constexpr int kHalf = kRows / 2;
    const auto lo = sums_of_lanes<A, kHalf>(rows, count);
    const auto hi =
        count > kHalf ? sums_of_lanes<A, kHalf>(rows + kHalf * lanes<A>(), count - kHalf) : lo;
    return hn::Add(hn::ConcatEven(d, hi, lo), hn::ConcatOdd(d, hi, lo));
  }
#endif
  return hn::Load(d, rows);
}

}  // namespace normcore::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
