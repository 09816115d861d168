// Backward primitives: sums of g and g * (x - center), and the gradients with respect to x and the
// residual, where g = grad_y * activation'(z). z is computed again from x: nothing but mean and
// rstd is kept from the forward pass. A masked-out value whose grad_y is 0 takes part with g = 0
// and x = center, whatever it holds. Sums may keep g for the gradients, which then read it as a
// grad_y without an activation.
#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/backward_primitives.cpp"
#include <hwy/foreach_target.h>
// clang-format off: must follow foreach_target.h
#include <hwy/highway.h>
// clang-format on

#include <algorithm>
#include <array>
#include <type_traits>

#include "cpu/activation-inl.h"
#include "cpu/coefficients-inl.h"
#include "cpu/primitives.h"
#include "cpu/primitives_export.h"
#include "cpu/relu_bits-inl.h"
#include "cpu/units-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normcore::kernels::HWY_NAMESPACE {
namespace {

// G: the type of grad_y, which is that of x or, for a g that was kept, A, where there is no mask
// and the residual, if any, has the type of x: loops made for these types and for the activation.
// void: any other combination, looked up per unit.
template <class G>
inline constexpr bool kTyped = !std::is_void_v<G>;
template <class G, Activation kActivation>
inline constexpr bool kPlain = kTyped<G> && kActivation == Activation::kNone;

template <class T, class A>
HWY_INLINE const std::uint8_t* relu_bits_of(const GradientArgs<A>& args, std::int64_t offset) {
  return args.relu_bits == nullptr ? nullptr : args.relu_bits + offset / kPerReluByte<T>;
}

// One run or row of the operands; offsets are applied once.
template <class T, class G>
struct Operands {
  const T* x;
  const G* grad_y;
  const T* residual;              // null: none
  const std::uint8_t* relu_bits;  // likewise

  template <class A>
  HWY_INLINE Operands(const GradientArgs<A>& args, std::int64_t offset, const std::uint8_t*, bool)
      : x(static_cast<const T*>(args.x.data) + offset),
        grad_y(static_cast<const G*>(args.grad_y.data) + offset),
        residual(static_cast<const T*>(advance(args.residual, offset).data)),
        relu_bits(relu_bits_of<T>(args, offset)) {}
};

template <class T>
struct Operands<T, void> {
  const T* x;
  ConstTensor grad_y;
  ConstTensor residual;
  const std::uint8_t* relu_bits;
  Activation activation;
  const std::uint8_t* mask;  // null: every value counts
  bool mask_is_one_value;    // the mask is a single byte for the whole row

  template <class A>
  HWY_INLINE Operands(const GradientArgs<A>& args, std::int64_t offset, const std::uint8_t* mask,
                      bool mask_is_one_value)
      : x(static_cast<const T*>(args.x.data) + offset),
        grad_y(advance(args.grad_y, offset)),
        residual(advance(args.residual, offset)),
        relu_bits(relu_bits_of<T>(args, offset)),
        activation(args.activation),
        mask(mask),
        mask_is_one_value(mask_is_one_value) {}
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

// grad_y * activation'(z)
template <Activation kActivation, class A>
HWY_INLINE Pair<A> behind_activation(const Pair<A>& grad_y, const Pair<A>& z) {
  return {hn::Mul(grad_y.lo, activation_derivative<kActivation, A>(z.lo)),
          hn::Mul(grad_y.hi, activation_derivative<kActivation, A>(z.hi))};
}

// The same of kReLU, from its bits.
HWY_INLINE Pair<float> behind_relu(const Pair<float>& grad_y, const PairMask<float>& is_active) {
  const auto one = hn::Set(Tag<float>(), 1.0f);
  return {hn::Mul(grad_y.lo, hn::IfThenElseZero(is_active.lo, one)),
          hn::Mul(grad_y.hi, hn::IfThenElseZero(is_active.hi, one))};
}

// kActivation: for typed operands only.
template <class A, Activation kActivation, class T, class G, class Unit, class V>
HWY_INLINE Gradient<A> gradient_of_unit(const Unit& u, const Operands<T, G>& in,
                                        const UnitCoefficients<V>& c) {
  const auto x = u.load(in.x);
  Gradient<A> out;
  if constexpr (kTyped<G>) {
    out.g = u.load(in.grad_y);
    out.centered = centered(x, c);
    if constexpr (kActivation == Activation::kReLU && std::is_same_v<A, float>) {
      if (in.relu_bits != nullptr) {
        out.g = behind_relu(out.g, load_relu_bits<kPerReluByte<T>>(u, in.relu_bits));
        return out;
      }
    }
    if constexpr (kActivation != Activation::kNone) {
      auto z = normalized(out.centered, c);
      if (in.residual != nullptr) z = sum_of(z, u.load(in.residual));
      out.g = behind_activation<kActivation>(out.g, z);
    }
  } else {
    const Tag<A> d;
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
      // Not Ne(), which is false for a NaN on some instruction sets.
      out.used = {hn::Or(out.counts.lo, hn::Not(hn::Eq(out.g.lo, hn::Zero(d)))),
                  hn::Or(out.counts.hi, hn::Not(hn::Eq(out.g.hi, hn::Zero(d))))};
    }
    out.centered = {subtract_or_zero<A>(out.used.lo, x.lo, lo<A>(c.center)),
                    subtract_or_zero<A>(out.used.hi, x.hi, hi<A>(c.center))};
    if (in.activation != Activation::kNone) {
      if (in.relu_bits != nullptr) {
        if constexpr (std::is_same_v<A, float>) {
          out.g = behind_relu(out.g, load_relu_bits<kPerReluByte<T>>(u, in.relu_bits));
        }
      } else {
        auto z = normalized(out.centered, c);
        if (in.residual) z = sum_of(z, load_any<A>(u, in.residual));
        visit_activation(in.activation, [&](auto activation) HWY_ATTR {
          out.g = behind_activation<activation()>(out.g, z);
        });
      }
      out.g = {hn::IfThenElseZero(out.used.lo, out.g.lo),
               hn::IfThenElseZero(out.used.hi, out.g.hi)};
    }
  }
  return out;
}

// Calls f(TypeTag<T>, TypeTag<G>, activation), the latter as a constant. kKept: grad_y may be kept
// g, which is of type A.
template <bool kKept, class A, class F>
HWY_INLINE void visit_gradient(const GradientArgs<A>& args, F&& f) {
  visit_elements<A>(args.x.dtype, [&](auto tag) HWY_ATTR {
    constexpr std::integral_constant<Activation, Activation::kNone> kNone;
    const bool is_masked = args.mask.data != nullptr;
    const bool residual_fits = args.activation == Activation::kNone || !args.residual ||
                               args.residual.dtype == args.x.dtype;
    if (!is_masked && args.grad_y.dtype == args.x.dtype && residual_fits) {
      visit_activation(args.activation, [&](auto activation) HWY_ATTR { f(tag, tag, activation); });
      return;
    }
    if constexpr (kKept) {
      if (!is_masked && args.activation == Activation::kNone &&
          args.grad_y.dtype == kArithmeticType<A>) {
        f(tag, TypeTag<A>(), kNone);
        return;
      }
    }
    f(tag, TypeTag<void>(), kNone);
  });
}

// ---- sums

// Units of a run, or rows, in one chain of additions; runs shorter than the least go into that of
// the record. In float32 the error of a sum grows with the length of its chain.
constexpr std::int64_t kMaxChain = 32, kMinChain = 8;

template <class A>
struct SumPair {
  Pair<A> g, g_centered;

  HWY_INLINE SumPair() : g(broadcast(A{0})), g_centered(broadcast(A{0})) {}
  HWY_INLINE SumPair(const Pair<A>& g, const Pair<A>& g_centered) : g(g), g_centered(g_centered) {}
  HWY_INLINE void add(const Pair<A>& value, const Pair<A>& centered) {
    add_lo(value.lo, centered.lo);
    g.hi = hn::Add(g.hi, value.hi);
    g_centered.hi = hn::MulAdd(value.hi, centered.hi, g_centered.hi);
  }
  HWY_INLINE void add_lo(Vector<A> value, Vector<A> centered) {
    g.lo = hn::Add(g.lo, value);
    g_centered.lo = hn::MulAdd(value, centered, g_centered.lo);
  }
  // Of a unit the values not seen before.
  template <class Unit>
  HWY_INLINE void add_new(const Unit& u, const Pair<A>& value, const Pair<A>& centered) {
    const auto v = u.only_new(value), c = u.only_new(centered);
    if constexpr (Unit::kIsVector) {
      add_lo(v.lo, c.lo);
    } else {
      add(v, c);
    }
  }
  HWY_INLINE void add(const SumPair& other) {
    g = sum_of(g, other.g);
    g_centered = sum_of(g_centered, other.g_centered);
  }
};

// kShort: one run per record, of less than kMinChain units.
template <bool kShort, Activation kActivation, class T, class G, class A>
HWY_INLINE void typed_sums_of_runs(const GradientArgs<A>& given, const RunBlock& given_block, A* g,
                                   A* g_centered) {
  // Copies that the sums cannot alias: runs may be short.
  const GradientArgs<A> args = given;
  const RunBlock block = given_block;
  constexpr Order kOrder = kOrderOf<A, T>;
  using Whole = WholeUnit<A, kOrder>;
  const std::int64_t step = unit<A>(), length = block.length;
  const std::int64_t chain = kMaxChain * step;
  const std::int64_t runs = kShort ? 1 : block.runs;
  const std::int64_t runs_per_chain = kShort ? 1 : std::max<std::int64_t>(1, chain / length);
  const RunEnd<A, kOrder, kTyped<G>> run_end(length);
  // Lanes are added for as many records as there are lanes.
  constexpr std::int64_t kRecords = hn::MaxLanes(Tag<A>());
  HWY_ALIGN A g_lanes[kRecords * kRecords];
  HWY_ALIGN A centered_lanes[kRecords * kRecords];
  for (std::int64_t record = 0; record < block.records; ++record) {
    const RunSource<A> source(args.coefficients, record);
    SumPair<A> total, before;
    for (std::int64_t run = 0, joined = 0; run < runs; ++run) {
      const std::uint8_t* mask =
          args.mask.data == nullptr
              ? nullptr
              : args.mask.data + record * args.mask.record_stride + run * args.mask.run_stride;
      const std::int64_t offset = record * block.record_stride + run * block.run_stride;
      const Operands<T, G> in(args, offset, mask, false);
      A* const kept =
          args.kept_gradient == nullptr
              ? nullptr
              : args.kept_gradient + record * block.record_stride + run * args.kept_run_stride;
      const auto add = [&](const auto& u, SumPair<A>& to) NORMCORE_INLINE_LAMBDA {
        const auto v = gradient_of_unit<A, kActivation>(u, in, source.values);
        to.add_new(u, v.g, v.centered);
        if constexpr (!kPlain<G, kActivation>) {
          if (kept != nullptr) u.store(v.g, kept);
        }
      };
      std::int64_t i = 0;
      while (!kShort && length - i >= kMinChain * step) {
        const std::int64_t stop = std::min(length, i + chain);
        SumPair<A> first;
        // Two chains of additions, unless they wait for g rather than for each other.
        if constexpr (kTyped<G> &&
                      (kActivation == Activation::kNone || kActivation == Activation::kReLU)) {
          SumPair<A> second;
          for (; i + 2 * step <= stop; i += 2 * step) {
            add(Whole{i}, first);
            add(Whole{i + step}, second);
          }
          first.add(second);
        } else {
          for (; i + step <= stop; i += step) add(Whole{i}, first);
        }
        total.add(first);
      }
      for (; i + step <= length; i += step) add(Whole{i}, total);
      if (i < length) {
        run_end.visit([&](const auto& u) NORMCORE_INLINE_LAMBDA { add(u, total); });
      }
      if (!kShort && run + 1 - joined == runs_per_chain) {
        before.add(total);
        total = SumPair<A>();
        joined = run + 1;
      }
    }
    if constexpr (!kShort) total.add(before);
    const Tag<A> d;
    const std::int64_t lane = record % kRecords;
    hn::Store(hn::Add(total.g.lo, total.g.hi), d, g_lanes + lane * kRecords);
    hn::Store(hn::Add(total.g_centered.lo, total.g_centered.hi), d,
              centered_lanes + lane * kRecords);
    if (lane + 1 == kRecords || record + 1 == block.records) {
      hn::StoreU(sums_of_lanes<A>(g_lanes, lane + 1), d, g + record - lane);
      hn::StoreU(sums_of_lanes<A>(centered_lanes, lane + 1), d, g_centered + record - lane);
    }
  }
}

template <class A>
void sums_of_runs(const GradientArgs<A>& args, const RunBlock& block, A* g, A* g_centered) {
  visit_gradient<false>(args, [&](auto tag, auto grad_tag, auto activation) HWY_ATTR {
    using T = typename decltype(tag)::type;
    using G = typename decltype(grad_tag)::type;
    if constexpr (kPlain<G, activation()>) {
      if (block.runs == 1 && block.length < kMinChain * unit<A>()) {
        typed_sums_of_runs<true, activation(), T, G>(args, block, g, g_centered);
        return;
      }
    }
    typed_sums_of_runs<false, activation(), T, G>(args, block, g, g_centered);
  });
}

template <class T, class G, class A>
HWY_INLINE Operands<T, G> row_operands(const GradientArgs<A>& args, std::int64_t row,
                                       std::int64_t width, std::int64_t first) {
  const bool per_row = args.mask.per_row;
  const std::uint8_t* mask =
      args.mask.data == nullptr ? nullptr : args.mask.data + (per_row ? row : row * width + first);
  return Operands<T, G>(args, row * width + first, mask, per_row);
}

// Of kRows rows from `row` on, made once for all of their units.
template <class T, class G, int kRows, class A>
HWY_INLINE std::array<Operands<T, G>, kRows> block_operands(const GradientArgs<A>& args,
                                                            std::int64_t row, std::int64_t width,
                                                            std::int64_t first) {
  const auto at = [&](int k) HWY_ATTR { return row_operands<T, G>(args, row + k, width, first); };
  if constexpr (kRows == 1) {
    return {at(0)};
  } else if constexpr (kRows == 2) {
    return {at(0), at(1)};
  } else {
    static_assert(kRows == 4);
    return {at(0), at(1), at(2), at(3)};
  }
}

template <class A>
void sums_of_rows(const GradientArgs<A>& args, std::int64_t rows, std::int64_t width, A* g,
                  A* g_centered) {
  Coefficients<A> needed = args.coefficients;  // slope and offset follow from the sums
  needed.slope = needed.offset = nullptr;
  visit_gradient<false>(args, [&](auto tag, auto grad_tag, auto activation) HWY_ATTR {
    using T = typename decltype(tag)::type;
    using G = typename decltype(grad_tag)::type;
    constexpr Order kOrder = kOrderOf<A, T>;
    // Rows that share one load of the accumulators. Those of float32 are rather followed by
    // prefetchers along one row.
    constexpr int kRows = kPlain<G, activation()> && kOrder == Order::kEvenOdd ? 4 : 1;
    for_each_strip(width, [&](std::int64_t first, std::int64_t columns) HWY_ATTR {
      const ColumnSource<A, kOrder> source(needed, first, columns);
      constexpr std::int64_t kSize = kColumnStrip + kSlotPadding<A>;
      HWY_ALIGN A g_slots[kSize];
      HWY_ALIGN A centered_slots[kSize];
      // Sums of chains, if there are several.
      HWY_ALIGN A g_chains[kSize];
      HWY_ALIGN A centered_chains[kSize];
      const bool is_chained = rows > kMaxChain;
      clear_slots<A, kOrder>(columns, g_slots);
      clear_slots<A, kOrder>(columns, centered_slots);
      if (is_chained) {
        clear_slots<A, kOrder>(columns, g_chains);
        clear_slots<A, kOrder>(columns, centered_chains);
      }
      std::int64_t row = 0;
      const auto add_rows = [&](auto count) NORMCORE_INLINE_LAMBDA {
        const auto in = block_operands<T, G, count()>(args, row, width, first);
        for_each_unit<A, kOrder>(columns, [&](const auto& u) HWY_ATTR {
          const auto coefficients = source.at(u);
          SumPair<A> sums(load_slot<A>(u, g_slots), load_slot<A>(u, centered_slots));
          for (int k = 0; k < count(); ++k) {
            const auto v = gradient_of_unit<A, activation()>(u, in[k], coefficients);
            sums.add(v.g, v.centered);
            if constexpr (!kPlain<G, activation()>) {
              if (args.kept_gradient != nullptr) {
                u.store(v.g, args.kept_gradient + (row + k) * width + first);
              }
            }
          }
          store_slot<A>(u, sums.g, g_slots);
          store_slot<A>(u, sums.g_centered, centered_slots);
        });
        row += count();
      };
      while (row < rows) {
        const std::int64_t end = std::min(row + kMaxChain, rows);
        const std::int64_t shared = end_of_shared_rows<T>(end, width);
        while (row + kRows <= shared) add_rows(std::integral_constant<int, kRows>());
        while (row < end) add_rows(std::integral_constant<int, 1>());
        if (is_chained) {
          move_slots<A, kOrder>(columns, g_slots, g_chains);
          move_slots<A, kOrder>(columns, centered_slots, centered_chains);
        }
      }
      from_slots<A, kOrder>(is_chained ? g_chains : g_slots, columns, g + first);
      from_slots<A, kOrder>(is_chained ? centered_chains : centered_slots, columns,
                            g_centered + first);
    });
  });
}

// ---- gradients

// kUsual: grad_x alone, through the statistics, known before the loops. kAny: looked up per unit.
enum class Outputs { kUsual, kAny };

template <class A>
HWY_INLINE Outputs outputs_of(const GradientArgs<A>& args) {
  const bool is_usual = args.grad_x && !args.grad_residual && args.coefficients.slope != nullptr;
  return is_usual ? Outputs::kUsual : Outputs::kAny;
}

// grad_x of what gradient_of_unit() gave.
template <class G, class A, class V>
HWY_INLINE Pair<A> input_gradient(const Gradient<A>& v, const UnitCoefficients<V>& c,
                                  bool constant_statistics) {
  Pair<A> dx = {hn::Mul(v.g.lo, lo<A>(c.scale)), hn::Mul(v.g.hi, hi<A>(c.scale))};
  if (constant_statistics) return dx;
  Pair<A> through = {hn::MulAdd(v.centered.lo, lo<A>(c.slope), lo<A>(c.offset)),
                     hn::MulAdd(v.centered.hi, hi<A>(c.slope), hi<A>(c.offset))};
  if constexpr (!kTyped<G>) {
    through = {hn::IfThenElseZero(v.counts.lo, through.lo),
               hn::IfThenElseZero(v.counts.hi, through.hi)};
  }
  dx = {hn::MulAdd(v.g.lo, lo<A>(c.scale), through.lo),
        hn::MulAdd(v.g.hi, hi<A>(c.scale), through.hi)};
  if constexpr (!kTyped<G>) {  // scale is NaN where no value counts
    dx = {hn::IfThenElseZero(v.used.lo, dx.lo), hn::IfThenElseZero(v.used.hi, dx.hi)};
  }
  return dx;
}

// kRows runs of n values that share their coefficients; `stride` leads from run to run.
template <Activation kActivation, Outputs kOutputs, int kRows, class T, class G, class A,
          class Source>
HWY_INLINE void gradient_of_block(const GradientArgs<A>& args, bool stream, std::int64_t offset,
                                  std::int64_t stride, std::int64_t n, const Source& source,
                                  const std::array<Operands<T, G>, kRows>& operands) {
  T* const grad_x = static_cast<T*>(advance(args.grad_x, offset).data);
  const auto grad_residual = advance(args.grad_residual, offset);
  constexpr bool kUsual = kOutputs == Outputs::kUsual;
  const bool constant_statistics = !kUsual && args.coefficients.slope == nullptr;
  const auto step = [&](const auto& u, auto options) HWY_ATTR {
    const auto& c = source.at(u);
    for (int row = 0; row < kRows; ++row) {
      const auto v = gradient_of_unit<A, kActivation>(u, operands[row], c);
      if (kUsual || grad_x != nullptr) {
        u.template store<options()>(input_gradient<G>(v, c, constant_statistics),
                                    grad_x + row * stride);
      }
      if constexpr (!kUsual) {
        if (grad_residual) store_any<A>(u, v.g, advance(grad_residual, row * stride));
      }
    }
  };
  if constexpr (kTyped<G>) {
    // Coefficients hold canonical NaNs only, and so do values of T.
    constexpr bool kCanonical = std::is_same_v<G, T> && kActivation == Activation::kNone;
    const bool may_stream = args.relu_bits == nullptr || streams_whole_relu_bytes(grad_x);
    for_each_stored_unit<A, kOrderOf<A, T>, StoreOptions{.canonical_nan = kCanonical},
                         Source::kEndOfRun>(n, grad_x, stream && may_stream, step);
  } else {
    for_each_unit<A, kOrderOf<A, T>>(n, [&](const auto& u) HWY_ATTR {
      step(u, std::integral_constant<StoreOptions, StoreOptions{}>());
    });
  }
}

template <Activation kActivation, Outputs kOutputs, class T, class G, class A>
HWY_INLINE void typed_gradient_of_runs(const GradientArgs<A>& given, std::int64_t count,
                                       std::int64_t length) {
  const GradientArgs<A> args = given;  // which outputs cannot alias: runs may be short
  for (std::int64_t run = 0; run < count; ++run) {
    const std::uint8_t* mask =
        args.mask.data == nullptr ? nullptr : args.mask.data + run * args.mask.record_stride;
    gradient_of_block<kActivation, kOutputs, 1, T, G>(
        args, args.stream, run * length, length, length, RunSource<A>(args.coefficients, run),
        {Operands<T, G>(args, run * length, mask, false)});
  }
}

template <class A>
void gradient_of_runs(const GradientArgs<A>& args, std::int64_t count, std::int64_t length) {
  visit_gradient<true>(args, [&](auto tag, auto grad_tag, auto activation) HWY_ATTR {
    using T = typename decltype(tag)::type;
    using G = typename decltype(grad_tag)::type;
    if constexpr (kPlain<G, activation()>) {
      if (outputs_of(args) == Outputs::kUsual) {
        typed_gradient_of_runs<activation(), Outputs::kUsual, T, G>(args, count, length);
        return;
      }
    }
    typed_gradient_of_runs<activation(), Outputs::kAny, T, G>(args, count, length);
  });
}

template <class A>
void gradient_of_rows(const GradientArgs<A>& args, std::int64_t rows, std::int64_t width) {
  visit_gradient<true>(args, [&](auto tag, auto grad_tag, auto activation) HWY_ATTR {
    using T = typename decltype(tag)::type;
    using G = typename decltype(grad_tag)::type;
    constexpr Order kOrder = kOrderOf<A, T>;
    // Rows that share one load of the coefficients.
    constexpr int kRows = kPlain<G, activation()> && kOrder == Order::kEvenOdd ? 2 : 1;
    for_each_strip(width, [&](std::int64_t first, std::int64_t columns) HWY_ATTR {
      const ColumnSource<A, kOrder> source(args.coefficients, first, columns);
      const bool stream = kTyped<G> && args.stream && args.grad_x &&
                          is_stream_start(static_cast<const T*>(args.grad_x.data) + first, width);
      std::int64_t row = 0;
      const auto block = [&](auto count) NORMCORE_INLINE_LAMBDA {
        gradient_of_block<activation(), Outputs::kAny, count(), T, G>(
            args, stream, row * width + first, width, columns, source,
            block_operands<T, G, count()>(args, row, width, first));
        row += count();
      };
      const std::int64_t shared = end_of_shared_rows<T>(rows, width);
      while (row + kRows <= shared) block(std::integral_constant<int, kRows>());
      while (row < rows) block(std::integral_constant<int, 1>());
    });
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
