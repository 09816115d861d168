#include "cpu/double_backward.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "check.h"
#include "cpu/element.h"
#include "cpu/gradient_drivers.h"
#include "cpu/samples.h"

namespace normcore::kernels {
namespace {

// The second derivatives: norm_input.h has the formula, primitives.h the sums and coefficients.
template <class A>
class DoubleBackwardPass {
 public:
  using Arithmetic = A;
  static constexpr Pass kPass = Pass::kDoubleBackward;
  static_assert(arrays_of(kPass).sums == kCurvedSums);

  DoubleBackwardPass(const DoubleBackwardCall& call, const NormInput& input, const Problem& problem,
                     A* affine, double* parameters)
      : call_(call),
        input_(input),
        affine_(input, affine),
        cotangents_(input, call.cotangents.scale, call.cotangents.bias,
                    affine + 2 * affine_count(input)),
        parameters_(input, call.backward.num_groups, call.backward.grad, parameters),
        slice_size_(slice_size(problem)) {}

  const NormInput& input() const { return input_; }
  std::int64_t num_groups() const { return call_.backward.num_groups; }
  const ParameterGradients& parameters() const { return parameters_; }

  // The tangent and grad_x go through the statistics.
  bool needs_sums() const {
    const NormGradients& grad = call_.backward.grad;
    const bool through_statistics = grad.x || (call_.cotangents.x && needs_sweep());
    return grad.scale || grad.bias || (call_.backward.batch_statistics && through_statistics);
  }
  bool needs_sweep() const {
    return call_.grad_grad_y || call_.backward.grad.x || call_.backward.grad.residual;
  }
  int sums() const { return is_curved(input_.activation) ? kCurvedSums : kFlatSums; }

  // Coefficients of z, and of the tangent q as far as it does not come through the statistics.
  void prepare(const TileState<A>& out, std::int64_t entry, std::int64_t slice, std::int64_t sample,
               std::int64_t channel, std::int64_t channels) const {
    const Slice s = slice_of(slice);
    out.set_affine(entry, channels, {s.mean, static_cast<A>(s.rstd)}, affine_, sample, channel);
    const A* const v = cotangents_.scale(sample, channel);
    const A* const bias = cotangents_.bias(sample, channel);
    const double u_center = first_cotangent(sample, channel);
    for (std::int64_t i = 0; i < channels; ++i) {
      set(out, entry + i, s,
          {.tangent_slope = s.rstd * v[i],
           .tangent_offset = bias[i],
           .g_gain = s.gain(v[i]),
           .u_center = u_center});
    }
    if (!s.is_valid) std::copy_n(affine_.bias(sample, channel), channels, out.shift + entry);
  }

  // The sums are those of primitives.h as reduced, with q as prepared and the center rounded.
  void finish_slice(const TileState<A>& out, std::int64_t entry, std::int64_t slice,
                    std::int64_t sample, std::int64_t channel, std::int64_t channels, double count,
                    const ChannelSums& sums) const {
    const Slice s = slice_of(slice);
    const double r = s.rstd;
    const A* const scale = affine_.scale(sample, channel);
    const A* const grad_scale = cotangents_.scale(sample, channel);
    const A* const grad_bias = cotangents_.bias(sample, channel);
    for (std::int64_t i = 0; i < channels; ++i) move_center(s.rounding, i, sums);

    // p0 and p1 of norm_input.h, for u less its center.
    const bool has_shares = call_.backward.batch_statistics && count != 0.0;
    double p0 = 0.0, p1 = 0.0;
    if (has_shares) {
      for (std::int64_t i = 0; i < channels; ++i) {
        p0 += sums[kU][i];
        p1 += sums[kUD][i];
      }
      p0 /= count;
      p1 *= r / count;
    }

    double h = 0.0, hx = 0.0, hu = 0.0, e = 0.0, ex = 0.0;
    parameters_.store(sample, channel, channels, [&](std::int64_t i) {
      const double w = scale[i], v = grad_scale[i];
      const double g = sums[kG][i], gx = r * sums[kGD][i], gu = sums[kGU][i];
      double k = 0.0, kx = 0.0;
      if (is_curved(input_.activation)) {
        const double through_mean = w * r * p0, through_spread = w * r * r * p1;
        k = sums[kBQ][i] - through_mean * sums[kB][i] - through_spread * sums[kBD][i];
        kx = r * (sums[kBQD][i] - through_mean * sums[kBD][i] - through_spread * sums[kBDD][i]);
      }
      h += w * g;
      hx += w * gx;
      hu += w * gu;
      e += w * k + v * g;
      ex += w * kx + v * gx;
      return std::pair(r * (gu - p0 * g - p1 * gx) + kx, k);
    });

    // From here on u is less its mean, up to the rounding of that.
    const double u_mean = p0 + out.u_center[entry];
    Gains gains;
    gains.u_center = has_shares ? static_cast<double>(static_cast<A>(u_mean)) : 0.0;
    const double u_rounding = has_shares ? u_mean - gains.u_center : 0.0;
    if (has_shares) {  // and no product with sums, which may not be finite, otherwise
      const double l = r * (hu - p0 * h - p1 * hx);
      gains.u_gain = -r * r * hx / count;
      gains.slope = r * r * (2.0 * r * p1 * hx - ex - l) / count;
      gains.offset = r * (r * (u_rounding * hx + p1 * h) - e) / count;
    }
    for (std::int64_t i = 0; i < channels; ++i) {
      const double by_spread = grad_scale[i] - r * p1 * scale[i];
      gains.tangent_slope = r * by_spread;
      gains.tangent_offset = grad_bias[i] - r * u_rounding * scale[i];
      gains.g_gain = s.gain(by_spread);
      set(out, entry + i, s, gains);
    }
  }

  void sums_of_runs(const Place<A>& place, const RunBlock& block, A* out,
                    std::int64_t stride) const {
    simd_.double_sums_of_runs(args(place), block, out, stride);
  }
  void sums_of_rows(const Place<A>& place, std::int64_t rows, std::int64_t width, A* out,
                    std::int64_t stride) const {
    simd_.double_sums_of_rows(args(place), rows, width, out, stride);
  }
  void gradient_of_runs(const Place<A>& place, std::int64_t planes, std::int64_t length) const {
    simd_.double_gradient_of_runs(args(place), planes, length);
  }
  void gradient_of_rows(const Place<A>& place, std::int64_t rows, std::int64_t width) const {
    simd_.double_gradient_of_rows(args(place), rows, width);
  }

 private:
  // Statistics of a slice. rstd is 0 where y does not depend on x: the slice has one value in all,
  // or none that is valid. In the latter case what has a grad_y becomes NaN by its center.
  struct Slice {
    double mean, rounding, rstd;
    bool is_valid;

    double gain(double v) const {
      return is_valid ? rstd * v : std::numeric_limits<double>::quiet_NaN();
    }
  };
  Slice slice_of(std::int64_t index) const {
    const double mean = load_element(call_.backward.mean, index);
    const bool is_valid = !std::isnan(mean),
               is_constant = call_.backward.batch_statistics && slice_size_ == 1;
    const double rounding = is_valid ? mean - static_cast<double>(static_cast<A>(mean)) : 0.0;
    const double rstd = static_cast<const A*>(call_.backward.rstd.data)[index];
    return {mean, rounding, is_valid && !is_constant ? rstd : 0.0, is_valid};
  }

  // Coefficients with respect to x - mean.
  struct Gains {
    double tangent_slope = 0.0, tangent_offset = 0.0, g_gain = 0.0, u_gain = 0.0, u_center = 0.0,
           slope = 0.0, offset = 0.0;
  };
  static void set(const TileState<A>& out, std::int64_t entry, const Slice& s, const Gains& gains) {
    out.tangent_slope[entry] = static_cast<A>(gains.tangent_slope);
    out.tangent_offset[entry] =
        static_cast<A>(gains.tangent_offset - gains.tangent_slope * s.rounding);
    out.g_gain[entry] = static_cast<A>(gains.g_gain);
    out.u_gain[entry] = static_cast<A>(gains.u_gain);
    out.u_center[entry] = static_cast<A>(gains.u_center);
    out.slope[entry] = static_cast<A>(gains.slope);
    out.offset[entry] = static_cast<A>(gains.offset - gains.slope * s.rounding);
  }

  // A value near the mean of the cotangent of grad_x over a slice: the first one that counts in the
  // first channel. Taken off, nothing cancels where the cotangent is nearly constant.
  double first_cotangent(std::int64_t sample, std::int64_t channel) const {
    const ConstTensor u = call_.cotangents.x;
    if (!u || !call_.backward.batch_statistics) return 0.0;
    const auto [n, c, s] = input_.extent;
    const bool by_sample = num_groups() != 0;
    const std::int64_t end = (by_sample ? sample + 1 : n) * s;
    for (std::int64_t row = by_sample ? sample * s : 0; row < end; ++row) {
      const std::int64_t index =
          input_.layout == Layout::kNSC ? row * c + channel : (row / s * c + channel) * s + row % s;
      const MaskKind kind = input_.mask.kind;
      if (kind == MaskKind::kNone || input_.mask.data[kind == MaskKind::kRow ? row : index] != 0) {
        return load_element(u, index);
      }
    }
    return 0.0;
  }

  // From sums with x - center to sums with x - mean = x - center - rounding.
  void move_center(double rounding, std::int64_t i, const ChannelSums& sums) const {
    sums[kUD][i] -= rounding * sums[kU][i];
    sums[kGD][i] -= rounding * sums[kG][i];
    if (!is_curved(input_.activation)) return;
    sums[kBDD][i] -= rounding * (2.0 * sums[kBD][i] - rounding * sums[kB][i]);
    sums[kBD][i] -= rounding * sums[kB][i];
    sums[kBQD][i] -= rounding * sums[kBQ][i];
  }

  DoubleBackwardArgs<A> args(const Place<A>& place) const {
    const BackwardCall& backward = call_.backward;
    DoubleBackwardArgs<A> out;
    out.x = advance(input_.x, place.offset);
    out.grad_y = advance(backward.grad_y, place.offset);
    out.residual = advance(input_.residual, place.offset);
    out.cotangent_x = advance(call_.cotangents.x, place.offset);
    out.cotangent_residual = advance(call_.cotangents.residual, place.offset);
    out.mask = place.mask;
    out.activation = input_.activation;
    out.coefficients = place.coefficients.double_view(place.entry);
    out.grad_grad_y = advance(call_.grad_grad_y, place.offset);
    out.grad_x = advance(backward.grad.x, place.offset);
    out.grad_residual = advance(backward.grad.residual, place.offset);
    return out;
  }

  const DoubleBackwardCall& call_;
  const NormInput& input_;
  Affine<A> affine_;
  Affine<A> cotangents_;  // of grad_scale and grad_bias
  ParameterGradients parameters_;
  std::int64_t slice_size_;
  Primitives<A> simd_ = primitives<A>();
};

template <class A>
void run_typed(const DoubleBackwardCall& call, const CpuPlan& plan, void* workspace,
               const CpuExecutor& executor) {
  const NormInput input = with_rows_of_channels(call.backward.input);
  const Problem problem(input, call.backward.num_groups, Pass::kDoubleBackward);
  const WorkspaceLayout layout = workspace_layout(problem, plan);
  auto* const base = static_cast<char*>(workspace);
  const DoubleBackwardPass<A> pass(call, input, problem, reinterpret_cast<A*>(base),
                                   reinterpret_cast<double*>(base + layout.affine));
  run_gradient(pass, problem, plan, layout, base, executor);
}

}  // namespace

Status run_double_backward(const DoubleBackwardCall& call, const CpuPlan& plan, void* workspace,
                           const CpuExecutor& executor) {
  const BackwardCall& backward = call.backward;
  const NormInput& input = backward.input;
  if (input.extent.numel() == 0) {
    zero_parameters(input, backward.grad);
    return Status::success();
  }
  if (const Status status =
          check_double_backward(input, backward.grad_y, backward.mean, backward.rstd,
                                call.cotangents, call.grad_grad_y, backward.grad);
      !status.ok()) {
    return status;
  }
  const bool is_samples = plan.path == CpuPath::kSample;
  if (compute_type(input.x.dtype) == DType::kFloat64) {
    is_samples ? run_samples<double>(call, plan, workspace, executor)
               : run_typed<double>(call, plan, workspace, executor);
  } else {
    is_samples ? run_samples<float>(call, plan, workspace, executor)
               : run_typed<float>(call, plan, workspace, executor);
  }
  return Status::success();
}

}  // namespace normcore::kernels
