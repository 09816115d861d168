// Where the coefficients of a unit come from: one value for a whole run, or one per column.
// Per-target code: included once for each instruction set.
#if defined(NORMCORE_KERNELS_CPU_COEFFICIENTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMCORE_KERNELS_CPU_COEFFICIENTS_INL_H_
#undef NORMCORE_KERNELS_CPU_COEFFICIENTS_INL_H_
#else
#define NORMCORE_KERNELS_CPU_COEFFICIENTS_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>

#include "cpu/primitives.h"
#include "cpu/units-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normcore::kernels::HWY_NAMESPACE {

// The two vectors of a coefficient: a pair of them, or one for both.
template <class A>
HWY_INLINE Vector<A> lo(const Pair<A>& pair) {
  return pair.lo;
}
template <class A>
HWY_INLINE Vector<A> hi(const Pair<A>& pair) {
  return pair.hi;
}
template <class A>
HWY_INLINE Vector<A> lo(const Vector<A>& both) {
  return both;
}
template <class A>
HWY_INLINE Vector<A> hi(const Vector<A>& both) {
  return both;
}

// V: Pair<A> or Vector<A>. slope and offset are 0 where there are none.
template <class V>
struct UnitCoefficients {
  V center, scale, shift, slope, offset;
};

// x - center, and of it z without a residual.
template <class A, class V>
HWY_INLINE Pair<A> centered(const Pair<A>& x, const UnitCoefficients<V>& c) {
  return {hn::Sub(x.lo, lo<A>(c.center)), hn::Sub(x.hi, hi<A>(c.center))};
}
template <class A, class V>
HWY_INLINE Pair<A> normalized(const Pair<A>& centered, const UnitCoefficients<V>& c) {
  return {hn::MulAdd(centered.lo, lo<A>(c.scale), lo<A>(c.shift)),
          hn::MulAdd(centered.hi, hi<A>(c.scale), hi<A>(c.shift))};
}

template <class A>
struct RunSource {
  static constexpr bool kEndOfRun = true;
  UnitCoefficients<Vector<A>> values;
  HWY_INLINE RunSource(const Coefficients<A>& c, std::int64_t run)
      : values{hn::Set(Tag<A>(), c.center[run]), hn::Set(Tag<A>(), c.scale[run]),
               hn::Set(Tag<A>(), c.shift[run]), of(c.slope, run), of(c.offset, run)} {}
  template <class Unit>
  HWY_INLINE const UnitCoefficients<Vector<A>>& at(const Unit&) const {
    return values;
  }

 private:
  static HWY_INLINE Vector<A> of(const A* coefficients, std::int64_t run) {
    return hn::Set(Tag<A>(), coefficients == nullptr ? A{0} : coefficients[run]);
  }
};

// Columns that share one ColumnSource: all of a folded row (kMaxFoldedColumns in
// plan/cpu_geometry.cpp).
inline constexpr std::int64_t kColumnStrip = 2048;

template <class A, Order kOrder, std::int64_t kStrip = kColumnStrip>
class ColumnSource {
 public:
  static constexpr bool kEndOfRun = false;  // slots know no other end
  // Of `columns` <= kStrip columns.
  HWY_INLINE ColumnSource(const Coefficients<A>& c, std::int64_t first, std::int64_t columns)
      : has_slope_(c.slope != nullptr) {
    const A* const given[] = {c.center, c.scale, c.shift, c.slope, c.offset};
    for (int i = 0; i < 5; ++i) {
      if (given[i] != nullptr) to_slots<A, kOrder>(given[i] + first, columns, slots_[i]);
    }
  }
  template <class Unit>
  HWY_INLINE UnitCoefficients<Pair<A>> at(const Unit& u) const {
    const auto of = [&](int i) HWY_ATTR { return load_slot<A>(u, slots_[i]); };
    const auto zero = broadcast(A{0});
    return {of(0), of(1), of(2), has_slope_ ? of(3) : zero, has_slope_ ? of(4) : zero};
  }

 private:
  bool has_slope_;
  HWY_ALIGN A slots_[5][kStrip + kSlotPadding<A>];
};

// The end of the rows that are taken several at a time, to share one load of coefficients and
// accumulators. Longer rows are as many streams, which prefetchers do not follow beyond the caches:
// none of them.
template <class T>
HWY_INLINE std::int64_t end_of_shared_rows(std::int64_t rows, std::int64_t width) {
  constexpr std::int64_t kMaxBytes = 256;  // of a row
  return width * static_cast<std::int64_t>(sizeof(T)) <= kMaxBytes ? rows : 0;
}

// Calls f(first, columns) for strips of the columns of rows.
template <std::int64_t kStrip = kColumnStrip, class F>
HWY_INLINE void for_each_strip(std::int64_t width, F&& f) {
  for (std::int64_t first = 0; first < width; first += kStrip) {
    f(first, std::min(kStrip, width - first));
  }
}

}  // namespace normcore::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
