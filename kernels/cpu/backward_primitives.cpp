// Backward primitives: sums of g and g * (x - center), and the gradients with respect to x and the
// residual, where g = grad_y * activation'(z). z is computed again from x: nothing but mean and
// rstd is kept from the forward pass. A masked-out value whose grad_y is 0 takes part with g = 0
// and x = center, whatever it holds.
#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/backward_primitives.cpp"
#include <hwy/foreach_target.h>
// clang-format off: must follow foreach_target.h
#include <hwy/highway.h>
// clang-format on

#include <algorithm>

#include "cpu/activation-inl.h"
#include "cpu/convert-inl.h"
#include "cpu/primitives.h"
#include "cpu/primitives_export.h"

HWY_BEFORE_NAMESPACE();
namespace normcore::kernels::HWY_NAMESPACE {
namespace {

// How much of the general formula a call needs. kPlain: grad_y has the dtype of x, no activation,
// no mask.
enum class Epilogue { kPlain, kGeneral };

// One run or row of the operands; offsets are applied once.
template <class T, class A>
struct Operands {
  const T* x;
  ConstTensor grad_y;
  ConstTensor residual;
  const std::uint8_t* mask;  // null: every value counts
  bool mask_is_one_value;    // the mask is a single byte for the whole row
  Activation activation;

  HWY_INLINE Operands(const GradientArgs<A>& args, std::int64_t offset, const std::uint8_t* mask,
                      bool mask_is_one_value)
      : x(static_cast<const T*>(args.x.data) + offset),
        grad_y(advance(args.grad_y, offset)),
        residual(advance(args.residual, offset)),
        mask(mask),
        mask_is_one_value(mask_is_one_value),
        activation(args.activation) {}
};

// Where the coefficients of a unit come from: one value per run, or one per column.
template <class A>
struct RunSource {
  const Coefficients<A>& c;
  std::int64_t run;
  template <class Unit>
  HWY_INLINE Pair<A> get(const Unit&, const A* values) const {
    return broadcast(values[run]);
  }
};

template <class A>
struct ColumnSource {
  const Coefficients<A>& c;
  template <class Unit>
  HWY_INLINE Pair<A> get(const Unit& u, const A* values) const {
    return u.load(values);
  }
};

// g, x - center, the mask of one unit, and what is not a masked-out value whose grad_y is 0.
template <class A>
struct Gradient {
  Pair<A> g, centered;
  PairMask<A> counts, used;
};

template <class A>
HWY_INLINE Vector<A> subtract_or_zero(hn::Mask<Tag<A>> keep, Vector<A> x, Vector<A> center) {
  return hn::IfThenElseZero(keep, hn::Sub(x, center));
}

template <Epilogue kEpilogue, class T, class A, class Unit, class Source>
HWY_INLINE Gradient<A> gradient_of_unit(const Unit& u, const Operands<T, A>& in,
                                        const Source& source, const Pair<A>& center) {
  const Tag<A> d;
  const auto x = u.load(in.x);
  Gradient<A> out;
  if constexpr (kEpilogue == Epilogue::kPlain) {
    out.g = u.load(static_cast<const T*>(in.grad_y.data));
    out.centered = {hn::Sub(x.lo, center.lo), hn::Sub(x.hi, center.hi)};
    return out;
  }
  out.g = load_any<A>(u, in.grad_y);
  const auto every = hn::Eq(hn::Zero(d), hn::Zero(d));
  out.counts = {every, every};
  out.used = {every, every};
  if (in.mask != nullptr) {
    if (!in.mask_is_one_value) {
      out.counts = u.load_mask(in.mask);
    } else if (*in.mask == 0) {
      out.counts = {hn::Not(every), hn::Not(every)};
    }
    out.used = {hn::Or(out.counts.lo, hn::Ne(out.g.lo, hn::Zero(d))),
                hn::Or(out.counts.hi, hn::Ne(out.g.hi, hn::Zero(d)))};
  }
  out.centered = {subtract_or_zero<A>(out.used.lo, x.lo, center.lo),
                  subtract_or_zero<A>(out.used.hi, x.hi, center.hi)};
  if (in.activation != Activation::kNone) {
    const auto scale = source.get(u, source.c.scale), shift = source.get(u, source.c.shift);
    Pair<A> z = {hn::MulAdd(out.centered.lo, scale.lo, shift.lo),
                 hn::MulAdd(out.centered.hi, scale.hi, shift.hi)};
    if (in.residual) {
      const auto r = load_any<A>(u, in.residual);
      z = {hn::Add(z.lo, r.lo), hn::Add(z.hi, r.hi)};
    }
    out.g = {hn::IfThenElseZero(out.used.lo,
                                hn::Mul(out.g.lo, activation_derivative<A>(in.activation, z.lo))),
             hn::IfThenElseZero(out.used.hi,
                                hn::Mul(out.g.hi, activation_derivative<A>(in.activation, z.hi)))};
  }
  return out;
}

template <class A, class F>
HWY_INLINE void visit_gradient(const GradientArgs<A>& args, F&& f) {
  visit_elements<A>(args.x.dtype, [&](auto tag) HWY_ATTR {
    if (args.grad_y.dtype == args.x.dtype && args.activation == Activation::kNone &&
        args.mask.data == nullptr) {
      f(tag, std::integral_constant<Epilogue, Epilogue::kPlain>());
    } else {
      f(tag, std::integral_constant<Epilogue, Epilogue::kGeneral>());
    }
  });
}

// ---- sums

template <class A>
struct SumPair {
  Pair<A> g, g_centered;

  HWY_INLINE SumPair() : g(broadcast(A{0})), g_centered(broadcast(A{0})) {}
  HWY_INLINE SumPair(const Pair<A>& g, const Pair<A>& g_centered) : g(g), g_centered(g_centered) {}
  HWY_INLINE void add(const Pair<A>& value, const Pair<A>& centered) {
    g = {hn::Add(g.lo, value.lo), hn::Add(g.hi, value.hi)};
    g_centered = {hn::MulAdd(value.lo, centered.lo, g_centered.lo),
                  hn::MulAdd(value.hi, centered.hi, g_centered.hi)};
  }
};

template <class A>
void sums_of_runs(const GradientArgs<A>& args, const RunBlock& block, GradientSums* out) {
  visit_gradient(args, [&](auto tag, auto epilogue) HWY_ATTR {
    using T = typename decltype(tag)::type;
    for (std::int64_t record = 0; record < block.records; ++record) {
      const RunSource<A> source{args.coefficients, record};
      const auto center = broadcast(args.coefficients.center[record]);
      SumPair<A> even, odd;
      for (std::int64_t run = 0; run < block.runs; ++run) {
        const std::uint8_t* mask =
            args.mask.data == nullptr
                ? nullptr
                : args.mask.data + record * args.mask.record_stride + run * args.mask.run_stride;
        const Operands<T, A> in(args, record * block.record_stride + run * block.run_stride, mask,
                                false);
        const auto add = [&](const auto& u, SumPair<A>& sums) HWY_ATTR {
          const auto v = gradient_of_unit<epilogue()>(u, in, source, center);
          sums.add(u.only_new(v.g), u.only_new(v.centered));
        };
        const std::int64_t step = unit<A>();
        std::int64_t i = 0;
        for (; i + 2 * step <= block.length; i += 2 * step) {
          add(WholeUnit<A>{i}, even);
          add(WholeUnit<A>{i + step}, odd);
        }
        if (i + step <= block.length) {
          add(WholeUnit<A>{i}, even);
          i += step;
        }
        if (i < block.length) add(LastUnit<A>(block.length), odd);
      }
      out[record].g =
          sum_of_lanes<A>(hn::Add(hn::Add(even.g.lo, odd.g.lo), hn::Add(even.g.hi, odd.g.hi)));
      out[record].g_centered =
          sum_of_lanes<A>(hn::Add(hn::Add(even.g_centered.lo, odd.g_centered.lo),
                                  hn::Add(even.g_centered.hi, odd.g_centered.hi)));
    }
  });
}

template <class T, class A>
HWY_INLINE Operands<T, A> row_operands(const GradientArgs<A>& args, std::int64_t row,
                                       std::int64_t width) {
  const bool per_row = args.mask.per_row;
  const std::uint8_t* mask =
      args.mask.data == nullptr ? nullptr : args.mask.data + (per_row ? row : row * width);
  return Operands<T, A>(args, row * width, mask, per_row);
}

template <class A>
void sums_of_rows(const GradientArgs<A>& args, std::int64_t rows, std::int64_t width, A* g,
                  A* g_centered) {
  std::fill(g, g + width, A{0});
  std::fill(g_centered, g_centered + width, A{0});
  visit_gradient(args, [&](auto tag, auto epilogue) HWY_ATTR {
    using T = typename decltype(tag)::type;
    const ColumnSource<A> source{args.coefficients};
    constexpr int kRows = 2;  // rows that share one load of the accumulators
    std::int64_t row = 0;
    const auto add_rows = [&](auto count) HWY_ATTR {
      for_each_unit<A>(width, [&](const auto& u) HWY_ATTR {
        const auto center = u.load(args.coefficients.center);
        SumPair<A> sums(u.load(g), u.load(g_centered));
        for (int k = 0; k < count(); ++k) {
          const auto in = row_operands<T>(args, row + k, width);
          const auto v = gradient_of_unit<epilogue()>(u, in, source, center);
          sums.add(u.only_new(v.g), u.only_new(v.centered));
        }
        u.store(sums.g, g);
        u.store(sums.g_centered, g_centered);
      });
      row += count();
    };
    while (row + kRows <= rows) add_rows(std::integral_constant<int, kRows>());
    while (row < rows) add_rows(std::integral_constant<int, 1>());
  });
}

// ---- gradients

template <Epilogue kEpilogue, class T, class A, class Source>
HWY_INLINE void gradient_of_run(const GradientArgs<A>& args, const Operands<T, A>& in,
                                std::int64_t offset, std::int64_t n, const Source& source) {
  const bool constant_statistics = args.coefficients.slope == nullptr;
  const auto grad_x = advance(args.grad_x, offset);
  const auto grad_residual = advance(args.grad_residual, offset);
  for_each_unit<A>(n, [&](const auto& u) HWY_ATTR {
    const auto center = source.get(u, args.coefficients.center);
    const auto v = gradient_of_unit<kEpilogue>(u, in, source, center);
    if (grad_x) {
      const auto scale = source.get(u, args.coefficients.scale);
      Pair<A> dx = {hn::Mul(v.g.lo, scale.lo), hn::Mul(v.g.hi, scale.hi)};
      if (!constant_statistics) {
        const auto slope = source.get(u, args.coefficients.slope);
        const auto shift = source.get(u, args.coefficients.offset);
        Pair<A> through = {hn::MulAdd(v.centered.lo, slope.lo, shift.lo),
                           hn::MulAdd(v.centered.hi, slope.hi, shift.hi)};
        if constexpr (kEpilogue == Epilogue::kGeneral) {
          through = {hn::IfThenElseZero(v.counts.lo, through.lo),
                     hn::IfThenElseZero(v.counts.hi, through.hi)};
        }
        dx = {hn::MulAdd(v.g.lo, scale.lo, through.lo), hn::MulAdd(v.g.hi, scale.hi, through.hi)};
        if constexpr (kEpilogue == Epilogue::kGeneral) {  // scale is NaN where no value counts
          dx = {hn::IfThenElseZero(v.used.lo, dx.lo), hn::IfThenElseZero(v.used.hi, dx.hi)};
        }
      }
      u.store(dx, static_cast<T*>(grad_x.data));
    }
    if (grad_residual) store_any<A>(u, v.g, grad_residual);
  });
}

template <class A>
void gradient_of_runs(const GradientArgs<A>& args, std::int64_t count, std::int64_t length) {
  visit_gradient(args, [&](auto tag, auto epilogue) HWY_ATTR {
    using T = typename decltype(tag)::type;
    for (std::int64_t run = 0; run < count; ++run) {
      const std::uint8_t* mask =
          args.mask.data == nullptr ? nullptr : args.mask.data + run * args.mask.record_stride;
      const Operands<T, A> in(args, run * length, mask, false);
      gradient_of_run<epilogue()>(args, in, run * length, length,
                                  RunSource<A>{args.coefficients, run});
    }
  });
}

template <class A>
void gradient_of_rows(const GradientArgs<A>& args, std::int64_t rows, std::int64_t width) {
  visit_gradient(args, [&](auto tag, auto epilogue) HWY_ATTR {
    using T = typename decltype(tag)::type;
    for (std::int64_t row = 0; row < rows; ++row) {
      gradient_of_run<epilogue()>(args, row_operands<T>(args, row, width), row * width, width,
                                  ColumnSource<A>{args.coefficients});
    }
  });
}

}  // namespace

void fill_backward_primitives(Primitives<float>& f, Primitives<double>& d) {
  f.sums_of_runs = sums_of_runs<float>;
  f.sums_of_rows = sums_of_rows<float>;
  f.gradient_of_runs = gradient_of_runs<float>;
  f.gradient_of_rows = gradient_of_rows<float>;
  d.sums_of_runs = sums_of_runs<double>;
  d.sums_of_rows = sums_of_rows<double>;
  d.gradient_of_runs = gradient_of_runs<double>;
  d.gradient_of_rows = gradient_of_rows<double>;
}

}  // namespace normcore::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normcore::kernels {
HWY_EXPORT(fill_backward_primitives);
void add_backward_primitives(Primitives<float>& f, Primitives<double>& d) {
  HWY_DYNAMIC_DISPATCH(fill_backward_primitives)(f, d);
}
}  // namespace normcore::kernels
#endif
