// Batch norm: the public operator and the low-level ones below autograd. A kernel template with Int
// = std::int64_t computes; with c10::SymInt it only makes the outputs (Meta).
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "backend.h"
#include "checks.h"
#include "context.h"
#include "formulas.h"
#include "outputs.h"
#include "relu_bits.h"
#include "staging.h"
#include "subclass.h"
#include "sync.h"

namespace normcore {
namespace {

template <class Int>
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_train(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& mask, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    at::IntArrayRef axis, std::optional<double> momentum, double eps, bool unbiased,
    OptionalString activation, OptionalDType dtype, OptionalFormat relu_bits_format) {
  const Operands operands{input, weight, bias, residual, mask};
  const auto norm =
      Check<Int>::batch_norm_train(operands, running_mean, running_var, num_batches_tracked, axis,
                                   momentum, eps, activation, dtype, relu_bits_format);
  const auto y = empty_output<Int>(input, norm.dtype);
  const auto mean = empty_statistic<Int>(input, {norm.channels}, at::kDouble);
  const auto rstd =
      empty_statistic<Int>(input, {norm.channels}, compute_dtype(input.scalar_type()));
  const auto relu_bits = relu_bits_format ? empty_relu_bits<Int>(input) : Tensor();
  if constexpr (is_concrete<Int>) {
    if (input.numel() == 0) return {y, mean.zero_(), rstd.zero_(), relu_bits};
    // In the order of the bits; vectors of CUDA kernels are whole bytes of them.
    const auto x = relu_bits_format ? input.contiguous(*relu_bits_format) : input;
    Staging staging({x, weight, bias, residual, mask}, norm, Samples::kReduced,
                    /*is_aligned=*/relu_bits_format.has_value());
    kernels::BatchNormForwardArgs args;
    args.input = staging.input();
    args.running.mean = staging.update_vector(value_or_undefined(running_mean));
    args.running.var = staging.update_vector(value_or_undefined(running_var));
    if (has(num_batches_tracked)) {
      args.running.num_batches_tracked = num_batches_tracked->mutable_data_ptr<std::int64_t>();
    }
    args.running.momentum = momentum.value_or(0.0);
    args.running.cumulative = has(running_mean) && !momentum.has_value();
    args.running.unbiased = unbiased;
    args.y = staging.write(y);
    args.mean = mean.template mutable_data_ptr<double>();
    args.rstd = backend::mutable_view(rstd);
    if (relu_bits_format) args.relu_bits = relu_bits.template mutable_data_ptr<std::uint8_t>();
    backend::run(args, input.device());
    staging.finish();
  }
  return {y, mean, rstd, relu_bits};
}

template <class Int>
std::tuple<Tensor, Tensor> batch_norm_eval(const Tensor& input, const OptionalTensor& weight,
                                           const OptionalTensor& bias,
                                           const OptionalTensor& residual,
                                           const Tensor& running_mean, const Tensor& running_var,
                                           at::IntArrayRef axis, double eps,
                                           OptionalString activation, OptionalDType dtype) {
  const OptionalTensor no_mask;
  const Operands operands{input, weight, bias, residual, no_mask};
  const auto norm = Check<Int>::batch_norm_eval(operands, running_mean, running_var, axis, eps,
                                                activation, dtype);
  const auto y = empty_output<Int>(input, norm.dtype);
  const auto rstd =
      empty_statistic<Int>(input, {norm.channels}, compute_dtype(input.scalar_type()));
  if constexpr (is_concrete<Int>) {
    if (input.numel() == 0) return {y, rstd.zero_()};
    Staging staging(operands, norm, Samples::kReduced);
    kernels::BatchNormInferenceArgs args;
    args.input = staging.input();
    args.running_mean = staging.read_vector(running_mean);
    args.running_var = staging.read_vector(running_var);
    args.y = staging.write(y);
    args.rstd = backend::mutable_view(rstd);
    backend::run(args, input.device());
    staging.finish();
  }
  return {y, rstd};
}

template <class Int>
Gradients batch_norm_backward(const Tensor& grad_output, const Tensor& input,
                              const OptionalTensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& residual, const OptionalTensor& mask,
                              const Tensor& mean, const Tensor& rstd, at::IntArrayRef axis,
                              bool batch_statistics, double eps, OptionalString activation,
                              OutputMask output_mask, const OptionalTensor& relu_bits,
                              OptionalFormat relu_bits_format) {
  const OptionalTensor none;
  const auto& counting = batch_statistics ? mask : none;
  const Operands given{input, weight, bias, residual, counting};
  const auto norm =
      Check<Int>::batch_norm_backward(grad_output, given, mean, rstd, axis, batch_statistics, eps,
                                      activation, relu_bits, relu_bits_format);
  // What bits replace had the dtype of the input.
  const OptionalTensor added = has(relu_bits) ? OptionalTensor(input) : residual;
  const auto gradients = empty_gradients<Int>({input, weight, bias, added, counting}, output_mask);
  if constexpr (is_concrete<Int>) {
    const auto remaining = fill_without_kernel(gradients, grad_output, norm.activation);
    if (!any_defined(remaining)) return gradients;
    const bool reads_bits =
        has(relu_bits) && input.is_contiguous(*relu_bits_format) && relu_bits->is_contiguous();
    const bool has_other_order = has(relu_bits) && !reads_bits;
    const OptionalTensor stand_in =
        has_other_order ? residual_of(*relu_bits, *relu_bits_format, input) : residual;
    const Operands operands{input, weight, bias, stand_in, counting};
    Staging staging(operands, norm, Samples::kReduced);
    kernels::BatchNormBackwardArgs args;
    args.input = staging.input();
    if (reads_bits) args.input.relu_bits = relu_bits->const_data_ptr<std::uint8_t>();
    args.grad_y = staging.read(grad_output);
    args.mean = staging.read_vector(mean);
    args.rstd = staging.read_vector(rstd);
    args.batch_statistics = batch_statistics;
    args.grad = staging.write(remaining);
    backend::run(args, input.device());
    staging.finish();
  }
  return gradients;
}

template <class Int>
DoubleGradients batch_norm_double_backward(
    const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
    const OptionalTensor& grad_grad_bias, const OptionalTensor& grad_grad_residual,
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask,
    const Tensor& mean, const Tensor& rstd, at::IntArrayRef axis, bool batch_statistics, double eps,
    OptionalString activation, DoubleOutputMask output_mask) {
  const OptionalTensor no_mask;
  const Operands operands{input, weight, bias, residual, batch_statistics ? mask : no_mask};
  const Cotangents cotangents{grad_grad_input, grad_grad_weight, grad_grad_bias,
                              grad_grad_residual};
  const auto norm = Check<Int>::batch_norm_double_backward(
      cotangents, grad_output, operands, mean, rstd, axis, batch_statistics, eps, activation);
  const auto gradients = empty_double_gradients<Int>(grad_output, operands, output_mask);
  if constexpr (is_concrete<Int>) {
    const auto& [grad_grad_output, x, w, b, r] = gradients;
    if (input.numel() == 0) {
      zero_parameters(w, b);
      return gradients;
    }
    Staging staging(operands, norm, Samples::kReduced);
    kernels::BatchNormDoubleBackwardArgs args;
    args.input = staging.input();
    args.grad_y = staging.read(grad_output);
    args.mean = staging.read_vector(mean);
    args.rstd = staging.read_vector(rstd);
    args.batch_statistics = batch_statistics;
    args.cotangents = staging.read(cotangents);
    args.grad_grad_y = staging.write(grad_grad_output);
    args.grad = staging.write(Gradients{x, w, b, r});
    if (!backend::try_run(args, input.device())) {
      return batch_norm_double_backward_formula(grad_grad_input, grad_grad_weight, grad_grad_bias,
                                                grad_grad_residual, grad_output, input, weight,
                                                bias, residual, mask, mean, rstd, axis,
                                                batch_statistics, eps, activation, output_mask);
    }
    staging.finish();
  }
  return gradients;
}

// running = (1 - weight) * running + weight * batch, and one batch more. Nothing is written before
// all of it is known.
void update_running(const BatchMoments& batch, const RunningState& running,
                    std::optional<double> momentum) {
  const at::NoGradGuard no_grad;
  const auto& [mean, var, num_batches_tracked] = running;
  // What was made in inference mode can be written there only.
  const auto is_inference = [](const OptionalTensor& t) { return has(t) && t->is_inference(); };
  std::optional<c10::InferenceMode> mode;
  if (is_inference(mean) || is_inference(var) || is_inference(num_batches_tracked)) mode.emplace();

  const auto blend = [&, &count = num_batches_tracked](const Tensor& old_value,
                                                       const Tensor& value) {
    const auto old = old_value.to(value.scalar_type());
    const auto step = value - old;
    const auto updated = momentum.has_value() ? old + step * *momentum
                                              : old + step / (*count + 1).to(value.scalar_type());
    return batch.is_empty.defined() ? at::where(batch.is_empty, old, updated) : updated;
  };
  if (has(mean)) {
    const auto new_mean = blend(*mean, batch.mean), new_var = blend(*var, batch.var);
    mean->copy_(new_mean);
    var->copy_(new_var);
  }
  if (has(num_batches_tracked)) num_batches_tracked->add_(1);
}

// y of batch norm in training, and the running statistics if the batch counts.
// A DTensor has those of all devices, whatever `ranks` says.
Tensor train(const Operands& operands, const RunningState& running, bool counts,
             at::IntArrayRef axis, std::optional<double> momentum, double eps, bool unbiased,
             OptionalString activation, at::ScalarType y_dtype, const Ranks& ranks = {}) {
  const auto& [x, weight, bias, residual, mask] = operands;
  const auto& [mean, var, num_batches_tracked] = running;
  if (is_dtensor("batch_norm", operands, running)) {
    check_no_grad("batch_norm", mean, var);
    const auto norm = Check<c10::SymInt>::batch_norm_train(
        operands, mean, var, num_batches_tracked, axis, momentum, eps, activation, y_dtype);
    if (is_spread(x, running, axis)) {
      const auto [y, moments] = batch_norm_train_formula(operands, norm, unbiased);
      if (counts && x.sym_numel() != 0) update_running(moments, running, momentum);
      return y;
    }
  } else if (ranks) {
    check_no_tangent("batch_norm", "running_mean and running_var", mean, var);
    check_no_grad("batch_norm", mean, var);
    check_transforms("batch_norm");
    TORCH_CHECK_VALUE(!unbiased || !ranks.by_rank || !has(mean),
                      "batch_norm: expected unbiased False with sync_weighting 'rank', got True");
    Check<c10::SymInt>::batch_norm_train(operands, mean, var, num_batches_tracked, axis, momentum,
                                         eps, activation, y_dtype);
    return sync_norm(operands, {/*num_groups=*/0, axis, std::nullopt},
                     {counts ? running : RunningState{}, momentum, unbiased}, eps, activation,
                     y_dtype, ranks);
  }
  const OptionalTensor none;
  return std::get<0>(op::batch_norm_train().call(
      x, weight, bias, residual, mask, counts ? mean : none, counts ? var : none,
      counts ? num_batches_tracked : none, axis, momentum, eps, unbiased, activation, y_dtype,
      /*relu_bits_format=*/std::nullopt));
}

Tensor batch_norm(const Tensor& input, const OptionalTensor& running_mean,
                  const OptionalTensor& running_var, const OptionalTensor& weight,
                  const OptionalTensor& bias, bool training, std::optional<double> momentum,
                  double eps, at::IntArrayRef axis, const OptionalTensor& mask,
                  OptionalString activation, const OptionalTensor& residual, bool unbiased,
                  const OptionalTensor& num_batches_tracked, OptionalDType dtype,
                  OptionalString group, std::string_view sync_weighting) {
  const auto ranks = check_ranks("batch_norm", group, sync_weighting);
  const auto x =
      promote_input(input, {&weight, &bias, &residual, &running_mean, &running_var}, dtype);
  const auto y_dtype = dtype.value_or(input.scalar_type());
  if (training) {
    return train({x, weight, bias, residual, mask},
                 {running_mean, running_var, num_batches_tracked}, !is_recomputed(input), axis,
                 momentum, eps, unbiased, activation, y_dtype, ranks);
  }
  TORCH_CHECK_VALUE(has(running_mean) && has(running_var),
                    "batch_norm: expected running_mean and running_var with training False, got ",
                    has(running_mean)  ? "only running_mean"
                    : has(running_var) ? "only running_var"
                                       : "None");
  check_ignored_mask(mask, input);
  if (ranks) {
    const Intent intent{training, /*num_groups=*/0, running_mean->sym_numel()};
    check_agreement("batch_norm", input, intent, ranks);
  }
  const OptionalTensor no_mask;
  const Operands operands{x, weight, bias, residual, no_mask};
  if (is_dtensor("batch_norm", operands, {running_mean, running_var, std::nullopt})) {
    Check<c10::SymInt>::batch_norm_eval(operands, *running_mean, *running_var, axis, eps,
                                        activation, y_dtype);
  }
  if (is_recorded()) {
    check_no_grad("batch_norm", running_mean, running_var);
    check_no_tangent("batch_norm", "running_mean and running_var", running_mean, running_var);
    return batch_norm_eval_formula(
        operands,
        Check<c10::SymInt>::batch_norm_eval(operands, *running_mean, *running_var, axis, eps,
                                            activation, y_dtype),
        *running_mean, *running_var);
  }
  return std::get<0>(op::batch_norm_eval().call(x, weight, bias, residual, *running_mean,
                                                *running_var, axis, eps, activation, y_dtype));
}

// A copy that under vmap varies with whatever one of `others` varies with.
Tensor copy_beside(const Tensor& t, std::initializer_list<const OptionalTensor*> others) {
  auto copy = t.clone();
  if (!is_transformed()) return copy;
  for (const auto* other : others) {
    if (has(*other)) copy = copy + (*other)->new_zeros({}, t.options());
  }
  return copy;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_functional(
    const Tensor& input, const Tensor& running_mean, const Tensor& running_var,
    const OptionalTensor& weight, const OptionalTensor& bias, std::optional<double> momentum,
    double eps, at::IntArrayRef axis, const OptionalTensor& mask, OptionalString activation,
    const OptionalTensor& residual, bool unbiased, const OptionalTensor& num_batches_tracked,
    OptionalDType dtype, OptionalString group, std::string_view sync_weighting) {
  const auto ranks = check_ranks("batch_norm_functional", group, sync_weighting);
  check_no_grad("batch_norm_functional", running_mean, running_var);
  const OptionalTensor batch(input), stats[] = {running_mean, running_var};
  const auto mean = copy_beside(running_mean, {&batch, &mask, &stats[1], &num_batches_tracked});
  const auto var = copy_beside(running_var, {&batch, &mask, &stats[0], &num_batches_tracked});
  const auto count =
      has(num_batches_tracked) ? OptionalTensor(num_batches_tracked->clone()) : std::nullopt;
  // Not batch_norm, which changes no statistics inside of a backward pass.
  const auto x = promote_input(input, {&weight, &bias, &residual, &stats[0], &stats[1]}, dtype);
  const auto y =
      train({x, weight, bias, residual, mask}, {mean, var, count}, /*counts=*/true, axis, momentum,
            eps, unbiased, activation, dtype.value_or(input.scalar_type()), ranks);
  return {y, mean, var};
}

}  // namespace

DoubleGradients batch_norm_double_backward_formula(
    const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
    const OptionalTensor& grad_grad_bias, const OptionalTensor& grad_grad_residual,
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask,
    const Tensor& mean, const Tensor& rstd, at::IntArrayRef axis, bool batch_statistics, double eps,
    OptionalString activation, DoubleOutputMask output_mask) {
  const OptionalTensor no_mask;
  const Operands operands{input, weight, bias, residual, batch_statistics ? mask : no_mask};
  const Cotangents cotangents{grad_grad_input, grad_grad_weight, grad_grad_bias,
                              grad_grad_residual};
  const auto norm = Check<c10::SymInt>::batch_norm_double_backward(
      cotangents, grad_output, operands, mean, rstd, axis, batch_statistics, eps, activation);
  return norm_double_backward_formula(cotangents, grad_output, operands, norm,
                                      {mean, rstd, !batch_statistics}, output_mask);
}

TORCH_LIBRARY_IMPL(normcore, CompositeImplicitAutograd, m) {
  m.impl("batch_norm", TORCH_FN(batch_norm));
  m.impl("batch_norm_functional", TORCH_FN(batch_norm_functional));
}

// Without autograd (inference_mode) a tensor subclass would see the composite operator itself.
TORCH_LIBRARY_IMPL(normcore, Python, m) {
  m.impl("batch_norm", TORCH_FN(batch_norm));
  m.impl("batch_norm_functional", TORCH_FN(batch_norm_functional));
}

// Under vmap a composite operator has to be registered as a decomposition as well.
TORCH_LIBRARY_IMPL(normcore, FuncTorchBatchedDecomposition, m) {
  m.impl("batch_norm", TORCH_FN(batch_norm));
  m.impl("batch_norm_functional", TORCH_FN(batch_norm_functional));
  m.impl("_batch_norm_double_backward", TORCH_FN(batch_norm_double_backward_formula));
}

TORCH_LIBRARY_IMPL(normcore, CPU, m) {
  m.impl("_batch_norm_train", TORCH_FN(batch_norm_train<std::int64_t>));
  m.impl("_batch_norm_eval", TORCH_FN(batch_norm_eval<std::int64_t>));
  m.impl("_batch_norm_backward", TORCH_FN(batch_norm_backward<std::int64_t>));
  m.impl("_batch_norm_double_backward", TORCH_FN(batch_norm_double_backward<std::int64_t>));
}

// The same functions: the backend decides what runs on a device.
TORCH_LIBRARY_IMPL(normcore, CUDA, m) {
  m.impl("_batch_norm_train", TORCH_FN(batch_norm_train<std::int64_t>));
  m.impl("_batch_norm_eval", TORCH_FN(batch_norm_eval<std::int64_t>));
  m.impl("_batch_norm_backward", TORCH_FN(batch_norm_backward<std::int64_t>));
  m.impl("_batch_norm_double_backward", TORCH_FN(batch_norm_double_backward<std::int64_t>));
}

TORCH_LIBRARY_IMPL(normcore, Meta, m) {
  m.impl("_batch_norm_train", TORCH_FN(batch_norm_train<c10::SymInt>));
  m.impl("_batch_norm_eval", TORCH_FN(batch_norm_eval<c10::SymInt>));
  m.impl("_batch_norm_backward", TORCH_FN(batch_norm_backward<c10::SymInt>));
  m.impl("_batch_norm_double_backward", TORCH_FN(batch_norm_double_backward<c10::SymInt>));
}

}  // namespace normcore
