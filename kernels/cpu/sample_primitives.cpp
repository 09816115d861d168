// Primitives over samples of many short slices, forward and backward. A slice is too short to
// pay for a call, a horizontal sum or a square root of its own: sums of slices go to arrays, their
// statistics are computed many at a time, and then spread over the columns again. Everything but x,
// grad_y and the outputs stays in the first two levels of cache.
//
// Statistics are centred twice: about the mean as the arithmetic type sums it, then, in float64,
// about what is left of the mean.
#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/sample_primitives.cpp"
#include <hwy/foreach_target.h>
// clang-format off: must follow foreach_target.h
#include <hwy/highway.h>
// clang-format on

#include <algorithm>
#include <cmath>

#include "cpu/activation-inl.h"
#include "cpu/primitives.h"
#include "cpu/primitives_export.h"
#include "cpu/samples-inl.h"
#include "cpu/units-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normcore::kernels::HWY_NAMESPACE {
namespace {

// x - pivot and (x - pivot)^2 of vectors and of single values.
template <class A>
struct Centered {
  Vector<A> pivots;
  A pivot;
  HWY_INLINE explicit Centered(A p) : pivots(hn::Set(Tag<A>(), p)), pivot(p) {}
  HWY_INLINE Vector<A> operator()(Vector<A> v) const { return hn::Sub(v, pivots); }
  HWY_INLINE A operator()(A v) const { return v - pivot; }
};
template <class A>
struct CenteredSquare {
  Centered<A> centered;
  HWY_INLINE Vector<A> operator()(Vector<A> v) const {
    const auto c = centered(v);
    return hn::Mul(c, c);
  }
  HWY_INLINE A operator()(A v) const { return centered(v) * centered(v); }
};
// ---- forward

// Statistics of one slice of float32 values in float64: for squares that float32 cannot hold.
inline void wide_statistics(const float* x, std::int64_t size, double eps, double* mean,
                            float* rstd) {
  double sum = 0.0, square = 0.0;
  for (std::int64_t i = 0; i < size; ++i) sum += x[i];
  *mean = sum / static_cast<double>(size);
  for (std::int64_t i = 0; i < size; ++i) square += (x[i] - *mean) * (x[i] - *mean);
  *rstd = static_cast<float>(1.0 / std::sqrt(square / static_cast<double>(size) + eps));
}

template <class A>
HWY_INLINE void statistics_of_sample(const SampleShape& shape, double eps, const A* x, A* pivot,
                                     A* sum, A* square, double* mean, A* rstd) {
  const A weight = A{1} / static_cast<A>(shape.size);
  for (std::int64_t k = 0; k < shape.slices; ++k, x += shape.size) {
    const A first = x[0];
    const Centered<A> about_mean(first +
                                 sum_of_slice<A>(x, shape.size, Centered<A>(first)) * weight);
    pivot[k] = about_mean.pivot;
    sum[k] = sum_of_slice<A>(x, shape.size, about_mean);
    square[k] = sum_of_slice<A>(x, shape.size, CenteredSquare<A>{about_mean});
  }
  const Tag<double> d;
  const auto size = hn::Set(d, static_cast<double>(shape.size)), one = hn::Set(d, 1.0),
             epsilon = hn::Set(d, eps), inverse_size = hn::Div(one, size);
  for_each_in_order<double>(shape.slices, [&](const auto& u) HWY_ATTR {
    const auto s = u.load(sum);
    const auto shift =
        map_pair<double>([&](auto v) HWY_ATTR { return hn::Mul(v, inverse_size); }, s);
    u.store(map_pair<double>([&](auto p, auto v) HWY_ATTR { return hn::Add(p, v); }, u.load(pivot),
                             shift),
            mean);
    u.store(map_pair<double>(
                [&](auto q, auto v, auto m) HWY_ATTR {
                  const auto rest = hn::NegMulAdd(v, m, q);
                  // A NaN stays one.
                  const auto m2 = hn::IfThenZeroElse(hn::Lt(rest, hn::Zero(d)), rest);
                  return hn::Div(one, hn::Sqrt(hn::MulAdd(m2, inverse_size, epsilon)));
                },
                u.load(square), s, shift),
            rstd);
  });
  if constexpr (sizeof(A) == 4) {
    constexpr float kTiny = 1e-28f;  // below, squares of a slice may be subnormal
    const bool tiny_matters = eps < 1e-20;
    const A* const begin = x - shape.columns();
    for (std::int64_t k = 0; k < shape.slices; ++k) {
      if (std::isfinite(square[k]) && !(tiny_matters && square[k] < kTiny)) continue;
      wide_statistics(begin + k * shape.size, shape.size, eps, mean + k, rstd + k);
    }
  }
}

template <Activation kActivation, class A>
HWY_INLINE void normalize(const SamplesForwardArgs<A>& args) {
  const std::int64_t columns = args.shape.columns(), slices = args.shape.slices;
  Arrays<A> arrays{args.scratch, args.scratch_stride};
  A *const values = arrays.take(), *const center = arrays.take(), *const rstd = arrays.take(),
           *const rest = arrays.take(), *const pivot = arrays.take(), *const sum = arrays.take(),
           *const square = arrays.take();
  for (std::int64_t sample = 0; sample < args.samples; ++sample) {
    const std::int64_t offset = sample * args.stride;
    const auto x = advance(args.x, offset), residual = advance(args.residual, offset);
    const auto y = advance(args.y, offset);
    for_each_in_order<A>(columns,
                         [&](const auto& u) HWY_ATTR { u.store(load_any<A>(u, x), values); });
    double* const mean = args.mean + sample * args.slice_stride;
    A* const saved_rstd = args.rstd + sample * args.slice_stride;
    statistics_of_sample<A>(args.shape, args.eps, values, pivot, sum, square, mean, saved_rstd);
    split_means<A>(mean, slices, pivot, sum);
    spread(args.shape, Spread<A>{pivot, center}, Spread<A>{sum, rest}, Spread<A>{saved_rstd, rstd});
    const A* const scale = args.scale + sample * args.scale_stride;
    const A* const bias = args.bias + sample * args.bias_stride;
    for_each_in_order<A>(columns, [&](const auto& u) HWY_ATTR {
      const auto gain = map_pair<A>([](auto r, auto s) HWY_ATTR { return hn::Mul(r, s); },
                                    u.load(rstd), u.load(scale));
      const auto shift =
          map_pair<A>([](auto r, auto g, auto b) HWY_ATTR { return hn::NegMulAdd(r, g, b); },
                      u.load(rest), gain, u.load(bias));
      auto z = map_pair<A>([](auto v, auto c, auto g, auto s)
                               HWY_ATTR { return hn::MulAdd(hn::Sub(v, c), g, s); },
                           u.load(values), u.load(center), gain, shift);
      if (residual) {
        z = map_pair<A>([](auto v, auto r) HWY_ATTR { return hn::Add(v, r); }, z,
                        load_any<A>(u, residual));
      }
      store_any<A>(u, map_pair<A>([](auto v) HWY_ATTR { return activate<kActivation, A>(v); }, z),
                   y);
    });
  }
}

template <class A>
void normalize_samples(const SamplesForwardArgs<A>& args) {
  visit_activation(args.activation,
                   [&](auto activation) HWY_ATTR { normalize<activation(), A>(args); });
}

// ---- backward

template <Activation kActivation, class A>
HWY_INLINE void gradient(const SamplesBackwardArgs<A>& args) {
  const std::int64_t columns = args.shape.columns(), slices = args.shape.slices,
                     size = args.shape.size;
  Arrays<A> arrays{args.scratch, args.scratch_stride};
  A *const centered = arrays.take(), *const weighted = arrays.take(),
           *const product = arrays.take(), *const center = arrays.take(),
           *const rstd = arrays.take(), *const rest = arrays.take(), *const slope = arrays.take(),
           *const offset = arrays.take(), *const of_slice = arrays.take(),
           *const of_slice_too = arrays.take(), *const slice_slope = arrays.take(),
           *const slice_offset = arrays.take();
  const Tag<double> d;
  const auto inverse_size = hn::Set(d, 1.0 / static_cast<double>(size));
  for (std::int64_t sample = 0; sample < args.samples; ++sample) {
    const std::int64_t at = sample * args.stride;
    const auto x = advance(args.x, at), residual = advance(args.residual, at),
               grad_y = advance(args.grad_y, at);
    const auto grad_x = advance(args.grad_x, at), grad_residual = advance(args.grad_residual, at);
    const A* const scale = args.scale + sample * args.scale_stride;
    const A* const bias = args.bias + sample * args.bias_stride;
    const A* const saved_rstd = args.rstd + sample * args.slice_stride;
    split_means<A>(args.mean + sample * args.slice_stride, slices, of_slice, of_slice_too);
    spread(args.shape, Spread<A>{of_slice, center}, Spread<A>{of_slice_too, rest},
           Spread<A>{saved_rstd, rstd});
    for_each_in_order<A>(columns, [&](const auto& u) HWY_ATTR {
      const auto gain = u.load(scale), r = u.load(rstd);
      const auto c = less_mean<A>(load_any<A>(u, x), u.load(center), u.load(rest));
      auto dz = load_any<A>(u, grad_y);
      if constexpr (kActivation != Activation::kNone) {
        auto z = map_pair<A>([](auto v, auto s, auto w, auto b)
                                 HWY_ATTR { return hn::MulAdd(v, hn::Mul(s, w), b); },
                             c, r, gain, u.load(bias));
        if (residual) {
          z = map_pair<A>([](auto v, auto a) HWY_ATTR { return hn::Add(v, a); }, z,
                          load_any<A>(u, residual));
        }
        dz = map_pair<A>(
            [](auto v, auto t)
                HWY_ATTR { return hn::Mul(v, activation_derivative<kActivation, A>(t)); },
            dz, z);
      }
      const auto w = map_pair<A>([](auto v, auto s) HWY_ATTR { return hn::Mul(v, s); }, dz, gain);
      if (args.scale_sums != nullptr) {
        const auto fresh = u.only_new(dz);
        const auto through =
            map_pair<A>([](auto v, auto m, auto s) HWY_ATTR { return hn::Mul(v, hn::Mul(m, s)); },
                        fresh, u.only_new(c), r);
        const auto add = [](auto a, auto b) HWY_ATTR { return hn::Add(a, b); };
        u.store(map_pair<A>(add, u.load(args.scale_sums), through), args.scale_sums);
        u.store(map_pair<A>(add, u.load(args.bias_sums), fresh), args.bias_sums);
      }
      u.store(c, centered);
      u.store(w, weighted);
      u.store(map_pair<A>([](auto v, auto m) HWY_ATTR { return hn::Mul(v, m); }, w, c), product);
      if (grad_residual) store_any<A>(u, dz, grad_residual);
    });
    if (!grad_x) continue;
    sums_of_slices(weighted, args.shape, of_slice);
    sums_of_slices(product, args.shape, of_slice_too);
    for_each_in_order<double>(slices, [&](const auto& u) HWY_ATTR {
      const auto r = u.load(saved_rstd), h = u.load(of_slice), hc = u.load(of_slice_too);
      const auto mean_of = [&](auto s, auto v)
                               HWY_ATTR { return hn::Neg(hn::Mul(hn::Mul(s, v), inverse_size)); };
      const auto cube =
          map_pair<double>([](auto v) HWY_ATTR { return hn::Mul(v, hn::Mul(v, v)); }, r);
      u.store(map_pair<double>(mean_of, cube, hc), slice_slope);
      u.store(map_pair<double>(mean_of, r, h), slice_offset);
    });
    spread(args.shape, Spread<A>{slice_slope, slope}, Spread<A>{slice_offset, offset});
    for_each_in_order<A>(columns, [&](const auto& u) HWY_ATTR {
      Pair<A> dx;
      if (size == 1) {  // y does not depend on x: 0, or NaN where there is one
        dx = map_pair<A>([](auto w, auto c)
                             HWY_ATTR { return hn::Mul(hn::Add(w, c), hn::Zero(Tag<A>())); },
                         u.load(weighted), u.load(centered));
      } else {
        const auto through =
            map_pair<A>([](auto c, auto s, auto o) HWY_ATTR { return hn::MulAdd(c, s, o); },
                        u.load(centered), u.load(slope), u.load(offset));
        dx = map_pair<A>([](auto w, auto r, auto t) HWY_ATTR { return hn::MulAdd(w, r, t); },
                         u.load(weighted), u.load(rstd), through);
      }
      store_any<A>(u, dx, grad_x);
    });
  }
}

template <class A>
void gradient_of_samples(const SamplesBackwardArgs<A>& args) {
  visit_activation(args.activation,
                   [&](auto activation) HWY_ATTR { gradient<activation(), A>(args); });
}

}  // namespace

void fill_sample_primitives(Primitives<float>& f, Primitives<double>& d) {
  f.normalize_samples = normalize_samples<float>;
  f.gradient_of_samples = gradient_of_samples<float>;
  d.normalize_samples = normalize_samples<double>;
  d.gradient_of_samples = gradient_of_samples<double>;
}

}  // namespace normcore::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normcore::kernels {
HWY_EXPORT(fill_sample_primitives);
void add_sample_primitives(Primitives<float>& f, Primitives<double>& d) {
  HWY_DYNAMIC_DISPATCH(fill_sample_primitives)(f, d);
}
}  // namespace normcore::kernels
#endif
