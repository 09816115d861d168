#include "tolerance.h"

#include <algorithm>
#include <cmath>

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
  double scale = 1.0;
  double xhat = 0.0, xhat_error = 0.0;
  double z = 0.0, z_error = 0.0;
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
    const double bias = in_.bias ? load(in_.bias, e.affine) : 0.0;
    const double residual = in_.residual ? load(in_.residual, e.index) : 0.0;
    const double x = load(in_.x, e.index);
    const double r = rstd(e.slice);
    e.xhat = (x - mean(e.slice)) * r;
    e.xhat_error = r * mean_error(e.slice) +
                   std::abs(e.xhat) * (4.0 * u_ + relative_rstd_error(e.slice)) +
                   mean_rounding(x, mean(e.slice)) * r;
    e.z = e.xhat * e.scale + bias + residual;
    e.z_error =
        e.xhat_error * std::abs(e.scale) +
        u_ * (2.0 * std::abs(e.xhat * e.scale) + 2.0 * std::abs(bias) + 2.0 * std::abs(residual));
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
  const bool smooth = activation != Activation::kNone && activation != Activation::kReLU;
  return smooth ? kActivationUlps * u * std::abs(value) : 0.0;
}

struct Sum {
  double value = 0.0, magnitude = 0.0, error = 0.0, count = 0.0;

  void add(double term, double term_error) {
    value += term;
    magnitude += std::abs(term);
    error += term_error;
    count += 1.0;
  }
  double bound(DType x) const { return error + sum_error(x, count) * magnitude; }
};

// g = grad_y * act'(z) with its error.
struct OutputGradient {
  double g = 0.0, error = 0.0;
};

OutputGradient output_gradient(const NormInput& input, const Element& e, double grad_y, double u) {
  if (grad_y == 0.0) return {};
  const double derivative = activate_derivative(input.activation, e.z);
  const bool smooth =
      input.activation != Activation::kNone && input.activation != Activation::kReLU;
  const double derivative_error = smooth ? e.z_error + kDerivativeUlps * u : 0.0;
  return {grad_y * derivative, std::abs(grad_y) * (derivative_error + u * std::abs(derivative))};
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
