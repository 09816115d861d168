// What both sweeps of the double backward pass compute of a unit (primitives.h); z is computed
// again from x. A masked-out value whose grad_y is 0 takes part as x = center where x is not
// finite, and with a residual of 0 where that is not. Per-target code: included once for each
// instruction set.
#if defined(NORMCORE_KERNELS_CPU_DOUBLE_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMCORE_KERNELS_CPU_DOUBLE_BACKWARD_INL_H_
#undef NORMCORE_KERNELS_CPU_DOUBLE_BACKWARD_INL_H_
#else
#define NORMCORE_KERNELS_CPU_DOUBLE_BACKWARD_INL_H_
#endif

#include <hwy/highway.h>

#include <type_traits>

#include "cpu/activation-inl.h"
#include "cpu/coefficients-inl.h"
#include "cpu/primitives.h"
#include "cpu/units-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normcore::kernels::HWY_NAMESPACE {
namespace {

// Columns that share their sums (twice kCurvedSums arrays) and coefficients (ten).
constexpr std::int64_t kStrip = 512;

// ---- coefficients

template <class V>
struct DoubleUnitCoefficients : UnitCoefficients<V> {
  V tangent_slope, tangent_offset, g_gain, u_gain, u_center;
};

template <class A>
Coefficients<A> further_coefficients(const DoubleCoefficients<A>& c) {
  return {c.tangent_slope, c.tangent_offset, c.g_gain, c.u_gain, c.u_center};
}

template <class A>
class DoubleRunSource {
 public:
  static constexpr bool kEndOfRun = true;
  HWY_INLINE DoubleRunSource(const DoubleCoefficients<A>& c, std::int64_t run)
      : values_{RunSource<A>(c, run).values, of(c.tangent_slope, run), of(c.tangent_offset, run),
                of(c.g_gain, run),           of(c.u_gain, run),        of(c.u_center, run)} {}
  template <class Unit>
  HWY_INLINE const DoubleUnitCoefficients<Vector<A>>& at(const Unit&) const {
    return values_;
  }

 private:
  static HWY_INLINE Vector<A> of(const A* coefficients, std::int64_t run) {
    return hn::Set(Tag<A>(), coefficients[run]);
  }
  DoubleUnitCoefficients<Vector<A>> values_;
};

template <class A, Order kOrder>
class DoubleColumnSource {
 public:
  static constexpr bool kEndOfRun = false;
  HWY_INLINE DoubleColumnSource(const DoubleCoefficients<A>& c, std::int64_t first,
                                std::int64_t columns)
      : affine_(c, first, columns), further_(further_coefficients(c), first, columns) {}
  template <class Unit>
  HWY_INLINE DoubleUnitCoefficients<Pair<A>> at(const Unit& u) const {
    const auto more = further_.at(u);
    return {affine_.at(u), more.center, more.scale, more.shift, more.slope, more.offset};
  }

 private:
  ColumnSource<A, kOrder, kStrip> affine_, further_;
};

// ---- one unit

// One run or row of the operands. kSame: all tensors have the type of x, and there is no mask.
template <class T, bool kSame>
struct Operands {
  const T* x;
  ConstTensor grad_y, residual, cotangent_x, cotangent_residual;
  const std::uint8_t* mask;  // null: every value counts
  bool mask_is_one_value;    // the mask is a single byte for the whole row

  template <class A>
  HWY_INLINE Operands(const DoubleBackwardArgs<A>& args, std::int64_t offset,
                      const std::uint8_t* mask, bool mask_is_one_value)
      : x(static_cast<const T*>(args.x.data) + offset),
        grad_y(advance(args.grad_y, offset)),
        residual(advance(args.residual, offset)),
        cotangent_x(advance(args.cotangent_x, offset)),
        cotangent_residual(advance(args.cotangent_residual, offset)),
        mask(mask),
        mask_is_one_value(mask_is_one_value) {}

  template <class A, class Unit>
  HWY_INLINE Pair<A> load(const Unit& unit, ConstTensor tensor) const {
    if constexpr (kSame) {
      return unit.load(static_cast<const T*>(tensor.data));
    } else {
      return load_any<A>(unit, tensor);
    }
  }
};

// Of primitives.h. counts: for the statistics; used: not a masked-out value that was dropped.
template <class A>
struct Terms {
  Pair<A> u, centered, q, g, b, derivative;
  PairMask<A> counts, used;
};

template <class A>
HWY_INLINE hn::Mask<Tag<A>> kept_or_finite(hn::Mask<Tag<A>> is_kept, Vector<A> v) {
  return hn::Or(is_kept, hn::IsFinite(v));
}
template <class A>
HWY_INLINE Pair<A> zero_unless(const PairMask<A>& keep, const Pair<A>& v) {
  return {hn::IfThenElseZero(keep.lo, v.lo), hn::IfThenElseZero(keep.hi, v.hi)};
}

// kActivation: only if kSame, else looked up.
template <bool kSame, Activation kActivation, class A, class T, class Unit, class V>
HWY_INLINE Terms<A> terms_of_unit(const Unit& unit, const Operands<T, kSame>& in,
                                  Activation activation, const DoubleUnitCoefficients<V>& c) {
  const Tag<A> d;
  Terms<A> out;
  const auto grad_y = in.template load<A>(unit, in.grad_y);
  out.centered = centered(unit.load(in.x), c);
  out.u = broadcast(A{0});
  if (in.cotangent_x) {
    const auto u = in.template load<A>(unit, in.cotangent_x);
    out.u = {hn::Sub(u.lo, lo<A>(c.u_center)), hn::Sub(u.hi, hi<A>(c.u_center))};
  }
  PairMask<A> valid;  // counts, or has a gradient
  if constexpr (!kSame) {
    const auto every = hn::Eq(hn::Zero(d), hn::Zero(d));
    out.counts = out.used = valid = {every, every};
    if (in.mask != nullptr) {
      if (!in.mask_is_one_value) {
        out.counts = unit.load_mask(in.mask);
      } else if (*in.mask == 0) {
        out.counts = {hn::Not(every), hn::Not(every)};
      }
      // Not Ne(), which is false for a NaN on some instruction sets.
      valid = {hn::Or(out.counts.lo, hn::Not(hn::Eq(grad_y.lo, hn::Zero(d)))),
               hn::Or(out.counts.hi, hn::Not(hn::Eq(grad_y.hi, hn::Zero(d))))};
      out.used = {kept_or_finite<A>(valid.lo, out.centered.lo),
                  kept_or_finite<A>(valid.hi, out.centered.hi)};
      out.centered = zero_unless(out.used, out.centered);
    }
  }
  out.q = {
      hn::MulAdd(out.u.lo, lo<A>(c.scale),
                 hn::MulAdd(out.centered.lo, lo<A>(c.tangent_slope), lo<A>(c.tangent_offset))),
      hn::MulAdd(out.u.hi, hi<A>(c.scale),
                 hn::MulAdd(out.centered.hi, hi<A>(c.tangent_slope), hi<A>(c.tangent_offset)))};
  if (in.cotangent_residual) {
    out.q = sum_of(out.q, in.template load<A>(unit, in.cotangent_residual));
  }
  auto residual = broadcast(A{0});
  if (in.residual && activation != Activation::kNone) {
    residual = in.template load<A>(unit, in.residual);
    if constexpr (!kSame) {
      residual = zero_unless(
          {kept_or_finite<A>(valid.lo, residual.lo), kept_or_finite<A>(valid.hi, residual.hi)},
          residual);
    }
  }
  const auto through = [&](auto constant) HWY_ATTR {
    constexpr Activation kThis = constant();
    if constexpr (kThis == Activation::kNone) {
      out.g = grad_y;
      out.derivative = broadcast(A{1});
      out.b = broadcast(A{0});
    } else {
      const auto z = sum_of(normalized(out.centered, c), residual);
      const auto of_lo = activation_derivatives<kThis, A>(z.lo),
                 of_hi = activation_derivatives<kThis, A>(z.hi);
      out.derivative = {of_lo.first, of_hi.first};
      out.g = {hn::Mul(grad_y.lo, of_lo.first), hn::Mul(grad_y.hi, of_hi.first)};
      out.b = {hn::Mul(grad_y.lo, of_lo.second), hn::Mul(grad_y.hi, of_hi.second)};
    }
  };
  if constexpr (kSame) {
    through(std::integral_constant<Activation, kActivation>());
  } else {
    visit_activation(activation, through);
  }
  return out;
}

// Calls f(TypeTag<T>, kSame, activation), the latter two as constants.
template <class A, class F>
HWY_INLINE void visit_terms(const DoubleBackwardArgs<A>& args, F&& f) {
  const auto fits = [&](auto tensor) { return !tensor || tensor.dtype == args.x.dtype; };
  const bool is_same = args.mask.data == nullptr && fits(args.grad_y) && fits(args.residual) &&
                       fits(args.cotangent_x) && fits(args.cotangent_residual) &&
                       fits(args.grad_grad_y) && fits(args.grad_x) && fits(args.grad_residual);
  // float64 computes GELU with scalar functions: a loop of its own would gain nothing.
  constexpr auto has_loop = [](Activation activation) {
    return sizeof(A) == 4 ||
           (activation != Activation::kGelu && activation != Activation::kGeluTanh);
  };
  visit_elements<A>(args.x.dtype, [&](auto tag) HWY_ATTR {
    if (!is_same || !has_loop(args.activation)) {
      return f(tag, std::false_type(), std::integral_constant<Activation, Activation::kNone>());
    }
    visit_activation(args.activation, [&](auto activation) HWY_ATTR {
      if constexpr (has_loop(activation())) f(tag, std::true_type(), activation);
    });
  });
}

template <class T, bool kSame, class A>
HWY_INLINE Operands<T, kSame> row_operands(const DoubleBackwardArgs<A>& args, std::int64_t row,
                                           std::int64_t width, std::int64_t first) {
  const bool per_row = args.mask.per_row;
  const std::uint8_t* const mask =
      args.mask.data == nullptr ? nullptr : args.mask.data + (per_row ? row : row * width + first);
  return Operands<T, kSame>(args, row * width + first, mask, per_row);
}

}  // namespace
}  // namespace normcore::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
