// What the primitives over samples share (sample_primitives.cpp describes them): arrays of columns
// and of slices, and the ways between them. Per-target code: included once for each instruction
// set.
#if defined(NORMCORE_KERNELS_CPU_SAMPLES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMCORE_KERNELS_CPU_SAMPLES_INL_H_
#undef NORMCORE_KERNELS_CPU_SAMPLES_INL_H_
#else
#define NORMCORE_KERNELS_CPU_SAMPLES_INL_H_
#endif

#include <hwy/highway.h>

#include "cpu/primitives.h"
#include "cpu/units-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normcore::kernels::HWY_NAMESPACE {
namespace {

// Values of A or of float64 in the order in which they lie in memory. The last ones may come twice:
// what is written is not what is read, but for sums, to which only new values are added.
template <class A, class Body>
HWY_INLINE void for_each_in_order(std::int64_t n, Body&& body) {
  for_each_unit<A, Order::kHalves>(n, body);
}

// The sum of one slice of float32 or float64 values, of f(vector) or f(value).
template <class A, class F>
HWY_INLINE A sum_of_slice(const A* values, std::int64_t size, F&& f) {
  const Tag<A> d;
  if (size == lanes<A>()) return sum_of_lanes<A>(f(hn::LoadU(d, values)));
  if (size < unit<A>()) {
    A sum = 0;
    for (std::int64_t i = 0; i < size; ++i) sum += f(values[i]);
    return sum;
  }
  auto sum = broadcast(A{0});
  for_each_in_order<A>(size, [&](const auto& u) HWY_ATTR {
    const auto v = u.load(values);
    const auto added = u.only_new(Pair<A>{f(v.lo), f(v.hi)});
    sum = {hn::Add(sum.lo, added.lo), hn::Add(sum.hi, added.hi)};
  });
  return sum_of_lanes<A>(hn::Add(sum.lo, sum.hi));
}

template <class A>
struct Itself {
  HWY_INLINE Vector<A> operator()(Vector<A> v) const { return v; }
  HWY_INLINE A operator()(A v) const { return v; }
};

// sums[k] = the sum of the k-th slice of an array of the scratch. Whole vectors are written: up to a
// vector behind the end.
template <class A>
HWY_INLINE void sums_of_slices(const A* columns, const SampleShape& shape, A* sums) {
  if (shape.size == lanes<A>()) {
    for (std::int64_t k = 0; k < shape.slices; k += lanes<A>()) {
      hn::StoreU(sums_of_lanes<A>(columns + k * shape.size, shape.slices - k), Tag<A>(), sums + k);
    }
    return;
  }
  for (std::int64_t k = 0; k < shape.slices; ++k) {
    sums[k] = sum_of_slice<A>(columns + k * shape.size, shape.size, Itself<A>());
  }
}

template <class A>
struct Spread {
  const A* slices;
  A* columns;
};
// columns[k * size + i] = slices[k], for each of the given ones. Whole vectors are written: up to a
// vector behind the end.
template <class A, class... More>
HWY_INLINE void spread(const SampleShape& shape, const Spread<A>& first, const More&... more) {
  const Tag<A> d;
  std::int64_t begin = 0;
  for (std::int64_t k = 0; k < shape.slices; ++k, begin += shape.size) {
    const auto one = [&](const Spread<A>& s) HWY_ATTR {
      const auto value = hn::Set(d, s.slices[k]);
      A* const out = s.columns + begin;
      hn::StoreU(value, d, out);
      for (std::int64_t i = lanes<A>(); i < shape.size; i += lanes<A>()) {
        hn::StoreU(value, d, out + i);
      }
    };
    one(first);
    (one(more), ...);
  }
}

// The means as two values of A each: rounded, and what the rounding lost.
template <class A>
HWY_INLINE void split_means(const double* mean, std::int64_t count, A* rounded, A* rest) {
  for_each_in_order<double>(count, [&](const auto& u) HWY_ATTR {
    const auto m = u.load(mean);
    u.store(m, rounded);
    const auto r = u.load(rounded);
    u.store(Pair<double>{hn::Sub(m.lo, r.lo), hn::Sub(m.hi, r.hi)}, rest);
  });
}

template <class A>
HWY_INLINE Pair<A> product_of(const Pair<A>& a, const Pair<A>& b) {
  return {hn::Mul(a.lo, b.lo), hn::Mul(a.hi, b.hi)};
}
template <class A>
HWY_INLINE Pair<A> multiply_add(const Pair<A>& a, const Pair<A>& b, const Pair<A>& add) {
  return {hn::MulAdd(a.lo, b.lo, add.lo), hn::MulAdd(a.hi, b.hi, add.hi)};
}
template <class A>
HWY_INLINE Pair<A> subtract_product(const Pair<A>& from, const Pair<A>& a, const Pair<A>& b) {
  return {hn::NegMulAdd(a.lo, b.lo, from.lo), hn::NegMulAdd(a.hi, b.hi, from.hi)};
}

// x less a mean that split_means() split.
template <class A>
HWY_INLINE Pair<A> less_mean(const Pair<A>& x, const Pair<A>& rounded, const Pair<A>& rest) {
  return subtract(subtract(x, rounded), rest);
}

// The arrays of a scratch memory, one after the other.
template <class A>
struct Arrays {
  A* next;
  std::int64_t stride;
  HWY_INLINE A* take() {
    A* const array = next;
    next += stride;
    return array;
  }
};

}  // namespace
}  // namespace normcore::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
