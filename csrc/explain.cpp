#include "normcore/explain.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <sstream>

#include "backend.h"
#include "checks.h"
#include "mapping.h"

namespace normcore {
namespace {

const char* pass_name(kernels::Pass pass) {
  switch (pass) {
    case kernels::Pass::kForward:
      return "forward";
    case kernels::Pass::kInference:
      return "inference";
    case kernels::Pass::kBackward:
      return "backward";
    case kernels::Pass::kDoubleBackward:
      return "double backward";
  }
  TORCH_INTERNAL_ASSERT(false, "unknown pass");
}

CheckedNorm<std::int64_t> check(const Tensor& input, bool is_group_norm,
                                const ExplainOptions& options) {
  const OptionalTensor none;
  const OptionalTensor mask =
      options.mask().defined() ? OptionalTensor(options.mask()) : std::nullopt;
  const Operands operands{input, none, none, none, mask};
  constexpr double kEps = 1e-5;
  const OptionalString activation =
      options.activation() ? OptionalString(*options.activation()) : std::nullopt;
  if (is_group_norm) {
    const at::OptionalIntArrayRef reduction_axes =
        options.reduction_axes() ? at::OptionalIntArrayRef(options.reduction_axes()->vec())
                                 : std::nullopt;
    return Check<std::int64_t>::group_norm(operands, options.num_groups(), options.axis(),
                                           reduction_axes, kEps, activation, std::nullopt);
  }
  return Check<std::int64_t>::batch_norm_train(operands, none, none, none, options.axis(), 0.1,
                                               kEps, activation, std::nullopt);
}

std::string explain_op(const Tensor& input, std::string_view op, at::IntArrayRef axis,
                       std::int64_t num_groups, at::OptionalIntArrayRef reduction_axes,
                       const OptionalTensor& mask, OptionalString activation,
                       bool affine_per_sample, bool training, bool backward,
                       std::optional<c10::Device> device) {
  auto options = ExplainOptions()
                     .axis(axis.vec())
                     .num_groups(num_groups)
                     .mask(value_or_undefined(mask))
                     .affine_per_sample(affine_per_sample)
                     .training(training)
                     .backward(backward)
                     .device(device);
  if (activation) options.activation(std::string(*activation));
  if (reduction_axes) options.reduction_axes(IntList(reduction_axes->vec()));
  return explain(input, std::string(op), options);
}

}  // namespace

std::string explain(const Tensor& input, const std::string& op, const ExplainOptions& options) {
  const bool is_group_norm = op == "group_norm";
  TORCH_CHECK_VALUE(is_group_norm || op == "batch_norm",
                    "explain: expected op to be batch_norm or group_norm, got ", op);
  const auto norm = check(input, is_group_norm, options);
  TORCH_CHECK_VALUE(!options.affine_per_sample() || is_group_norm,
                    "explain: expected affine_per_sample with group_norm only, got ", op);
  if (input.numel() == 0) return op + ": nothing to do for an empty input";

  const Mapping mapping(input, norm.axes, is_group_norm ? Samples::kKept : Samples::kReduced);
  kernels::Problem problem;
  problem.extent = mapping.extent();
  problem.layout = mapping.layout();
  problem.dtype = backend::to_dtype(input.scalar_type());
  problem.num_groups = is_group_norm ? norm.num_groups : 0;
  problem.affine_per_sample = options.affine_per_sample();
  problem.activation = norm.activation;
  const bool has_batch_statistics = is_group_norm || options.training();
  if (options.mask().defined() && has_batch_statistics) {
    problem.mask =
        mapping.is_row_mask(options.mask()) ? kernels::MaskKind::kRow : kernels::MaskKind::kElement;
  }
  problem.pass = options.backward()     ? kernels::Pass::kBackward
                 : has_batch_statistics ? kernels::Pass::kForward
                                        : kernels::Pass::kInference;
  const bool is_copied = !mapping.reads(input);
  problem.aligned = is_copied || backend::is_aligned(input);

  const auto device = options.device().value_or(input.device());
  const auto& [n, c, s] = problem.extent;
  std::ostringstream text;
  text << op << ' ' << pass_name(problem.pass) << " on " << device << ", "
       << c10::getDtypeNames(input.scalar_type()).first << ' ' << input.sizes()
       << (is_copied ? " copied to" : " as") << " n=" << n << " c=" << c << " s=" << s
       << (problem.layout == kernels::Layout::kNCS ? " planes" : " rows") << ": "
       << backend::describe_plan(problem, device);
  return text.str();
}

TORCH_LIBRARY_IMPL(normcore, CompositeImplicitAutograd, m) {
  m.impl("explain", TORCH_FN(explain_op));
}

}  // namespace normcore
