// Forward primitives: moments of runs and of rows, and the application of y = act((x - center) *
// scale + shift + res).
//
// Moments are taken about a pivot, in arithmetic A: the pivot is the mean of (at least) the first
// eighth of the values, taken relative to the first value. Then sum (x - pivot)^2 is at most 9
// times the centred sum of squares whatever the data, so that subtracting sum^2 / n in float64
// costs about 3 bits at worst, and constant data gives exactly 0. Masked values are read but never
// used in arithmetic.
#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/forward_primitives.cpp"
#include <hwy/foreach_target.h>
// clang-format off: must follow foreach_target.h
#include <hwy/cache_control.h>
#include <hwy/highway.h>
// clang-format on

#include <algorithm>

#include "cpu/activation-inl.h"
#include "cpu/coefficients-inl.h"
#include "cpu/primitives.h"
#include "cpu/primitives_export.h"
#include "cpu/relu_bits-inl.h"
#include "cpu/units-inl.h"
#include "cpu/wide_moments.h"

HWY_BEFORE_NAMESPACE();
namespace normcore::kernels::HWY_NAMESPACE {
namespace {

// ---- moments of runs

// Sums about a pivot in four pairs of accumulators: two for values, two for squares.
template <class A>
struct ShiftedSums {
  Pair<A> sum[2], square[2];

  HWY_INLINE ShiftedSums() {
    for (int i = 0; i < 2; ++i) sum[i] = square[i] = broadcast(A{0});
  }
  HWY_INLINE void add(int slot, const Pair<A>& centered) {
    sum[slot] = {hn::Add(sum[slot].lo, centered.lo), hn::Add(sum[slot].hi, centered.hi)};
    square[slot] = {hn::MulAdd(centered.lo, centered.lo, square[slot].lo),
                    hn::MulAdd(centered.hi, centered.hi, square[slot].hi)};
  }
  static HWY_INLINE A total(const Pair<A> (&v)[2]) {
    return sum_of_lanes<A>(hn::Add(hn::Add(v[0].lo, v[1].lo), hn::Add(v[0].hi, v[1].hi)));
  }
};

// sum(x - pivot) of n values
template <class T, class A>
HWY_INLINE A sum_about(const T* x, std::int64_t n, A pivot) {
  const auto p = broadcast(pivot);
  auto sum = broadcast(A{0});
  for_each_unit<A, kOrderOf<A, T>>(n, [&](const auto& u) HWY_ATTR {
    const auto v = u.only_new(subtract(u.load(x), p));
    sum = {hn::Add(sum.lo, v.lo), hn::Add(sum.hi, v.hi)};
  });
  return sum_of_lanes<A>(hn::Add(sum.lo, sum.hi));
}

template <class T, class A>
HWY_INLINE void accumulate_run(const T* x, std::int64_t n, const Pair<A>& pivot,
                               ShiftedSums<A>& sums) {
  using Whole = WholeUnit<A, kOrderOf<A, T>>;
  const std::int64_t u = unit<A>();
  std::int64_t i = 0;
  for (; i + 2 * u <= n; i += 2 * u) {
    sums.add(0, subtract(Whole{i}.load(x), pivot));
    sums.add(1, subtract(Whole{i + u}.load(x), pivot));
  }
  for_each_unit<A, kOrderOf<A, T>>(n - i, [&](const auto& rest) HWY_ATTR {
    sums.add(0, rest.only_new(subtract(rest.load(x + i), pivot)));
  });
}

template <class T, class A>
HWY_INLINE Moments moments_of_record(const T* x, const RunBlock& block) {
  const std::int64_t n = block.runs * block.length;
  const A first = static_cast<A>(to_double(x[0]));
  A sum = 0;
  std::int64_t seen = 0;
  if (block.runs == 1) {
    seen = std::min(n, std::max(2 * unit<A>(), n / 8 / unit<A>() * unit<A>()));
    sum = sum_about<T, A>(x, seen, first);
  } else {
    const std::int64_t runs = (block.runs + 7) / 8;
    for (std::int64_t r = 0; r < runs; ++r) {
      sum += sum_about<T, A>(x + r * block.run_stride, block.length, first);
    }
    seen = runs * block.length;
  }
  const A pivot = first + sum / static_cast<A>(seen);
  const auto p = broadcast(pivot);
  ShiftedSums<A> sums;
  for (std::int64_t r = 0; r < block.runs; ++r) {
    accumulate_run<T, A>(x + r * block.run_stride, block.length, p, sums);
  }
  return Moments::from_shifted_sums(static_cast<double>(n), pivot, ShiftedSums<A>::total(sums.sum),
                                    ShiftedSums<A>::total(sums.square));
}

// With a mask the values that count may lie anywhere, so the pivot is the mean of all of them.
template <class T, class A>
HWY_INLINE Moments masked_moments_of_record(const T* x, const std::uint8_t* mask,
                                            std::int64_t mask_run_stride, const RunBlock& block) {
  std::int64_t count = 0;
  A first = 0;
  for (std::int64_t r = 0; r < block.runs; ++r) {
    for (std::int64_t i = 0; i < block.length; ++i) {
      if (mask[r * mask_run_stride + i] == 0) continue;
      if (count++ == 0) first = static_cast<A>(to_double(x[r * block.run_stride + i]));
    }
  }
  if (count == 0) return {};
  const auto shift = broadcast(first);
  auto total = broadcast(A{0});
  const auto masked = [&](const auto& u, std::int64_t r, const Pair<A>& pivot) HWY_ATTR {
    const auto m = u.only_new(u.load_mask(mask + r * mask_run_stride));
    const auto v = subtract(u.load(x + r * block.run_stride), pivot);
    return Pair<A>{hn::IfThenElseZero(m.lo, v.lo), hn::IfThenElseZero(m.hi, v.hi)};
  };
  for (std::int64_t r = 0; r < block.runs; ++r) {
    for_each_unit<A, kOrderOf<A, T>>(block.length, [&](const auto& u) HWY_ATTR {
      const auto v = masked(u, r, shift);
      total = {hn::Add(total.lo, v.lo), hn::Add(total.hi, v.hi)};
    });
  }
  const A pivot = first + sum_of_lanes<A>(hn::Add(total.lo, total.hi)) / static_cast<A>(count);
  const auto p = broadcast(pivot);
  ShiftedSums<A> sums;
  for (std::int64_t r = 0; r < block.runs; ++r) {
    for_each_unit<A, kOrderOf<A, T>>(block.length,
                                     [&](const auto& u) HWY_ATTR { sums.add(0, masked(u, r, p)); });
  }
  return Moments::from_shifted_sums(static_cast<double>(count), pivot,
                                    ShiftedSums<A>::total(sums.sum),
                                    ShiftedSums<A>::total(sums.square));
}

template <class A>
void moments_of_runs(ConstTensor x, const RunBlock& block, const MaskBlock& mask, Moments* out) {
  visit_elements<A>(x.dtype, [&](auto tag) HWY_ATTR {
    using T = typename decltype(tag)::type;
    for (std::int64_t r = 0; r < block.records; ++r) {
      const T* const values = static_cast<const T*>(x.data) + r * block.record_stride;
      const std::uint8_t* const counts =
          mask.data == nullptr ? nullptr : mask.data + r * mask.record_stride;
      const Moments moments = counts == nullptr ? moments_of_record<T, A>(values, block)
                                                : masked_moments_of_record<T, A>(
                                                      values, counts, mask.run_stride, block);
      out[r] = finite_moments(moments, [&](const auto& f) {
        for (std::int64_t run = 0; run < block.runs; ++run) {
          for (std::int64_t i = 0; i < block.length; ++i) {
            if (counts != nullptr && counts[run * mask.run_stride + i] == 0) continue;
            f(to_double(values[run * block.run_stride + i]));
          }
        }
      });
    }
  });
}

// ---- moments of rows

// Columns are processed in strips whose accumulators fit the first-level cache.
constexpr std::int64_t kMomentStrip = 1024;

// Rows that count, as offsets in rows; all of them when there is no row mask.
struct RowList {
  const std::int32_t* index;  // null: 0, 1, 2, ...
  std::int64_t size;
  HWY_INLINE std::int64_t operator[](std::int64_t i) const { return index ? index[i] : i; }
};

// In the order of the columns when a strip is done. count: with a mask of values only.
template <class A>
struct StripSums {
  static constexpr std::int64_t kSize = kMomentStrip + kSlotPadding<A>;
  HWY_ALIGN A pivot[kSize];
  HWY_ALIGN A sum[kSize];
  HWY_ALIGN A square[kSize];
  HWY_ALIGN A count[kSize];
};

template <class A>
HWY_INLINE void fill_zero(A* p, std::int64_t n) {
  std::fill(p, p + n, A{0});
}

// Sums of a unit of columns over rows, in registers while rows are added: about the first row ...
template <class A>
class HeadSums {
 public:
  template <class Unit, class T>
  HWY_INLINE HeadSums(const Unit& u, const T* first, const StripSums<A>& s)
      : base_(u.load(first)), sum_(load_slot<A>(u, s.sum)) {}
  HWY_INLINE void add(const Pair<A>& v) { sum_ = sum_of(sum_, subtract(v, base_)); }
  template <class Unit>
  HWY_INLINE void store(const Unit& u, StripSums<A>& s) const {
    store_slot<A>(u, sum_, s.sum);
  }

 private:
  Pair<A> base_, sum_;
};

// ... and about the pivot.
template <class A>
class PivotSums {
 public:
  template <class Unit, class T>
  HWY_INLINE PivotSums(const Unit& u, const T*, const StripSums<A>& s)
      : pivot_(load_slot<A>(u, s.pivot)),
        sum_(load_slot<A>(u, s.sum)),
        square_(load_slot<A>(u, s.square)) {}
  HWY_INLINE void add(const Pair<A>& v) {
    const auto centered = subtract(v, pivot_);
    sum_ = sum_of(sum_, centered);
    square_ = {hn::MulAdd(centered.lo, centered.lo, square_.lo),
               hn::MulAdd(centered.hi, centered.hi, square_.hi)};
  }
  template <class Unit>
  HWY_INLINE void store(const Unit& u, StripSums<A>& s) const {
    store_slot<A>(u, sum_, s.sum);
    store_slot<A>(u, square_, s.square);
  }

 private:
  Pair<A> pivot_, sum_, square_;
};

// Adds rows [begin, end) of the list. A block of rows that the first-level cache holds is walked
// down by two units of columns at a time, whose sums stay in registers; meanwhile the next block is
// prefetched, since prefetchers do not follow such a walk.
template <class Sums, class T, class A>
HWY_INLINE void add_rows(const T* x, std::int64_t stride, std::int64_t width, const RowList& rows,
                         std::int64_t begin, std::int64_t end, StripSums<A>& s) {
  constexpr Order kOrder = kOrderOf<A, T>;
  constexpr std::int64_t kBlockBytes = 8192, kMinRows = 4, kLine = 64;
  const T* const first = x + rows[0] * stride;
  const std::int64_t step = std::max<std::int64_t>(
      kBlockBytes / (width * static_cast<std::int64_t>(sizeof(T))), kMinRows);
  for (std::int64_t block = begin; block < end; block += step) {
    const std::int64_t block_end = std::min(block + step, end);
    const auto add_columns = [&](const auto&... u) NORMCORE_INLINE_LAMBDA {
      const std::int64_t at = std::min({u.at...});
      Sums sums[] = {Sums(u, first, s)...};
      for (std::int64_t i = block; i < block_end; ++i) {
        const T* const row = x + rows[i] * stride;
        const auto* const next =
            reinterpret_cast<const char*>(x + rows[std::min(i + step, end - 1)] * stride + at);
        for (std::int64_t byte = 0;
             byte < static_cast<std::int64_t>(sizeof...(u) * sizeof(T)) * unit<A>();
             byte += kLine) {
          hwy::Prefetch(next + byte);
        }
        int k = 0;
        (sums[k++].add(u.load(row)), ...);
      }
      int k = 0;
      (sums[k++].store(u, s), ...);
    };
    std::int64_t at = 0;
    for (; at + 2 * unit<A>() <= width; at += 2 * unit<A>()) {
      add_columns(WholeUnit<A, kOrder>{at}, WholeUnit<A, kOrder>{at + unit<A>()});
    }
    for_each_unit<A, kOrder>(width, add_columns, at);
  }
}

template <class T, class A>
HWY_INLINE void strip_moments(const T* x, std::int64_t stride, std::int64_t width,
                              const RowList& rows, StripSums<A>& s) {
  constexpr Order kOrder = kOrderOf<A, T>;
  const std::int64_t head = (rows.size + 7) / 8;
  const T* const first = x + rows[0] * stride;
  clear_slots<A, kOrder>(width, s.sum);
  add_rows<HeadSums<A>>(x, stride, width, rows, 1, head, s);
  const auto weight = hn::Set(Tag<A>(), A{1} / static_cast<A>(head));
  for_each_unit<A, kOrder>(width, [&](const auto& u) HWY_ATTR {
    const auto sum = load_slot<A>(u, s.sum), base = u.load(first);
    store_slot<A>(u, {hn::MulAdd(sum.lo, weight, base.lo), hn::MulAdd(sum.hi, weight, base.hi)},
                  s.pivot);
  });
  clear_slots<A, kOrder>(width, s.sum);
  clear_slots<A, kOrder>(width, s.square);
  add_rows<PivotSums<A>>(x, stride, width, rows, 0, rows.size, s);
  for (A* array : {s.pivot, s.sum, s.square}) from_slots<A, kOrder>(array, width, array);
}

template <class T, class A>
HWY_INLINE void masked_strip_moments(const T* x, const std::uint8_t* mask, std::int64_t stride,
                                     std::int64_t width, std::int64_t rows, StripSums<A>& s) {
  const Tag<A> d;
  const auto one = hn::Set(d, A{1});
  A* first = s.square;  // not needed before the second sweep
  fill_zero(first, width);
  fill_zero(s.sum, width);
  fill_zero(s.count, width);
  for (std::int64_t r = 0; r < rows; ++r) {
    for_each_unit<A, kOrderOf<A, T>>(width, [&](const auto& u) HWY_ATTR {
      const auto m = u.only_new(u.load_mask(mask + r * stride));
      const auto v = u.load(x + r * stride), old_first = u.load(first), count = u.load(s.count),
                 sum = u.load(s.sum);
      const auto step = [&](auto mk, auto value, auto f, auto c) HWY_ATTR {
        return hn::IfThenElse(hn::And(mk, hn::Eq(c, hn::Zero(d))), value, f);
      };
      const Pair<A> f = {step(m.lo, v.lo, old_first.lo, count.lo),
                         step(m.hi, v.hi, old_first.hi, count.hi)};
      u.store(f, first);
      u.store(Pair<A>{hn::Add(sum.lo, hn::IfThenElseZero(m.lo, hn::Sub(v.lo, f.lo))),
                      hn::Add(sum.hi, hn::IfThenElseZero(m.hi, hn::Sub(v.hi, f.hi)))},
              s.sum);
      u.store(Pair<A>{hn::Add(count.lo, hn::IfThenElseZero(m.lo, one)),
                      hn::Add(count.hi, hn::IfThenElseZero(m.hi, one))},
              s.count);
    });
  }
  for (std::int64_t j = 0; j < width; ++j) {
    s.pivot[j] = s.count[j] == A{0} ? A{0} : first[j] + s.sum[j] / s.count[j];
  }
  fill_zero(s.sum, width);
  fill_zero(s.square, width);
  for (std::int64_t r = 0; r < rows; ++r) {
    for_each_unit<A, kOrderOf<A, T>>(width, [&](const auto& u) HWY_ATTR {
      const auto m = u.only_new(u.load_mask(mask + r * stride));
      const auto centered = subtract(u.load(x + r * stride), u.load(s.pivot));
      const auto lo = hn::IfThenElseZero(m.lo, centered.lo),
                 hi = hn::IfThenElseZero(m.hi, centered.hi);
      const auto sum = u.load(s.sum), square = u.load(s.square);
      u.store(Pair<A>{hn::Add(sum.lo, lo), hn::Add(sum.hi, hi)}, s.sum);
      u.store(Pair<A>{hn::MulAdd(lo, lo, square.lo), hn::MulAdd(hi, hi, square.hi)}, s.square);
    });
  }
}

template <class A>
void moments_of_rows(ConstTensor x, std::int64_t rows, std::int64_t width, const MaskBlock& mask,
                     const ColumnMoments& out) {
  std::int32_t counting[kMaxRows];
  RowList list{nullptr, rows};
  if (mask.data != nullptr && mask.per_row) {
    list = {counting, 0};
    for (std::int64_t r = 0; r < rows; ++r) {
      if (mask.data[r] != 0) counting[list.size++] = static_cast<std::int32_t>(r);
    }
  }
  const bool masked = mask.data != nullptr && !mask.per_row;
  StripSums<A> s;
  for (std::int64_t at = 0; at < width; at += kMomentStrip) {
    const std::int64_t columns = std::min(kMomentStrip, width - at);
    if (list.size == 0) {
      for (std::int64_t j = at; j < at + columns; ++j) out.mean[j] = out.m2[j] = out.count[j] = 0.0;
      continue;
    }
    visit_elements<A>(x.dtype, [&](auto tag) HWY_ATTR {
      using T = typename decltype(tag)::type;
      const T* values = static_cast<const T*>(x.data) + at;
      if (masked) {
        masked_strip_moments<T, A>(values, mask.data + at, width, columns, rows, s);
      } else {
        strip_moments<T, A>(values, width, columns, list, s);
      }
    });
    const auto store = [&](std::int64_t j, double count, double weight) HWY_ATTR {
      const double sum = s.sum[j];
      out.mean[at + j] = s.pivot[j] + sum * weight;
      out.m2[at + j] = std::max(s.square[j] - sum * sum * weight, 0.0);
      out.count[at + j] = count;
    };
    if (masked) {
      for (std::int64_t j = 0; j < columns; ++j) {
        store(j, s.count[j], s.count[j] == A{0} ? 0.0 : 1.0 / s.count[j]);
      }
    } else {
      const double count = static_cast<double>(list.size), weight = 1.0 / count;
      for (std::int64_t j = 0; j < columns; ++j) store(j, count, weight);
    }
    visit_elements<A>(x.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for (std::int64_t j = at; j < at + columns; ++j) {
        const Moments moments =
            finite_moments({out.count[j], out.mean[j], out.m2[j]}, [&](const auto& f) {
              for (std::int64_t i = 0; i < list.size; ++i) {
                const std::int64_t value = list[i] * width + j;
                if (masked && mask.data[value] == 0) continue;
                f(to_double(static_cast<const T*>(x.data)[value]));
              }
            });
        out.mean[j] = moments.mean;
        out.m2[j] = moments.m2;
      }
    });
  }
}

// ---- application

// What follows the normalization. kPlain: nothing, and y has the dtype of x. kTyped: an activation
// that is known and perhaps a residual, which like y has the dtype of x. kAny: looked up per unit.
enum class Epilogue { kPlain, kTyped, kAny };

// y of kRows runs of n values that share their coefficients; `stride` leads from run to run.
template <class T, class A, Epilogue kEpilogue, Activation kActivation, int kRows, class Source>
HWY_INLINE void apply_block(const ApplyArgs<A>& args, bool stream, std::int64_t offset,
                            std::int64_t stride, std::int64_t n, const Source& source) {
  constexpr Order kOrder = kOrderOf<A, T>;
  const T* const x = static_cast<const T*>(args.x.data) + offset;
  const auto residual = advance(args.residual, offset);
  const auto y = advance(args.y, offset);
  // A pointer of its own: what is stored through it might be one of args.
  std::uint8_t* const relu_bits = args.relu_bits;
  const auto keep_bits = [&](const auto& u, const Pair<A>& z, int row) HWY_ATTR {
    if constexpr (std::is_same_v<A, float>) {
      constexpr int kPerByte = kPerReluByte<T>;
      if (relu_bits == nullptr) return;
      store_relu_bits<kPerByte>(u, is_active(z), relu_bits + (offset + row * stride) / kPerByte);
    }
  };
  const auto z_of = [&](const auto& u, const auto& c, int row)
                        HWY_ATTR { return normalized(centered(u.load(x + row * stride), c), c); };
  if constexpr (kEpilogue == Epilogue::kAny) {
    for_each_unit<A, kOrder>(n, [&](const auto& u) HWY_ATTR {
      const auto& c = source.at(u);
      for (int row = 0; row < kRows; ++row) {
        auto z = z_of(u, c, row);
        if (residual) z = sum_of(z, load_any<A>(u, advance(residual, row * stride)));
        keep_bits(u, z, row);
        visit_activation(args.activation, [&](auto activation) HWY_ATTR {
          z = {activate<activation(), A>(z.lo), activate<activation(), A>(z.hi)};
        });
        store_any<A>(u, z, advance(y, row * stride));
      }
    });
  } else {
    const T* const summand = static_cast<const T*>(residual.data);
    T* const out = static_cast<T*>(y.data);
    // Coefficients hold canonical NaNs only, and so do values of T.
    constexpr bool kCanonical =
        kActivation == Activation::kNone || kActivation == Activation::kReLU;
    const bool may_stream = relu_bits == nullptr || streams_whole_relu_bytes(out);
    for_each_stored_unit<A, kOrder, StoreOptions{.canonical_nan = kCanonical}, Source::kEndOfRun>(
        n, out, stream && may_stream, [&](const auto& u, auto options) HWY_ATTR {
          const auto& c = source.at(u);
          for (int row = 0; row < kRows; ++row) {
            auto z = z_of(u, c, row);
            if constexpr (kEpilogue == Epilogue::kTyped) {
              if (summand != nullptr) z = sum_of(z, u.load(summand + row * stride));
              if constexpr (kActivation == Activation::kReLU) keep_bits(u, z, row);
              z = {activate<kActivation, A>(z.lo), activate<kActivation, A>(z.hi)};
            }
            u.template store<options()>(z, out + row * stride);
          }
        });
  }
}

// Calls f(TypeTag<T>, epilogue, activation), the latter two as constants.
template <class A, class F>
HWY_INLINE void visit_apply(const ApplyArgs<A>& args, F&& f) {
  visit_elements<A>(args.x.dtype, [&](auto tag) HWY_ATTR {
    constexpr std::integral_constant<Activation, Activation::kNone> kNone;
    const bool residual_fits = !args.residual || args.residual.dtype == args.x.dtype;
    if (args.y.dtype != args.x.dtype || !residual_fits) {
      f(tag, std::integral_constant<Epilogue, Epilogue::kAny>(), kNone);
    } else if (!args.residual && args.activation == Activation::kNone) {
      f(tag, std::integral_constant<Epilogue, Epilogue::kPlain>(), kNone);
    } else {
      visit_activation(args.activation, [&](auto activation) HWY_ATTR {
        f(tag, std::integral_constant<Epilogue, Epilogue::kTyped>(), activation);
      });
    }
  });
}

template <class A>
void apply_runs(const ApplyArgs<A>& args, std::int64_t count, std::int64_t length) {
  visit_apply(args, [&](auto tag, auto epilogue, auto activation) HWY_ATTR {
    using T = typename decltype(tag)::type;
    for (std::int64_t r = 0; r < count; ++r) {
      apply_block<T, A, epilogue(), activation(), 1>(args, args.stream, r * length, length, length,
                                                     RunSource<A>(args.coefficients, r));
    }
  });
}

template <class A>
void apply_rows(const ApplyArgs<A>& args, std::int64_t rows, std::int64_t width) {
  visit_apply(args, [&](auto tag, auto epilogue, auto activation) HWY_ATTR {
    using T = typename decltype(tag)::type;
    constexpr Order kOrder = kOrderOf<A, T>;
    // Rows that share one load of the coefficients.
    constexpr int kRows = epilogue() == Epilogue::kPlain && kOrder == Order::kEvenOdd ? 4 : 1;
    for_each_strip(width, [&](std::int64_t first, std::int64_t columns) HWY_ATTR {
      const ColumnSource<A, kOrder> source(args.coefficients, first, columns);
      const bool stream = epilogue() != Epilogue::kAny && args.stream &&
                          is_stream_start(static_cast<const T*>(args.y.data) + first, width);
      std::int64_t row = 0;
      const auto rows_at = [&](auto count) NORMCORE_INLINE_LAMBDA {
        apply_block<T, A, epilogue(), activation(), count()>(args, stream, row * width + first,
                                                             width, columns, source);
        row += count();
      };
      const std::int64_t shared = end_of_shared_rows<T>(rows, width);
      while (row + kRows <= shared) rows_at(std::integral_constant<int, kRows>());
      while (row < rows) rows_at(std::integral_constant<int, 1>());
    });
  });
}

}  // namespace

void fill_forward_primitives(Primitives<float>& f, Primitives<double>& d) {
  f.moments_of_runs = moments_of_runs<float>;
  f.moments_of_rows = moments_of_rows<float>;
  f.apply_runs = apply_runs<float>;
  f.apply_rows = apply_rows<float>;
  d.moments_of_runs = moments_of_runs<double>;
  d.moments_of_rows = moments_of_rows<double>;
  d.apply_runs = apply_runs<double>;
  d.apply_rows = apply_rows<double>;
}

}  // namespace normcore::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normcore::kernels {
HWY_EXPORT(fill_forward_primitives);
void add_forward_primitives(Primitives<float>& f, Primitives<double>& d) {
  HWY_DYNAMIC_DISPATCH(fill_forward_primitives)(f, d);
}
}  // namespace normcore::kernels
#endif
