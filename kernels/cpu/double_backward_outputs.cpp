// The second sweep of the double backward pass: what has the extent of x.
#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/double_backward_outputs.cpp"
#include <hwy/foreach_target.h>
// clang-format off: must follow foreach_target.h
#include <hwy/highway.h>
// clang-format on

#include <type_traits>

#include "cpu/double_backward-inl.h"
#include "cpu/primitives.h"
#include "cpu/primitives_export.h"

HWY_BEFORE_NAMESPACE();
namespace normcore::kernels::HWY_NAMESPACE {
namespace {

template <class T, bool kSame, StoreOptions kOptions, class A, class Unit>
HWY_INLINE void store_output(const Unit& unit, const Pair<A>& v, MutableTensor out) {
  if constexpr (kSame) {
    unit.template store<kOptions>(v, static_cast<T*>(out.data));
  } else {
    store_any<A>(unit, v, out);
  }
}

// One run of n values.
template <bool kSame, Activation kActivation, class T, class A, class Source>
HWY_INLINE void gradient_of_run(const DoubleBackwardArgs<A>& args, std::int64_t offset,
                                std::int64_t n, const Source& source,
                                const Operands<T, kSame>& in) {
  const auto grad_grad_y = advance(args.grad_grad_y, offset), grad_x = advance(args.grad_x, offset),
             grad_residual = advance(args.grad_residual, offset);
  const auto body = [&](const auto& unit, auto options) HWY_ATTR {
    const auto& c = source.at(unit);
    const auto t = terms_of_unit<kSame, kActivation, A>(unit, in, args.activation, c);
    auto k = broadcast(A{0});  // and not 0 * q, which may be NaN
    if (kSame ? is_curved(kActivation) : is_curved(args.activation)) {
      k = {hn::Mul(t.b.lo, t.q.lo), hn::Mul(t.b.hi, t.q.hi)};
    }
    if (grad_grad_y) {
      const auto v =
          map_pair<A>([](auto a, auto q) HWY_ATTR { return hn::Mul(a, q); }, t.derivative, t.q);
      store_output<T, kSame, options()>(unit, v, grad_grad_y);
    }
    if (grad_x) {
      const auto through = [](auto u, auto centered, auto gain, auto slope, auto shift) HWY_ATTR {
        return hn::MulAdd(u, gain, hn::MulAdd(centered, slope, shift));
      };
      Pair<A> v = {
          through(t.u.lo, t.centered.lo, lo<A>(c.u_gain), lo<A>(c.slope), lo<A>(c.offset)),
          through(t.u.hi, t.centered.hi, hi<A>(c.u_gain), hi<A>(c.slope), hi<A>(c.offset))};
      if constexpr (!kSame) v = zero_unless(t.counts, v);
      v = {hn::MulAdd(t.g.lo, lo<A>(c.g_gain), hn::MulAdd(k.lo, lo<A>(c.scale), v.lo)),
           hn::MulAdd(t.g.hi, hi<A>(c.g_gain), hn::MulAdd(k.hi, hi<A>(c.scale), v.hi))};
      if constexpr (!kSame) v = zero_unless(t.used, v);  // g_gain is NaN where no value counts
      store_output<T, kSame, options()>(unit, v, grad_x);
    }
    if (grad_residual) store_output<T, kSame, options()>(unit, k, grad_residual);
  };
  // Values are stored twice at the end of a run.
  for_each_stored_unit<A, kOrderOf<A, T>, StoreOptions{}, Source::kEndOfRun && kSame>(
      n, static_cast<const T*>(nullptr), /*stream=*/false, body);
}

template <class A>
void double_gradient_of_runs(const DoubleBackwardArgs<A>& given, std::int64_t count,
                             std::int64_t length) {
  visit_terms(given, [&](auto tag, auto same, auto activation) HWY_ATTR {
    using T = typename decltype(tag)::type;
    const DoubleBackwardArgs<A> args = given;  // which outputs cannot alias: runs may be short
    for (std::int64_t run = 0; run < count; ++run) {
      const std::uint8_t* const mask =
          args.mask.data == nullptr ? nullptr : args.mask.data + run * args.mask.record_stride;
      const std::int64_t offset = run * length;
      gradient_of_run<same(), activation()>(args, offset, length,
                                            DoubleRunSource<A>(args.coefficients, run),
                                            Operands<T, same()>(args, offset, mask, false));
    }
  });
}

template <class A>
void double_gradient_of_rows(const DoubleBackwardArgs<A>& args, std::int64_t rows,
                             std::int64_t width) {
  visit_terms(args, [&](auto tag, auto same, auto activation) HWY_ATTR {
    using T = typename decltype(tag)::type;
    for_each_strip<kStrip>(width, [&](std::int64_t first, std::int64_t columns) HWY_ATTR {
      const DoubleColumnSource<A, kOrderOf<A, T>> source(args.coefficients, first, columns);
      for (std::int64_t row = 0; row < rows; ++row) {
        gradient_of_run<same(), activation()>(args, row * width + first, columns, source,
                                              row_operands<T, same()>(args, row, width, first));
      }
    });
  });
}

}  // namespace

void fill_double_backward_outputs(Primitives<float>& f, Primitives<double>& d) {
  f.double_gradient_of_runs = double_gradient_of_runs<float>;
  f.double_gradient_of_rows = double_gradient_of_rows<float>;
  d.double_gradient_of_runs = double_gradient_of_runs<double>;
  d.double_gradient_of_rows = double_gradient_of_rows<double>;
}

}  // namespace normcore::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normcore::kernels {
HWY_EXPORT(fill_double_backward_outputs);
void add_double_backward_outputs(Primitives<float>& f, Primitives<double>& d) {
  HWY_DYNAMIC_DISPATCH(fill_double_backward_outputs)(f, d);
}
}  // namespace normcore::kernels
#endif
