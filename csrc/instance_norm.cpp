// Instance norm that updates running statistics: a batch norm of which every sample is a batch of
// its own. Without them it is group norm with one channel per group, and with
// use_input_stats=False batch norm.
#include <torch/library.h>

#include "checks.h"
#include "context.h"

namespace normcore {
namespace {

// [N, *shape], as many copies as there are samples.
Tensor per_sample(const Tensor& t, const c10::SymInt& samples) {
  c10::SymDimVector shape{samples};
  for (const auto& size : t.sym_sizes()) shape.push_back(size);
  return t.unsqueeze(0).expand_symint(shape);
}
OptionalTensor per_sample(const OptionalTensor& t, const c10::SymInt& samples) {
  return has(t) ? OptionalTensor(per_sample(*t, samples)) : std::nullopt;
}

// Running statistics become the means of what every sample makes of them.
Tensor instance_norm_train(const Tensor& input, const Tensor& running_mean,
                           const Tensor& running_var, const OptionalTensor& weight,
                           const OptionalTensor& bias, double momentum, double eps,
                           at::IntArrayRef axis, const OptionalTensor& mask,
                           OptionalString activation, const OptionalTensor& residual,
                           OptionalDType dtype) {
  const auto norm =
      Check<c10::SymInt>::batch_norm_eval({input, weight, bias, residual, std::nullopt},
                                          running_mean, running_var, axis, eps, activation, dtype);
  TORCH_CHECK_VALUE(norm.axes.feature.empty() || norm.axes.feature.front() != 0,
                    "instance_norm: expected axis without the batch axis 0, got ", axis);
  const auto samples = input.sym_size(0);
  auto features = norm.axes.feature;
  features.insert(features.begin(), 0);
  const auto mean = per_sample(running_mean, samples).clone(),
             var = per_sample(running_var, samples).clone();
  const auto y = op::batch_norm().call(
      input, mean, var, per_sample(weight, samples), per_sample(bias, samples), /*training=*/true,
      momentum, eps, features, mask, activation, residual, /*unbiased=*/true, std::nullopt, dtype,
      /*group=*/std::nullopt, "count");
  // A checkpoint that is computed again changes nothing, and the mean of copies may round.
  if (!is_recomputed(input) && input.sym_numel() != 0) {
    running_mean.copy_(mean.mean(0));
    running_var.copy_(var.mean(0));
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(normcore, CompositeImplicitAutograd, m) {
  m.impl("_instance_norm_train", TORCH_FN(instance_norm_train));
}

TORCH_LIBRARY_IMPL(normcore, Python, m) {
  m.impl("_instance_norm_train", TORCH_FN(instance_norm_train));
}

TORCH_LIBRARY_IMPL(normcore, FuncTorchBatchedDecomposition, m) {
  m.impl("_instance_norm_train", TORCH_FN(instance_norm_train));
}

}  // namespace normcore
