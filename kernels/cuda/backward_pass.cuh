// The backward pass: with g the gradient behind the activation, grad_x = gain * g
// + slope * (x - center) + offset. A pass says what planes_gradient.cuh, rows_gradient.cuh and
// runs_gradient.cuh do to the vectors, channels and slices that they walk over. Its types:
//   Call          arguments; a BackwardCall
//   Operands      of a vector: load()ed, and held in registers
//   HeldOperands  of several vectors, held in shared memory; if the pass has kernels of kTeam
//   Sums          over the values of a channel (gradients.cuh); add() of one element
//   Slice         what is known of a slice beside its statistics(): prepare() before its sums are
//                 there, finish_slice() from them, zeros where nothing flows through the statistics
//   Coefficients  of a channel of a slice, from coefficients(): per vector (planes) or per element of
//                 it (rows, runs). set() takes another slice, if kKeepsCoefficients
//   Terms         what sums and outputs are made of, per element, from terms()
//   Parameters    of a channel: scale, bias and what else coefficients are made of (parameters.cuh)
// Runs have no sums of channels: those of the slice are weighted by the parameters. kRunPhases times
// the values are gone through; kRunSums sums are taken, of which the first is the number of values that
// count, add_to_run() adds to the others, and finish_run() makes the slice of them. add_parameters()
// adds the gradients of scale and bias.
// applies() says whether there are outputs over the extent, apply() stores them. T, kWidth and kPlain
// are the template arguments, A is the arithmetic type, kBlocks how many blocks of kReduce and kApply
// a multiprocessor should have registers for.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/call.h"
#include "cuda/epilogue.cuh"
#include "cuda/gradients.cuh"
#include "cuda/parameters.cuh"
#include "cuda/statistics.cuh"

namespace normcore::kernels::cuda {

// Vectors of a gradient, held as they are in memory where it has the dtype of x.
template <bool kPlain, class T, int kWidth>
using GradientVector = Vector<std::conditional_t<kPlain, T, Arithmetic<T>>, kWidth>;

template <bool kPlain, class T, int kWidth>
__device__ GradientVector<kPlain, T, kWidth> load_gradients(ConstTensor tensor, std::int64_t index,
                                                            Span span) {
  if constexpr (kPlain) {
    return load_vector<T, kWidth>(static_cast<const T*>(tensor.data), index, span);
  } else {
    Arithmetic<T> values[kWidth];
    load_values<kPlain, T>(tensor, index, span, values);
    return GradientVector<kPlain, T, kWidth>::from(values);
  }
}

// Over values of a channel: g, g * (x - center), and how many values count.
template <class Value>
struct BackwardSums {
  Value g, g_centered, count;

  template <class Other, class F>
  __device__ static void for_each(BackwardSums& a, const BackwardSums<Other>& b, F f) {
    f(a.g, b.g);
    f(a.g_centered, b.g_centered);
    f(a.count, b.count);
  }
};
static_assert(sizeof(BackwardSums<double>) == kBackwardSums * sizeof(double));

// How grad_x of a slice depends on x through the statistics.
template <class A>
struct BackwardSlice {
  A slope, offset;
  A is_constant;  // 1 for a slice of one value: y does not depend on x, grad_x is 0, or NaN with g

  // `share`: weight of a value in the statistics. `h`: sums of scale * g and scale * g * (x - mean).
  __device__ static BackwardSlice of(double rstd, double rounding, double share,
                                     const GradientSums& h) {
    const double slope = -rstd * rstd * rstd * h.h_centered * share;
    const double offset = -rstd * h.h * share - slope * rounding;
    return {static_cast<A>(slope), static_cast<A>(offset), A{0}};
  }
};
static_assert(sizeof(BackwardSlice<double>) == kBackwardSliceValues * sizeof(double));

template <class ElementT, int kVectorWidth, bool kIsPlain>
struct BackwardPass {
  using T = ElementT;
  using A = Arithmetic<T>;
  static constexpr int kWidth = kVectorWidth;
  static constexpr bool kPlain = kIsPlain;
  static constexpr int kBlocks = 2;  // at once, where nothing is held
  // Whether coefficients of columns stay in registers while their slices are finished.
  static constexpr bool kKeepsCoefficients = kPlain;
  using Call = BackwardCall;
  template <class Value>
  using Sums = BackwardSums<Value>;
  using Slice = BackwardSlice<A>;

  struct Operands {
    Vector<T, kWidth> x;
    GradientVector<kPlain, T, kWidth> grad_y;

    __device__ void load(const Call& call, std::int64_t index, Span span) {
      x = load_vector<T, kWidth>(static_cast<const T*>(call.input.x.data), index, span);
      grad_y = load_gradients<kPlain, T, kWidth>(call.grad_y, index, span);
    }
    __device__ void keep_packed() {
      cuda::keep_packed(x);
      cuda::keep_packed(grad_y);
    }
  };

  // In shared memory, of so many vectors (hold_vector()).
  class HeldOperands {
   public:
    __device__ HeldOperands(void* memory, std::uint32_t vectors)
        : x_(static_cast<Vector<T, kWidth>*>(memory)),
          grad_y_(reinterpret_cast<GradientVector<kPlain, T, kWidth>*>(x_ + vectors)),
          end_(grad_y_ + vectors) {}

    // The i-th vector, of a kPlain call.
    __device__ void hold(const Call& call, std::uint32_t i, std::int64_t index) const {
      constexpr Span kWhole{0, kWidth};
      hold_vector<kPlain>(x_ + i, static_cast<const T*>(call.input.x.data), index, kWhole);
      hold_vector<kPlain>(grad_y_ + i, static_cast<const T*>(call.grad_y.data), index, kWhole);
    }
    // Several: place(k, i, index, span) says whether a thread has a k-th of `count`, and which. What has to
    // be converted is loaded a few at a time.
    template <class Place>
    __device__ void hold_all(const Call& call, std::uint32_t count, Place place) const {
      std::uint32_t i = 0;
      std::int64_t index = 0;
      Span span{0, kWidth};
      if constexpr (kPlain) {
        for (std::uint32_t k = 0; k < count; ++k) {
          if (place(k, i, index, span)) hold(call, i, index);
        }
      } else {
        constexpr std::uint32_t kAtOnce = 4;
        for (std::uint32_t first = 0; first < count; first += kAtOnce) {
          GradientVector<kPlain, T, kWidth> gradients[kAtOnce];
#pragma unroll
          for (std::uint32_t k = 0; k < kAtOnce; ++k) {
            if (!place(first + k, i, index, span)) continue;
            hold_vector<kPlain>(x_ + i, static_cast<const T*>(call.input.x.data), index, span);
            gradients[k] = load_gradients<kPlain, T, kWidth>(call.grad_y, index, span);
          }
#pragma unroll
          for (std::uint32_t k = 0; k < kAtOnce; ++k) {
            if (place(first + k, i, index, span)) grad_y_[i] = gradients[k];
          }
        }
      }
    }
    __device__ void load(std::uint32_t i, Operands& operands) const {
      operands.x = x_[i];
      operands.grad_y = grad_y_[i];
    }
    __device__ void* end() const { return end_; }

   private:
    Vector<T, kWidth>* x_;
    GradientVector<kPlain, T, kWidth>* grad_y_;
    void* end_;
  };

  struct Coefficients : Affine<A> {
    A slope, offset;
    __device__ const Coefficients& operator[](int) const { return *this; }

    __device__ void set(const Slice& slice) {
      slope = slice.slope;
      offset = slice.offset;
      if (slice.is_constant != A{0}) this->gain = A{0};
    }
  };

  struct Terms {
    A g[kWidth];
  };

  using Parameters = AffineParameters<A>;

  __device__ static bool applies(const Call& call) { return call.grad.x || call.grad.residual; }

  __device__ static SliceStatistics<A> statistics(const Call& call, std::int64_t slice) {
    return load_statistics<A>(call, slice);
  }

  __device__ static Slice prepare(const Call&, std::int64_t, std::int64_t) {
    return {A{0}, A{0}, A{0}};
  }

  __device__ static Coefficients coefficients(const Call& call,
                                              const SliceStatistics<A>& statistics,
                                              const Slice& slice, std::int64_t sample,
                                              std::int64_t channel, bool for_sums = false) {
    // Without an activation, or with its bits, sums need the center only.
    const bool is_linear =
        call.input.activation == Activation::kNone || call.input.relu_bits != nullptr;
    if (for_sums && is_linear) {
      return {{statistics.center, A{0}, A{0}}, A{0}, A{0}};
    }
    const std::int64_t i = affine_index(call.input, sample, channel);
    return coefficients(statistics, slice, parameters_at<Parameters>(call, i));
  }
  __device__ static Coefficients coefficients(const SliceStatistics<A>& statistics,
                                              const Slice& slice, const Parameters& p) {
    Coefficients out{Affine<A>::of(statistics, p.scale, p.bias), A{0}, A{0}};
    out.set(slice);
    return out;
  }

  // A masked-out value whose grad_y is 0 passes nothing on, not even a NaN: its g is 0, and what has
  // g = 0 and does not count is taken out of every sum.
  template <class PerElement>
  __device__ static Terms terms(const Call& call, const Operands& in, std::int64_t index, Span span,
                                unsigned counting, const PerElement& coefficients) {
    Terms out;
    A(&g)[kWidth] = out.g;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) g[i] = convert_from<A>(in.grad_y[i]);
    if (call.input.activation == Activation::kNone) return out;
    A slope[kWidth];
    if (call.input.relu_bits != nullptr) {
      const unsigned byte = call.input.relu_bits[index / kPerReluByte<T>];
      const auto shift = static_cast<unsigned>(index % kPerReluByte<T>);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) slope[i] = static_cast<A>(byte >> (shift + i) & 1);
    } else {
      pre_activation<kPlain>(call.input, in.x, index, span, coefficients, slope);
      derive_all<T>(call.input.activation, slope);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const bool is_used = (counting >> i & 1) != 0 || g[i] != A{0};
      g[i] = is_used ? g[i] * slope[i] : A{0};
    }
    return out;
  }

  // Of element i; its count is left to the caller.
  template <class PerElement>
  __device__ static void add(Sums<A>& sums, const Operands& in, const Terms& terms,
                             unsigned counting, int i, const PerElement& coefficients) {
    const A g = terms.g[i];
    if ((counting >> i & 1) == 0 && g == A{0}) return;
    sums.g += g;
    sums.g_centered =
        std::fma(g, convert_from<A>(in.x[i]) - coefficients[i].center, sums.g_centered);
  }

  template <class PerElement>
  __device__ static void apply(const Call& call, const Operands& in, const Terms& terms,
                               std::int64_t index, Span span, unsigned counting,
                               const PerElement& coefficients) {
    const A(&g)[kWidth] = terms.g;
    if (call.grad.residual) store_values<kPlain, T>(call.grad.residual, index, span, g);
    if (!call.grad.x) return;
    A dx[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const auto& c = coefficients[i];
      const bool counts = (counting >> i & 1) != 0, is_used = counts || g[i] != A{0};
      const A centered = convert_from<A>(in.x[i]) - c.center;
      const A through = std::fma(c.slope, centered, c.offset);
      const A direct = g[i] * c.gain;
      dx[i] = !is_used ? A{0} : call.batch_statistics && counts ? direct + through : direct;
    }
    store_values<kPlain, T>(call.grad.x, index, span, dx);
  }

  // Completes a slice of `channels` channels and, if it `stores`, the gradients of its parameters. sums(i)
  // are those of channel first_channel + i. Called by `lanes` neighbouring threads of a warp, all of whose
  // threads take part.
  template <class SumsOf>
  __device__ static Slice finish_slice(const Call& call, bool is_active, bool stores,
                                       const SliceStatistics<A>& statistics, std::int64_t sample,
                                       std::int64_t first_channel, std::uint32_t channels,
                                       unsigned lane, unsigned lanes, SumsOf sums) {
    double count = 0.0, h = 0.0, h_centered = 0.0;
    for (std::uint32_t i = lane; is_active && i < channels; i += lanes) count += sums(i).count;
    count = warp_sum(count, lanes);
    // A slice without a valid value has NaN statistics: where no g comes in, none goes out.
    // A part has those of the whole.
    const bool is_empty =
        call.is_partial ? std::isnan(statistics.rstd) : call.batch_statistics && count == 0.0;
    const double rstd = is_empty ? 0.0 : static_cast<double>(statistics.rstd);
    const double rounding = is_empty ? 0.0 : static_cast<double>(statistics.rounding);
    for (std::uint32_t i = lane; is_active && i < channels; i += lanes) {
      const Sums<double> channel = sums(i);
      const double g_centered = channel.g_centered - rounding * channel.g;
      const std::int64_t at = affine_index(call.input, sample, first_channel + i);
      const double scale = load_or(call.input.scale, at, 1.0);
      h += scale * channel.g;
      h_centered += scale * g_centered;
      if (stores) store_parameters(call, sample, first_channel + i, g_centered * rstd, channel.g);
    }
    h = warp_sum(h, lanes);
    h_centered = warp_sum(h_centered, lanes);
    if (call.sums != nullptr && is_active && lane == 0) {
      call.sums[slice_index(call, sample, first_channel)] = {h, h_centered};
    }
    return slice_of(call, rstd, rounding, count, {h, h_centered});
  }

  static constexpr int kRunPhases = 1, kRunSums = 3;

  template <int kPhase>
  __device__ static void add_to_run(const Call&, A (&sums)[kRunSums], const Operands& in,
                                    const Terms& terms, unsigned counting, int i,
                                    const Coefficients& coefficients,
                                    const Parameters& parameters) {
    const A g = terms.g[i];
    if ((counting >> i & 1) == 0 && g == A{0}) return;
    const A h = parameters.scale * g;
    sums[1] += h;
    sums[2] = std::fma(h, convert_from<A>(in.x[i]) - coefficients.center, sums[2]);
  }

  template <int kPhase>
  __device__ static void finish_run(const Call& call, const SliceStatistics<A>& statistics,
                                    const double (&sums)[kRunSums], Slice& slice) {
    const double rounding = static_cast<double>(statistics.rounding);
    slice = slice_of(call, static_cast<double>(statistics.rstd), rounding, sums[0],
                     {sums[1], sums[2] - rounding * sums[1]});
  }

  __device__ static void add_parameters(const Call&, A& scale, A& bias, const Operands& in,
                                        const Terms& terms, unsigned counting, int i,
                                        const Coefficients& coefficients,
                                        const SliceStatistics<A>& statistics, const Slice&) {
    const A g = terms.g[i];
    if ((counting >> i & 1) == 0 && g == A{0}) return;
    const A centered = convert_from<A>(in.x[i]) - coefficients.center - statistics.rounding;
    scale = std::fma(g, centered * statistics.rstd, scale);
    bias += g;
  }

 private:
  __device__ static Slice slice_of(const Call& call, double rstd, double rounding, double count,
                                   const GradientSums& h) {
    if (!call.batch_statistics) return {A{0}, A{0}, A{0}};
    // With nothing else in the slice y does not depend on x: exactly 0, not the difference of equal
    // terms.
    if (count == 1.0 && slice_size(call) == 1) return {A{0}, A{0}, A{1}};
    return Slice::of(rstd, rounding, 1.0 / count, h);
  }
};

}  // namespace normcore::kernels::cuda
