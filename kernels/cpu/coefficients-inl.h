// Where the coefficients of a unit come from: one value for a whole run, or one per column. Per-target
// code: included once for each instruction set.
#if defined(NORMCORE_KERNELS_CPU_COEFFICIENTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMCORE_KERNELS_CPU_COEFFICIENTS_INL_H_
#undef NORMCORE_KERNELS_CPU_COEFFICIENTS_INL_H_
#else
#define NORMCORE_KERNELS_CPU_COEFFICIENTS_INL_H_
#endif

#include <hwy/highway.h>

#include "cpu/convert-inl.h"
#include "cpu/primitives.h"

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

template <class A>
struct RunSource {
  UnitCoefficients<Vector<A>> values;
  HWY_INLINE RunSource(const Coefficients<A>& c, std::int64_t run)
      : values{of(c.center, run), of(c.scale, run), of(c.shift, run), of(c.slope, run),
               of(c.offset, run)} {}
  template <class Unit>
  HWY_INLINE const UnitCoefficients<Vector<A>>& at(const Unit&) const {
    return values;
  }

 private:
  static HWY_INLINE Vector<A> of(const A* coefficients, std::int64_t run) {
    return hn::Set(Tag<A>(), coefficients == nullptr ? A{0} : coefficients[run]);
  }
};

template <class A>
struct ColumnSource {
  const Coefficients<A>& c;
  template <class Unit>
  HWY_INLINE UnitCoefficients<Pair<A>> at(const Unit& u) const {
    const auto of = [&](const A* coefficients) HWY_ATTR {
      return coefficients == nullptr ? broadcast(A{0}) : u.load(coefficients);
    };
    return {of(c.center), of(c.scale), of(c.shift), of(c.slope), of(c.offset)};
  }
};

}  // namespace normcore::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
