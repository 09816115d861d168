#include "tolerance.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>

#include "cpu/reference.h"
#include "positions.h"

namespace normcore::kernels::testing {
namespace {

using reference::load;

constexpr double kLongestChain = 1024.0;

double unit_roundoff(DType x) { return x == DType::kFloat64 ? 0x1p-52 : 0x1p-24; }

// One position of the input with all that the bounds need.
struct Element {
  std::int64_t index = 0, slice = 0, affine = 0;
  bool counts = true;
  double scale = 1.0, bias = 0.0, residual = 0.0;
  double xhat = 0.0, xhat_error = 0.0;
  double z = 0.0, z_error = 0.0;

  void set_xhat(double value, double error, double u) {
    xhat = value;
    xhat_error = error;
    z = xhat * scale + bias + residual;
    z_error = xhat_error * std::abs(scale) +
              u * (2.0 * std::abs(xhat * scale) + 2.0 * std::abs(bias) + 2.0 * std::abs(residual));
  }
};

class Model {
 public:
  Model(const NormInput& input, const Statistics& statistics)
      : in_(input), statistics_(statistics), u_(unit_roundoff(input.x.dtype)) {
    counts_.resize(statistics.mean.size());
    for_each_position(in_.extent, [&](std::int64_t n, std::int64_t c, std::int64_t s) {
      const std::int64_t slice = slice_of(in_.extent, statistics.num_groups, n, c);
      if (counts(in_, n, c, s)) counts_[static_cast<std::size_t>(slice)] += 1.0;
    });
  }

  double u() const { return u_; }
  double count(std::int64_t slice) const { return counts_[static_cast<std::size_t>(slice)]; }
  double mean(std::int64_t slice) const {
    return statistics_.mean[static_cast<std::size_t>(slice)];
  }
  double rstd(std::int64_t slice) const {
    return statistics_.rstd[static_cast<std::size_t>(slice)];
  }
  double var(std::int64_t slice) const {
    return std::max(0.0, 1.0 / (rstd(slice) * rstd(slice)) - in_.eps);
  }
  double mean_error(std::int64_t slice) const {
    if (!statistics_.from_batch) return 0.0;
    return 2.0 * sum_error(in_.x.dtype, count(slice)) * std::sqrt(var(slice)) +
           0x1p-51 * std::abs(mean(slice));
  }
  double var_error(std::int64_t slice) const {
    return statistics_.from_batch ? 4.0 * sum_error(in_.x.dtype, count(slice)) * var(slice) : 0.0;
  }
  double relative_rstd_error(std::int64_t slice) const {
    return u_ + 0.5 * var_error(slice) * rstd(slice) * rstd(slice);
  }

  template <class Body>
  void for_each(Body body) const {
    for_each_position(in_.extent, [&](std::int64_t n, std::int64_t c, std::int64_t s) {
      body(element(n, c, s));
    });
  }

 private:
  Element element(std::int64_t n, std::int64_t c, std::int64_t s) const {
    Element e;
    e.index = index_of(in_.extent, in_.layout, n, c, s);
    e.slice = slice_of(in_.extent, statistics_.num_groups, n, c);
    e.affine = in_.affine_per_sample ? n * in_.extent.c + c : c;
    e.counts = counts(in_, n, c, s);
    e.scale = in_.scale ? load(in_.scale, e.affine) : 1.0;
    e.bias = in_.bias ? load(in_.bias, e.affine) : 0.0;
    e.residual = in_.residual ? load(in_.residual, e.index) : 0.0;
    const double x = load(in_.x, e.index);
    const double r = rstd(e.slice);
    const double xhat = (x - mean(e.slice)) * r;
    const double error = r * mean_error(e.slice) +
                         std::abs(xhat) * (4.0 * u_ + relative_rstd_error(e.slice)) +
                         mean_rounding(x, mean(e.slice)) * r;
    e.set_xhat(xhat, error, u_);
    return e;
  }

  // The error of x - mean that does not shrink with the difference.
  double mean_rounding(double x, double mean) const {
    switch (in_.x.dtype) {
      case DType::kFloat64:
        return u_ * std::abs(mean);
      case DType::kFloat32:
        return u_ * u_ * std::abs(mean);  // hi + lo
      case DType::kBFloat16:
      case DType::kFloat16:
        return 2.0 * u_ * (std::abs(x) + std::abs(mean));
    }
    return 0.0;
  }

  const NormInput& in_;
  const Statistics& statistics_;
  const double u_;
  std::vector<double> counts_;
};

double activation_error(Activation activation, double value, double u) {
  return is_curved(activation) ? kActivationUlps * u * std::abs(value) : 0.0;
}

// A value and how far a kernel's may be from it.
struct Estimate {
  double value = 0.0, error = 0.0;

  Estimate operator-() const { return {-value, error}; }
};

struct Sum {
  double value = 0.0, magnitude = 0.0, error = 0.0, count = 0.0;

  void add(double term, double term_error) { add_terms({{term, term_error}}); }
  // All of one position.
  void add_terms(std::initializer_list<Estimate> terms) {
    for (const Estimate& term : terms) {
      value += term.value;
      magnitude += std::abs(term.value);
      error += term.error;
    }
    count += 1.0;
  }
  double bound(DType x) const { return error + sum_error(x, count) * magnitude; }
  Estimate estimate(DType x) const { return {value, bound(x)}; }
};

// g = grad_y * act'(z) with its error.
struct OutputGradient {
  double g = 0.0, error = 0.0;
};

OutputGradient output_gradient(const NormInput& input, const Element& e, double grad_y, double u) {
  if (grad_y == 0.0) return {};
  const double derivative = activate_derivative(input.activation, e.z);
  const double derivative_error =
      is_curved(input.activation) ? e.z_error + kDerivativeUlps * u : 0.0;
  return {grad_y * derivative, std::abs(grad_y) * (derivative_error + u * std::abs(derivative))};
}

// Rounded operations on estimates.
struct Arithmetic {
  double u;

  Estimate product(Estimate a, Estimate b) const {
    const double value = a.value * b.value;
    return {value, std::abs(a.value) * b.error + a.error * std::abs(b.value) + a.error * b.error +
                       u * std::abs(value)};
  }
  Estimate product(Estimate a, Estimate b, Estimate c) const { return product(a, product(b, c)); }

  // Whatever the order of the terms.
  Estimate sum(std::initializer_list<Estimate> terms) const {
    Estimate result;
    for (const Estimate& term : terms) {
      result.value += term.value;
      result.error += term.error + 2.0 * u * std::abs(term.value);
    }
    return result;
  }
};

double largest(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return std::numeric_limits<double>::max();
    case DType::kFloat32:
      return std::numeric_limits<float>::max();
    case DType::kBFloat16:
      return 0x1.fep127;
    case DType::kFloat16:
      return 65504.0;
  }
  return 0.0;
}

// With the rounding of the store.
double stored_bound(DType dtype, Estimate e) {
  const double farthest = std::abs(e.value) + e.error;
  return farthest > largest(dtype) ? std::numeric_limits<double>::infinity()
                                   : e.error + half_ulp(dtype, farthest);
}

// The terms of the double backward pass at one position.
struct DoubleTerms {
  Element e;
  bool in_statistics = false;
  double rstd = 0.0;
  Estimate xhat, scale, u, v, s, t, slope, q, g, k;
};

// Statistics as they count for the double backward pass: without a valid value, or without another
// value, nothing depends on x.
Statistics without_constant_slices(const NormInput& input, const Statistics& statistics) {
  Statistics result = statistics;
  result.from_batch = false;
  if (!statistics.from_batch) return result;
  std::vector<std::int64_t> size(result.mean.size()), count(result.mean.size());
  for_each_position(input.extent, [&](std::int64_t n, std::int64_t c, std::int64_t s) {
    const auto slice =
        static_cast<std::size_t>(slice_of(input.extent, statistics.num_groups, n, c));
    ++size[slice];
    if (counts(input, n, c, s)) ++count[slice];
  });
  for (std::size_t i = 0; i < size.size(); ++i) {
    if (count[i] == 0) result.mean[i] = 0.0;
    if (count[i] == 0 || size[i] == 1) result.rstd[i] = 0.0;
  }
  return result;
}

}  // namespace

double half_ulp(DType dtype, double value) {
  int mantissa_bits = 0, min_exponent = 0;
  switch (dtype) {
    case DType::kFloat64:
      mantissa_bits = 52, min_exponent = -1022;
      break;
    case DType::kFloat32:
      mantissa_bits = 23, min_exponent = -126;
      break;
    case DType::kBFloat16:
      mantissa_bits = 7, min_exponent = -126;
      break;
    case DType::kFloat16:
      mantissa_bits = 10, min_exponent = -14;
      break;
  }
  if (!std::isfinite(value)) return 0.0;
  const int exponent = value == 0.0 ? min_exponent : std::max(std::ilogb(value), min_exponent);
  return std::ldexp(0.5, exponent - mantissa_bits);
}

double sum_error(DType x, double count) {
  return unit_roundoff(x) * (4.0 + std::sqrt(std::min(count, kLongestChain)));
}

ForwardBounds forward_bounds(const NormInput& input, const Statistics& statistics, DType y) {
  const Model model(input, statistics);
  ForwardBounds bounds;
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(statistics.mean.size()); ++i) {
    bounds.mean.push_back(model.mean_error(i));
    bounds.var.push_back(model.var_error(i));
    bounds.rstd.push_back(model.relative_rstd_error(i) * model.rstd(i));
  }
  bounds.y.resize(static_cast<std::size_t>(input.extent.numel()));
  model.for_each([&](const Element& e) {
    const double value = activate(input.activation, e.z);
    const double slope = input.activation == Activation::kNone ? 1.0 : 1.13;
    const double error = slope * e.z_error + activation_error(input.activation, value, model.u());
    // The error may carry the value into the next binade, where an ulp is twice as large.
    bounds.y[static_cast<std::size_t>(e.index)] = error + half_ulp(y, std::abs(value) + error);
  });
  return bounds;
}

BackwardBounds backward_bounds(const NormInput& input, const Statistics& statistics,
                               ConstTensor grad_y, const NormGradients& grad) {
  Statistics given = statistics;
  given.from_batch = false;
  const Model model(input, given);
  const double u = model.u();
  const DType x = input.x.dtype;
  const auto numel = static_cast<std::size_t>(input.extent.numel());
  const auto affine_count = static_cast<std::size_t>(
      input.affine_per_sample ? input.extent.n * input.extent.c : input.extent.c);

  std::vector<Sum> h(given.mean.size()), hx(given.mean.size());
  std::vector<Sum> scale(affine_count), bias(affine_count);
  const auto product_error = [](const OutputGradient& g, const Element& e) {
    return g.g == 0.0 && g.error == 0.0 ? 0.0
                                        : g.error * std::abs(e.xhat) + std::abs(g.g) * e.xhat_error;
  };
  model.for_each([&](const Element& e) {
    const OutputGradient g = output_gradient(input, e, load(grad_y, e.index), u);
    if (g.g == 0.0 && g.error == 0.0) return;
    const auto slice = static_cast<std::size_t>(e.slice);
    const auto affine = static_cast<std::size_t>(e.affine);
    const double weight = std::abs(e.scale);
    bias[affine].add(g.g, g.error);
    scale[affine].add(g.g * e.xhat, product_error(g, e));
    h[slice].add(g.g * e.scale, g.error * weight);
    hx[slice].add(g.g * e.xhat * e.scale, product_error(g, e) * weight);
  });

  BackwardBounds bounds;
  bounds.x.resize(numel);
  bounds.residual.resize(numel);
  model.for_each([&](const Element& e) {
    const auto slice = static_cast<std::size_t>(e.slice);
    const OutputGradient g = output_gradient(input, e, load(grad_y, e.index), u);
    double value = g.g * e.scale;
    double error = std::abs(e.scale) * (g.error + 4.0 * u * std::abs(g.g));
    if (statistics.from_batch && e.counts) {
      const double w = 1.0 / model.count(e.slice);
      value -= w * (h[slice].value + e.xhat * hx[slice].value);
      error += w * (h[slice].bound(x) + std::abs(e.xhat) * hx[slice].bound(x) +
                    e.xhat_error * std::abs(hx[slice].value) +
                    4.0 * u * (std::abs(h[slice].value) + std::abs(e.xhat * hx[slice].value)));
    }
    const double rstd = model.rstd(e.slice);
    const auto i = static_cast<std::size_t>(e.index);
    bounds.x[i] = rstd * error + half_ulp(grad.x.dtype, rstd * (std::abs(value) + error));
    bounds.residual[i] = g.error + half_ulp(grad.residual.dtype, std::abs(g.g) + g.error);
  });
  for (const Sum& sum : scale) {
    const double error = sum.bound(x);
    bounds.scale.push_back(error + half_ulp(grad.scale.dtype, std::abs(sum.value) + error));
  }
  for (const Sum& sum : bias) {
    const double error = sum.bound(x);
    bounds.bias.push_back(error + half_ulp(grad.bias.dtype, std::abs(sum.value) + error));
  }
  return bounds;
}

// What kernels take off the cotangent of grad_x before they sum: of every slice the first value that
// counts in its first channel.
std::vector<double> first_cotangents(const NormInput& input, const Statistics& statistics,
                                     ConstTensor cotangent) {
  const std::int64_t groups = statistics.num_groups,
                     channels = groups == 0 ? 1 : input.extent.c / groups;
  std::vector<std::optional<double>> found(statistics.mean.size());
  for_each_position(input.extent, [&](std::int64_t n, std::int64_t c, std::int64_t s) {
    auto& first = found[static_cast<std::size_t>(slice_of(input.extent, groups, n, c))];
    if (first || !cotangent || !statistics.from_batch || c % channels != 0) return;
    if (counts(input, n, c, s))
      first = load(cotangent, index_of(input.extent, input.layout, n, c, s));
  });
  std::vector<double> result;
  for (const auto& first : found) result.push_back(first.value_or(0.0));
  return result;
}

DoubleBackwardBounds double_backward_bounds(const NormInput& input, const Statistics& statistics,
                                            ConstTensor grad_y,
                                            const GradientCotangents& cotangents, DType grad_grad_y,
                                            const NormGradients& grad) {
  const Statistics given = without_constant_slices(input, statistics);
  const Model model(input, given);
  const DType x = input.x.dtype;
  const double u = model.u();
  const Arithmetic a{u};
  const auto exact = [](ConstTensor tensor, std::int64_t i) {
    return Estimate{tensor ? load(tensor, i) : 0.0, 0.0};
  };
  const auto at = [](auto& values, std::int64_t i) -> auto& {
    return values[static_cast<std::size_t>(i)];
  };
  const auto numel = static_cast<std::size_t>(input.extent.numel());
  const auto affine_count = static_cast<std::size_t>(
      input.affine_per_sample ? input.extent.n * input.extent.c : input.extent.c);
  const std::size_t slices = given.mean.size();

  // xhat, the cotangents, p0 and p1.
  std::vector<DoubleTerms> positions;
  positions.reserve(numel);
  std::vector<Sum> u_sum(slices), ux_sum(slices);
  model.for_each([&](const Element& element) {
    DoubleTerms p;
    p.e = element;
    p.in_statistics = statistics.from_batch && element.counts;
    p.rstd = model.rstd(element.slice);
    const bool unused =
        statistics.from_batch && !element.counts && load(grad_y, element.index) == 0.0;
    if (unused && !std::isfinite(p.e.residual)) p.e.residual = 0.0;
    if (unused && !std::isfinite(p.e.xhat)) {  // it counts as the mean, which may be rounded
      p.e.set_xhat(0.0, p.rstd * u * std::abs(model.mean(element.slice)), u);
    } else {
      p.e.set_xhat(p.e.xhat, p.e.xhat_error, u);
    }
    p.xhat = {p.e.xhat, p.e.xhat_error};
    p.scale = {p.e.scale, 0.0};
    p.u = exact(cotangents.x, p.e.index);  // less its center, below
    p.v = exact(cotangents.scale, p.e.affine);
    p.s = exact(cotangents.bias, p.e.affine);
    p.t = exact(cotangents.residual, p.e.index);
    positions.push_back(p);
  });
  const std::vector<double> center = first_cotangents(input, statistics, cotangents.x);
  for (DoubleTerms& p : positions) {
    const double shifted = p.u.value - at(center, p.e.slice);
    p.u = {shifted, u * std::abs(shifted)};
    if (p.in_statistics) {
      at(u_sum, p.e.slice).add_terms({p.u});
      at(ux_sum, p.e.slice).add_terms({a.product(p.u, p.xhat)});
    }
  }
  std::vector<Estimate> p0(slices), p1(slices);
  for (std::int64_t i = 0; statistics.from_batch && i < static_cast<std::int64_t>(slices); ++i) {
    if (model.count(i) == 0.0) continue;
    const Estimate w{1.0 / model.count(i), 0.0};
    at(p0, i) = a.product(w, at(u_sum, i).estimate(x));
    at(p1, i) = a.product(w, at(ux_sum, i).estimate(x));
    // Means are float64: the one of the cotangent is rounded, and xhat about the one of x has a sum,
    // which reaches p1 through what was taken off.
    const double rounding = 0x1p-52 * std::abs(at(center, i));
    at(p0, i).error += rounding;
    at(p1, i).error += rounding * model.rstd(i) * std::abs(model.mean(i));
  }

  // q, g, k and the other sums.
  DoubleBackwardBounds bounds;
  bounds.grad_y.resize(numel);
  bounds.x.resize(numel);
  bounds.residual.resize(numel);
  std::vector<Sum> h(slices), hx(slices), hu(slices), e(slices), ex(slices);
  std::vector<Sum> scale(affine_count), bias(affine_count);
  for (DoubleTerms& p : positions) {
    const Estimate rstd{p.rstd, 0.0};
    const Estimate &mean_u = at(p0, p.e.slice), &slope_u = at(p1, p.e.slice);
    const Estimate scaled = a.product(p.scale, rstd);
    p.q = a.sum({a.product(scaled, p.u), -a.product(scaled, mean_u),
                 -a.product(scaled, p.xhat, slope_u), a.product(p.v, p.xhat), p.s, p.t});
    const double dy = load(grad_y, p.e.index);
    const OutputGradient g = output_gradient(input, p.e, dy, u);
    p.g = {g.g, g.error};
    const double z_error = p.e.z_error + kDerivativeUlps * u;
    p.slope = {activate_derivative(input.activation, p.e.z), 0.0};
    if (is_curved(input.activation)) {
      p.slope.error = z_error;
      const Estimate curvature{activate_second_derivative(input.activation, p.e.z), z_error};
      p.k = a.product({dy, 0.0}, curvature, p.q);
    }
    const bool is_kink =
        input.activation == Activation::kReLU && std::abs(p.e.z) <= 2.0 * p.e.z_error;
    if (is_kink) p.slope.error = 1.0;
    at(bounds.grad_y, p.e.index) = stored_bound(grad_grad_y, a.product(p.slope, p.q));
    at(bounds.residual, p.e.index) = stored_bound(grad.residual.dtype, p.k);

    const Estimate sg = a.product(p.scale, p.g), vg = a.product(p.v, p.g),
                   sk = a.product(p.scale, p.k);
    at(h, p.e.slice).add_terms({sg});
    at(hx, p.e.slice).add_terms({a.product(sg, p.xhat)});
    at(hu, p.e.slice).add_terms({a.product(sg, p.u)});
    at(e, p.e.slice).add_terms({sk, vg});
    at(ex, p.e.slice).add_terms({a.product(sk, p.xhat), a.product(vg, p.xhat)});
    const Estimate rg = a.product(rstd, p.g);
    at(scale, p.e.affine)
        .add_terms({a.product(rg, p.u), -a.product(rg, mean_u), -a.product(rg, slope_u, p.xhat),
                    a.product(p.k, p.xhat)});
    at(bias, p.e.affine).add_terms({p.k});
  }
  for (const Sum& sum : scale) {
    bounds.scale.push_back(stored_bound(grad.scale.dtype, sum.estimate(x)));
  }
  for (const Sum& sum : bias) {
    bounds.bias.push_back(stored_bound(grad.bias.dtype, sum.estimate(x)));
  }

  for (const DoubleTerms& p : positions) {
    const auto sum_of = [&](const std::vector<Sum>& sums) {
      return at(sums, p.e.slice).estimate(x);
    };
    const Estimate rstd{p.rstd, 0.0};
    const Estimate &mean_u = at(p0, p.e.slice), &slope_u = at(p1, p.e.slice);
    const Estimate scaled = a.product(p.scale, rstd);
    Estimate value =
        a.sum({a.product(rstd, p.v, p.g), -a.product(rstd, slope_u, a.product(scaled, p.g)),
               a.product(scaled, p.k)});
    if (p.in_statistics) {
      const Estimate h_sum = sum_of(h), hx_sum = sum_of(hx);
      const Estimate l = a.product(
          rstd, a.sum({sum_of(hu), -a.product(mean_u, h_sum), -a.product(slope_u, hx_sum)}));
      const Estimate slope =
          a.sum({a.product({2.0 * p.rstd, 0.0}, slope_u, hx_sum), -sum_of(ex), -l});
      const Estimate offset =
          a.product(rstd, a.sum({a.product(mean_u, hx_sum), a.product(slope_u, h_sum)}));
      const Estimate term =
          a.sum({-a.product(rstd, hx_sum, p.u), a.product(p.xhat, slope), -sum_of(e), offset});
      const Estimate w{p.rstd / model.count(p.e.slice), 0.0};
      value = a.sum({value, a.product(w, term)});
    }
    at(bounds.x, p.e.index) = stored_bound(grad.x.dtype, value);
  }
  return bounds;
}

std::vector<std::int64_t> kink_positions(const NormInput& input, const Statistics& statistics) {
  Statistics given = statistics;
  given.from_batch = false;
  std::vector<std::int64_t> positions;
  Model(input, given).for_each([&](const Element& e) {
    if (std::abs(e.z) <= 2.0 * e.z_error) positions.push_back(e.index);
  });
  return positions;
}

}  // namespace normcore::kernels::testing
