// The unit in which every loop walks a run: a pair of vectors, whole or cut at the end of the run;
// from and to tensors, and the arrays that only loops see. Per-target code: included once for each
// instruction set.
#if defined(NORMCORE_KERNELS_CPU_UNITS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMCORE_KERNELS_CPU_UNITS_INL_H_
#undef NORMCORE_KERNELS_CPU_UNITS_INL_H_
#else
#define NORMCORE_KERNELS_CPU_UNITS_INL_H_
#endif

#include <hwy/highway.h>

#include <cstring>
#include <type_traits>

#include "cpu/convert-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normcore::kernels::HWY_NAMESPACE {

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

// Which values of a unit a pair holds in lo and hi: the first and the last half, or the even and
// the odd ones. The latter is what a load of bfloat16 as 32-bit words gives for a shift and a mask;
// tensors beside it follow.
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

// The end of a run of at least a vector, where at most a vector of it is left: the last whole
// vector, twice in a pair, so that whatever is done to the pair is done once.
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

// Whether all runs at this distance, from `p` on, start where streams may be written to: their
// units then begin at multiples of a unit, as slots need.
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
// stored: streamed if that is worth it. Values may be stored twice. kEndOfRun: the last unit may be
// a vector.
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
