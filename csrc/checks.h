// User arguments of the operators, checked and resolved. Every rule about shapes, dtypes, devices
// and names lives here, and is checked before anything is computed or changed. `Int` is
// std::int64_t for tensors with data and c10::SymInt for shape inference (Meta) and for the
// differentiable formulas: all of them go through the same rules. Errors: ValueError (value or
// shape), TypeError (dtype), IndexError (axis).
#pragma once

#include <ATen/core/DimVector.h>
#include <normcore/kernels/activation.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "dispatch.h"
#include "normcore/subclass.h"

namespace normcore {

// Numbers of a slice that ranks add up (moment_sums.h), in the forward and in the backward pass.
inline constexpr std::int64_t kMomentSums = 8, kGradientSums = 2;

// Axes of the input, non-negative and ascending; together they are all of them.
struct Axes {
  at::DimVector feature;  // scale and bias have one entry per index of these
  at::DimVector kept;     // statistics are separate for every index of these (group norm only)
  at::DimVector reduced;
};

// The tensors that every norm takes, as the user gave them.
struct Operands {
  const Tensor& input;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& residual;
  const OptionalTensor& mask;
};

// Gradients with respect to the results of a backward pass; absent: zero.
struct Cotangents {
  const OptionalTensor& input;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& residual;
};

template <class Int>
inline constexpr bool is_concrete = std::is_same_v<Int, std::int64_t>;

template <class Int>
c10::ArrayRef<Int> sizes_of(const Tensor& t) {
  if constexpr (std::is_same_v<Int, c10::SymInt>) {
    return t.sym_sizes();
  } else {
    return t.sizes();
  }
}

// A norm whose arguments obey the rules. Batch norm is the norm without kept axes that has one
// group per channel.
template <class Int>
struct CheckedNorm {
  Axes axes;
  Int samples;   // product of the kept axes
  Int channels;  // product of the feature axes
  Int num_groups;
  Int group_size = 1;              // channels of a group
  bool affine_per_sample = false;  // weight and bias have the sizes of kept and feature axes
  double eps = 0.0;
  kernels::Activation activation = kernels::Activation::kNone;
  at::ScalarType dtype = at::kFloat;  // of the output
};

// The rules of each low-level operator.
template <class Int>
struct Check {
  static CheckedNorm<Int> batch_norm_train(
      const Operands& operands, const OptionalTensor& running_mean,
      const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
      at::IntArrayRef axis, std::optional<double> momentum, double eps, OptionalString activation,
      OptionalDType dtype, OptionalFormat relu_bits_format = {});

  static CheckedNorm<Int> batch_norm_eval(const Operands& operands, const Tensor& running_mean,
                                          const Tensor& running_var, at::IntArrayRef axis,
                                          double eps, OptionalString activation,
                                          OptionalDType dtype);

  static CheckedNorm<Int> batch_norm_backward(const Tensor& grad_output, const Operands& operands,
                                              const Tensor& mean, const Tensor& rstd,
                                              at::IntArrayRef axis, bool batch_statistics,
                                              double eps, OptionalString activation,
                                              const OptionalTensor& relu_bits = {},
                                              OptionalFormat relu_bits_format = {});

  static CheckedNorm<Int> batch_norm_double_backward(const Cotangents& cotangents,
                                                     const Tensor& grad_output,
                                                     const Operands& operands, const Tensor& mean,
                                                     const Tensor& rstd, at::IntArrayRef axis,
                                                     bool batch_statistics, double eps,
                                                     OptionalString activation);

  static CheckedNorm<Int> group_norm(const Operands& operands, std::int64_t num_groups,
                                     at::IntArrayRef axis, at::OptionalIntArrayRef reduction_axes,
                                     double eps, OptionalString activation, OptionalDType dtype);

  static CheckedNorm<Int> group_norm_backward(const Tensor& grad_output, const Operands& operands,
                                              const Tensor& mean, const Tensor& rstd,
                                              std::int64_t num_groups, at::IntArrayRef axis,
                                              at::OptionalIntArrayRef reduction_axes, double eps,
                                              OptionalString activation);

  static CheckedNorm<Int> group_norm_double_backward(
      const Cotangents& cotangents, const Tensor& grad_output, const Operands& operands,
      const Tensor& mean, const Tensor& rstd, std::int64_t num_groups, at::IntArrayRef axis,
      at::OptionalIntArrayRef reduction_axes, double eps, OptionalString activation);

  // Of slices that ranks share: batch norm (num_groups 0) or group norm. grad_output may be
  // undefined.
  struct OfSlices {
    const char* name;
    const Tensor& values;
    std::int64_t per_slice = 0;  // 0: one, without an axis of its own
    at::ScalarType dtype = at::kDouble;
  };
  static CheckedNorm<Int> sync(const Operands& operands, std::int64_t num_groups,
                               at::IntArrayRef axis, at::OptionalIntArrayRef reduction_axes,
                               double eps, OptionalString activation, OptionalDType dtype,
                               const Tensor& grad_output = {},
                               std::initializer_list<OfSlices> saved = {});

  // Sums of slices [slices, kMomentSums], and what is updated with them.
  static void sync_statistics(const Tensor& own, const Tensor& total, const RunningState& running,
                              std::optional<double> momentum);
};

// The mask of a batch norm with running statistics: it has no effect, but has to fit.
void check_ignored_mask(const OptionalTensor& mask, const Tensor& input);

// Running statistics are updated in place and have no derivative.
void check_no_grad(const char* op, const OptionalTensor& running_mean,
                   const OptionalTensor& running_var);

// Statistics have no derivative in forward mode either. `names`: of both.
void check_no_tangent(const char* op, const char* names, const OptionalTensor& mean,
                      const OptionalTensor& spread);

// The input of a public operator: in float64 if any of the others is, so that nothing is computed
// in less than it has.
Tensor promote_input(const Tensor& input, std::initializer_list<const OptionalTensor*> others,
                     OptionalDType dtype);

// Of a norm whose num_groups is 0 for batch norm.
inline const char* norm_name(std::int64_t num_groups) {
  return num_groups == 0 ? "batch_norm" : "group_norm";
}

kernels::Activation parse_activation(const char* op, OptionalString name);
OptionalString activation_name(kernels::Activation activation);

// The dtype in which a norm of `dtype` values is computed, and of its rstd.
inline at::ScalarType compute_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace normcore
