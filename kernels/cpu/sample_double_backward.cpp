// The double backward pass over samples of many short slices, in the way of sample_primitives.cpp.
// With the names of norm_input.h, m = u - p0 - p1 xhat and a = scale k + (v - rstd p1 scale) g
//   q = scale rstd m + v xhat + s + t
//   grad_scale = sum of rstd g m + k xhat
//   grad_x = rstd (a - mean(a) - xhat mean(a xhat + rstd scale g m) - m rstd mean(scale g xhat))
// so that a slice has two sums before its terms are known, and three behind them.
#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/sample_double_backward.cpp"
#include <hwy/foreach_target.h>
// clang-format off: must follow foreach_target.h
#include <hwy/highway.h>
// clang-format on

#include <algorithm>

#include "cpu/activation-inl.h"
#include "cpu/primitives.h"
#include "cpu/primitives_export.h"
#include "cpu/samples-inl.h"
#include "cpu/units-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normcore::kernels::HWY_NAMESPACE {
namespace {

// Arrays of columns. One that is read no more gives its place to another.
template <class A>
struct Columns {
  A *rstd, *xhat, *u;                          // u is less its center
  A *mean, *rest, *center, *given_u, *ux;      // up to p0 and p1
  A *p0 = mean, *p1 = rest;                    // up to the terms
  A *m = center, *a = given_u, *gx = ux, *ax;  // the terms: gx is scale g xhat
  A *a_mean = p0, *ax_mean = p1, *m_gain = u;  // with the factor -rstd

  HWY_INLINE explicit Columns(Arrays<A>& arrays)
      : rstd(arrays.take()),
        xhat(arrays.take()),
        u(arrays.take()),
        mean(arrays.take()),
        rest(arrays.take()),
        center(arrays.take()),
        given_u(arrays.take()),
        ux(arrays.take()),
        ax(arrays.take()) {}
};

// Arrays of slices: sums, what is computed of them, and rstd where y does not depend on x.
template <class A>
struct Slices {
  A *first, *second, *third, *of_first, *of_second, *of_third, *zeros;

  HWY_INLINE explicit Slices(Arrays<A>& arrays)
      : first(arrays.take()),
        second(arrays.take()),
        third(arrays.take()),
        of_first(arrays.take()),
        of_second(arrays.take()),
        of_third(arrays.take()),
        zeros(arrays.take()) {}
};

template <class A, class Unit>
HWY_INLINE Pair<A> load_or_zero(const Unit& unit, ConstTensor tensor) {
  return tensor ? load_any<A>(unit, tensor) : broadcast(A{0});
}

// The first loop: rstd, xhat, u, p0 and p1.
template <class A>
void deviations(ConstTensor x, ConstTensor cotangent, const SampleShape& shape, const double* mean,
                const A* rstd, const Columns<A>& c, const Slices<A>& s) {
  split_means<A>(mean, shape.slices, s.first, s.second);
  for_each_in_order<A>(shape.columns(), [&](const auto& unit) HWY_ATTR {
    unit.store(load_or_zero<A>(unit, cotangent), c.given_u);
  });
  for (std::int64_t k = 0; k < shape.slices; ++k) s.third[k] = c.given_u[k * shape.size];
  spread(shape, Spread<A>{s.first, c.mean}, Spread<A>{s.second, c.rest},
         Spread<A>{s.third, c.center}, Spread<A>{rstd, c.rstd});
  for_each_in_order<A>(shape.columns(), [&](const auto& unit) HWY_ATTR {
    const auto centered = less_mean<A>(load_any<A>(unit, x), unit.load(c.mean), unit.load(c.rest));
    const auto xhat = product_of(centered, unit.load(c.rstd));
    const auto u = subtract(unit.load(c.given_u), unit.load(c.center));
    unit.store(xhat, c.xhat);
    unit.store(u, c.u);
    unit.store(product_of(u, xhat), c.ux);
  });
  sums_of_slices(c.u, shape, s.first);
  sums_of_slices(c.ux, shape, s.second);
  const auto share = broadcast(1.0 / static_cast<double>(shape.size));
  for_each_in_order<double>(shape.slices, [&](const auto& unit) HWY_ATTR {
    unit.store(product_of(unit.load(s.first), share), s.of_first);
    unit.store(product_of(unit.load(s.second), share), s.of_second);
  });
  spread(shape, Spread<A>{s.of_first, c.p0}, Spread<A>{s.of_second, c.p1});
}

// The second loop, over one sample: the terms, and every output but grad_x.
template <Activation kActivation, class A>
HWY_INLINE void terms(const SamplesDoubleBackwardArgs<A>& args, std::int64_t sample,
                      const Columns<A>& c) {
  const std::int64_t at = sample * args.stride;
  const auto residual = advance(args.residual, at), grad_y = advance(args.grad_y, at),
             t = advance(args.cotangent_residual, at);
  const auto grad_grad_y = advance(args.grad_grad_y, at),
             grad_residual = advance(args.grad_residual, at);
  const A* const scale = args.scale + sample * args.scale_stride;
  const A* const bias = args.bias + sample * args.bias_stride;
  const A* const cotangent_scale = args.cotangent_scale + sample * args.cotangent_scale_stride;
  const A* const cotangent_bias = args.cotangent_bias + sample * args.cotangent_bias_stride;
  A *const scale_sums = args.scale_sums, *const bias_sums = args.bias_sums;
  const bool wants_x(args.grad_x);
  for_each_in_order<A>(args.shape.columns(), [&](const auto& unit) HWY_ATTR {
    const auto w = unit.load(scale), v = unit.load(cotangent_scale), r = unit.load(c.rstd),
               xhat = unit.load(c.xhat), p1 = unit.load(c.p1);
    const auto m = subtract_product(subtract(unit.load(c.u), unit.load(c.p0)), p1, xhat);
    const auto rm = product_of(r, m);
    auto q = multiply_add(w, rm, multiply_add(v, xhat, unit.load(cotangent_bias)));
    if (t) q = sum_of(q, load_any<A>(unit, t));
    auto g = load_any<A>(unit, grad_y), k = broadcast(A{0}), derivative = broadcast(A{1});
    if constexpr (kActivation != Activation::kNone) {
      auto z = multiply_add(xhat, w, unit.load(bias));
      if (residual) z = sum_of(z, load_any<A>(unit, residual));
      const auto of_lo = activation_derivatives<kActivation, A>(z.lo),
                 of_hi = activation_derivatives<kActivation, A>(z.hi);
      derivative = {of_lo.first, of_hi.first};
      if constexpr (is_curved(kActivation)) {  // else 0, and not 0 * q, which may be NaN
        const auto b = product_of(g, Pair<A>{of_lo.second, of_hi.second});
        k = product_of(b, q);
      }
      g = product_of(g, derivative);
    }
    const auto g_rm = product_of(g, rm);
    if (grad_grad_y) store_any<A>(unit, product_of(derivative, q), grad_grad_y);
    if (grad_residual) store_any<A>(unit, k, grad_residual);
    if (scale_sums != nullptr) {
      const auto added = multiply_add(k, xhat, g_rm);
      unit.store(sum_of(unit.load(scale_sums), unit.only_new(added)), scale_sums);
      unit.store(sum_of(unit.load(bias_sums), unit.only_new(k)), bias_sums);
    }
    if (wants_x) {
      const auto by_spread = subtract_product(v, product_of(r, p1), w);
      const auto a = multiply_add(by_spread, g, product_of(w, k));
      const auto gx = product_of(product_of(w, g), xhat);
      unit.store(m, c.m);
      unit.store(a, c.a);
      unit.store(gx, c.gx);
      unit.store(multiply_add(a, xhat, product_of(w, g_rm)), c.ax);
    }
  });
}

// The third loop.
template <class A>
void input_gradient(const SampleShape& shape, const A* rstd, const Columns<A>& c,
                    const Slices<A>& s, MutableTensor grad_x) {
  sums_of_slices(c.a, shape, s.first);
  sums_of_slices(c.ax, shape, s.second);
  sums_of_slices(c.gx, shape, s.third);
  const auto share = broadcast(-1.0 / static_cast<double>(shape.size));
  for_each_in_order<double>(shape.slices, [&](const auto& unit) HWY_ATTR {
    const auto r = unit.load(rstd);
    const auto factor = product_of(r, share);
    unit.store(product_of(factor, unit.load(s.first)), s.of_first);
    unit.store(product_of(factor, unit.load(s.second)), s.of_second);
    unit.store(product_of(product_of(factor, r), unit.load(s.third)), s.of_third);
  });
  spread(shape, Spread<A>{s.of_first, c.a_mean}, Spread<A>{s.of_second, c.ax_mean},
         Spread<A>{s.of_third, c.m_gain});
  for_each_in_order<A>(shape.columns(), [&](const auto& unit) HWY_ATTR {
    const auto by_m = multiply_add(unit.load(c.m), unit.load(c.m_gain), unit.load(c.a_mean));
    const auto by_x = multiply_add(unit.load(c.xhat), unit.load(c.ax_mean), by_m);
    store_any<A>(unit, multiply_add(unit.load(c.a), unit.load(c.rstd), by_x), grad_x);
  });
}

template <class A>
void double_gradient_of_samples(const SamplesDoubleBackwardArgs<A>& args) {
  Arrays<A> arrays{args.scratch, args.scratch_stride};
  const Columns<A> columns(arrays);
  const Slices<A> slices(arrays);
  const bool is_constant = args.shape.size == 1;  // y does not depend on x
  if (is_constant) std::fill_n(slices.zeros, args.shape.slices, A{0});
  visit_activation(args.activation, [&](auto activation) HWY_ATTR {
    for (std::int64_t sample = 0; sample < args.samples; ++sample) {
      const std::int64_t at = sample * args.stride, slice = sample * args.slice_stride;
      const A* const rstd = is_constant ? slices.zeros : args.rstd + slice;
      deviations(advance(args.x, at), advance(args.cotangent_x, at), args.shape, args.mean + slice,
                 rstd, columns, slices);
      terms<activation()>(args, sample, columns);
      if (!args.grad_x) continue;
      input_gradient(args.shape, rstd, columns, slices, advance(args.grad_x, at));
    }
  });
}

}  // namespace

void fill_sample_double_backward(Primitives<float>& f, Primitives<double>& d) {
  f.double_gradient_of_samples = double_gradient_of_samples<float>;
  d.double_gradient_of_samples = double_gradient_of_samples<double>;
}

}  // namespace normcore::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normcore::kernels {
HWY_EXPORT(fill_sample_double_backward);
void add_sample_double_backward(Primitives<float>& f, Primitives<double>& d) {
  HWY_DYNAMIC_DISPATCH(fill_sample_double_backward)(f, d);
}
}  // namespace normcore::kernels
#endif
