// The double backward pass, as backward_pass.cuh explains it; norm_input.h has the formula. With
// d = x - center, u less its center, and g, b the products of grad_y with the first and the second
// derivative of the activation at z, which is computed again from x:
//   q = gain * u + tangent_slope * d + tangent_offset + t     the tangent of z
//   grad_grad_y = activation'(z) * q,  grad_residual = k = b * q
//   grad_x = g_gain * g + gain * k + u_gain * u + slope * d + offset     the latter three if it counts
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/backward_pass.cuh"
#include "cuda/call.h"
#include "cuda/epilogue.cuh"
#include "cuda/gradients.cuh"
#include "cuda/parameters.cuh"
#include "cuda/statistics.cuh"

namespace normcore::kernels::cuda {

// Of a channel, u and u d over what counts for the statistics, the others over all values; with the
// tangent as it is before its share through the statistics is known.
enum DoubleBackwardSum { kU, kUD, kG, kGD, kGU, kB, kBD, kBDD, kBQ, kBQD };

template <class Value, bool kCurved>
struct DoubleBackwardSums {
  static constexpr int kValues = kCurved ? 10 : 5;
  Value of[kValues], count;

  template <class Other, class F>
  __device__ static void for_each(DoubleBackwardSums& a,
                                  const DoubleBackwardSums<Other, kCurved>& b, F f) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) f(a.of[i], b.of[i]);
    f(a.count, b.count);
  }
};
static_assert(sizeof(DoubleBackwardSums<double, true>) == kDoubleBackwardSums * sizeof(double));

// u_center, u_rounding: the mean of u over what counts, or before that is known a value near it.
// spread: rstd * p1 of norm_input.h.
template <class A>
struct DoubleBackwardSlice {
  A u_center, u_rounding, spread, u_gain, slope, offset;
};
static_assert(sizeof(DoubleBackwardSlice<double>) == kDoubleBackwardSliceValues * sizeof(double));

// kCurved: with the sums that a second derivative takes.
template <class ElementT, int kVectorWidth, bool kIsPlain, bool kCurved>
struct DoubleBackwardPass {
  using T = ElementT;
  using A = Arithmetic<T>;
  static constexpr int kWidth = kVectorWidth;
  static constexpr bool kPlain = kIsPlain;
  static constexpr int kBlocks = 1;
  static constexpr bool kKeepsCoefficients = false;
  using Call = DoubleBackwardCall;
  template <class Value>
  using Sums = DoubleBackwardSums<Value, kCurved>;
  using Slice = DoubleBackwardSlice<A>;

  struct Operands {
    Vector<T, kWidth> x;
    GradientVector<kPlain, T, kWidth> grad_y, u;

    __device__ void load(const Call& call, std::int64_t index, Span span) {
      x = load_vector<T, kWidth>(static_cast<const T*>(call.input.x.data), index, span);
      grad_y = load_gradients<kPlain, T, kWidth>(call.grad_y, index, span);
      u = call.cotangents.x ? load_gradients<kPlain, T, kWidth>(call.cotangents.x, index, span)
                            : GradientVector<kPlain, T, kWidth>::zero();
    }
    __device__ void keep_packed() {
      cuda::keep_packed(x);
      cuda::keep_packed(grad_y);
      cuda::keep_packed(u);
    }
  };

  struct Coefficients : Affine<A> {
    A tangent_slope, tangent_offset, g_gain, u_center, u_gain, slope, offset;
    __device__ const Coefficients& operator[](int) const { return *this; }
  };

  struct Terms {
    A u[kWidth], d[kWidth], q[kWidth], g[kWidth], b[kWidth], derivative[kWidth];
    unsigned used;  // bits of the elements that count or have a grad_y
  };

  struct Parameters {
    A scale, bias, scale_tangent, bias_tangent;
    template <class F>
    __device__ static void for_each(const Call& call, F f) {
      f(call.input.scale, A{1}, &Parameters::scale);
      f(call.input.bias, A{0}, &Parameters::bias);
      f(call.cotangents.scale, A{0}, &Parameters::scale_tangent);
      f(call.cotangents.bias, A{0}, &Parameters::bias_tangent);
    }
  };

  __device__ static bool applies(const Call& call) {
    return call.grad_grad_y || call.grad.x || call.grad.residual;
  }

  // Those of a slice without a valid value are NaN; there, and where the slice has a single value, y
  // does not depend on x.
  __device__ static SliceStatistics<A> statistics(const Call& call, std::int64_t slice) {
    SliceStatistics<A> out = load_statistics<A>(call, slice);
    if (std::isnan(out.center)) {
      out.rounding = out.rstd = A{0};
    } else if (call.batch_statistics && slice_size(call) == 1) {
      out.rstd = A{0};
    }
    return out;
  }

  // With a u of the first channel (of the slice, where each has one value) that counts: taken off,
  // nothing cancels where u is nearly constant. It is looked for in steps of the golden ratio: what is
  // masked out is often one piece. If most is, none may be found.
  __device__ static Slice prepare(const Call& call, std::int64_t sample, std::int64_t channel) {
    constexpr std::uint32_t kTries = 32, kGoldenStep = 2654435769;  // the ratio less 1, times 2^32
    Slice out{};
    if (!call.cotangents.x || !call.batch_statistics) return out;
    const auto& [n, c, s] = call.input.extent;
    const bool by_sample = call.num_groups != 0, is_run = by_sample && s == 1;
    const std::int64_t first = by_sample ? sample * s : 0, rows = by_sample ? s : n * s;
    const std::int64_t values = is_run ? c / call.num_groups : rows;
    const Mask& mask = call.input.mask;
    for (std::uint32_t i = 0; i < kTries && i < values; ++i) {
      const double part = static_cast<double>(i * kGoldenStep) * 0x1p-32;
      const std::int64_t at =
          values <= kTries ? i : static_cast<std::int64_t>(part * static_cast<double>(values));
      const std::int64_t row = is_run ? first : first + at;
      const std::int64_t index = is_run || call.input.layout == Layout::kNSC
                                     ? row * c + channel + (is_run ? at : 0)
                                     : (row / s * c + channel) * s + row % s;
      if (!mask || mask.data[mask.kind == MaskKind::kElement ? index : row] != 0) {
        out.u_center = load_element<A>(call.cotangents.x, index);
        break;
      }
    }
    return out;
  }

  __device__ static Coefficients coefficients(const Call& call,
                                              const SliceStatistics<A>& statistics,
                                              const Slice& slice, std::int64_t sample,
                                              std::int64_t channel, bool /*for_sums*/ = false) {
    const std::int64_t i = affine_index(call.input, sample, channel);
    return coefficients(statistics, slice, parameters_at<Parameters>(call, i));
  }
  __device__ static Coefficients coefficients(const SliceStatistics<A>& statistics,
                                              const Slice& slice, const Parameters& p) {
    Coefficients out{};
    static_cast<Affine<A>&>(out) = Affine<A>::of(statistics, p.scale, p.bias);
    out.tangent_slope = statistics.rstd * std::fma(-slice.spread, p.scale, p.scale_tangent);
    out.tangent_offset =
        p.bias_tangent - slice.u_rounding * out.gain - out.tangent_slope * statistics.rounding;
    // Without a valid value what has a grad_y becomes NaN.
    out.g_gain = std::isnan(statistics.center) ? statistics.center : out.tangent_slope;
    out.u_center = slice.u_center;
    out.u_gain = slice.u_gain;
    out.slope = slice.slope;
    out.offset = slice.offset;
    return out;
  }

  // A masked-out value whose grad_y is 0 takes part as x = center where x is not finite, and with a
  // residual of 0 where that is not.
  template <class PerElement>
  __device__ static Terms terms(const Call& call, const Operands& in, std::int64_t index, Span span,
                                unsigned counting, const PerElement& coefficients) {
    Terms out;
    A grad_y[kWidth];
    out.used = 0;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const auto& c = coefficients[i];
      grad_y[i] = convert_from<A>(in.grad_y[i]);
      const bool is_used = (counting >> i & 1) != 0 || grad_y[i] != A{0};
      out.used |= is_used ? 1u << i : 0u;
      out.u[i] = convert_from<A>(in.u[i]) - c.u_center;
      out.d[i] = convert_from<A>(in.x[i]) - c.center;
      if (!is_used && !std::isfinite(out.d[i])) out.d[i] = A{0};
      out.q[i] = std::fma(out.u[i], c.gain, std::fma(out.d[i], c.tangent_slope, c.tangent_offset));
    }
    if (call.cotangents.residual) {
      A t[kWidth];
      load_values<kPlain, T>(call.cotangents.residual, index, span, t);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) out.q[i] += t[i];
    }
    if (call.input.activation == Activation::kNone) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        out.g[i] = grad_y[i];
        out.b[i] = A{0};
        out.derivative[i] = A{1};
      }
      return out;
    }
    A z[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      z[i] = std::fma(out.d[i], coefficients[i].gain, coefficients[i].shift);
    }
    if (call.input.residual) {
      A residual[kWidth];
      load_values<kPlain, T>(call.input.residual, index, span, residual);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const bool is_used = (out.used >> i & 1) != 0;
        z[i] += is_used || std::isfinite(residual[i]) ? residual[i] : A{0};
      }
    }
    derive_twice_all<T>(call.input.activation, z, out.derivative, out.b);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      out.g[i] = grad_y[i] * out.derivative[i];
      out.b[i] *= grad_y[i];
    }
    return out;
  }

  // Of element i; its count is left to the caller.
  template <class PerElement>
  __device__ static void add(Sums<A>& sums, const Operands&, const Terms& terms, unsigned counting,
                             int i, const PerElement&) {
    if ((terms.used >> i & 1) == 0) return;
    const A u = terms.u[i], d = terms.d[i], g = terms.g[i];
    if ((counting >> i & 1) != 0) {
      sums.of[kU] += u;
      sums.of[kUD] = std::fma(u, d, sums.of[kUD]);
    }
    sums.of[kG] += g;
    sums.of[kGD] = std::fma(g, d, sums.of[kGD]);
    sums.of[kGU] = std::fma(g, u, sums.of[kGU]);
    if constexpr (kCurved) {
      const A q = terms.q[i], b = terms.b[i], bd = b * d;
      sums.of[kB] += b;
      sums.of[kBD] += bd;
      sums.of[kBDD] = std::fma(bd, d, sums.of[kBDD]);
      sums.of[kBQ] = std::fma(b, q, sums.of[kBQ]);
      sums.of[kBQD] = std::fma(bd, q, sums.of[kBQD]);
    }
  }

  template <class PerElement>
  __device__ static void apply(const Call& call, const Operands&, const Terms& terms,
                               std::int64_t index, Span span, unsigned counting,
                               const PerElement& coefficients) {
    if (call.grad_grad_y) {
      A out[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) out[i] = terms.derivative[i] * terms.q[i];
      store_values<kPlain, T>(call.grad_grad_y, index, span, out);
    }
    A k[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      k[i] = k_of(call, terms, i);
    }
    if (call.grad.residual) store_values<kPlain, T>(call.grad.residual, index, span, k);
    if (!call.grad.x) return;
    A dx[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const auto& c = coefficients[i];
      const A through = std::fma(terms.u[i], c.u_gain, std::fma(terms.d[i], c.slope, c.offset));
      const A share = (counting >> i & 1) != 0 ? through : A{0};
      const A all = std::fma(terms.g[i], c.g_gain, std::fma(k[i], c.gain, share));
      dx[i] = (terms.used >> i & 1) != 0 ? all : A{0};
    }
    store_values<kPlain, T>(call.grad.x, index, span, dx);
  }

  // With sums about the mean instead of the center.
  __device__ static Sums<double> about_mean(Sums<double> sums, double rounding) {
    double(&of)[Sums<double>::kValues] = sums.of;
    of[kUD] -= rounding * of[kU];
    of[kGD] -= rounding * of[kG];
    if constexpr (kCurved) {
      of[kBDD] -= rounding * (2.0 * of[kBD] - rounding * of[kB]);
      of[kBD] -= rounding * of[kB];
      of[kBQD] -= rounding * of[kBQ];
    }
    return sums;
  }

  template <class SumsOf>
  __device__ static Slice finish_slice(const Call& call, bool is_active, bool stores,
                                       const SliceStatistics<A>& statistics, std::int64_t sample,
                                       std::int64_t first_channel, std::uint32_t channels,
                                       unsigned lane, unsigned lanes, SumsOf sums) {
    const double r = static_cast<double>(statistics.rstd),
                 rounding = static_cast<double>(statistics.rounding);
    double count = 0.0, p0 = 0.0, p1 = 0.0;
    for (std::uint32_t i = lane; is_active && i < channels; i += lanes) {
      const Sums<double> channel = about_mean(sums(i), rounding);
      count += channel.count;
      p0 += channel.of[kU];
      p1 += channel.of[kUD];
    }
    count = warp_sum(count, lanes);
    p0 = warp_sum(p0, lanes);
    p1 = warp_sum(p1, lanes);
    // p0 and p1 of norm_input.h, for u less its center.
    const bool has_shares = call.batch_statistics && count != 0.0;
    p0 = has_shares ? p0 / count : 0.0;
    p1 = has_shares ? p1 * r / count : 0.0;

    double h = 0.0, hx = 0.0, hu = 0.0, e = 0.0, ex = 0.0;
    for (std::uint32_t i = lane; is_active && i < channels; i += lanes) {
      const Sums<double> channel = about_mean(sums(i), rounding);
      const std::int64_t at = affine_index(call.input, sample, first_channel + i);
      const double w = load_or(call.input.scale, at, 1.0);
      const double v = load_or(call.cotangents.scale, at, 0.0);
      const double g = channel.of[kG], gx = r * channel.of[kGD], gu = channel.of[kGU];
      double k = 0.0, kx = 0.0;
      if constexpr (kCurved) {
        if (is_curved(call.input.activation)) {
          const double through_mean = w * r * p0, through_spread = w * r * r * p1;
          k = channel.of[kBQ] - through_mean * channel.of[kB] - through_spread * channel.of[kBD];
          kx = r * (channel.of[kBQD] - through_mean * channel.of[kBD] -
                    through_spread * channel.of[kBDD]);
        }
      }
      h += w * g;
      hx += w * gx;
      hu += w * gu;
      e += w * k + v * g;
      ex += w * kx + v * gx;
      if (stores)
        store_parameters(call, sample, first_channel + i, r * (gu - p0 * g - p1 * gx) + kx, k);
    }
    h = warp_sum(h, lanes);
    hx = warp_sum(hx, lanes);
    hu = warp_sum(hu, lanes);
    e = warp_sum(e, lanes);
    ex = warp_sum(ex, lanes);
    if (!has_shares) return {};  // and no product with sums, which may not be finite
    Slice out{};
    const double u_center = static_cast<double>(prepare(call, sample, first_channel).u_center);
    const double u_rounding = set_means(out, u_center + p0, r * p1);
    set_shares(out, statistics, count, u_rounding, r * p1, h, hx, r * (hu - p0 * h - p1 * hx), e,
               ex);
    return out;
  }

  // The first phase gives the means of u and u d, the second, where q is the tangent itself, the sums
  // of w g, w g d, w g u, w k + v g and (w k + v g) d with the scale w and its cotangent v.
  static constexpr int kRunPhases = 2, kRunSums = 6;

  template <int kPhase>
  __device__ static void add_to_run(const Call& call, A (&sums)[kRunSums], const Operands&,
                                    const Terms& terms, unsigned counting, int i,
                                    const Coefficients&, const Parameters& parameters) {
    const A u = terms.u[i], d = terms.d[i];
    if constexpr (kPhase == 0) {
      if ((counting >> i & 1) == 0) return;
      sums[1] += u;
      sums[2] = std::fma(u, d, sums[2]);
    } else {
      if ((terms.used >> i & 1) == 0) return;
      const A h = parameters.scale * terms.g[i];
      const A e =
          std::fma(parameters.scale, k_of(call, terms, i), parameters.scale_tangent * terms.g[i]);
      sums[1] += h;
      sums[2] = std::fma(h, d, sums[2]);
      sums[3] = std::fma(h, u, sums[3]);
      sums[4] += e;
      sums[5] = std::fma(e, d, sums[5]);
    }
  }

  template <int kPhase>
  __device__ static void finish_run(const Call& call, const SliceStatistics<A>& statistics,
                                    const double (&sums)[kRunSums], Slice& slice) {
    const double r = static_cast<double>(statistics.rstd),
                 rounding = static_cast<double>(statistics.rounding), count = sums[0];
    if (!call.batch_statistics || count == 0.0) {
      slice = {};
    } else if constexpr (kPhase == 0) {
      const double u_center = static_cast<double>(slice.u_center);
      set_means(slice, u_center + sums[1] / count, r * r * (sums[2] - rounding * sums[1]) / count);
    } else {
      const double u_rounding = static_cast<double>(slice.u_rounding),
                   spread = static_cast<double>(slice.spread);
      const double h = sums[1], hx = r * (sums[2] - rounding * h), e = sums[4];
      const double l = r * (sums[3] - u_rounding * h) - spread * hx;
      set_shares(slice, statistics, count, u_rounding, spread, h, hx, l, e,
                 r * (sums[5] - rounding * e));
    }
  }

  __device__ static void add_parameters(const Call& call, A& scale, A& bias, const Operands&,
                                        const Terms& terms, unsigned, int i, const Coefficients&,
                                        const SliceStatistics<A>& statistics, const Slice& slice) {
    if ((terms.used >> i & 1) == 0) return;
    const A k = k_of(call, terms, i), xhat = statistics.rstd * (terms.d[i] - statistics.rounding);
    const A u = statistics.rstd * (terms.u[i] - slice.u_rounding) - slice.spread * xhat;
    scale = std::fma(terms.g[i], u, std::fma(k, xhat, scale));
    bias += k;
  }

 private:
  // Not 0 * q, which may be NaN.
  __device__ static A k_of(const Call& call, const Terms& terms, int i) {
    return is_curved(call.input.activation) ? terms.b[i] * terms.q[i] : A{0};
  }

  // From here on u is less its mean, up to the rounding of that, which is returned.
  __device__ static double set_means(Slice& slice, double u_mean, double spread) {
    slice.u_center = static_cast<A>(u_mean);
    const double u_rounding = u_mean - static_cast<double>(slice.u_center);
    slice.u_rounding = static_cast<A>(u_rounding);
    slice.spread = static_cast<A>(spread);
    return u_rounding;
  }

  // From H, Hx, L, E and Ex of norm_input.h.
  __device__ static void set_shares(Slice& slice, const SliceStatistics<A>& statistics,
                                    double count, double u_rounding, double spread, double h,
                                    double hx, double l, double e, double ex) {
    const double r = static_cast<double>(statistics.rstd),
                 rounding = static_cast<double>(statistics.rounding);
    const double slope = r * r * (2.0 * spread * hx - ex - l) / count;
    const double offset = r * (r * u_rounding * hx + spread * h - e) / count;
    slice.u_gain = static_cast<A>(-r * r * hx / count);
    slice.slope = static_cast<A>(slope);
    slice.offset = static_cast<A>(offset - slope * rounding);
  }
};

// Whether chunks of vectors of that width have all sums: those of single elements always do.
inline bool has_curved_sums(const DoubleBackwardCall& call, int width) {
  return width == 1 || is_curved(call.input.activation);
}

// Calls f.operator()<Pass>() with the pass that takes no more sums than the call needs.
template <class T, int kWidth, Stage kStage, bool kPlain, class F>
auto with_double_backward_pass(const DoubleBackwardCall& call, F f) {
  if constexpr (kWidth > 1 && kStage == Stage::kReduce) {
    if (!has_curved_sums(call, kWidth)) {
      return f.template operator()<DoubleBackwardPass<T, kWidth, kPlain, false>>();
    }
  }
  return f.template operator()<DoubleBackwardPass<T, kWidth, kPlain, true>>();
}

}  // namespace normcore::kernels::cuda
