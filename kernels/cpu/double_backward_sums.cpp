// The first sweep of the double backward pass: sums over channels.
#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/double_backward_sums.cpp"
#include <hwy/foreach_target.h>
// clang-format off: must follow foreach_target.h
#include <hwy/highway.h>
// clang-format on

#include <algorithm>
#include <type_traits>

#include "cpu/double_backward-inl.h"
#include "cpu/primitives.h"
#include "cpu/primitives_export.h"

HWY_BEFORE_NAMESPACE();
namespace normcore::kernels::HWY_NAMESPACE {
namespace {

// Units of a run, or rows, in one chain of additions.
constexpr std::int64_t kMaxChain = 32;

template <class V>
HWY_INLINE V grown(V sum, V a) {
  return hn::Add(sum, a);
}
template <class V>
HWY_INLINE V grown(V sum, V a, V b) {
  return hn::MulAdd(a, b, sum);
}

// Calls grow(i, a) or grow(i, a, b): the sum i grows by a or a * b. `counted`: u, or 0 for values that
// do not count for the statistics.
template <int kSums, class V, class Grow>
HWY_INLINE void grow_sums(V counted, V u, V centered, V q, V g, V b, Grow&& grow) {
  grow(kU, counted);
  grow(kUD, counted, centered);
  grow(kG, g);
  grow(kGD, g, centered);
  grow(kGU, g, u);
  if constexpr (kSums == kCurvedSums) {
    const auto b_centered = hn::Mul(b, centered);
    grow(kB, b);
    grow(kBD, b_centered);
    grow(kBDD, b_centered, centered);
    grow(kBQ, b, q);
    grow(kBQD, b_centered, q);
  }
}

// Sums of one record; both vectors of a unit go into the same.
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
    const auto counted = unit.only_new(counted_u), g = unit.only_new(t.g), b = unit.only_new(t.b);
    grow_sums<kSums>(counted.lo, t.u.lo, t.centered.lo, t.q.lo, g.lo, b.lo, grow);
    if constexpr (!Unit::kIsVector) {
      grow_sums<kSums>(counted.hi, t.u.hi, t.centered.hi, t.q.hi, g.hi, b.hi, grow);
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

// Sums that are taken; where types are looked up the activation is, too.
template <bool kSame, Activation kActivation>
inline constexpr int kSumsOf = kSame && !is_curved(kActivation) ? kFlatSums : kCurvedSums;

template <class A>
void double_sums_of_runs(const DoubleBackwardArgs<A>& args, const RunBlock& block, A* out,
                         std::int64_t stride) {
  visit_terms(args, [&](auto tag, auto same, auto activation) HWY_ATTR {
    typed_sums_of_runs<kSumsOf<same(), activation()>, same(), activation(),
                       typename decltype(tag)::type>(args, block, out, stride);
  });
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
    grow_sums<kSums>(counted.lo, t.u.lo, t.centered.lo, t.q.lo, t.g.lo, t.b.lo,
                     grow_at(unit.slot()));
    grow_sums<kSums>(counted.hi, t.u.hi, t.centered.hi, t.q.hi, t.g.hi, t.b.hi,
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
    constexpr int kSums = kSumsOf<same(), activation()>;
    for_each_strip<kStrip>(width, [&](std::int64_t first, std::int64_t columns) HWY_ATTR {
      const DoubleColumnSource<A, kOrder> source(args.coefficients, first, columns);
      const bool is_chained = rows > kMaxChain;
      ColumnSums<A, kOrder, kSums> chain(columns), total(is_chained ? columns : 0);
      for (std::int64_t row = 0; row < rows; ++row) {
        const auto in = row_operands<T, same()>(args, row, width, first);
        for_each_unit<A, kOrder>(columns, [&](const auto& unit) HWY_ATTR {
          const auto t =
              terms_of_unit<same(), activation(), A>(unit, in, args.activation, source.at(unit));
          chain.add(unit, t, same() ? t.u : zero_unless(t.counts, t.u));
        });
        if (is_chained && ((row + 1) % kMaxChain == 0 || row + 1 == rows)) chain.move_to(total);
      }
      (is_chained ? total : chain).store(out + first, stride);
    });
  });
}

}  // namespace

void fill_double_backward_sums(Primitives<float>& f, Primitives<double>& d) {
  f.double_sums_of_runs = double_sums_of_runs<float>;
  f.double_sums_of_rows = double_sums_of_rows<float>;
  d.double_sums_of_runs = double_sums_of_runs<double>;
  d.double_sums_of_rows = double_sums_of_rows<double>;
}

}  // namespace normcore::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normcore::kernels {
HWY_EXPORT(fill_double_backward_sums);
void add_double_backward_sums(Primitives<float>& f, Primitives<double>& d) {
  HWY_DYNAMIC_DISPATCH(fill_double_backward_sums)(f, d);
}
}  // namespace normcore::kernels
#endif
