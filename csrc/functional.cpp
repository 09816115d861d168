#include "dispatch.h"
#include "normcore/ops.h"

namespace normcore {
namespace {

OptionalTensor present(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

OptionalString view(const std::optional<std::string>& text) {
  return text ? OptionalString(*text) : std::nullopt;
}

at::OptionalIntArrayRef view(const OptionalIntList& list) {
  return list ? at::OptionalIntArrayRef(list->vec()) : std::nullopt;
}

}  // namespace

Tensor batch_norm(const Tensor& input, const Tensor& running_mean, const Tensor& running_var,
                  const Tensor& weight, const Tensor& bias, const BatchNormFuncOptions& options) {
  return op::batch_norm().call(input, present(running_mean), present(running_var), present(weight),
                               present(bias), options.training(), options.momentum(), options.eps(),
                               options.axis(), present(options.mask()), view(options.activation()),
                               present(options.residual()), options.unbiased(),
                               present(options.num_batches_tracked()), options.dtype(),
                               view(options.group()), options.sync_weighting());
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_functional(const Tensor& input,
                                                         const Tensor& running_mean,
                                                         const Tensor& running_var,
                                                         const Tensor& weight, const Tensor& bias,
                                                         const BatchNormFuncOptions& options) {
  return op::batch_norm_functional().call(
      input, running_mean, running_var, present(weight), present(bias), options.momentum(),
      options.eps(), options.axis(), present(options.mask()), view(options.activation()),
      present(options.residual()), options.unbiased(), present(options.num_batches_tracked()),
      options.dtype(), view(options.group()), options.sync_weighting());
}

Tensor group_norm(const Tensor& input, std::int64_t num_groups, const Tensor& weight,
                  const Tensor& bias, const GroupNormFuncOptions& options) {
  return op::group_norm().call(input, num_groups, present(weight), present(bias), options.eps(),
                               options.axis(), view(options.reduction_axes()),
                               present(options.mask()), view(options.activation()),
                               present(options.residual()), options.dtype(), view(options.group()),
                               options.sync_weighting());
}

}  // namespace normcore
