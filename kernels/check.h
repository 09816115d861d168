// Rules of the args structs that a caller may break by mistake; they cost nothing beside a kernel.
#pragma once

#include <utility>

#include "normcore/kernels/batch_norm.h"
#include "normcore/kernels/group_norm.h"
#include "normcore/kernels/sync.h"

namespace normcore::kernels {

inline bool fits_arithmetic(const NormInput& input, DType dtype) {
  return dtype != DType::kFloat64 || input.x.dtype == DType::kFloat64;
}

inline Status check_operands(const NormInput& input) {
  if (!input.x) return Status::invalid("x must be given");
  if (input.mask && input.mask.data == nullptr) return Status::invalid("a mask needs data");
  if (input.residual && !fits_arithmetic(input, input.residual.dtype)) {
    return Status::invalid("a float64 residual needs a float64 x");
  }
  if (input.relu_bits != nullptr && (input.residual || !fits_relu_bits(input))) {
    return Status::invalid("relu_bits replace the residual of a ReLU, in whole bytes");
  }
  return Status::success();
}

inline Status check_input(const NormInput& input, ConstTensor y) {
  if (!y) return Status::invalid("y must be given");
  if (!fits_arithmetic(input, y.dtype)) return Status::invalid("a float64 y needs a float64 x");
  if (input.relu_bits != nullptr) return Status::invalid("relu_bits are read by backward passes");
  return check_operands(input);
}

inline Status check_any_gradients(const NormInput& input, ConstTensor grad_y, ConstTensor mean,
                                  ConstTensor rstd, const NormGradients& grad) {
  if (!grad_y || !mean || !rstd) return Status::invalid("grad_y, mean and rstd must be given");
  if (!fits_arithmetic(input, grad_y.dtype)) {
    return Status::invalid("a float64 grad_y needs a float64 x");
  }
  if (grad.x && grad.x.dtype != input.x.dtype) return Status::invalid("grad_x has the dtype of x");
  if (grad.residual && !fits_arithmetic(input, grad.residual.dtype)) {
    return Status::invalid("a float64 grad_residual needs a float64 x");
  }
  return check_operands(input);
}

inline Status check_gradients(const NormInput& input, ConstTensor grad_y, ConstTensor mean,
                              ConstTensor rstd, const NormGradients& grad) {
  if (grad.residual && input.activation == Activation::kNone) {
    return Status::invalid("without an activation the gradient of the residual is grad_y");
  }
  return check_any_gradients(input, grad_y, mean, rstd, grad);
}

inline Status check_double_backward(const NormInput& input, ConstTensor grad_y, ConstTensor mean,
                                    ConstTensor rstd, const GradientCotangents& cotangents,
                                    ConstTensor grad_grad_y, const NormGradients& grad) {
  for (const auto& [tensor, message] :
       {std::pair(cotangents.x, "a float64 cotangent of grad_x needs a float64 x"),
        std::pair(cotangents.residual, "a float64 cotangent of grad_residual needs a float64 x"),
        std::pair(grad_grad_y, "a float64 grad_grad_y needs a float64 x")}) {
    if (tensor && !fits_arithmetic(input, tensor.dtype)) return Status::invalid(message);
  }
  if (input.relu_bits != nullptr) {
    return Status::invalid("a double backward pass reads the residual, not relu_bits");
  }
  return check_any_gradients(input, grad_y, mean, rstd, grad);
}

inline Status check_groups(const NormInput& input, std::int64_t num_groups) {
  const bool ok = num_groups > 0 && input.extent.c % num_groups == 0;
  if (input.relu_bits != nullptr) return Status::invalid("relu_bits are those of batch norm");
  return ok ? Status::success() : Status::invalid("num_groups must divide c");
}

inline Status check_args(const BatchNormForwardArgs& args) {
  if (args.mean == nullptr || !args.rstd) return Status::invalid("mean and rstd must be given");
  if (static_cast<bool>(args.running.mean) != static_cast<bool>(args.running.var)) {
    return Status::invalid("running mean and variance come together");
  }
  if (args.running.cumulative && args.running.num_batches_tracked == nullptr) {
    return Status::invalid("a cumulative average needs num_batches_tracked");
  }
  if (args.relu_bits != nullptr && !fits_relu_bits(args.input)) {
    return Status::invalid("relu_bits are those of a ReLU, in whole bytes");
  }
  return check_input(args.input, args.y);
}

inline Status check_args(const BatchNormInferenceArgs& args) {
  if (!args.running_mean || !args.running_var || !args.rstd) {
    return Status::invalid("running mean, running variance and rstd must be given");
  }
  return check_input(args.input, args.y);
}

inline Status check_args(const GroupNormForwardArgs& args) {
  if (args.mean == nullptr || !args.rstd) return Status::invalid("mean and rstd must be given");
  if (const Status status = check_groups(args.input, args.num_groups); !status.ok()) return status;
  return check_input(args.input, args.y);
}

inline Status check_slices(const NormInput& input, std::int64_t num_groups) {
  return num_groups == 0 ? Status::success() : check_groups(input, num_groups);
}

inline Status check_args(const SyncMomentsArgs& args) {
  if (args.sums == nullptr) return Status::invalid("sums must be given");
  if (const Status status = check_slices(args.input, args.num_groups); !status.ok()) return status;
  return check_operands(args.input);
}

inline Status check_args(const SyncApplyArgs& args) {
  if (!args.mean || !args.var || !args.rstd) {
    return Status::invalid("mean, var and rstd must be given");
  }
  if (const Status status = check_slices(args.input, args.num_groups); !status.ok()) return status;
  return check_input(args.input, args.y);
}

inline Status check_args(const SyncStatisticsArgs& args) {
  if (args.own == nullptr || args.total == nullptr || args.mean == nullptr || args.var == nullptr ||
      args.share == nullptr) {
    return Status::invalid("own, total, mean, var and share must be given");
  }
  if (static_cast<bool>(args.running.mean) != static_cast<bool>(args.running.var)) {
    return Status::invalid("running mean and variance come together");
  }
  if (args.running.cumulative && args.running.num_batches_tracked == nullptr) {
    return Status::invalid("a cumulative average needs num_batches_tracked");
  }
  return Status::success();
}

inline Status check_args(const SyncGradientArgs& args) {
  if (args.grad_x && (args.sums == nullptr || args.share == nullptr)) {
    return Status::invalid("grad_x needs the sums of whole slices and shares");
  }
  return check_slices(args.input, args.num_groups);
}

}  // namespace normcore::kernels
