// Operators over slices that several ranks share: what a rank does by itself, before and after the
// sums over ranks (sync_autograd.cpp). Batch norm (num_groups 0) and group norm are one here. A
// template with Int = std::int64_t computes; with c10::SymInt it only makes the outputs (Meta).
#include <ATen/TensorOperators.h>
#include <normcore/kernels/sync.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <limits>

#include "backend.h"
#include "checks.h"
#include "outputs.h"
#include "staging.h"

namespace normcore {
namespace {

using kernels::GradientSums;
using kernels::MomentSums;
static_assert(sizeof(MomentSums) == kMomentSums * sizeof(double));
static_assert(sizeof(GradientSums) == kGradientSums * sizeof(double));

Samples samples_of(std::int64_t num_groups) {
  return num_groups == 0 ? Samples::kReduced : Samples::kKept;
}

template <class T>
const T* read_as(const Tensor& t) {
  return reinterpret_cast<const T*>(t.const_data_ptr<double>());
}
template <class T>
T* write_as(const Tensor& t) {
  return reinterpret_cast<T*>(t.mutable_data_ptr<double>());
}

template <class Int>
Tensor moments(const Tensor& input, const OptionalTensor& mask, std::int64_t num_groups,
               at::IntArrayRef axis, at::OptionalIntArrayRef reduction_axes, bool by_rank) {
  const OptionalTensor none;
  const Operands operands{input, none, none, none, mask};
  const auto norm = Check<Int>::sync(operands, num_groups, axis, reduction_axes, /*eps=*/0.0,
                                     std::nullopt, std::nullopt);
  const auto sums =
      empty_statistic<Int>(input, {norm.samples * norm.num_groups, Int(kMomentSums)}, at::kDouble);
  if constexpr (is_concrete<Int>) {
    if (input.numel() == 0) {
      sums.zero_();
      if (by_rank) sums.select(1, 0).fill_(std::numeric_limits<double>::quiet_NaN());
      return sums;
    }
    Staging staging(operands, norm, samples_of(num_groups));
    kernels::SyncMomentsArgs args;
    args.input = staging.input();
    args.num_groups = num_groups;
    args.by_rank = by_rank;
    args.sums = write_as<MomentSums>(sums);
    backend::run(args, input.device());
  }
  return sums;
}

// A running statistic as the kernel updates it, and back where that is a copy.
class Updated {
 public:
  explicit Updated(const OptionalTensor& t) : tensor_(value_or_undefined(t)) {
    if (tensor_.defined()) buffer_ = tensor_.contiguous();
  }
  kernels::MutableTensor view() const { return backend::mutable_view(buffer_); }
  void finish() const {
    if (tensor_.defined() && !buffer_.is_same(tensor_)) tensor_.copy_(buffer_);
  }

 private:
  Tensor tensor_, buffer_;
};

template <class Int>
std::tuple<Tensor, Tensor, Tensor> statistics(const Tensor& own, const Tensor& total,
                                              const OptionalTensor& running_mean,
                                              const OptionalTensor& running_var,
                                              const OptionalTensor& num_batches_tracked,
                                              std::optional<double> momentum, bool unbiased,
                                              bool by_rank) {
  Check<Int>::sync_statistics(own, total, {running_mean, running_var, num_batches_tracked},
                              momentum);
  const auto of_slices = [&] {
    return empty_statistic<Int>(own, {sizes_of<Int>(own)[0]}, at::kDouble);
  };
  const auto mean = of_slices(), var = of_slices(), share = of_slices();
  if constexpr (is_concrete<Int>) {
    const auto of_rank = own.contiguous(), of_all = total.contiguous();
    const Updated mean_buffer(running_mean), var_buffer(running_var);
    kernels::SyncStatisticsArgs args;
    args.own = read_as<MomentSums>(of_rank);
    args.total = read_as<MomentSums>(of_all);
    args.slices = own.size(0);
    args.by_rank = by_rank;
    args.running.mean = mean_buffer.view();
    args.running.var = var_buffer.view();
    if (has(num_batches_tracked)) {
      args.running.num_batches_tracked = num_batches_tracked->mutable_data_ptr<std::int64_t>();
    }
    args.running.momentum = momentum.value_or(0.0);
    args.running.cumulative = has(running_mean) && !momentum.has_value();
    args.running.unbiased = unbiased;
    args.mean = write_as<double>(mean);
    args.var = write_as<double>(var);
    args.share = write_as<double>(share);
    if (args.slices != 0) backend::run(args, own.device());
    mean_buffer.finish();
    var_buffer.finish();
  }
  return {mean, var, share};
}

// Version counters of what has changed. Inference tensors have none.
std::tuple<Tensor, Tensor, Tensor> statistics_bump_versions(
    c10::DispatchKeySet keys, const Tensor& own, const Tensor& total,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, std::optional<double> momentum, bool unbiased,
    bool by_rank) {
  auto result = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op::sync_statistics().redispatch(keys & c10::after_ADInplaceOrView_keyset, own, total,
                                            running_mean, running_var, num_batches_tracked,
                                            momentum, unbiased, by_rank);
  }();
  for (const auto* t : {&running_mean, &running_var, &num_batches_tracked}) {
    if (has(*t) && !(*t)->is_inference()) torch::autograd::impl::bump_version(**t);
  }
  return result;
}

template <class Int>
std::tuple<Tensor, Tensor> apply(const Tensor& input, const OptionalTensor& weight,
                                 const OptionalTensor& bias, const OptionalTensor& residual,
                                 const Tensor& mean, const Tensor& var, std::int64_t num_groups,
                                 at::IntArrayRef axis, at::OptionalIntArrayRef reduction_axes,
                                 double eps, OptionalString activation, OptionalDType dtype) {
  const OptionalTensor no_mask;
  const Operands operands{input, weight, bias, residual, no_mask};
  const auto norm = Check<Int>::sync(operands, num_groups, axis, reduction_axes, eps, activation,
                                     dtype, {}, {{"mean", mean}, {"var", var}});
  const auto y = empty_output<Int>(input, norm.dtype);
  const auto rstd = empty_statistic<Int>(input, {norm.samples * norm.num_groups},
                                         compute_dtype(input.scalar_type()));
  if constexpr (is_concrete<Int>) {
    if (input.numel() == 0) return {y, rstd.zero_()};
    Staging staging(operands, norm, samples_of(num_groups));
    kernels::SyncApplyArgs args;
    args.input = staging.input();
    args.num_groups = num_groups;
    args.mean = staging.read_vector(mean);
    args.var = staging.read_vector(var);
    args.y = staging.write(y);
    args.rstd = backend::mutable_view(rstd);
    backend::run(args, input.device());
    staging.finish();
  }
  return {y, rstd};
}

template <class Int>
CheckedNorm<Int> check_gradient(const Tensor& grad_output, const Operands& operands,
                                std::initializer_list<typename Check<Int>::OfSlices> saved,
                                std::int64_t num_groups, at::IntArrayRef axis,
                                at::OptionalIntArrayRef reduction_axes, double eps,
                                OptionalString activation) {
  return Check<Int>::sync(operands, num_groups, axis, reduction_axes, eps, activation, std::nullopt,
                          grad_output, saved);
}

template <class Int>
std::tuple<Tensor, Tensor, Tensor> gradient_sums(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask,
    const Tensor& mean, const Tensor& rstd, std::int64_t num_groups, at::IntArrayRef axis,
    at::OptionalIntArrayRef reduction_axes, double eps, OptionalString activation,
    std::array<bool, 3> output_mask) {
  const Operands operands{input, weight, bias, residual, mask};
  const auto norm =
      check_gradient<Int>(grad_output, operands,
                          {{"mean", mean}, {"rstd", rstd, 0, compute_dtype(input.scalar_type())}},
                          num_groups, axis, reduction_axes, eps, activation);
  const auto sums =
      output_mask[0] ? empty_statistic<Int>(
                           input, {norm.samples * norm.num_groups, Int(kGradientSums)}, at::kDouble)
                     : Tensor();
  const auto [x, w, b, r] =
      empty_gradients<Int>(operands, {false, output_mask[1], output_mask[2], false});
  if constexpr (is_concrete<Int>) {
    if (input.numel() == 0) {
      if (sums.defined()) sums.zero_();
      zero_parameters(w, b);
      return {sums, w, b};
    }
    if (!sums.defined() && !w.defined() && !b.defined()) return {sums, w, b};
    Staging staging(operands, norm, samples_of(num_groups));
    kernels::SyncGradientSumsArgs args;
    args.input = staging.input();
    args.num_groups = num_groups;
    args.grad_y = staging.read(grad_output);
    args.mean = staging.read_vector(mean);
    args.rstd = staging.read_vector(rstd);
    if (sums.defined()) args.sums = write_as<GradientSums>(sums);
    args.grad_scale = backend::mutable_view(w);
    args.grad_bias = backend::mutable_view(b);
    backend::run(args, input.device());
  }
  return {sums, w, b};
}

template <class Int>
std::tuple<Tensor, Tensor> gradient(const Tensor& grad_output, const Tensor& input,
                                    const OptionalTensor& weight, const OptionalTensor& bias,
                                    const OptionalTensor& residual, const OptionalTensor& mask,
                                    const Tensor& mean, const Tensor& rstd,
                                    const OptionalTensor& sums, const Tensor& share,
                                    std::int64_t num_groups, at::IntArrayRef axis,
                                    at::OptionalIntArrayRef reduction_axes, double eps,
                                    OptionalString activation, std::array<bool, 2> output_mask) {
  const Operands operands{input, weight, bias, residual, mask};
  const auto norm =
      check_gradient<Int>(grad_output, operands,
                          {{"mean", mean},
                           {"rstd", rstd, 0, compute_dtype(input.scalar_type())},
                           {"sums", has(sums) ? *sums : share, has(sums) ? kGradientSums : 0},
                           {"share", share}},
                          num_groups, axis, reduction_axes, eps, activation);
  TORCH_CHECK_VALUE(has(sums) || !output_mask[0], norm_name(num_groups),
                    ": expected sums with the gradient of input, got None");
  const auto gradients =
      empty_gradients<Int>(operands, {output_mask[0], false, false, output_mask[1]});
  const auto& [x, w, b, r] = gradients;
  if constexpr (is_concrete<Int>) {
    const auto remaining = fill_without_kernel(gradients, grad_output, norm.activation);
    if (input.numel() == 0 || !any_defined(remaining)) return {x, r};
    Staging staging(operands, norm, samples_of(num_groups));
    const auto of_all = has(sums) ? sums->contiguous() : Tensor();
    const auto weights = share.contiguous();
    kernels::SyncGradientArgs args;
    args.input = staging.input();
    args.num_groups = num_groups;
    args.grad_y = staging.read(grad_output);
    args.mean = staging.read_vector(mean);
    args.rstd = staging.read_vector(rstd);
    if (of_all.defined()) args.sums = read_as<GradientSums>(of_all);
    args.share = read_as<double>(weights);
    const auto grad = staging.write(remaining);
    args.grad_x = grad.x;
    args.grad_residual = grad.residual;
    backend::run(args, input.device());
    staging.finish();
  }
  return {x, r};
}

template <class Int>
void implement(torch::Library& m) {
  m.impl("_sync_moments", TORCH_FN(moments<Int>));
  m.impl("_sync_statistics", TORCH_FN(statistics<Int>));
  m.impl("_sync_apply", TORCH_FN(apply<Int>));
  m.impl("_sync_gradient_sums", TORCH_FN(gradient_sums<Int>));
  m.impl("_sync_gradient", TORCH_FN(gradient<Int>));
}

}  // namespace

TORCH_LIBRARY_IMPL(normcore, CPU, m) { implement<std::int64_t>(m); }
TORCH_LIBRARY_IMPL(normcore, CUDA, m) { implement<std::int64_t>(m); }
TORCH_LIBRARY_IMPL(normcore, Meta, m) { implement<c10::SymInt>(m); }

TORCH_LIBRARY_IMPL(normcore, ADInplaceOrView, m) {
  m.impl("_sync_statistics", TORCH_FN(statistics_bump_versions));
}

}  // namespace normcore
