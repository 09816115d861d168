#include "cpu/reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace normcore::kernels::reference {
namespace {

// An IEEE 754 binary interchange format of at most 16 bits.
struct SmallFloat {
  int exponent_bits;
  int mantissa_bits;

  int min_exponent() const { return 2 - (1 << (exponent_bits - 1)); }
  unsigned infinity() const { return ((1u << exponent_bits) - 1u) << mantissa_bits; }

  double decode(std::uint16_t bits) const {
    const unsigned magnitude = bits & 0x7fffu;
    const double sign = (bits & 0x8000u) != 0 ? -1.0 : 1.0;
    if (magnitude > infinity()) return std::numeric_limits<double>::quiet_NaN();
    if (magnitude == infinity()) return sign * std::numeric_limits<double>::infinity();
    const unsigned exponent = magnitude >> mantissa_bits;
    const unsigned mantissa = magnitude & ((1u << mantissa_bits) - 1u);
    const unsigned digits = exponent == 0 ? mantissa : mantissa | (1u << mantissa_bits);
    const int shift = exponent == 0 ? 0 : static_cast<int>(exponent) - 1;
    return sign * std::ldexp(digits, min_exponent() + shift - mantissa_bits);
  }

  std::uint16_t encode(double value) const {
    const unsigned sign = std::signbit(value) ? 0x8000u : 0u;
    if (std::isnan(value)) {
      return static_cast<std::uint16_t>(sign | infinity() | (1u << (mantissa_bits - 1)));
    }
    unsigned magnitude = infinity();
    if (std::abs(value) < std::ldexp(1.0, 2 - min_exponent())) {
      const int exponent =
          value == 0.0 ? min_exponent() : std::max(std::ilogb(value), min_exponent());
      // Scaling by a power of two is exact, so the only rounding is nearbyint's. The hidden bit of
      // a normal number, and a carry out of the mantissa, add themselves to the exponent field.
      const double digits = std::nearbyint(std::ldexp(std::abs(value), mantissa_bits - exponent));
      const unsigned exponent_field = static_cast<unsigned>(exponent - min_exponent());
      magnitude = (exponent_field << mantissa_bits) + static_cast<unsigned>(digits);
    }
    return static_cast<std::uint16_t>(sign | std::min(magnitude, infinity()));
  }
};

constexpr SmallFloat kBFloat16Format{8, 7};
constexpr SmallFloat kFloat16Format{5, 10};

// Every value of a format: decoding them again and again would take most of the tests' time.
std::vector<double> decode_all(const SmallFloat& format) {
  std::vector<double> values(0x10000);
  for (std::size_t bits = 0; bits < values.size(); ++bits) {
    values[bits] = format.decode(static_cast<std::uint16_t>(bits));
  }
  return values;
}

template <class T>
T read(const void* data, std::int64_t index) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + index * static_cast<std::int64_t>(sizeof(T)),
              sizeof(T));
  return value;
}

template <class T>
void write(void* data, std::int64_t index, T value) {
  std::memcpy(static_cast<char*>(data) + index * static_cast<std::int64_t>(sizeof(T)), &value,
              sizeof(T));
}

// The values that share one mean and variance: samples [n_begin, n_end) of channels [c_begin,
// c_end), all positions.
struct Slice {
  std::int64_t n_begin, n_end, c_begin, c_end;
};

struct Moments {
  double count = 0.0, mean = 0.0, var = 0.0;
};

double compute_rstd(double var, double eps) { return 1.0 / std::sqrt(var + eps); }

// A norm's input, addressed by (n, c, s).
struct Input {
  explicit Input(const NormInput& input) : in(input), e(input.extent) {}

  std::int64_t index(std::int64_t n, std::int64_t c, std::int64_t s) const {
    return in.layout == Layout::kNCS ? (n * e.c + c) * e.s + s : (n * e.s + s) * e.c + c;
  }
  std::int64_t affine_index(std::int64_t n, std::int64_t c) const {
    return in.affine_per_sample ? n * e.c + c : c;
  }
  std::int64_t affine_count() const { return in.affine_per_sample ? e.n * e.c : e.c; }

  double x(std::int64_t n, std::int64_t c, std::int64_t s) const {
    return load(in.x, index(n, c, s));
  }
  double scale(std::int64_t n, std::int64_t c) const {
    return in.scale ? load(in.scale, affine_index(n, c)) : 1.0;
  }
  double bias(std::int64_t n, std::int64_t c) const {
    return in.bias ? load(in.bias, affine_index(n, c)) : 0.0;
  }
  bool counts(std::int64_t n, std::int64_t c, std::int64_t s) const {
    switch (in.mask.kind) {
      case MaskKind::kNone:
        return true;
      case MaskKind::kRow:
        return in.mask.data[n * e.s + s] != 0;
      case MaskKind::kElement:
        return in.mask.data[index(n, c, s)] != 0;
    }
    return true;
  }
  // What the activation is applied to.
  double z(std::int64_t n, std::int64_t c, std::int64_t s, double mean, double rstd) const {
    const double residual = in.residual ? load(in.residual, index(n, c, s)) : 0.0;
    return (x(n, c, s) - mean) * (rstd * scale(n, c)) + bias(n, c) + residual;
  }

  template <class Body>
  void for_each(const Slice& slice, Body body) const {
    for (std::int64_t n = slice.n_begin; n < slice.n_end; ++n) {
      for (std::int64_t c = slice.c_begin; c < slice.c_end; ++c) {
        for (std::int64_t s = 0; s < e.s; ++s) body(n, c, s);
      }
    }
  }

  // Sums are taken relative to the first value, so that equal values give exactly that value and
  // variance 0.
  Moments moments(const Slice& slice) const {
    double count = 0.0, pivot = 0.0;
    long double sum = 0.0L, square_sum = 0.0L;
    for_each(slice, [&](std::int64_t n, std::int64_t c, std::int64_t s) {
      if (!counts(n, c, s)) return;
      if (count == 0.0) pivot = x(n, c, s);
      count += 1.0;
      sum += static_cast<long double>(x(n, c, s)) - pivot;
    });
    const long double mean = pivot + sum / count;
    for_each(slice, [&](std::int64_t n, std::int64_t c, std::int64_t s) {
      if (!counts(n, c, s)) return;
      const long double centred = x(n, c, s) - mean;
      square_sum += centred * centred;
    });
    return {count, static_cast<double>(mean), static_cast<double>(square_sum / count)};
  }

  void apply(const Slice& slice, double mean, double rstd, MutableTensor y) const {
    for_each(slice, [&](std::int64_t n, std::int64_t c, std::int64_t s) {
      store(y, index(n, c, s), activate(in.activation, z(n, c, s, mean, rstd)));
    });
  }

  const NormInput& in;
  const Extent e;
};

// Gradients of scale and bias, summed over all slices before they are stored.
struct ParameterSums {
  explicit ParameterSums(const Input& input)
      : scale(static_cast<std::size_t>(input.affine_count())), bias(scale.size()) {}

  void store_to(const NormGradients& grad) const {
    for (std::size_t i = 0; i < scale.size(); ++i) {
      const auto index = static_cast<std::int64_t>(i);
      if (grad.scale) store(grad.scale, index, static_cast<double>(scale[i]));
      if (grad.bias) store(grad.bias, index, static_cast<double>(bias[i]));
    }
  }

  std::vector<long double> scale, bias;
};

// Gradients of one slice after another; those of scale and bias are stored by finish().
class Backward {
 public:
  Backward(const NormInput& input, ConstTensor grad_y, const NormGradients& grad)
      : input_(input), grad_y_(grad_y), grad_(grad), parameters_(input_) {}

  void add_slice(const Slice& slice, double mean, double rstd, bool batch_statistics) {
    double count = 0.0;
    long double h_sum = 0.0L, hx_sum = 0.0L;
    input_.for_each(slice, [&](std::int64_t n, std::int64_t c, std::int64_t s) {
      const bool counts = input_.counts(n, c, s);
      if (counts) count += 1.0;
      const double grad_z = grad_z_at(n, c, s, mean, rstd, counts);
      const double xhat = (input_.x(n, c, s) - mean) * rstd;
      const double product = !counts && grad_z == 0.0 ? 0.0 : grad_z * xhat;
      const auto affine = static_cast<std::size_t>(input_.affine_index(n, c));
      parameters_.scale[affine] += product;
      parameters_.bias[affine] += grad_z;
      h_sum += static_cast<long double>(grad_z) * input_.scale(n, c);
      hx_sum += static_cast<long double>(product) * input_.scale(n, c);
    });
    input_.for_each(slice, [&](std::int64_t n, std::int64_t c, std::int64_t s) {
      const bool counts = input_.counts(n, c, s);
      const double grad_z = grad_z_at(n, c, s, mean, rstd, counts);
      double grad_xhat = grad_z * input_.scale(n, c);
      if (batch_statistics && counts) {
        const double xhat = (input_.x(n, c, s) - mean) * rstd;
        grad_xhat -= static_cast<double>((h_sum + xhat * hx_sum) / count);
      }
      // Where no gradient comes in, none goes out: not even 0 * NaN of a slice without valid values.
      const bool unused = batch_statistics && !counts && grad_z == 0.0;
      if (grad_.x) store(grad_.x, input_.index(n, c, s), unused ? 0.0 : rstd * grad_xhat);
      if (grad_.residual) store(grad_.residual, input_.index(n, c, s), grad_z);
    });
  }

  void finish() const { parameters_.store_to(grad_); }

 private:
  // A masked-out value may be NaN: it must not get into the gradients through 0 * NaN.
  double grad_z_at(std::int64_t n, std::int64_t c, std::int64_t s, double mean, double rstd,
                   bool counts) const {
    const double grad_y = load(grad_y_, input_.index(n, c, s));
    if (!counts && grad_y == 0.0) return 0.0;
    return grad_y * activate_derivative(input_.in.activation, input_.z(n, c, s, mean, rstd));
  }

  const Input input_;
  const ConstTensor grad_y_;
  const NormGradients grad_;
  ParameterSums parameters_;
};

// The formula of norm_input.h, with its names, for one slice after another; the gradients of scale
// and bias are stored by finish().
class DoubleBackward {
 public:
  DoubleBackward(const NormInput& input, ConstTensor grad_y, const GradientCotangents& cotangents,
                 MutableTensor grad_grad_y, const NormGradients& grad)
      : input_(input),
        grad_y_(grad_y),
        cotangents_(cotangents),
        grad_grad_y_(grad_grad_y),
        grad_(grad),
        parameters_(input_) {}

  void add_slice(const Slice& slice, double mean, double rstd, bool batch_statistics) {
    Statistics statistics{mean, rstd, batch_statistics, 0.0};
    double size = 0.0;
    input_.for_each(slice, [&](std::int64_t n, std::int64_t c, std::int64_t s) {
      size += 1.0;
      if (input_.counts(n, c, s)) statistics.count += 1.0;
    });
    // With nothing else in the slice y does not depend on x.
    if (batch_statistics && size == 1.0) statistics.rstd = 0.0;

    std::vector<Terms> terms;
    terms.reserve(static_cast<std::size_t>(size));
    long double p0 = 0.0L, p1 = 0.0L;
    input_.for_each(slice, [&](std::int64_t n, std::int64_t c, std::int64_t s) {
      const Terms& t = terms.emplace_back(terms_at(n, c, s, statistics));
      if (t.w == 0.0L) return;
      p0 += t.w * t.u;
      p1 += t.w * t.u * t.xhat;
    });
    long double h = 0.0L, hx = 0.0L, e = 0.0L, ex = 0.0L, hu = 0.0L;
    for (Terms& t : terms) {
      t.q += t.scale * t.rstd * (t.u - p0 - t.xhat * p1);
      t.k = t.bends ? t.bend * t.q : 0.0L;
      parameters_.scale[t.affine] += t.rstd * t.g * (t.u - p0 - p1 * t.xhat) + t.k * t.xhat;
      parameters_.bias[t.affine] += t.k;
      h += t.scale * t.g;
      hx += t.scale * t.g * t.xhat;
      hu += t.scale * t.g * t.u;
      e += t.scale * t.k + t.v * t.g;
      ex += (t.scale * t.k + t.v * t.g) * t.xhat;
    }
    for (const Terms& t : terms) {
      const long double l = t.rstd * (hu - p0 * h - p1 * hx);
      long double grad_x = t.rstd * (t.v - t.rstd * p1 * t.scale) * t.g + t.rstd * t.scale * t.k;
      if (t.w != 0.0L) {
        grad_x += t.w * t.rstd *
                  (-t.rstd * hx * t.u + t.xhat * (2.0L * t.rstd * p1 * hx - ex - l) - e +
                   t.rstd * (p0 * hx + p1 * h));
      }
      const auto put = [&](MutableTensor tensor, long double value) {
        if (tensor) store(tensor, t.index, static_cast<double>(value));
      };
      put(grad_grad_y_, t.slope * t.q);
      put(grad_.x, grad_x);
      put(grad_.residual, t.k);
    }
  }

  void finish() const { parameters_.store_to(grad_); }

 private:
  struct Statistics {
    double mean, rstd;
    bool of_batch;
    double count;
  };

  // Of one position. slope is activation'(z), bend is grad_y activation''(z).
  struct Terms {
    std::int64_t index;
    std::size_t affine;
    long double w, rstd, scale, u, v, xhat, slope, bend, g;
    bool bends;     // otherwise k is 0, even if q is NaN
    long double q;  // at first without the term that p0 and p1 are in
    long double k;
  };

  Terms terms_at(std::int64_t n, std::int64_t c, std::int64_t s,
                 const Statistics& statistics) const {
    const NormInput& in = input_.in;
    const std::int64_t index = input_.index(n, c, s), affine = input_.affine_index(n, c);
    const auto get = [](ConstTensor tensor, std::int64_t i) {
      return tensor ? load(tensor, i) : 0.0;
    };
    const double grad_y = load(grad_y_, index);
    const bool counts = !statistics.of_batch || input_.counts(n, c, s);
    const bool unused = !counts && grad_y == 0.0;
    Terms t;
    t.index = index;
    t.affine = static_cast<std::size_t>(affine);
    t.w = statistics.of_batch && counts ? 1.0L / statistics.count : 0.0L;
    t.rstd = statistics.rstd;
    if (statistics.of_batch && statistics.count == 0.0) {
      t.rstd = unused ? 0.0 : std::numeric_limits<double>::quiet_NaN();
    }
    t.scale = input_.scale(n, c);
    t.u = get(cotangents_.x, index);
    t.v = get(cotangents_.scale, affine);
    t.xhat = (static_cast<long double>(input_.x(n, c, s)) - statistics.mean) * t.rstd;
    double residual = get(in.residual, index);
    if (unused && !std::isfinite(t.xhat)) t.xhat = 0.0L;
    if (unused && !std::isfinite(residual)) residual = 0.0;

    const auto z = static_cast<double>(t.xhat * t.scale + input_.bias(n, c) + residual);
    t.slope = activate_derivative(in.activation, z);
    t.g = unused ? 0.0L : grad_y * t.slope;
    t.bends = !unused && is_curved(in.activation);
    t.bend = grad_y * activate_second_derivative(in.activation, z);
    t.q = t.v * t.xhat + get(cotangents_.bias, affine) + get(cotangents_.residual, index);
    return t;
  }

  const Input input_;
  const ConstTensor grad_y_;
  const GradientCotangents cotangents_;
  const MutableTensor grad_grad_y_;
  const NormGradients grad_;
  ParameterSums parameters_;
};

Slice channel_slice(const Extent& extent, std::int64_t channel) {
  return {0, extent.n, channel, channel + 1};
}

Slice group_slice(const Extent& extent, std::int64_t num_groups, std::int64_t slice) {
  const std::int64_t n = slice / num_groups, group = slice % num_groups;
  const std::int64_t group_size = extent.c / num_groups;
  return {n, n + 1, group * group_size, (group + 1) * group_size};
}

void update(const RunningStatistics& running, std::int64_t channel, const Moments& moments) {
  if (!running.mean || moments.count == 0.0) return;
  const double weight = running.cumulative ? 1.0 / static_cast<double>(*running.num_batches_tracked)
                                           : running.momentum;
  const bool correct = running.unbiased && moments.count > 1.0;
  const double var = correct ? moments.var * moments.count / (moments.count - 1.0) : moments.var;
  const auto blend = [&](MutableTensor tensor, double value) {
    store(tensor, channel, (1.0 - weight) * load(tensor, channel) + weight * value);
  };
  blend(running.mean, moments.mean);
  blend(running.var, var);
}

}  // namespace

double load(ConstTensor tensor, std::int64_t index) {
  switch (tensor.dtype) {
    case DType::kFloat64:
      return read<double>(tensor.data, index);
    case DType::kFloat32:
      return read<float>(tensor.data, index);
    case DType::kBFloat16: {
      static const std::vector<double> values = decode_all(kBFloat16Format);
      return values[read<std::uint16_t>(tensor.data, index)];
    }
    case DType::kFloat16: {
      static const std::vector<double> values = decode_all(kFloat16Format);
      return values[read<std::uint16_t>(tensor.data, index)];
    }
  }
  return 0.0;
}

void store(MutableTensor tensor, std::int64_t index, double value) {
  switch (tensor.dtype) {
    case DType::kFloat64:
      return write(tensor.data, index, value);
    case DType::kFloat32:
      return write(tensor.data, index, static_cast<float>(value));
    case DType::kBFloat16:
      return write(tensor.data, index, kBFloat16Format.encode(value));
    case DType::kFloat16:
      return write(tensor.data, index, kFloat16Format.encode(value));
  }
}

void batch_norm_forward(const BatchNormForwardArgs& args) {
  const Input input(args.input);
  if (input.e.numel() == 0) return;
  if (args.running.num_batches_tracked != nullptr) ++*args.running.num_batches_tracked;
  for (std::int64_t c = 0; c < input.e.c; ++c) {
    const Slice slice = channel_slice(input.e, c);
    const Moments moments = input.moments(slice);
    const double rstd = compute_rstd(moments.var, args.input.eps);
    args.mean[c] = moments.mean;
    store(args.rstd, c, rstd);
    update(args.running, c, moments);
    input.apply(slice, moments.mean, rstd, args.y);
  }
}

void batch_norm_inference(const BatchNormInferenceArgs& args) {
  const Input input(args.input);
  if (input.e.numel() == 0) return;
  for (std::int64_t c = 0; c < input.e.c; ++c) {
    const double rstd = compute_rstd(load(args.running_var, c), args.input.eps);
    store(args.rstd, c, rstd);
    input.apply(channel_slice(input.e, c), load(args.running_mean, c), rstd, args.y);
  }
}

void batch_norm_backward(const BatchNormBackwardArgs& args) {
  const Extent& extent = args.input.extent;
  Backward backward(args.input, args.grad_y, args.grad);
  for (std::int64_t c = 0; extent.numel() > 0 && c < extent.c; ++c) {
    backward.add_slice(channel_slice(extent, c), load(args.mean, c), load(args.rstd, c),
                       args.batch_statistics);
  }
  backward.finish();
}

void batch_norm_double_backward(const BatchNormDoubleBackwardArgs& args) {
  const Extent& extent = args.input.extent;
  DoubleBackward backward(args.input, args.grad_y, args.cotangents, args.grad_grad_y, args.grad);
  for (std::int64_t c = 0; extent.numel() > 0 && c < extent.c; ++c) {
    backward.add_slice(channel_slice(extent, c), load(args.mean, c), load(args.rstd, c),
                       args.batch_statistics);
  }
  backward.finish();
}

void group_norm_forward(const GroupNormForwardArgs& args) {
  const Input input(args.input);
  if (input.e.numel() == 0) return;
  for (std::int64_t i = 0; i < input.e.n * args.num_groups; ++i) {
    const Slice slice = group_slice(input.e, args.num_groups, i);
    const Moments moments = input.moments(slice);
    const double rstd = compute_rstd(moments.var, args.input.eps);
    args.mean[i] = moments.mean;
    store(args.rstd, i, rstd);
    input.apply(slice, moments.mean, rstd, args.y);
  }
}

void group_norm_backward(const GroupNormBackwardArgs& args) {
  const Extent& extent = args.input.extent;
  Backward backward(args.input, args.grad_y, args.grad);
  for (std::int64_t i = 0; extent.numel() > 0 && i < extent.n * args.num_groups; ++i) {
    backward.add_slice(group_slice(extent, args.num_groups, i), args.mean[i], load(args.rstd, i),
                       true);
  }
  backward.finish();
}

void group_norm_double_backward(const GroupNormDoubleBackwardArgs& args) {
  const Extent& extent = args.input.extent;
  DoubleBackward backward(args.input, args.grad_y, args.cotangents, args.grad_grad_y, args.grad);
  for (std::int64_t i = 0; extent.numel() > 0 && i < extent.n * args.num_groups; ++i) {
    backward.add_slice(group_slice(extent, args.num_groups, i), args.mean[i], load(args.rstd, i),
                       true);
  }
  backward.finish();
}

}  // namespace normcore::kernels::reference
