#include "checks.h"

#include <ATen/MemoryOverlap.h>
#include <c10/core/GradMode.h>
#include <c10/core/SymBool.h>
#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "normcore/ops.h"
#include "relu_bits.h"

namespace normcore {
namespace {

constexpr const char* kBatchNorm = "batch_norm";
constexpr const char* kGroupNorm = "group_norm";

constexpr std::pair<std::string_view, kernels::Activation> kActivations[] = {
    {"relu", kernels::Activation::kReLU},
    {"silu", kernels::Activation::kSiLU},
    {"gelu", kernels::Activation::kGelu},
    {"gelu_tanh", kernels::Activation::kGeluTanh},
};

// Whether a rule holds. On symbolic sizes it becomes a guard, or a run-time assertion where the
// size is not known.
bool holds(const c10::SymBool& rule) { return rule.expect_true(__FILE__, __LINE__); }

bool equal(std::int64_t a, std::int64_t b) { return a == b; }
bool equal(const c10::SymInt& a, const c10::SymInt& b) { return holds(a.sym_eq(b)); }

bool broadcasts(std::int64_t from, std::int64_t to) { return from == 1 || from == to; }
bool broadcasts(const c10::SymInt& from, const c10::SymInt& to) {
  return holds(from.sym_eq(1).sym_or(from.sym_eq(to)));
}

template <class Int>
bool equal(c10::ArrayRef<Int> a, c10::ArrayRef<Int> b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(),
                                            [](const Int& x, const Int& y) { return equal(x, y); });
}

template <class Int>
using Sizes = c10::SmallVector<Int, 5>;

template <class Int>
Sizes<Int> select(c10::ArrayRef<Int> sizes, const at::DimVector& axes) {
  Sizes<Int> result;
  for (const auto axis : axes) result.push_back(sizes[axis]);
  return result;
}

template <class Int>
Int product(c10::ArrayRef<Int> sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), Int(1), std::multiplies<Int>());
}

bool contains(const at::DimVector& axes, std::int64_t axis) {
  return std::find(axes.begin(), axes.end(), axis) != axes.end();
}

std::string dtype_name(at::ScalarType dtype) {
  return std::string(c10::getDtypeNames(dtype).first);
}

bool is_supported(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

void check_dtype(const char* op, const char* name, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(is_supported(dtype), op, ": expected ", name,
                   " to have dtype float64, float32, bfloat16 or float16, got ", dtype_name(dtype));
}

// float64 beside a narrower input would have to be computed in float64: the public operators
// convert the input.
void check_not_wider(const char* op, const char* name, at::ScalarType dtype, const Tensor& input) {
  check_dtype(op, name, dtype);
  TORCH_CHECK_TYPE(dtype != at::kDouble || input.scalar_type() == at::kDouble, op,
                   ": expected a float64 input with ", name, " of dtype float64, got ",
                   dtype_name(input.scalar_type()));
}

void check_device(const char* op, const char* name, const Tensor& t, const Tensor& input) {
  TORCH_CHECK_VALUE(t.device() == input.device(), op, ": expected ", name, " on device ",
                    input.device(), ", got ", t.device());
}

template <class Int>
void check_shape(const char* op, const char* name, const Tensor& t, c10::ArrayRef<Int> shape) {
  TORCH_CHECK_VALUE(equal(sizes_of<Int>(t), shape), op, ": expected ", name, " to have shape ",
                    shape, ", got ", sizes_of<Int>(t));
}

template <class Int>
void check_vector(const char* op, const char* name, const Tensor& t, const Tensor& input,
                  c10::ArrayRef<Int> shape) {
  check_device(op, name, t, input);
  check_dtype(op, name, t.scalar_type());
  check_shape(op, name, t, shape);
}

// A saved statistic: its dtype follows from the operator.
template <class Int>
void check_saved(const char* op, const char* name, const Tensor& t, const Tensor& input,
                 c10::ArrayRef<Int> shape, at::ScalarType dtype) {
  check_device(op, name, t, input);
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, op, ": expected ", name, " to have dtype ",
                   dtype_name(dtype), ", got ", dtype_name(t.scalar_type()));
  check_shape(op, name, t, shape);
}

at::DimVector normalize_axes(const char* op, const char* name, at::IntArrayRef axes,
                             std::int64_t rank) {
  at::DimVector result;
  for (const auto axis : axes) {
    TORCH_CHECK_INDEX(-rank <= axis && axis < rank, op, ": expected ", name, " in [", -rank, ", ",
                      rank - 1, "] for an input of rank ", rank, ", got ", axis);
    const auto positive = axis < 0 ? axis + rank : axis;
    TORCH_CHECK_VALUE(!contains(result, positive), op, ": expected ", name,
                      " without duplicates, got ", axes);
    result.push_back(positive);
  }
  std::sort(result.begin(), result.end());
  return result;
}

Axes batch_norm_axes(const Tensor& input, at::IntArrayRef axis) {
  Axes axes;
  axes.feature = normalize_axes(kBatchNorm, "axis", axis, input.dim());
  for (std::int64_t d = 0; d < input.dim(); ++d) {
    if (!contains(axes.feature, d)) axes.reduced.push_back(d);
  }
  return axes;
}

Axes group_norm_axes(const Tensor& input, at::IntArrayRef axis,
                     at::OptionalIntArrayRef reduction_axes) {
  Axes axes;
  axes.feature = normalize_axes(kGroupNorm, "axis", axis, input.dim());
  at::DimVector reduction;
  if (reduction_axes.has_value()) {
    reduction = normalize_axes(kGroupNorm, "reduction_axes", *reduction_axes, input.dim());
    TORCH_CHECK_VALUE(
        std::includes(reduction.begin(), reduction.end(), axes.feature.begin(), axes.feature.end()),
        kGroupNorm, ": expected reduction_axes to contain the feature axes ",
        at::IntArrayRef(axes.feature), ", got ", *reduction_axes);
  }
  for (std::int64_t d = 0; d < input.dim(); ++d) {
    if (contains(axes.feature, d)) continue;
    const bool reduced = reduction_axes.has_value() ? contains(reduction, d) : d != 0;
    (reduced ? axes.reduced : axes.kept).push_back(d);
  }
  return axes;
}

template <class Int>
void check_mask(const char* op, const Tensor& mask, const Tensor& input) {
  check_device(op, "mask", mask, input);
  const auto sizes = sizes_of<Int>(input), mask_sizes = sizes_of<Int>(mask);
  const bool ok = mask_sizes.size() <= sizes.size() &&
                  std::equal(mask_sizes.rbegin(), mask_sizes.rend(), sizes.rbegin(),
                             [](const Int& m, const Int& x) { return broadcasts(m, x); });
  TORCH_CHECK_VALUE(ok, op, ": expected mask to broadcast to the input's shape ", sizes, ", got ",
                    mask_sizes);
}

// The rules that all norms share; `axes` says which norm it is.
template <class Int>
CheckedNorm<Int> check_norm(const char* op, const Operands& operands, Axes axes, double eps,
                            OptionalString activation, OptionalDType dtype) {
  const auto& input = operands.input;
  check_dtype(op, "input", input.scalar_type());
  const auto sizes = sizes_of<Int>(input);

  CheckedNorm<Int> norm;
  norm.samples = product<Int>(select(sizes, axes.kept));
  norm.channels = product<Int>(select(sizes, axes.feature));
  norm.num_groups = norm.channels;
  norm.eps = eps;
  norm.activation = parse_activation(op, activation);
  norm.dtype = dtype.value_or(input.scalar_type());
  norm.axes = std::move(axes);

  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0.0, op,
                    ": expected eps to be finite and not negative, got ", eps);
  check_not_wider(op, "dtype", norm.dtype, input);

  // One entry per channel, or per sample and channel where each sample has statistics of its own.
  const auto feature_shape = select(sizes, norm.axes.feature);
  auto sample_shape = select(sizes, norm.axes.kept);
  sample_shape.append(feature_shape.begin(), feature_shape.end());
  const auto is_per_sample = [&](const Tensor& t) {
    return !norm.axes.kept.empty() && t.dim() == static_cast<std::int64_t>(sample_shape.size());
  };
  const auto check_affine = [&](const char* name, const OptionalTensor& t) {
    if (!has(t)) return;
    check_device(op, name, *t, input);
    check_not_wider(op, name, t->scalar_type(), input);
    check_shape<Int>(op, name, *t, is_per_sample(*t) ? sample_shape : feature_shape);
  };
  check_affine("weight", operands.weight);
  check_affine("bias", operands.bias);
  const bool both = has(operands.weight) && has(operands.bias);
  TORCH_CHECK_VALUE(!both || operands.weight->dim() == operands.bias->dim(), op,
                    ": expected weight and bias to have the same shape, got ",
                    sizes_of<Int>(*operands.weight), " and ", sizes_of<Int>(*operands.bias));
  const auto& affine = has(operands.weight) ? operands.weight : operands.bias;
  norm.affine_per_sample = has(affine) && is_per_sample(*affine);

  if (has(operands.residual)) {
    check_device(op, "residual", *operands.residual, input);
    check_not_wider(op, "residual", operands.residual->scalar_type(), input);
    check_shape(op, "residual", *operands.residual, sizes);
  }
  if (has(operands.mask)) check_mask<Int>(op, *operands.mask, input);
  return norm;
}

template <class Int>
CheckedNorm<Int> check_batch_norm(const Operands& operands, at::IntArrayRef axis, double eps,
                                  OptionalString activation, OptionalDType dtype) {
  return check_norm<Int>(kBatchNorm, operands, batch_norm_axes(operands.input, axis), eps,
                         activation, dtype);
}

template <class Int>
void check_grad_output(const char* op, const Tensor& grad_output, const Tensor& input) {
  check_vector(op, "grad_output", grad_output, input, sizes_of<Int>(input));
  check_not_wider(op, "grad_output", grad_output.scalar_type(), input);
}

template <class Int>
void check_cotangents(const char* op, const Cotangents& cotangents, const Operands& operands) {
  const auto check = [&](const char* name, const OptionalTensor& t, const char* of,
                         const OptionalTensor& operand) {
    if (!has(t)) return;
    TORCH_CHECK_VALUE(has(operand), op, ": expected no ", name, " without ", of,
                      ", got one of shape ", sizes_of<Int>(*t));
    check_vector(op, name, *t, operands.input, sizes_of<Int>(*operand));
    check_not_wider(op, name, t->scalar_type(), operands.input);
  };
  check("grad_grad_input", cotangents.input, "input", operands.input);
  check("grad_grad_weight", cotangents.weight, "weight", operands.weight);
  check("grad_grad_bias", cotangents.bias, "bias", operands.bias);
  check("grad_grad_residual", cotangents.residual, "residual", operands.residual);
}

// What replaces the residual (relu_bits.h), in which order.
template <class Int>
void check_relu_bits_format(const Tensor& input, const CheckedNorm<Int>& norm,
                            at::MemoryFormat format) {
  TORCH_CHECK_VALUE(norm.activation == kernels::Activation::kReLU, kBatchNorm,
                    ": expected activation 'relu' with relu_bits, got ",
                    activation_name(norm.activation).value_or("None"));
  TORCH_CHECK_TYPE(input.scalar_type() != at::kDouble, kBatchNorm,
                   ": expected an input of dtype float32, bfloat16 or float16 with relu_bits, got "
                   "float64");
  const bool has_rank = format == at::MemoryFormat::Contiguous ||
                        (format == at::MemoryFormat::ChannelsLast && input.dim() == 4) ||
                        (format == at::MemoryFormat::ChannelsLast3d && input.dim() == 5);
  TORCH_CHECK_VALUE(has_rank, kBatchNorm,
                    ": expected relu_bits_format to be a dense format of rank ", input.dim(),
                    ", got ", format);
  TORCH_CHECK_VALUE(fits_relu_bits<Int>(input, norm.axes, format), kBatchNorm,
                    ": expected neighbours in memory of format ", format,
                    ", positions of a channel or channels of a position, to be a multiple of ",
                    elements_per_relu_byte(input), " with relu_bits, got shape ",
                    sizes_of<Int>(input), " with axis ", at::IntArrayRef(norm.axes.feature));
}

template <class Int>
void check_relu_bits(const Tensor& bits, const Operands& operands, const CheckedNorm<Int>& norm,
                     OptionalFormat format) {
  const auto& input = operands.input;
  TORCH_CHECK_VALUE(!has(operands.residual), kBatchNorm,
                    ": expected either residual or relu_bits, got both");
  TORCH_CHECK_VALUE(format.has_value(), kBatchNorm,
                    ": expected relu_bits_format with relu_bits, got None");
  check_relu_bits_format(input, norm, *format);
  const Sizes<Int> flat{product(sizes_of<Int>(input)) / Int(elements_per_relu_byte(input))};
  check_device(kBatchNorm, "relu_bits", bits, input);
  TORCH_CHECK_TYPE(bits.scalar_type() == at::kByte, kBatchNorm,
                   ": expected relu_bits to have dtype uint8, got ",
                   dtype_name(bits.scalar_type()));
  check_shape<Int>(kBatchNorm, "relu_bits", bits, flat);
}

template <class Int>
void check_running(const Tensor& running_mean, const Tensor& running_var, const Tensor& input,
                   const Axes& axes) {
  const auto shape = select(sizes_of<Int>(input), axes.feature);
  check_vector<Int>(kBatchNorm, "running_mean", running_mean, input, shape);
  check_vector<Int>(kBatchNorm, "running_var", running_var, input, shape);
}

// What is updated in place has a place for every value.
void check_writable(const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(at::has_internal_overlap(t) != at::MemOverlap::Yes, kBatchNorm, ": expected ",
                    name, " not to be expanded, got strides ", t.sym_strides());
}

void check_apart(const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  const auto has_symbols = [](const Tensor& tensor) {
    return tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  };
  if (has_symbols(t) || has_symbols(other)) return;  // nobody knows how far they reach
  const auto status = at::get_overlap_status(t, other);
  TORCH_CHECK_VALUE(status != at::MemOverlapStatus::Full && status != at::MemOverlapStatus::Partial,
                    kBatchNorm, ": expected ", name, " and ", other_name,
                    " in different memory, got tensors that overlap");
}

void check_counter(const Tensor& counter, const Tensor& input) {
  check_device(kBatchNorm, "num_batches_tracked", counter, input);
  TORCH_CHECK_TYPE(counter.scalar_type() == at::kLong, kBatchNorm,
                   ": expected num_batches_tracked to have dtype int64, got ",
                   dtype_name(counter.scalar_type()));
  TORCH_CHECK_VALUE(holds(counter.sym_numel().sym_eq(1)), kBatchNorm,
                    ": expected num_batches_tracked to have one element, got shape ",
                    counter.sym_sizes());
}

void check_cumulative(std::optional<double> momentum, const OptionalTensor& num_batches_tracked) {
  TORCH_CHECK_VALUE(momentum.has_value() || has(num_batches_tracked), kBatchNorm,
                    ": expected num_batches_tracked with momentum None (cumulative average), "
                    "got None");
}

void check_both(const OptionalTensor& running_mean, const OptionalTensor& running_var) {
  TORCH_CHECK_VALUE(has(running_mean) == has(running_var), kBatchNorm,
                    ": expected both or none of running_mean and running_var, got only ",
                    has(running_mean) ? "running_mean" : "running_var");
}

}  // namespace

template <class Int>
CheckedNorm<Int> Check<Int>::batch_norm_train(
    const Operands& operands, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, at::IntArrayRef axis, std::optional<double> momentum,
    double eps, OptionalString activation, OptionalDType dtype, OptionalFormat relu_bits_format) {
  auto norm = check_batch_norm<Int>(operands, axis, eps, activation, dtype);
  if (relu_bits_format) check_relu_bits_format(operands.input, norm, *relu_bits_format);
  check_both(running_mean, running_var);
  if (has(running_mean)) {
    check_running<Int>(*running_mean, *running_var, operands.input, norm.axes);
    check_writable("running_mean", *running_mean);
    check_writable("running_var", *running_var);
    check_apart("running_mean", *running_mean, "running_var", *running_var);
    check_apart("running_mean", *running_mean, "input", operands.input);
    check_apart("running_var", *running_var, "input", operands.input);
    check_cumulative(momentum, num_batches_tracked);
  }
  if (has(num_batches_tracked)) check_counter(*num_batches_tracked, operands.input);
  return norm;
}

template <class Int>
CheckedNorm<Int> Check<Int>::batch_norm_eval(const Operands& operands, const Tensor& running_mean,
                                             const Tensor& running_var, at::IntArrayRef axis,
                                             double eps, OptionalString activation,
                                             OptionalDType dtype) {
  auto norm = check_batch_norm<Int>(operands, axis, eps, activation, dtype);
  check_running<Int>(running_mean, running_var, operands.input, norm.axes);
  return norm;
}

template <class Int>
CheckedNorm<Int> Check<Int>::batch_norm_backward(
    const Tensor& grad_output, const Operands& operands, const Tensor& mean, const Tensor& rstd,
    at::IntArrayRef axis, bool batch_statistics, double eps, OptionalString activation,
    const OptionalTensor& relu_bits, OptionalFormat relu_bits_format) {
  const auto& input = operands.input;
  auto norm = check_batch_norm<Int>(operands, axis, eps, activation, std::nullopt);
  check_grad_output<Int>(kBatchNorm, grad_output, input);
  const Sizes<Int> flat{norm.channels};
  if (batch_statistics) {
    check_saved<Int>(kBatchNorm, "mean", mean, input, flat, at::kDouble);
  } else {
    check_vector<Int>(kBatchNorm, "mean", mean, input,
                      select(sizes_of<Int>(input), norm.axes.feature));
  }
  check_saved<Int>(kBatchNorm, "rstd", rstd, input, flat, compute_dtype(input.scalar_type()));
  if (has(relu_bits)) check_relu_bits(*relu_bits, operands, norm, relu_bits_format);
  return norm;
}

template <class Int>
CheckedNorm<Int> Check<Int>::group_norm(const Operands& operands, std::int64_t num_groups,
                                        at::IntArrayRef axis,
                                        at::OptionalIntArrayRef reduction_axes, double eps,
                                        OptionalString activation, OptionalDType dtype) {
  auto norm =
      check_norm<Int>(kGroupNorm, operands, group_norm_axes(operands.input, axis, reduction_axes),
                      eps, activation, dtype);
  TORCH_CHECK_VALUE(num_groups > 0, kGroupNorm, ": expected num_groups to be positive, got ",
                    num_groups);
  TORCH_CHECK_VALUE(equal(Int(norm.channels % Int(num_groups)), Int(0)), kGroupNorm,
                    ": expected num_groups to divide the number of channels (", norm.channels,
                    "), got ", num_groups);
  norm.num_groups = num_groups;
  norm.group_size = norm.channels / Int(num_groups);
  return norm;
}

template <class Int>
CheckedNorm<Int> Check<Int>::group_norm_backward(const Tensor& grad_output,
                                                 const Operands& operands, const Tensor& mean,
                                                 const Tensor& rstd, std::int64_t num_groups,
                                                 at::IntArrayRef axis,
                                                 at::OptionalIntArrayRef reduction_axes, double eps,
                                                 OptionalString activation) {
  const auto& input = operands.input;
  auto norm = group_norm(operands, num_groups, axis, reduction_axes, eps, activation, std::nullopt);
  check_grad_output<Int>(kGroupNorm, grad_output, input);
  const Sizes<Int> per_group{norm.samples, norm.num_groups};
  check_saved<Int>(kGroupNorm, "mean", mean, input, per_group, at::kDouble);
  check_saved<Int>(kGroupNorm, "rstd", rstd, input, per_group, compute_dtype(input.scalar_type()));
  return norm;
}

template <class Int>
CheckedNorm<Int> Check<Int>::batch_norm_double_backward(const Cotangents& cotangents,
                                                        const Tensor& grad_output,
                                                        const Operands& operands,
                                                        const Tensor& mean, const Tensor& rstd,
                                                        at::IntArrayRef axis, bool batch_statistics,
                                                        double eps, OptionalString activation) {
  auto norm = batch_norm_backward(grad_output, operands, mean, rstd, axis, batch_statistics, eps,
                                  activation);
  check_cotangents<Int>(kBatchNorm, cotangents, operands);
  return norm;
}

template <class Int>
CheckedNorm<Int> Check<Int>::group_norm_double_backward(
    const Cotangents& cotangents, const Tensor& grad_output, const Operands& operands,
    const Tensor& mean, const Tensor& rstd, std::int64_t num_groups, at::IntArrayRef axis,
    at::OptionalIntArrayRef reduction_axes, double eps, OptionalString activation) {
  auto norm = group_norm_backward(grad_output, operands, mean, rstd, num_groups, axis,
                                  reduction_axes, eps, activation);
  check_cotangents<Int>(kGroupNorm, cotangents, operands);
  return norm;
}

template <class Int>
CheckedNorm<Int> Check<Int>::sync(const Operands& operands, std::int64_t num_groups,
                                  at::IntArrayRef axis, at::OptionalIntArrayRef reduction_axes,
                                  double eps, OptionalString activation, OptionalDType dtype,
                                  const Tensor& grad_output,
                                  std::initializer_list<OfSlices> saved) {
  const auto& input = operands.input;
  const char* const op = norm_name(num_groups);
  auto norm = num_groups == 0
                  ? check_batch_norm<Int>(operands, axis, eps, activation, dtype)
                  : group_norm(operands, num_groups, axis, reduction_axes, eps, activation, dtype);
  if (grad_output.defined()) check_grad_output<Int>(op, grad_output, input);
  for (const auto& [name, values, per_slice, value_dtype] : saved) {
    Sizes<Int> shape{norm.samples * norm.num_groups};
    if (per_slice != 0) shape.push_back(per_slice);
    check_saved<Int>(op, name, values, input, shape, value_dtype);
  }
  return norm;
}

template <class Int>
void Check<Int>::sync_statistics(const Tensor& own, const Tensor& total,
                                 const RunningState& running, std::optional<double> momentum) {
  const auto& [mean, var, num_batches_tracked] = running;
  TORCH_CHECK_VALUE(own.dim() == 2, kBatchNorm, ": expected own to have 2 axes, got ", own.dim());
  const Int slices = sizes_of<Int>(own)[0];
  const Sizes<Int> sums{slices, kMomentSums};
  check_saved<Int>(kBatchNorm, "own", own, own, sums, at::kDouble);
  check_saved<Int>(kBatchNorm, "total", total, own, sums, at::kDouble);
  check_both(mean, var);
  for (const auto& [name, t] : {std::pair("running_mean", mean), std::pair("running_var", var)}) {
    if (!has(t)) continue;
    check_device(kBatchNorm, name, *t, own);
    check_dtype(kBatchNorm, name, t->scalar_type());
    TORCH_CHECK_VALUE(equal(product(sizes_of<Int>(*t)), slices), kBatchNorm, ": expected ", name,
                      " to have ", slices, " elements, got shape ", sizes_of<Int>(*t));
    check_writable(name, *t);
  }
  if (has(mean)) {
    check_apart("running_mean", *mean, "running_var", *var);
    check_cumulative(momentum, num_batches_tracked);
  }
  if (has(num_batches_tracked)) check_counter(*num_batches_tracked, own);
}

void check_ignored_mask(const OptionalTensor& mask, const Tensor& input) {
  if (has(mask)) check_mask<c10::SymInt>(kBatchNorm, *mask, input);
}

void check_no_grad(const char* op, const OptionalTensor& running_mean,
                   const OptionalTensor& running_var) {
  if (!c10::GradMode::is_enabled()) return;
  const auto check = [&](const char* name, const OptionalTensor& t) {
    TORCH_CHECK_VALUE(!has(t) || !t->requires_grad(), op, ": expected ", name,
                      " not to require grad, got requires_grad=True");
  };
  check("running_mean", running_mean);
  check("running_var", running_var);
}

void check_no_tangent(const char* op, const char* names, const OptionalTensor& mean,
                      const OptionalTensor& spread) {
  const auto has_tangent = [](const OptionalTensor& t) {
    return has(t) && t->_fw_grad(/*level=*/0).defined();
  };
  TORCH_CHECK_VALUE(!has_tangent(mean) && !has_tangent(spread), op, ": expected ", names,
                    " without a tangent of forward-mode differentiation");
}

Tensor promote_input(const Tensor& input, std::initializer_list<const OptionalTensor*> others,
                     OptionalDType dtype) {
  const bool wanted =
      dtype == at::kDouble || std::any_of(others.begin(), others.end(), [](const auto* t) {
        return has(*t) && (*t)->scalar_type() == at::kDouble;
      });
  return wanted && is_supported(input.scalar_type()) ? input.to(at::kDouble) : input;
}

std::vector<std::string> activation_names() {
  std::vector<std::string> names;
  for (const auto& [name, activation] : kActivations) names.emplace_back(name);
  return names;
}

kernels::Activation parse_activation(const char* op, OptionalString name) {
  if (!name.has_value()) return kernels::Activation::kNone;
  for (const auto& [known, activation] : kActivations) {
    if (*name == known) return activation;
  }
  TORCH_CHECK_VALUE(false, op,
                    ": expected activation to be None, relu, silu, gelu or gelu_tanh, got ", *name);
}

OptionalString activation_name(kernels::Activation activation) {
  for (const auto& [name, known] : kActivations) {
    if (activation == known) return name;
  }
  return std::nullopt;
}

template struct Check<std::int64_t>;
template struct Check<c10::SymInt>;

}  // namespace normcore
