// How a norm would run on a device, without running it: which path, how the work is cut, how much
// workspace, and why. Plans follow from shapes, strides and dtypes, so the input may be a Meta tensor
// and the device one that this machine does not have (it is then taken to have 132 multiprocessors).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <torch/arg.h>

#include <cstdint>
#include <optional>
#include <string>

#include "normcore/export.h"
#include "normcore/options.h"

namespace normcore {

/// Options of `normcore::explain`: what a plan depends on besides the input.
struct NORMCORE_API ExplainOptions {
  /// Feature axis or axes.
  TORCH_ARG(IntList, axis) = 1;
  /// Of group norm.
  TORCH_ARG(std::int64_t, num_groups) = 32;
  /// Of group norm. Empty: all axes but axis 0.
  TORCH_ARG(OptionalIntList, reduction_axes);
  /// Of the statistics; only its shape matters.
  TORCH_ARG(at::Tensor, mask);
  /// Name of the activation, as of the operator. Empty: none.
  TORCH_ARG(std::optional<std::string>, activation);
  /// Of group norm: whether weight and bias are [N, C].
  TORCH_ARG(bool, affine_per_sample) = false;
  /// Batch norm: whether the statistics are those of the batch.
  TORCH_ARG(bool, training) = true;
  /// The backward pass, with all gradients wanted, instead of the forward pass.
  TORCH_ARG(bool, backward) = false;
  /// CPU or CUDA. Empty: where the input is.
  TORCH_ARG(std::optional<c10::Device>, device);
};

/// One line for people about `op`, "batch_norm" or "group_norm", on `input`.
///
/// Errors: c10::ValueError, c10::TypeError and c10::IndexError as the operator itself;
/// c10::NotImplementedError for other devices.
NORMCORE_API std::string explain(const at::Tensor& input, const std::string& op,
                                 const ExplainOptions& options = {});

}  // namespace normcore
