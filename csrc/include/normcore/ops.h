// Batch and group normalization as functions. They call the operators torch.ops.normcore.batch_norm
// and group_norm through the dispatcher: autograd of any order, autocast, Meta, every device. Both:
//   y = activation((x - mean) * (rstd * weight) + bias + residual)
//   rstd = 1 / sqrt(var + eps), var the biased variance
// x: any rank >= 1 and any strides, float64, float32, bfloat16 or float16. y and the gradients keep
// its memory format. weight, bias and statistics: any of these dtypes in any mix. Arithmetic is at
// least float32 (float64 if any of input, weight, bias, running statistics, residual or the
// output's dtype is), with one rounding at the end. An undefined tensor means "absent". An empty x
// gives an empty y. Errors: c10::ValueError (shape or value), c10::TypeError (dtype),
// c10::IndexError (axis), c10::NotImplementedError. A call that throws leaves the running
// statistics unchanged.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "normcore/export.h"
#include "normcore/options.h"

namespace normcore {

/// Batch normalization over every axis but `options.axis()`.
///
/// With `training(true)`, mean and var are those of the batch, and the running statistics, when
/// given, become `(1 - momentum) * running + momentum * batch` in place. Otherwise they are
/// `running_mean` and `running_var`, both required. weight, bias and running statistics have the
/// shape `[input.size(a) for a in sorted(axis)]`. One value per channel is legal: its variance is
/// 0. A call inside of a backward pass (an activation checkpoint) leaves the running statistics
/// alone. A channel whose mask is all zero gives NaN and keeps its running statistics.
///
/// ```
/// auto y = normcore::batch_norm(x, running_mean, running_var, weight, bias,
///                               normcore::BatchNormFuncOptions().training(true).axis(-1));
/// ```
NORMCORE_API at::Tensor batch_norm(const at::Tensor& input, const at::Tensor& running_mean,
                                   const at::Tensor& running_var, const at::Tensor& weight = {},
                                   const at::Tensor& bias = {},
                                   const BatchNormFuncOptions& options = {});

/// The training call of batch_norm that changes no argument: y, and the running mean and variance
/// after this batch. `options.training()` is not asked for; `options.num_batches_tracked()`, the
/// number of batches before this one, is needed with a momentum of none.
NORMCORE_API std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_functional(
    const at::Tensor& input, const at::Tensor& running_mean, const at::Tensor& running_var,
    const at::Tensor& weight = {}, const at::Tensor& bias = {},
    const BatchNormFuncOptions& options = {});

/// Group normalization over blocks of `C / num_groups` neighbouring channels of each sample.
///
/// `num_groups` divides C, the product of the sizes of the feature axes: 1 is layer normalization
/// over everything but the samples, C is instance normalization. weight and bias have the shape
/// `[input.size(a) for a in sorted(axis)]`, or `[N, C]` for an affine map of each sample's own.
///
/// ```
/// auto y = normcore::group_norm(x, 32, weight, bias,
///                               normcore::GroupNormFuncOptions().activation("silu"));
/// ```
NORMCORE_API at::Tensor group_norm(const at::Tensor& input, std::int64_t num_groups,
                                   const at::Tensor& weight = {}, const at::Tensor& bias = {},
                                   const GroupNormFuncOptions& options = {});

/// The values of `activation`, besides none.
NORMCORE_API std::vector<std::string> activation_names();

}  // namespace normcore
