// Vectors of arithmetic type A from and to elements of any dtype, and the unit in which every loop
// walks a run: two vectors, whole or cut at the end of the run. Per-target code: included once for
// each instruction set.
#if defined(NORMCORE_KERNELS_CPU_CONVERT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMCORE_KERNELS_CPU_CONVERT_INL_H_
#undef NORMCORE_KERNELS_CPU_CONVERT_INL_H_
#else
#define NORMCORE_KERNELS_CPU_CONVERT_INL_H_
#endif

#include <hwy/highway.h>

#include <cstring>
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

// How values are written. canonical_nan: the low halves of NaN lanes are 0, so that rounding them to
// bfloat16 by integer addition keeps them NaN. stream: past the caches, to aligned addresses.
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

// The sums of the lanes of `count` <= kRows vectors at `rows`, added like a tree of neighbours: lane k is that
// of vector k, whatever the others hold. kRows: the number of lanes, but for the recursion.
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

// ---- units: pairs of vectors that cover a run of n values

template <class A>
struct Pair {
  Vector<A> lo, hi;
};
template <class A>
struct PairMask {
  hn::Mask<Tag<A>> lo, hi;
};

template <class A>
HWY_INLINE std::int64_t unit() {
  return 2 * lanes<A>();
}

// Applies f to both vectors of pairs.
template <class A, class F, class... P>
HWY_INLINE Pair<A> map_pair(F&& f, const P&... pairs) {
  return {f(pairs.lo...), f(pairs.hi...)};
}

template <class A>
HWY_INLINE Pair<A> sum_of(const Pair<A>& a, const Pair<A>& b) {
  return {hn::Add(a.lo, b.lo), hn::Add(a.hi, b.hi)};
}
template <class A>
HWY_INLINE Pair<A> subtract(const Pair<A>& a, const Pair<A>& b) {
  return {hn::Sub(a.lo, b.lo), hn::Sub(a.hi, b.hi)};
}

template <class A>
HWY_INLINE Pair<A> broadcast(A value) {
  const auto v = hn::Set(Tag<A>(), value);
  return {v, v};
}

// Which values of a unit a pair holds in lo and hi: the first and the last half, or the even and the
// odd ones. The latter is what a load of bfloat16 as 32-bit words gives for a shift and a mask; tensors
// beside it follow.
enum class Order { kHalves, kEvenOdd };

template <class A, class T>
inline constexpr Order kOrderOf =
    std::is_same_v<A, float> && std::is_same_v<T, BFloat16> && HWY_TARGET != HWY_SCALAR
        ? Order::kEvenOdd
        : Order::kHalves;

template <class T>
HWY_INLINE Pair<float> load_even_odd(const T* p) {
  const Tag<float> d;
  if constexpr (std::is_same_v<T, BFloat16>) {
    const hn::RebindToUnsigned<Tag<float>> du;
    const auto words = hn::LoadU(du, reinterpret_cast<const std::uint32_t*>(p));
    return {float_from_bfloat16(d, words),
            hn::BitCast(d, hn::And(words, hn::Set(du, 0xffff0000u)))};
  } else if constexpr (std::is_same_v<T, float>) {
    Pair<float> v;
    hn::LoadInterleaved2(d, p, v.lo, v.hi);
    return v;
  } else {
    HWY_ALIGN float values[2 * HWY_MAX_BYTES / sizeof(float)];
    hn::Store(load_vector<float>(p), d, values);
    hn::Store(load_vector<float>(p + lanes<float>()), d, values + lanes<float>());
    return load_even_odd(values);
  }
}

template <StoreOptions kOptions, class T>
HWY_INLINE void store_even_odd(const Pair<float>& v, T* p) {
  const Tag<float> d;
  if constexpr (std::is_same_v<T, BFloat16>) {
    const hn::RebindToUnsigned<Tag<float>> du;
    constexpr bool kCanonicalNaN = kOptions.canonical_nan;
    const auto words =
        hn::Or(hn::ShiftRight<16>(round_to_high_half<kCanonicalNaN>(d, v.lo)),
               hn::And(round_to_high_half<kCanonicalNaN>(d, v.hi), hn::Set(du, 0xffff0000u)));
    auto* const out = reinterpret_cast<std::uint32_t*>(p);
    if constexpr (kOptions.stream) {
      hn::Stream(words, du, out);
    } else {
      hn::StoreU(words, du, out);
    }
  } else if constexpr (std::is_same_v<T, float>) {
    hn::StoreInterleaved2(v.lo, v.hi, d, p);
  } else {
    HWY_ALIGN float values[2 * HWY_MAX_BYTES / sizeof(float)];
    hn::StoreInterleaved2(v.lo, v.hi, d, values);
    store_vector<float>(hn::Load(d, values), p);
    store_vector<float>(hn::Load(d, values + lanes<float>()), p + lanes<float>());
  }
}

template <class A>
HWY_INLINE hn::Mask<Tag<A>> load_mask_vector(const std::uint8_t* p) {
  const hn::Rebind<std::uint8_t, Tag<A>> d8;
  const auto bytes = hn::LoadU(d8, p);
  if constexpr (sizeof(A) == 4) {
    const hn::RebindToUnsigned<Tag<A>> du;
    return hn::RebindMask(Tag<A>(), hn::Ne(hn::PromoteTo(du, bytes), hn::Zero(du)));
  } else {
    const hn::RebindToUnsigned<Tag<A>> du;
    const hn::Rebind<std::uint32_t, Tag<A>> d32;
    return hn::RebindMask(Tag<A>(),
                          hn::Ne(hn::PromoteTo(du, hn::PromoteTo(d32, bytes)), hn::Zero(du)));
  }
}

// A whole unit at [at, at + unit).
template <class A, Order kOrder>
struct WholeUnit {
  static constexpr bool kIsVector = false;
  std::int64_t at;

  template <class T>
  HWY_INLINE Pair<A> load(const T* run) const {
    if constexpr (kOrder == Order::kEvenOdd) return load_even_odd(run + at);
    return {load_vector<A>(run + at), load_vector<A>(run + at + lanes<A>())};
  }
  template <StoreOptions kOptions = StoreOptions{}, class T>
  HWY_INLINE void store(const Pair<A>& v, T* run) const {
    if constexpr (kOrder == Order::kEvenOdd) {
      store_even_odd<kOptions>(v, run + at);
    } else {
      store_vector<A, kOptions>(v.lo, run + at);
      store_vector<A, kOptions>(v.hi, run + at + lanes<A>());
    }
  }
  HWY_INLINE PairMask<A> load_mask(const std::uint8_t* run) const {
    const PairMask<A> halves{load_mask_vector<A>(run + at),
                             load_mask_vector<A>(run + at + lanes<A>())};
#if HWY_TARGET != HWY_SCALAR  // which knows no even lanes, and needs none
    if constexpr (kOrder == Order::kEvenOdd) {
      const Tag<A> d;
      const auto lo = hn::VecFromMask(d, halves.lo), hi = hn::VecFromMask(d, halves.hi);
      return {hn::MaskFromVec(hn::ConcatEven(d, hi, lo)),
              hn::MaskFromVec(hn::ConcatOdd(d, hi, lo))};
    }
#endif
    return halves;
  }
  HWY_INLINE Pair<A> only_new(const Pair<A>& v) const { return v; }
  HWY_INLINE PairMask<A> only_new(const PairMask<A>& m) const { return m; }
  HWY_INLINE std::int64_t slot() const { return at; }
};

// The end of a run. Runs of at least a unit: the last whole unit, which overlaps values already
// seen; `only_new` clears those, storing them again writes the same bits. Shorter runs: `count`
// values, the rest of the lanes is 0.
template <class A, Order kOrder>
struct LastUnit {
  using Whole = WholeUnit<A, kOrder>;
  static constexpr bool kIsVector = false;
  std::int64_t at, count, whole;
  PairMask<A> fresh;  // lanes that hold values not seen before

  HWY_INLINE explicit LastUnit(std::int64_t n) {
    const auto u = unit<A>();
    at = n >= u ? n - u : 0;
    count = n >= u ? u : n;
    whole = n / u * u;
    fresh = lanes_from(n >= u ? u - n % u : 0);
  }

  template <class T>
  HWY_INLINE Pair<A> load(const T* run) const {
    if (count == unit<A>()) return Whole{at}.load(run);
    T buffer[2 * HWY_MAX_BYTES / sizeof(A)] = {};
    std::memcpy(buffer, run, static_cast<std::size_t>(count) * sizeof(T));
    return Whole{0}.load(buffer);
  }
  template <StoreOptions = StoreOptions{}, class T>
  HWY_INLINE void store(const Pair<A>& v, T* run) const {
    if (count == unit<A>()) return Whole{at}.store(v, run);
    T buffer[2 * HWY_MAX_BYTES / sizeof(A)];
    Whole{0}.store(v, buffer);
    std::memcpy(run, buffer, static_cast<std::size_t>(count) * sizeof(T));
  }
  HWY_INLINE PairMask<A> load_mask(const std::uint8_t* run) const {
    if (count == unit<A>()) return Whole{at}.load_mask(run);
    std::uint8_t buffer[2 * HWY_MAX_BYTES / sizeof(A)] = {};
    std::memcpy(buffer, run, static_cast<std::size_t>(count));
    return Whole{0}.load_mask(buffer);
  }
  HWY_INLINE Pair<A> only_new(const Pair<A>& v) const {
    return {hn::IfThenElseZero(fresh.lo, v.lo), hn::IfThenElseZero(fresh.hi, v.hi)};
  }
  HWY_INLINE PairMask<A> only_new(const PairMask<A>& v) const {
    return {hn::And(fresh.lo, v.lo), hn::And(fresh.hi, v.hi)};
  }
  HWY_INLINE std::int64_t slot() const { return whole; }

 private:
  HWY_INLINE PairMask<A> lanes_from(std::int64_t first) const {
    const Tag<A> d;
    const auto from = hn::Set(d, static_cast<A>(first)), to = hn::Set(d, static_cast<A>(count));
    auto lo = hn::Iota(d, A{0}), hi = hn::Iota(d, static_cast<A>(lanes<A>()));
    if constexpr (kOrder == Order::kEvenOdd) {
      lo = hn::Add(lo, lo);
      hi = hn::Add(lo, hn::Set(d, A{1}));
    }
    return {hn::And(hn::Ge(lo, from), hn::Lt(lo, to)), hn::And(hn::Ge(hi, from), hn::Lt(hi, to))};
  }
};

// The end of a run of at least a vector, where at most a vector of it is left: the last whole vector,
// twice in a pair, so that whatever is done to the pair is done once.
template <class A>
struct LastVector {
  static constexpr bool kIsVector = true;
  std::int64_t at;
  hn::Mask<Tag<A>> fresh;  // lanes that hold values not seen before

  HWY_INLINE explicit LastVector(std::int64_t n) : at(n - lanes<A>()) {
    const Tag<A> d;
    const auto old = hn::Set(d, static_cast<A>(lanes<A>() - n % unit<A>()));
    fresh = hn::Ge(hn::Iota(d, A{0}), old);
  }

  template <class T>
  HWY_INLINE Pair<A> load(const T* run) const {
    const auto v = load_vector<A>(run + at);
    return {v, v};
  }
  template <StoreOptions = StoreOptions{}, class T>
  HWY_INLINE void store(const Pair<A>& v, T* run) const {
    store_vector<A>(v.lo, run + at);
  }
  HWY_INLINE Pair<A> only_new(const Pair<A>& v) const {
    const auto kept = hn::IfThenElseZero(fresh, v.lo);
    return {kept, kept};
  }
};

// The unit at the end of runs of n values. kMayBeVector: either of the two.
template <class A, Order kOrder, bool kMayBeVector = true>
class RunEnd {
 public:
  HWY_INLINE explicit RunEnd(std::int64_t n)
      : is_vector_(n >= lanes<A>() && n % unit<A>() <= lanes<A>()), unit_(n), vector_(n) {}
  template <class Body>
  HWY_INLINE void visit(Body&& body) const {
    if constexpr (kMayBeVector && kOrder == Order::kHalves) {
      if (is_vector_) return body(vector_);
    }
    body(unit_);
  }

 private:
  bool is_vector_;
  LastUnit<A, kOrder> unit_;
  LastVector<A> vector_;
};

// Calls body(unit) for the units that cover n values, from `first` on.
template <class A, Order kOrder, class Body>
HWY_INLINE void for_each_unit(std::int64_t n, Body&& body, std::int64_t first = 0) {
  std::int64_t i = first;
  for (; i + unit<A>() <= n; i += unit<A>()) body(WholeUnit<A, kOrder>{i});
  if (i < n) body(LastUnit<A, kOrder>(n));
}

// Whether store() can stream values of T.
template <class A, Order kOrder, class T>
inline constexpr bool kCanStream =
    kOrder == Order::kEvenOdd ? std::is_same_v<T, BFloat16> : std::is_same_v<T, A>;

// Values up to the next address that streams may be written to.
template <class T>
HWY_INLINE std::int64_t values_to_alignment(const T* p) {
  constexpr std::size_t kBytes = HWY_MAX_BYTES;
  const std::size_t over = reinterpret_cast<std::uintptr_t>(p) % kBytes;
  return static_cast<std::int64_t>((kBytes - over) % kBytes / sizeof(T));
}

// Whether all runs at this distance, from `p` on, start where streams may be written to: their units
// then begin at multiples of a unit, as slots need.
template <class T>
HWY_INLINE bool is_stream_start(const T* p, std::int64_t stride) {
  return values_to_alignment(p) == 0 &&
         static_cast<std::size_t>(stride) * sizeof(T) % HWY_MAX_BYTES == 0;
}

// Arrays of A that only loops see hold the pairs of all units as they are, one behind the other: no
// lane has to move, and the last unit has a slot of its own, so that its values may be seen twice.
template <class A>
inline constexpr std::int64_t kSlotPadding = 2 * HWY_MAX_BYTES / sizeof(A);

template <class A, class Unit>
HWY_INLINE Pair<A> load_slot(const Unit& u, const A* slots) {
  const Tag<A> d;
  return {hn::LoadU(d, slots + u.slot()), hn::LoadU(d, slots + u.slot() + lanes<A>())};
}
template <class A, class Unit>
HWY_INLINE void store_slot(const Unit& u, const Pair<A>& v, A* slots) {
  const Tag<A> d;
  hn::StoreU(v.lo, d, slots + u.slot());
  hn::StoreU(v.hi, d, slots + u.slot() + lanes<A>());
}

template <class A, Order kOrder>
HWY_INLINE void clear_slots(std::int64_t n, A* slots) {
  for_each_unit<A, kOrder>(
      n, [&](const auto& u) HWY_ATTR { store_slot<A>(u, broadcast(A{0}), slots); });
}
// Adds the sums in `from` to those in `to`, and begins anew.
template <class A, Order kOrder>
HWY_INLINE void move_slots(std::int64_t n, A* from, A* to) {
  for_each_unit<A, kOrder>(n, [&](const auto& u) HWY_ATTR {
    store_slot<A>(u, sum_of(load_slot<A>(u, to), load_slot<A>(u, from)), to);
    store_slot<A>(u, broadcast(A{0}), from);
  });
}
template <class A, Order kOrder>
HWY_INLINE void to_slots(const A* values, std::int64_t n, A* slots) {
  for_each_unit<A, kOrder>(
      n, [&](const auto& u) HWY_ATTR { store_slot<A>(u, u.load(values), slots); });
}
// `values` may be `slots`: the units come in order.
template <class A, Order kOrder>
HWY_INLINE void from_slots(const A* slots, std::int64_t n, A* values) {
  for_each_unit<A, kOrder>(
      n, [&](const auto& u) HWY_ATTR { u.store(load_slot<A>(u, slots), values); });
}

// Calls body(unit, options) for the units that cover n values of which the outputs at `out` are
// stored: streamed if that is worth it. Values may be stored twice. kEndOfRun: the last unit may be a
// vector.
template <class A, Order kOrder, StoreOptions kOptions, bool kEndOfRun, class T, class Body>
HWY_INLINE void for_each_stored_unit(std::int64_t n, const T* out, bool stream, Body&& body) {
  using Cached = std::integral_constant<StoreOptions, StoreOptions{kOptions.canonical_nan, false}>;
  constexpr std::int64_t kMinStreamedUnits = 8;
  if (kCanStream<A, kOrder, T> && stream && n >= kMinStreamedUnits * unit<A>()) {
    using Streamed =
        std::integral_constant<StoreOptions, StoreOptions{kOptions.canonical_nan, true}>;
    std::int64_t i = values_to_alignment(out);
    if (i != 0) body(WholeUnit<A, kOrder>{0}, Cached());
    for (; i + unit<A>() <= n; i += unit<A>()) body(WholeUnit<A, kOrder>{i}, Streamed());
    if (i < n) body(LastUnit<A, kOrder>(n), Cached());
    return;
  }
  std::int64_t i = 0;
  for (; i + unit<A>() <= n; i += unit<A>()) body(WholeUnit<A, kOrder>{i}, Cached());
  if (i < n) {
    RunEnd<A, kOrder, kEndOfRun>(n).visit([&](const auto& u) HWY_ATTR { body(u, Cached()); });
  }
}

// Calls f(TypeTag<T>) for the dtype of x: float64 tensors are computed in float64, all others in
// float32.
template <class A, class F>
HWY_INLINE void visit_elements(DType dtype, F&& f) {
  if constexpr (std::is_same_v<A, double>) {
    f(TypeTag<double>{});
  } else if (dtype == DType::kBFloat16) {
    f(TypeTag<BFloat16>{});
  } else if (dtype == DType::kFloat16) {
    f(TypeTag<Float16>{});
  } else {
    f(TypeTag<float>{});
  }
}

// ---- tensors whose dtype is known only at run time (outputs, residuals and gradients of another
// dtype than x)

// The dtypes that can stand beside arithmetic in A: no float64 beside float32 arithmetic.
template <class A, class F>
HWY_INLINE void visit_beside(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      if constexpr (std::is_same_v<A, double>) f(TypeTag<double>{});
      break;
    case DType::kFloat32:
      f(TypeTag<float>{});
      break;
    case DType::kBFloat16:
      f(TypeTag<BFloat16>{});
      break;
    case DType::kFloat16:
      f(TypeTag<Float16>{});
      break;
  }
}

template <class A, class Unit>
HWY_INLINE Pair<A> load_any(const Unit& u, ConstTensor tensor) {
  Pair<A> v = broadcast(A{0});
  visit_beside<A>(tensor.dtype, [&](auto tag) HWY_ATTR {
    v = u.load(static_cast<const typename decltype(tag)::type*>(tensor.data));
  });
  return v;
}

template <class A, class Unit>
HWY_INLINE void store_any(const Unit& u, const Pair<A>& v, MutableTensor tensor) {
  visit_beside<A>(tensor.dtype, [&](auto tag) HWY_ATTR {
    u.store(v, static_cast<typename decltype(tag)::type*>(tensor.data));
  });
}

}  // namespace normcore::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
