// Options of the functions (ops.h) and modules (modules.h) as chainable setters, e.g.
//   BatchNormOptions().num_features(64).axis(1).momentum(0.9)
// Names, defaults and meanings are those of the Python package. Wherever an axis may be given, so
// may several: axis(1) or axis({1, 2}); negative values count from the last axis. Nothing here is
// checked by itself: a function checks what it is called with, a module checks in its constructor,
// and in each call what the call reads. The classes are exported because the modules are templates
// over them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <torch/arg.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "normcore/export.h"

namespace normcore {

/// One integer or a list of them: axes, or the number of features along each of them. Implicit, so
/// that the setters take either.
class NORMCORE_API IntList {
 public:
  IntList(std::int64_t value) : values_{value} {}
  IntList(std::initializer_list<std::int64_t> values) : values_(values) {}
  IntList(std::vector<std::int64_t> values) : values_(std::move(values)) {}
  operator at::IntArrayRef() const { return values_; }
  const std::vector<std::int64_t>& vec() const { return values_; }

 private:
  std::vector<std::int64_t> values_;
};

/// A list that may be left out.
class NORMCORE_API OptionalIntList : public std::optional<IntList> {
 public:
  using std::optional<IntList>::optional;
  OptionalIntList(std::initializer_list<std::int64_t> values)
      : std::optional<IntList>(IntList(values)) {}
};

/// Fills a new parameter in place, e.g. `torch::nn::init::ones_`.
using Initializer = std::function<void(at::Tensor)>;

/// Options of `normcore::batch_norm`.
struct NORMCORE_API BatchNormFuncOptions {
  /// Normalize with the statistics of the batch, and update the running ones.
  TORCH_ARG(bool, training) = false;
  /// Weight of the NEW value in the running statistics, as in torch::nn. Empty: the cumulative
  /// average, which needs num_batches_tracked.
  TORCH_ARG(std::optional<double>, momentum) = 0.1;
  /// Added to the variance.
  TORCH_ARG(double, eps) = 1e-5;
  /// Feature axis or axes; all others are reduced, the batch axis too.
  TORCH_ARG(IntList, axis) = 1;
  /// Any dtype, broadcasts to the input; nonzero elements count for the statistics. Ignored unless
  /// training.
  TORCH_ARG(at::Tensor, mask);
  /// "relu", "silu", "gelu" or "gelu_tanh".
  TORCH_ARG(std::optional<std::string>, activation);
  /// Shape of the input; added before the activation.
  TORCH_ARG(at::Tensor, residual);
  /// The running variance takes var * n / (n - 1), as in torch::nn; false takes the biased
  /// variance, as Flax does.
  TORCH_ARG(bool, unbiased) = true;
  /// int64 scalar, incremented by a training call whose input is not empty.
  TORCH_ARG(at::Tensor, num_batches_tracked);
  /// Dtype of the output; empty: that of the input.
  TORCH_ARG(std::optional<at::ScalarType>, dtype);
  /// Name of the process group (c10d::register_process_group) whose ranks have common statistics.
  TORCH_ARG(std::optional<std::string>, group);
  /// "count": every value counts the same; "rank": every rank does, as in Flax.
  TORCH_ARG(std::string, sync_weighting) = "count";
};

/// Options of `normcore::group_norm`.
struct NORMCORE_API GroupNormFuncOptions {
  /// Added to the variance.
  TORCH_ARG(double, eps) = 1e-5;
  /// Feature axis or axes: flattened in ascending order, then cut into groups.
  TORCH_ARG(IntList, axis) = 1;
  /// Axes that a statistic is taken over, the feature axes among them. Empty: all axes but axis 0.
  TORCH_ARG(OptionalIntList, reduction_axes);
  /// Any dtype, broadcasts to the input; nonzero elements count for the statistics.
  TORCH_ARG(at::Tensor, mask);
  /// "relu", "silu", "gelu" or "gelu_tanh".
  TORCH_ARG(std::optional<std::string>, activation);
  /// Shape of the input; added before the activation.
  TORCH_ARG(at::Tensor, residual);
  /// Dtype of the output; empty: that of the input.
  TORCH_ARG(std::optional<at::ScalarType>, dtype);
  /// Name of the process group (c10d::register_process_group) whose ranks have common statistics.
  TORCH_ARG(std::optional<std::string>, group);
  /// "count": every value counts the same; "rank": every rank does, as in Flax.
  TORCH_ARG(std::string, sync_weighting) = "count";
};

/// Options of the module `normcore::BatchNorm`.
struct NORMCORE_API BatchNormOptions {
  /// Size of the feature axis (of each of them, in ascending order of the axes). Empty: taken from
  /// the first input.
  TORCH_ARG(OptionalIntList, num_features);
  /// Feature axis or axes; all others are reduced, the batch axis too.
  TORCH_ARG(IntList, axis) = -1;
  /// Decay of the OLD running statistics: running = momentum * running + (1 - momentum) * batch.
  TORCH_ARG(double, momentum) = 0.99;
  /// Added to the variance.
  TORCH_ARG(double, epsilon) = 1e-5;
  /// Dtype of the output. Empty: the promoted dtype of input, scale and bias, and float32 for
  /// integers.
  TORCH_ARG(std::optional<at::ScalarType>, dtype) = at::kFloat;
  /// Dtype of scale and bias.
  TORCH_ARG(at::ScalarType, param_dtype) = at::kFloat;
  /// Whether there is a bias.
  TORCH_ARG(bool, use_bias) = true;
  /// Whether there is a scale.
  TORCH_ARG(bool, use_scale) = true;
  /// Initial value of bias; empty: 0.
  TORCH_ARG(Initializer, bias_init);
  /// Initial value of scale; empty: 1.
  TORCH_ARG(Initializer, scale_init);
  /// Name of the process group whose ranks have common statistics, "world" for the default group.
  TORCH_ARG(std::optional<std::string>, axis_name);
  /// Independent subgroups, e.g. {{0, 1}, {2, 3}}: a partition of that group's ranks. Only all ranks
  /// in one and each rank alone are done here; for others a call throws, and says what to do instead.
  TORCH_ARG(std::optional<std::vector<std::vector<std::int64_t>>>, axis_index_groups);
  /// "count": every element counts the same; "rank": every rank does, as in Flax.
  TORCH_ARG(std::string, sync_weighting) = "count";
  /// "relu", "silu", "gelu" or "gelu_tanh".
  TORCH_ARG(std::optional<std::string>, activation);
  /// Device of the state. Empty: that of the first input of a lazy module, else the CPU.
  TORCH_ARG(std::optional<c10::Device>, device);
};

/// Options of the module `normcore::GroupNorm`.
struct NORMCORE_API GroupNormOptions {
  /// Size of the feature axis (of each of them, in ascending order of the axes). Empty: taken from
  /// the first input.
  TORCH_ARG(OptionalIntList, num_features);
  /// Number of groups. Empty: 32, or what group_size implies.
  TORCH_ARG(std::optional<std::int64_t>, num_groups);
  /// Number of channels in a group; at most one of num_groups and group_size may be given.
  TORCH_ARG(std::optional<std::int64_t>, group_size);
  /// Feature axis or axes: flattened in ascending order, then cut into groups.
  TORCH_ARG(IntList, axis) = -1;
  /// Added to the variance.
  TORCH_ARG(double, epsilon) = 1e-5;
  /// Dtype of the output. Empty: the promoted dtype of input, scale and bias, and float32 for
  /// integers.
  TORCH_ARG(std::optional<at::ScalarType>, dtype) = at::kFloat;
  /// Dtype of scale and bias.
  TORCH_ARG(at::ScalarType, param_dtype) = at::kFloat;
  /// Whether there is a bias.
  TORCH_ARG(bool, use_bias) = true;
  /// Whether there is a scale.
  TORCH_ARG(bool, use_scale) = true;
  /// Initial value of bias; empty: 0.
  TORCH_ARG(Initializer, bias_init);
  /// Initial value of scale; empty: 1.
  TORCH_ARG(Initializer, scale_init);
  /// Axes that a statistic is taken over, the feature axes among them. Empty: all axes but axis 0.
  TORCH_ARG(OptionalIntList, reduction_axes);
  /// Name of the process group whose ranks have common statistics, "world" for the default group.
  TORCH_ARG(std::optional<std::string>, axis_name);
  /// Independent subgroups, e.g. {{0, 1}, {2, 3}}: a partition of that group's ranks. Only all ranks
  /// in one and each rank alone are done here; for others a call throws, and says what to do instead.
  TORCH_ARG(std::optional<std::vector<std::vector<std::int64_t>>>, axis_index_groups);
  /// "count": every element counts the same; "rank": every rank does, as in Flax.
  TORCH_ARG(std::string, sync_weighting) = "count";
  /// "relu", "silu", "gelu" or "gelu_tanh".
  TORCH_ARG(std::optional<std::string>, activation);
  /// Device of the state. Empty: that of the first input of a lazy module, else the CPU.
  TORCH_ARG(std::optional<c10::Device>, device);
};

}  // namespace normcore
