// Kernels of this library in the place of aten's batch and group norms. Each function below has the
// signature of an aten operator and the meaning of aten's kernel. What that kernel computes in its
// own way (empty tensors, one value per channel, an eps that is not positive) or rejects goes on to
// it, which was looked up before it was overridden.
#include "normcore/override_aten.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cmath>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "normcore/build_info.h"

namespace normcore {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;
using Results = std::tuple<Tensor, Tensor, Tensor>;  // y, mean, rstd; or three gradients
using GradientMask = std::array<bool, 3>;            // input, weight, bias

std::atomic<std::int64_t> calls_of_normcore{0};
std::atomic<std::int64_t> calls_of_aten{0};

enum Op {
  kBatchNorm,
  kBatchNormLegit,
  kBatchNormNoStatistics,
  kBatchNormBackward,
  kGroupNorm,
  kGroupNormBackward,
  kBatchNormImplIndex,
};

// The names of the operators, in the order of Op.
constexpr std::array<std::pair<const char*, const char*>, 7> kNames{{
    {"aten::native_batch_norm", ""},
    {"aten::_native_batch_norm_legit", ""},
    {"aten::_native_batch_norm_legit", "no_stats"},
    {"aten::native_batch_norm_backward", ""},
    {"aten::native_group_norm", ""},
    {"aten::native_group_norm_backward", ""},
    {"aten::_batch_norm_impl_index", ""},
}};

bool is_cuda(DispatchKeySet keys) { return keys.has_backend(c10::BackendComponent::CUDABit); }

// Aten's own kernels on one device, looked up before they are overridden.
using AtenKernels = std::vector<c10::SafeKernelFunction>;
std::array<AtenKernels, 2> aten_kernels;  // on CPU and CUDA devices

void find_aten_kernels(DispatchKey key) {
  AtenKernels kernels;
  for (const auto& [name, overload] : kNames) {
    kernels.push_back(c10::Dispatcher::singleton()
                          .findSchemaOrThrow(name, overload)
                          .getComputedKernelForDispatchKey(key));
  }
  aten_kernels[is_cuda(DispatchKeySet(key))] = std::move(kernels);
}

template <class... Args>
torch::jit::Stack call_boxed(Op op, DispatchKeySet keys, const Args&... args) {
  ++calls_of_aten;
  const auto& kernel = aten_kernels[is_cuda(keys)][op];
  torch::jit::Stack stack;
  torch::jit::push(stack, args...);
  kernel.callBoxed(kernel.opHandle(), keys, &stack);
  return stack;
}

template <class... Args>
Results call_aten(Op op, DispatchKeySet keys, const Args&... args) {
  const auto stack = call_boxed(op, keys, args...);
  return {stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor()};
}

bool is_absent_or(at::ScalarType dtype, const OptionalTensor& t) {
  return !has(t) || t->scalar_type() == dtype;
}

// The dtype of parameters and statistics by aten's rule: that of the input, or float32 for all of
// them beside a half input. Nothing where they break the rule.
template <class... Tensors>
OptionalDType parameter_dtype(const Tensor& input, const Tensors&... parameters) {
  const auto all_are = [&](at::ScalarType dtype) {
    return (is_absent_or(dtype, parameters) && ...);
  };
  const auto dtype = input.scalar_type();
  const bool half = at::isReducedFloatingType(dtype);
  if (!half && dtype != at::kFloat && dtype != at::kDouble) return std::nullopt;
  if (all_are(dtype)) return dtype;
  return half && all_are(at::kFloat) ? OptionalDType(at::kFloat) : std::nullopt;
}

bool is_vector(const OptionalTensor& t, const Tensor& input) {
  return !has(t) || (t->dim() == 1 && t->size(0) == input.size(1) && t->device() == input.device());
}

bool is_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias) {
  return input.dim() >= 2 && input.numel() > 0 && is_vector(weight, input) &&
         is_vector(bias, input);
}

bool fits(const Tensor& grad_output, const Tensor& input) {
  return grad_output.sizes() == input.sizes() && grad_output.options().type_equal(input.options());
}

bool is_usual(double eps) { return std::isfinite(eps) && eps > 0.0; }

// Whether both can be updated in place, and updating one changes neither the other nor the input.
bool are_apart(const Tensor& running_mean, const Tensor& running_var, const Tensor& input) {
  const auto writable = [](const Tensor& t) {
    return at::has_internal_overlap(t) != at::MemOverlap::Yes;
  };
  const auto apart = [](const Tensor& a, const Tensor& b) {
    const auto status = at::get_overlap_status(a, b);
    return status != at::MemOverlapStatus::Full && status != at::MemOverlapStatus::Partial;
  };
  return writable(running_mean) && writable(running_var) && apart(running_mean, running_var) &&
         apart(running_mean, input) && apart(running_var, input);
}

bool is_batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& running_mean, const OptionalTensor& running_var,
                   bool training, double eps) {
  if (!is_norm(input, weight, bias) || !is_usual(eps) || !is_vector(running_mean, input) ||
      !is_vector(running_var, input) || has(running_mean) != has(running_var) ||
      !parameter_dtype(input, weight, bias, running_mean, running_var)) {
    return false;
  }
  if (!has(running_mean)) return training;
  // The unbiased variance of one value is NaN in aten.
  return !training ||
         (input.numel() > input.size(1) && are_apart(*running_mean, *running_var, input));
}

// The input in the memory format that aten gives its outputs. CUDA batch norm keeps any strides.
Tensor arrange_batch_norm(const Tensor& input) {
  return input.is_cuda() ? input : input.contiguous(input.suggest_memory_format());
}
Tensor arrange_group_norm(const Tensor& input) {
  return input.is_cuda() ? input.contiguous() : input.contiguous(input.suggest_memory_format());
}

// Results of a forward pass with the statistics in the dtype in which aten saves them.
Results save_as(at::ScalarType dtype, const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  return {y, mean.to(dtype), rstd.to(dtype)};
}

Results run_batch_norm(DispatchKeySet keys, const Tensor& input, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& running_mean,
                       const OptionalTensor& running_var, bool training, double momentum,
                       double eps) {
  ++calls_of_normcore;
  const auto x = arrange_batch_norm(input);
  const auto dtype = input.is_cuda() ? compute_dtype(input.scalar_type())
                                     : *parameter_dtype(input, weight, bias, running_mean);
  if (training) {
    const auto [y, mean, rstd, relu_bits] = op::batch_norm_train().redispatch(
        keys, x, weight, bias, std::nullopt, std::nullopt, running_mean, running_var, std::nullopt,
        {1}, momentum, eps, /*unbiased=*/true, std::nullopt, std::nullopt,
        /*relu_bits_format=*/std::nullopt);
    return save_as(dtype, y, mean, rstd);
  }
  const auto [y, rstd] =
      op::batch_norm_eval().redispatch(keys, x, weight, bias, std::nullopt, *running_mean,
                                       *running_var, {1}, eps, std::nullopt, std::nullopt);
  if (input.is_cuda()) return save_as(dtype, y, running_mean->clone(), rstd);
  const auto nothing = [&] { return at::empty({0}, input.options().dtype(dtype)); };
  return {y, nothing(), nothing()};
}

// Both operators with running statistics, as they are called.
template <Op kOp, class RunningStatistic>
Results native_batch_norm(DispatchKeySet keys, const Tensor& input, const OptionalTensor& weight,
                          const OptionalTensor& bias, RunningStatistic& running_mean,
                          RunningStatistic& running_var, bool training, double momentum,
                          double eps) {
  if (is_batch_norm(input, weight, bias, running_mean, running_var, training, eps)) {
    return run_batch_norm(keys, input, weight, bias, running_mean, running_var, training, momentum,
                          eps);
  }
  return call_aten(kOp, keys, input, weight, bias, running_mean, running_var, training, momentum,
                   eps);
}

Results native_batch_norm_no_statistics(DispatchKeySet keys, const Tensor& input,
                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                        bool training, double momentum, double eps) {
  if (is_batch_norm(input, weight, bias, std::nullopt, std::nullopt, training, eps)) {
    return run_batch_norm(keys, input, weight, bias, std::nullopt, std::nullopt, training, momentum,
                          eps);
  }
  return call_aten(kBatchNormNoStatistics, keys, input, weight, bias, training, momentum, eps);
}

// Aten promises gradients of parameters that are absent too: the operators of this library give
// them for stand-ins. That of bias has no influence on any gradient.
std::pair<OptionalTensor, OptionalTensor> stand_ins(const Tensor& input,
                                                    const OptionalTensor& weight,
                                                    at::ScalarType dtype,
                                                    const GradientMask& output_mask) {
  const auto options = input.options().dtype(dtype).memory_format(std::nullopt);
  const auto channels = input.size(1);
  return {output_mask[1] && !has(weight) ? at::ones({channels}, options) : weight,
          output_mask[2] ? OptionalTensor(at::empty({channels}, options)) : std::nullopt};
}

Results without_residual(const Gradients& gradients) {
  return {std::get<0>(gradients), std::get<1>(gradients), std::get<2>(gradients)};
}

Results native_batch_norm_backward(DispatchKeySet keys, const Tensor& grad_output,
                                   const Tensor& input, const OptionalTensor& weight,
                                   const OptionalTensor& running_mean,
                                   const OptionalTensor& running_var,
                                   const OptionalTensor& save_mean,
                                   const OptionalTensor& save_invstd, bool train, double eps,
                                   GradientMask output_mask) {
  const auto& mean = train ? save_mean : running_mean;
  const auto& spread = train ? save_invstd : running_var;
  // On CUDA devices statistics are saved in the compute dtype, whatever that of the parameters is.
  const auto dtype = is_cuda(keys) ? parameter_dtype(input, weight, running_mean, running_var)
                                   : parameter_dtype(input, weight, running_mean, running_var,
                                                     save_mean, save_invstd);
  const bool ours = is_norm(input, weight, std::nullopt) && dtype && has(mean) && has(spread) &&
                    is_vector(mean, input) && is_vector(spread, input) && is_usual(eps) &&
                    fits(grad_output, input);
  if (!ours) {
    return call_aten(kBatchNormBackward, keys, grad_output, input, weight, running_mean,
                     running_var, save_mean, save_invstd, train, eps, output_mask);
  }
  ++calls_of_normcore;
  const auto [scale, bias] = stand_ins(input, weight, *dtype, output_mask);
  const auto computed = spread->to(compute_dtype(input.scalar_type()));
  return without_residual(op::batch_norm_backward().redispatch(
      keys, grad_output, arrange_batch_norm(input), scale, bias, std::nullopt, std::nullopt,
      train ? mean->to(at::kDouble) : *mean, train ? computed : computed.add(eps).rsqrt(), {1},
      train, eps, std::nullopt, {output_mask[0], output_mask[1], output_mask[2], false},
      std::nullopt, std::nullopt));
}

bool is_group_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                   std::int64_t n, std::int64_t c, std::int64_t hxw, std::int64_t group) {
  return is_norm(input, weight, bias) && input.size(0) == n && input.size(1) == c &&
         input.numel() == n * c * hxw && group > 0 && c % group == 0;
}

Results native_group_norm(DispatchKeySet keys, const Tensor& input, const OptionalTensor& weight,
                          const OptionalTensor& bias, std::int64_t n, std::int64_t c,
                          std::int64_t hxw, std::int64_t group, double eps) {
  const auto dtype = parameter_dtype(input, weight, bias);
  if (!dtype || !is_usual(eps) || !is_group_norm(input, weight, bias, n, c, hxw, group)) {
    return call_aten(kGroupNorm, keys, input, weight, bias, n, c, hxw, group, eps);
  }
  ++calls_of_normcore;
  const auto [y, mean, rstd] = op::group_norm_forward().redispatch(
      keys, arrange_group_norm(input), weight, bias, std::nullopt, std::nullopt, group, {1},
      std::nullopt, eps, std::nullopt, std::nullopt);
  return save_as(*dtype, y, mean, rstd);
}

Results native_group_norm_backward(DispatchKeySet keys, const Tensor& grad_output,
                                   const Tensor& input, const Tensor& mean, const Tensor& rstd,
                                   const OptionalTensor& weight, std::int64_t n, std::int64_t c,
                                   std::int64_t hxw, std::int64_t group, GradientMask output_mask) {
  const auto dtype = parameter_dtype(input, weight);
  const std::array<std::int64_t, 2> shape{n, group};
  const at::IntArrayRef per_group(shape);
  const bool ours = dtype && is_group_norm(input, weight, std::nullopt, n, c, hxw, group) &&
                    parameter_dtype(input, mean, rstd) && mean.sizes() == per_group &&
                    rstd.sizes() == per_group && fits(grad_output, input);
  if (!ours) {
    return call_aten(kGroupNormBackward, keys, grad_output, input, mean, rstd, weight, n, c, hxw,
                     group, output_mask);
  }
  ++calls_of_normcore;
  const auto [scale, bias] = stand_ins(input, weight, *dtype, output_mask);
  return without_residual(op::group_norm_backward().redispatch(
      keys, grad_output, arrange_group_norm(input), scale, bias, std::nullopt, std::nullopt,
      mean.to(at::kDouble), rstd.to(compute_dtype(input.scalar_type())), group, {1}, std::nullopt,
      /*eps=*/0.0, std::nullopt, {output_mask[0], output_mask[1], output_mask[2], false}));
}

// Batch norm on a CUDA device. aten's composite operator would choose cuDNN, whose backward pass
// needs what only its own forward pass saves. This one calls the operator that is overridden and
// has a derivative.
std::tuple<Tensor, Tensor, Tensor, Tensor, std::int64_t> batch_norm_impl_index(
    DispatchKeySet keys, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, bool training, double momentum, double eps,
    bool cudnn_enabled) {
  if (is_batch_norm(input, weight, bias, running_mean, running_var, training, eps)) {
    const auto [y, mean, invstd] = at::native_batch_norm(input, weight, bias, running_mean,
                                                         running_var, training, momentum, eps);
    return {y, mean, invstd, at::empty({0}, input.options().dtype(at::kByte)), 0};
  }
  const auto stack = call_boxed(kBatchNormImplIndex, keys, input, weight, bias, running_mean,
                                running_var, training, momentum, eps, cudnn_enabled);
  return {stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor(), stack[3].toTensor(),
          stack[4].toInt()};
}

// Torch warns once per process that a kernel is overridden, which is meant here. All other warnings
// go where they would have gone.
class WithoutOverrideWarning final : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override {
    const bool is_meant =
        warning.msg().find("Overriding a previously registered") != std::string::npos;
    if (!is_meant) next_->process(warning);
  }

 private:
  c10::WarningHandler* next_ = c10::WarningUtils::get_warning_handler();
};

// The kernels above are registered as long as this exists.
class Registration {
 public:
  Registration() {
    WithoutOverrideWarning handler;
    const c10::WarningUtils::WarningHandlerGuard guard(&handler);
    override_kernels(DispatchKey::CPU);
    if (!build_info().cuda) return;
    override_kernels(DispatchKey::CUDA);
    // The composite operator chooses between backends: with and without autograd.
    for (const auto key : {DispatchKey::AutogradCUDA, DispatchKey::CUDA}) {
      library(key).impl("_batch_norm_impl_index", TORCH_FN(batch_norm_impl_index));
    }
  }

 private:
  torch::Library& library(DispatchKey key) {
    return libraries_.emplace_back(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
  }

  void override_kernels(DispatchKey key) {
    find_aten_kernels(key);
    library(key)
        .impl("native_batch_norm", TORCH_FN((native_batch_norm<kBatchNorm, const OptionalTensor>)))
        .impl("_native_batch_norm_legit", TORCH_FN((native_batch_norm<kBatchNormLegit, Tensor>)))
        .impl("_native_batch_norm_legit.no_stats", TORCH_FN(native_batch_norm_no_statistics))
        .impl("native_batch_norm_backward", TORCH_FN(native_batch_norm_backward))
        .impl("native_group_norm", TORCH_FN(native_group_norm))
        .impl("native_group_norm_backward", TORCH_FN(native_group_norm_backward));
  }

  std::vector<torch::Library> libraries_;
};

std::mutex mutex;
int enabled = 0;
std::optional<Registration> registration;

}  // namespace

void enable_aten_override() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (enabled == 0) registration.emplace();
  ++enabled;
}

void disable_aten_override() {
  const std::lock_guard<std::mutex> lock(mutex);
  TORCH_CHECK(enabled > 0, "disable_aten_override: expected an override that is enabled");
  if (--enabled == 0) registration.reset();
}

AtenOverrideCalls aten_override_calls() { return {calls_of_normcore, calls_of_aten}; }

}  // namespace normcore
