#include "cpu/backward.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "check.h"
#include "cpu/element.h"
#include "cpu/gradient_drivers.h"
#include "cpu/samples.h"

namespace normcore::kernels {
namespace {

// Sums of a channel: of g and g * (x - mean).
enum Sum { kG, kGCentered };

// Moves the center of the channels' sums by `rounding`, and adds them up in chains that do not wait
// for each other.
template <class A>
GradientSums sums_of_slice(const A* scale, double rounding, std::int64_t channels,
                           const ChannelSums& sums) {
  constexpr int kChains = 4;
  double* const g = sums[kG];
  double* const g_centered = sums[kGCentered];
  double h[kChains] = {}, h_centered[kChains] = {};
  const auto add = [&](std::int64_t i, int k) {
    g_centered[i] -= rounding * g[i];
    h[k] += scale[i] * g[i];
    h_centered[k] += scale[i] * g_centered[i];
  };
  std::int64_t i = 0;
  for (; i + kChains <= channels; i += kChains) {
    for (int k = 0; k < kChains; ++k) add(i + k, k);
  }
  for (; i < channels; ++i) add(i, 0);
  return {(h[0] + h[1]) + (h[2] + h[3]),
          (h_centered[0] + h_centered[1]) + (h_centered[2] + h_centered[3])};
}

// The first derivatives: saved statistics, coefficients of grad_x and gradients of the parameters.
template <class A>
class BackwardPass {
 public:
  using Arithmetic = A;
  static constexpr Pass kPass = Pass::kBackward;

  // `kept`: where g is kept behind the state of a tile; 0: nowhere.
  BackwardPass(const BackwardCall& call, const Problem& problem, bool stream, std::size_t kept,
               A* affine, double* parameters)
      : call_(call),
        stream_(stream),
        kept_(kept),
        affine_(call.input, affine),
        parameters_(call.input, call.num_groups, call.grad, parameters),
        slice_size_(slice_size(problem)) {}

  const NormInput& input() const { return call_.input; }
  std::int64_t num_groups() const { return call_.num_groups; }
  const ParameterGradients& parameters() const { return parameters_; }

  // The sums are needed for grad_x only through the statistics; the second sweep only for grad_x
  // and grad_residual.
  bool needs_sums() const {
    const bool of_slices =
        call_.is_partial ? call_.sums != nullptr : call_.grad.x && call_.batch_statistics;
    return call_.grad.scale || call_.grad.bias || of_slices;
  }
  bool needs_sweep() const { return call_.grad.x || call_.grad.residual; }
  int sums() const { return arrays_of(kPass).sums; }

  void prepare(const TileState<A>& out, std::int64_t entry, std::int64_t slice, std::int64_t sample,
               std::int64_t channel, std::int64_t channels) const {
    const SliceStatistics<A> stat = statistics(slice);
    out.set_affine(entry, channels, stat, affine_, sample, channel);
    if (call_.whole == nullptr) return;
    const GradientSums& sums = call_.whole[slice];
    set_slice(out, entry, channels, stat.rstd, rounding_of(stat), sums, call_.share[slice]);
  }

  // The sums are those of g and g * (x - center), as reduced; center differs from the mean by its
  // rounding error.
  void finish_slice(const TileState<A>& out, std::int64_t entry, std::int64_t slice,
                    std::int64_t sample, std::int64_t channel, std::int64_t channels, double count,
                    const ChannelSums& sums) const {
    const SliceStatistics<A> stat = statistics(slice);
    // A slice without a valid value has NaN statistics: where no g comes in, none goes out.
    // A part has those of the whole.
    const bool is_empty =
        call_.is_partial ? std::isnan(stat.rstd) : call_.batch_statistics && count == 0.0;
    const double rstd = is_empty ? 0.0 : stat.rstd;
    const double rounding = is_empty ? 0.0 : rounding_of(stat);
    const A* const scale = affine_.scale(sample, channel);
    const GradientSums h = sums_of_slice(scale, rounding, channels, sums);
    parameters_.store(sample, channel, channels, [&](std::int64_t i) {
      return std::pair(sums[kGCentered][i] * rstd, sums[kG][i]);
    });
    if (call_.sums != nullptr) call_.sums[slice] = h;
    if (call_.is_partial || !call_.batch_statistics) return;
    // With nothing else in the slice y does not depend on x: exactly 0, not the difference of equal
    // terms.
    if (count == 1.0 && slice_size_ == 1) {
      out.scale[entry] = out.slope[entry] = out.offset[entry] = A{0};
      return;
    }
    set_slice(out, entry, channels, rstd, rounding, h, 1.0 / count);
  }

  void sums_of_runs(const Place<A>& place, const RunBlock& block, A* out,
                    std::int64_t stride) const {
    simd_.sums_of_runs(first_args(place), block, out, out + stride);
  }
  void sums_of_rows(const Place<A>& place, std::int64_t rows, std::int64_t width, A* out,
                    std::int64_t stride) const {
    simd_.sums_of_rows(first_args(place), rows, width, out, out + stride);
  }
  void gradient_of_runs(const Place<A>& place, std::int64_t planes, std::int64_t length) const {
    simd_.gradient_of_runs(second_args(place), planes, length);
  }
  void gradient_of_rows(const Place<A>& place, std::int64_t rows, std::int64_t width) const {
    simd_.gradient_of_rows(second_args(place), rows, width);
  }

 private:
  static double rounding_of(const SliceStatistics<A>& stat) {
    return stat.mean - static_cast<double>(static_cast<A>(stat.mean));
  }

  // How grad_x depends on x through the statistics.
  static void set_slice(const TileState<A>& out, std::int64_t entry, std::int64_t channels,
                        double rstd, double rounding, const GradientSums& h, double share) {
    const double slope = -rstd * rstd * rstd * h.h_centered * share;
    const double offset = -rstd * h.h * share - slope * rounding;
    std::fill_n(out.slope + entry, channels, out.canonical(static_cast<A>(slope)));
    std::fill_n(out.offset + entry, channels, out.canonical(static_cast<A>(offset)));
  }

  SliceStatistics<A> statistics(std::int64_t slice) const {
    return {load_element(call_.mean, slice), static_cast<const A*>(call_.rstd.data)[slice]};
  }

  GradientArgs<A> args(const Place<A>& place) const {
    GradientArgs<A> out;
    out.x = advance(call_.input.x, place.offset);
    out.grad_y = advance(call_.grad_y, place.offset);
    out.residual = advance(call_.input.residual, place.offset);
    out.relu_bits = advance_relu_bits(call_.input.relu_bits, call_.input.x.dtype, place.offset);
    out.mask = place.mask;
    out.activation = call_.input.activation;
    out.coefficients = place.coefficients.view(place.entry, call_.batch_statistics);
    out.grad_x = advance(call_.grad.x, place.offset);
    out.grad_residual = advance(call_.grad.residual, place.offset);
    out.stream = stream_;
    return out;
  }
  // What the first sweep keeps for the second one, if anything: g.
  A* kept(const Place<A>& place) const {
    return kept_ == 0 ? nullptr : reinterpret_cast<A*>(place.state + kept_) + place.kept_offset;
  }
  GradientArgs<A> first_args(const Place<A>& place) const {
    auto out = args(place);
    out.kept_gradient = kept(place);
    out.kept_run_stride = place.kept_run_stride;
    return out;
  }
  GradientArgs<A> second_args(const Place<A>& place) const {
    auto out = args(place);
    if (const A* const g = kept(place); g != nullptr) {
      out.grad_y = {g, kArithmeticType<A>};
      out.residual = {};
      out.relu_bits = nullptr;
      out.activation = Activation::kNone;
    }
    return out;
  }

  const BackwardCall& call_;
  bool stream_;
  std::size_t kept_;
  Affine<A> affine_;
  ParameterGradients parameters_;
  std::int64_t slice_size_;
  Primitives<A> simd_ = primitives<A>();
};

template <class A>
void run_typed(const BackwardCall& call, const CpuPlan& plan, void* workspace,
               const CpuExecutor& executor) {
  const Problem problem(call.input, call.num_groups, Pass::kBackward);
  const WorkspaceLayout layout = workspace_layout(problem, plan);
  auto* const base = static_cast<char*>(workspace);
  const BackwardPass<A> pass(call, problem, plan.stream, plan.keep ? layout.before_kept() : 0,
                             reinterpret_cast<A*>(base),
                             reinterpret_cast<double*>(base + layout.affine));
  run_gradient(pass, problem, plan, layout, base, executor);
}

}  // namespace

Status run_backward(const BackwardCall& call, const CpuPlan& plan, void* workspace,
                    const CpuExecutor& executor) {
  const NormInput& input = call.input;
  if (input.extent.numel() == 0) {
    zero_parameters(input, call.grad);
    return Status::success();
  }
  if (const Status status = check_gradients(input, call.grad_y, call.mean, call.rstd, call.grad);
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
