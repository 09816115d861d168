// Double-backward primitives: the sums and the outputs over the extent that primitives.h defines. z is
// computed again from x. A masked-out value whose grad_y is 0 takes part as x = center where x is
// not finite, and with a residual of 0 where that is not.
#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/double_backward_primitives.cpp"
#include <hwy/foreach_target.h>
// clang-format off: must follow foreach_target.h
#include <hwy/highway.h>
// clang-format on

#include <algorithm>
#include <type_traits>

#include "cpu/activation-inl.h"
#include "cpu/coefficients-inl.h"
#include "cpu/primitives.h"
#include "cpu/primitives_export.h"
#include "cpu/units-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normcore::kernels::HWY_NAMESPACE {
namespace {

// Units of a run, or rows, in one chain of additions.
constexpr std::int64_t kMaxChain = 32;
// Columns that share their sums and coefficients: kCurvedSums arrays twice, and nine.
constexpr std::int64_t kStrip = 512;

// ---- coefficients

template <class V>
struct DoubleUnitCoefficients : UnitCoefficients<V> {
  V tangent_slope, tangent_offset, g_gain, u_gain;
};

template <class A>
Coefficients<A> further_coefficients(const DoubleCoefficients<A>& c) {
  return {c.tangent_slope, c.tangent_offset, c.g_gain, c.u_gain, nullptr};
}

template <class A>
class DoubleRunSource {
 public:
  static constexpr bool kEndOfRun = true;
  HWY_INLINE DoubleRunSource(const DoubleCoefficients<A>& c, std::int64_t run)
      : values_{RunSource<A>(c, run).values, of(c.tangent_slope, run), of(c.tangent_offset, run),
                of(c.g_gain, run), of(c.u_gain, run)} {}
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
    return {affine_.at(u), more.center, more.scale, more.shift, more.slope};
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
  Pair<A> u, centered, q, g, h, derivative;
  PairMask<A> counts, used;
};

template <class A>
HWY_INLINE hn::Mask<Tag<A>> nothing_or_finite(hn::Mask<Tag<A>> is_kept, Vector<A> v) {
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
  out.u = in.cotangent_x ? in.template load<A>(unit, in.cotangent_x) : broadcast(A{0});
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
      out.used = {nothing_or_finite<A>(valid.lo, out.centered.lo),
                  nothing_or_finite<A>(valid.hi, out.centered.hi)};
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
  const auto through = [&](auto constant) HWY_ATTR {
    constexpr Activation kThis = constant();
    if constexpr (kThis == Activation::kNone) {
      out.g = grad_y;
      out.derivative = broadcast(A{1});
      out.h = broadcast(A{0});
    } else {
      auto z = normalized(out.centered, c);
      if (in.residual) {
        auto residual = in.template load<A>(unit, in.residual);
        if constexpr (!kSame) {
          residual = zero_unless({nothing_or_finite<A>(valid.lo, residual.lo),
                                  nothing_or_finite<A>(valid.hi, residual.hi)},
                                 residual);
        }
        z = sum_of(z, residual);
      }
      const auto of_lo = activation_derivatives<kThis, A>(z.lo),
                 of_hi = activation_derivatives<kThis, A>(z.hi);
      out.derivative = {of_lo.first, of_hi.first};
      out.g = {hn::Mul(grad_y.lo, of_lo.first), hn::Mul(grad_y.hi, of_hi.first)};
      out.h = {hn::Mul(grad_y.lo, of_lo.second), hn::Mul(grad_y.hi, of_hi.second)};
    }
  };
  if constexpr (kSame) {
    through(std::integral_constant<Activation, kActivation>());
  } else {
    visit_activation(activation, through);
  }
  return out;
}

// Calls f(TypeTag<T>, kSame, activation), the latter two as constants. Activations that take long
// are looked up per unit.
template <class A, class F>
HWY_INLINE void visit_terms(const DoubleBackwardArgs<A>& args, F&& f) {
  const auto fits = [&](auto tensor) { return !tensor || tensor.dtype == args.x.dtype; };
  const bool is_same = args.mask.data == nullptr && fits(args.grad_y) && fits(args.residual) &&
                       fits(args.cotangent_x) && fits(args.cotangent_residual) &&
                       fits(args.grad_grad_y) && fits(args.grad_x) && fits(args.grad_residual);
  visit_elements<A>(args.x.dtype, [&](auto tag) HWY_ATTR {
    using Activations = std::integral_constant<Activation, Activation::kNone>;
    const auto same = [&](auto activation) HWY_ATTR { f(tag, std::true_type(), activation); };
    if (is_same) {
      switch (args.activation) {
        case Activation::kNone:
          return same(std::integral_constant<Activation, Activation::kNone>());
        case Activation::kReLU:
          return same(std::integral_constant<Activation, Activation::kReLU>());
        case Activation::kSiLU:
          return same(std::integral_constant<Activation, Activation::kSiLU>());
        case Activation::kGelu:
        case Activation::kGeluTanh:
          break;
      }
    }
    f(tag, std::false_type(), Activations());
  });
}

// ---- sums

template <class V>
HWY_INLINE V grown(V sum, V a) {
  return hn::Add(sum, a);
}
template <class V>
HWY_INLINE V grown(V sum, V a, V b) {
  return hn::MulAdd(a, b, sum);
}

// Calls grow(i, a) or grow(i, a, b): the sum i grows by a or a * b. `counted`: u, or 0 where the mask
// lets nothing count.
template <int kSums, class V, class Grow>
HWY_INLINE void grow_sums(V counted, V u, V centered, V q, V g, V h, Grow&& grow) {
  grow(kU, counted);
  grow(kUD, counted, centered);
  grow(kG, g);
  grow(kGD, g, centered);
  grow(kGU, g, u);
  if constexpr (kSums == kCurvedSums) {
    const auto h_centered = hn::Mul(h, centered);
    grow(kH, h);
    grow(kHD, h_centered);
    grow(kHDD, h_centered, centered);
    grow(kHQ, h, q);
    grow(kHQD, h_centered, q);
  }
}

// Sums of one record, of both vectors of units in the same.
template <class A, int kSums>
struct RecordSums {
  Vector<A> values[kSums];

  HWY_INLINE RecordSums() {
    for (auto& v : values) v = hn::Zero(Tag<A>());
  }
  HWY_INLINE void add(const RecordSums& other) {
    for (int i = 0; i < kSums; ++i) values[i] = hn::Add(values[i], other.values[i]);
  }
  template <class Unit>
  HWY_INLINE void add_new(const Unit& unit, const Terms<A>& t, const Pair<A>& counted_u) {
    const auto grow = [&](int i, auto... factors)
                          HWY_ATTR { values[i] = grown(values[i], factors...); };
    const auto counted = unit.only_new(counted_u), g = unit.only_new(t.g), h = unit.only_new(t.h);
    grow_sums<kSums>(counted.lo, t.u.lo, t.centered.lo, t.q.lo, g.lo, h.lo, grow);
    if constexpr (!Unit::kIsVector) {
      grow_sums<kSums>(counted.hi, t.u.hi, t.centered.hi, t.q.hi, g.hi, h.hi, grow);
    }
  }
};

template <int kSums, bool kSame, Activation kActivation, class T, class A>
HWY_INLINE void typed_sums_of_runs(const DoubleBackwardArgs<A>& given, const RunBlock& given_block,
                                   A* out, std::int64_t stride) {
  // Copies that the sums cannot alias: runs may be short.
  const DoubleBackwardArgs<A> args = given;
  const RunBlock block = given_block;
  constexpr Order kOrder = kOrderOf<A, T>;
  const Tag<A> d;
  const RunEnd<A, kOrder, kSame> run_end(block.length);
  // Lanes are added for as many records as there are lanes.
  constexpr std::int64_t kRecords = hn::MaxLanes(Tag<A>());
  HWY_ALIGN A lanes_of[kSums][kRecords * kRecords];
  for (std::int64_t record = 0; record < block.records; ++record) {
    const DoubleRunSource<A> source(args.coefficients, record);
    RecordSums<A, kSums> chain, total;
    std::int64_t chained = 0;
    for (std::int64_t run = 0; run < block.runs; ++run) {
      const std::uint8_t* const mask =
          args.mask.data == nullptr
              ? nullptr
              : args.mask.data + record * args.mask.record_stride + run * args.mask.run_stride;
      const Operands<T, kSame> in(args, record * block.record_stride + run * block.run_stride, mask,
                                  false);
      const auto add = [&](const auto& unit) NORMCORE_INLINE_LAMBDA {
        const auto t =
            terms_of_unit<kSame, kActivation, A>(unit, in, args.activation, source.at(unit));
        chain.add_new(unit, t, kSame ? t.u : zero_unless(t.counts, t.u));
      };
      std::int64_t i = 0;
      while (i + unit<A>() <= block.length) {
        const std::int64_t stop = std::min(block.length, i + (kMaxChain - chained) * unit<A>());
        const std::int64_t start = i;
        for (; i + unit<A>() <= stop; i += unit<A>()) add(WholeUnit<A, kOrder>{i});
        chained += (i - start) / unit<A>();
        if (chained == kMaxChain) {
          total.add(chain);
          chain = RecordSums<A, kSums>();
          chained = 0;
        }
      }
      if (i < block.length) {
        run_end.visit([&](const auto& unit) NORMCORE_INLINE_LAMBDA { add(unit); });
        chained = std::min(chained + 1, kMaxChain - 1);
      }
    }
    total.add(chain);
    const std::int64_t lane = record % kRecords;
    for (int i = 0; i < kSums; ++i) hn::Store(total.values[i], d, lanes_of[i] + lane * kRecords);
    if (lane + 1 == kRecords || record + 1 == block.records) {
      for (int i = 0; i < kSums; ++i) {
        hn::StoreU(sums_of_lanes<A>(lanes_of[i], lane + 1), d, out + i * stride + record - lane);
      }
    }
  }
}

// Calls f(std::integral_constant) of the number of sums. Types are known only if kSame.
template <bool kSame, Activation kActivation, class F>
HWY_INLINE void visit_sums(Activation activation, F&& f) {
  constexpr std::integral_constant<int, kFlatSums> kFlat;
  constexpr std::integral_constant<int, kCurvedSums> kCurved;
  if constexpr (!kSame) {
    is_curved(activation) ? f(kCurved) : f(kFlat);
  } else if constexpr (is_curved(kActivation)) {
    f(kCurved);
  } else {
    f(kFlat);
  }
}

template <class A>
void double_sums_of_runs(const DoubleBackwardArgs<A>& args, const RunBlock& block, A* out,
                         std::int64_t stride) {
  visit_terms(args, [&](auto tag, auto same, auto activation) HWY_ATTR {
    visit_sums<same(), activation()>(args.activation, [&](auto sums) HWY_ATTR {
      typed_sums_of_runs<sums(), same(), activation(), typename decltype(tag)::type>(args, block,
                                                                                     out, stride);
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

// Sums of columns, one array per sum.
template <class A, Order kOrder, int kSums>
class ColumnSums {
 public:
  HWY_INLINE explicit ColumnSums(std::int64_t columns) : columns_(columns) {
    for (auto& slots : slots_) clear_slots<A, kOrder>(columns, slots);
  }
  template <class Unit>
  HWY_INLINE void add(const Unit& unit, const Terms<A>& t, const Pair<A>& counted) {
    const auto grow_at = [&](std::int64_t at) HWY_ATTR {
      return [this, at](int i, auto... factors) HWY_ATTR {
        const Tag<A> d;
        hn::StoreU(grown(hn::LoadU(d, slots_[i] + at), factors...), d, slots_[i] + at);
      };
    };
    grow_sums<kSums>(counted.lo, t.u.lo, t.centered.lo, t.q.lo, t.g.lo, t.h.lo,
                     grow_at(unit.slot()));
    grow_sums<kSums>(counted.hi, t.u.hi, t.centered.hi, t.q.hi, t.g.hi, t.h.hi,
                     grow_at(unit.slot() + lanes<A>()));
  }
  HWY_INLINE void move_to(ColumnSums& total) {
    for (int i = 0; i < kSums; ++i) move_slots<A, kOrder>(columns_, slots_[i], total.slots_[i]);
  }
  HWY_INLINE void store(A* out, std::int64_t stride) const {
    for (int i = 0; i < kSums; ++i) from_slots<A, kOrder>(slots_[i], columns_, out + i * stride);
  }

 private:
  std::int64_t columns_;
  HWY_ALIGN A slots_[kSums][kStrip + kSlotPadding<A>];
};

template <class A>
void double_sums_of_rows(const DoubleBackwardArgs<A>& args, std::int64_t rows, std::int64_t width,
                         A* out, std::int64_t stride) {
  visit_terms(args, [&](auto tag, auto same, auto activation) HWY_ATTR {
    using T = typename decltype(tag)::type;
    constexpr Order kOrder = kOrderOf<A, T>;
    visit_sums<same(), activation()>(args.activation, [&](auto sums) HWY_ATTR {
      for_each_strip<kStrip>(width, [&](std::int64_t first, std::int64_t columns) HWY_ATTR {
        const DoubleColumnSource<A, kOrder> source(args.coefficients, first, columns);
        ColumnSums<A, kOrder, sums()> chain(columns), total(columns);
        for (std::int64_t row = 0; row < rows; ++row) {
          const auto in = row_operands<T, same()>(args, row, width, first);
          for_each_unit<A, kOrder>(columns, [&](const auto& unit) HWY_ATTR {
            const auto t =
                terms_of_unit<same(), activation(), A>(unit, in, args.activation, source.at(unit));
            chain.add(unit, t, same() ? t.u : zero_unless(t.counts, t.u));
          });
          if ((row + 1) % kMaxChain == 0) chain.move_to(total);
        }
        chain.move_to(total);
        total.store(out + first, stride);
      });
    });
  });
}

// ---- what has the extent of x

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
    const auto k = map_pair<A>([](auto h, auto q) HWY_ATTR { return hn::Mul(h, q); }, t.h, t.q);
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

void fill_double_backward_primitives(Primitives<float>& f, Primitives<double>& d) {
  f.double_sums_of_runs = double_sums_of_runs<float>;
  f.double_sums_of_rows = double_sums_of_rows<float>;
  f.double_gradient_of_runs = double_gradient_of_runs<float>;
  f.double_gradient_of_rows = double_gradient_of_rows<float>;
  d.double_sums_of_runs = double_sums_of_runs<double>;
  d.double_sums_of_rows = double_sums_of_rows<double>;
  d.double_gradient_of_runs = double_gradient_of_runs<double>;
  d.double_gradient_of_rows = double_gradient_of_rows<double>;
}

}  // namespace normcore::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normcore::kernels {
HWY_EXPORT(fill_double_backward_primitives);
void add_double_backward_primitives(Primitives<float>& f, Primitives<double>& d) {
  HWY_DYNAMIC_DISPATCH(fill_double_backward_primitives)(f, d);
}
}  // namespace normcore::kernels
#endif
