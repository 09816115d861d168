#include "normcore/modules.h"

#include <ATen/Functions.h>
#include <ATen/core/DimVector.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <sstream>
#include <string>

#include "checks.h"
#include "normcore/ops.h"
#include "normcore/settings.h"
#include "process_group.h"

namespace normcore {
namespace {

constexpr std::int64_t kDefaultNumGroups = 32;

// The process group of a module's axis; none: this process alone.
template <class Options>
OptionalGroup group_of(const char* module, const Options& options) {
  if (!options.axis_name()) return std::nullopt;
  const auto group = group_of_axis(module, *options.axis_name());
  const auto ranks = check_ranks(module, group, options.sync_weighting());
  if (!ranks) return std::nullopt;
  if (!options.axis_index_groups()) return group;
  // A partition of as many indices, as the constructor has checked.
  const auto& parts = *options.axis_index_groups();
  std::int64_t indices = 0;
  for (const auto& part : parts) indices += static_cast<std::int64_t>(part.size());
  TORCH_CHECK_VALUE(indices == ranks.size, module,
                    ": expected axis_index_groups to be a partition of the ", ranks.size,
                    " ranks of axis_name, got ", parts);
  if (parts.size() == 1) return group;
  TORCH_CHECK_NOT_IMPLEMENTED(
      static_cast<std::int64_t>(parts.size()) == ranks.size, module,
      ": expected axis_index_groups to be one group or one of each rank, got ", parts,
      "; register a process group for each of them, and name that of this rank as axis_name");
  return std::nullopt;
}

std::int64_t product(at::IntArrayRef sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), std::int64_t{1}, std::multiplies<>());
}

// The axes in ascending order; `given` is how the user wrote them.
at::DimVector sorted_axes(const char* module, at::DimVector axes, at::IntArrayRef given) {
  std::sort(axes.begin(), axes.end());
  TORCH_CHECK_VALUE(std::adjacent_find(axes.begin(), axes.end()) == axes.end(), module,
                    ": expected axis without duplicates, got ", given);
  return axes;
}

// The sizes of x along `axis`, in ascending order of the axes.
at::DimVector feature_sizes(const char* module, const at::Tensor& x, at::IntArrayRef axis) {
  TORCH_CHECK_VALUE(x.defined(), module,
                    ": expected x to be a defined tensor, got an undefined one");
  const auto rank = x.dim();
  at::DimVector axes;
  for (const auto a : axis) {
    TORCH_CHECK_INDEX(-rank <= a && a < rank, module, ": expected axis in [", -rank, ", ", rank - 1,
                      "] for an input of rank ", rank, ", got ", a);
    axes.push_back(a < 0 ? a + rank : a);
  }
  at::DimVector sizes;
  for (const auto a : sorted_axes(module, std::move(axes), axis)) sizes.push_back(x.size(a));
  return sizes;
}

// Whether the one feature axis of x has the expected size: what nearly every call asks, at the cost
// of some compares. False also if this is not the question.
bool fits_one_axis(const at::Tensor& x, at::IntArrayRef expected, at::IntArrayRef axis) {
  if (!x.defined() || expected.size() != 1 || axis.size() != 1) return false;
  const auto sizes = x.sizes();
  const auto rank = static_cast<std::int64_t>(sizes.size());
  const auto a = axis[0] < 0 ? axis[0] + rank : axis[0];
  return 0 <= a && a < rank && sizes[a] == expected[0];
}

// The sizes themselves, not their product: of [2, 3] and [3, 2], only one fits the state.
void check_feature_sizes(const char* module, at::IntArrayRef sizes, at::IntArrayRef expected,
                         at::IntArrayRef axis) {
  if (sizes == expected) return;
  TORCH_CHECK_VALUE(sizes.size() != 1 || expected.size() != 1, module, ": expected ",
                    expected.front(), " features on axis ", axis, ", got ", sizes.front());
  TORCH_CHECK_VALUE(false, module, ": expected features of shape ", expected, " on axis ", axis,
                    ", got ", sizes);
}

using RankGroups = std::vector<std::vector<std::int64_t>>;

// Whether the groups hold each of the ranks 0..N-1 once, for some N, and none is empty.
bool is_partition(const RankGroups& groups) {
  std::vector<std::int64_t> ranks;
  for (const auto& group : groups) {
    if (group.empty()) return false;
    ranks.insert(ranks.end(), group.begin(), group.end());
  }
  std::sort(ranks.begin(), ranks.end());
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    if (ranks[i] != static_cast<std::int64_t>(i)) return false;
  }
  return !ranks.empty();
}

void check_group_options(const GroupNormOptions& options) {
  const auto num_groups = options.num_groups(), group_size = options.group_size();
  TORCH_CHECK_VALUE(!num_groups || !group_size, GroupNormImpl::kName,
                    ": expected either num_groups or group_size to be given, got num_groups=",
                    *num_groups, " and group_size=", *group_size);
  TORCH_CHECK_VALUE(num_groups.value_or(1) > 0, GroupNormImpl::kName,
                    ": expected num_groups to be positive, got ", *num_groups);
  TORCH_CHECK_VALUE(group_size.value_or(1) > 0, GroupNormImpl::kName,
                    ": expected group_size to be positive, got ", *group_size);
}

// Into how many groups the options divide the channels. The options may have changed since the
// constructor has checked them.
std::int64_t count_groups(const GroupNormOptions& options, std::int64_t channels) {
  check_group_options(options);
  const auto group_size = options.group_size();
  const auto divisor = group_size ? *group_size : options.num_groups().value_or(kDefaultNumGroups);
  TORCH_CHECK_VALUE(channels % divisor == 0, GroupNormImpl::kName, ": expected ",
                    group_size ? "group_size" : "num_groups", " to divide the number of channels (",
                    channels, "), got ", divisor);
  return group_size ? channels / divisor : divisor;
}

bool is_half(at::ScalarType dtype) { return dtype == at::kHalf || dtype == at::kBFloat16; }

void set_requires_grad(const at::Tensor& parameter, bool requires_grad) {
  if (parameter.defined()) parameter.set_requires_grad(requires_grad);
}

Initializer constant(double value) {
  return [value](at::Tensor tensor) { tensor.fill_(value); };
}

std::ostream& operator<<(std::ostream& stream, const IntList& list) {
  const at::IntArrayRef values = list;
  return values.size() == 1 ? stream << values.front() : stream << values;
}

std::ostream& operator<<(std::ostream& stream, const RankGroups& groups) {
  const char* separator = "[";
  for (const auto& group : groups) {
    stream << separator << at::IntArrayRef(group);
    separator = ", ";
  }
  return stream << (groups.empty() ? "[]" : "]");
}

// As pretty_print() writes it; TORCH_CHECK does not find the operators above.
template <class T>
std::string text(const T& value) {
  std::ostringstream stream;
  stream << value;
  return stream.str();
}

std::string dtype_name(at::ScalarType dtype) {
  return std::string(c10::getDtypeNames(dtype).first);
}

template <class T>
void print_optional(std::ostream& stream, const char* name, const std::optional<T>& value) {
  if (value) stream << ", " << name << '=' << *value;
}

}  // namespace

namespace detail {

template <class Derived, class Options>
NormImpl<Derived, Options>::NormImpl(Options options) : options(std::move(options)) {
  const auto& o = this->options;
  TORCH_CHECK_VALUE(o.sync_weighting() == "count" || o.sync_weighting() == "rank", Derived::kName,
                    ": expected sync_weighting to be 'count' or 'rank', got '", o.sync_weighting(),
                    "'");
  if (const auto& groups = o.axis_index_groups()) {
    TORCH_CHECK_VALUE(o.axis_name(), Derived::kName,
                      ": expected axis_name to be given with axis_index_groups, got None");
    TORCH_CHECK_VALUE(is_partition(*groups), Derived::kName,
                      ": expected axis_index_groups to be a partition of the ranks 0..N-1, got ",
                      text(*groups));
  }
  parse_activation(Derived::kName, o.activation());
  TORCH_CHECK_VALUE(std::isfinite(o.epsilon()) && o.epsilon() >= 0.0, Derived::kName,
                    ": expected epsilon to be finite and >= 0, got ", o.epsilon());
  TORCH_CHECK_VALUE(!o.dtype() || at::isFloatingType(*o.dtype()), Derived::kName,
                    ": expected dtype to be None or floating point, got ", dtype_name(*o.dtype()));
  TORCH_CHECK_VALUE(at::isFloatingType(o.param_dtype()), Derived::kName,
                    ": expected param_dtype to be floating point, got ",
                    dtype_name(o.param_dtype()));
  const at::IntArrayRef axis = o.axis();
  TORCH_CHECK_VALUE(!axis.empty(), Derived::kName, ": expected at least one axis, got []");
  sorted_axes(Derived::kName, at::DimVector(axis), axis);
  if (const auto& features = o.num_features()) {
    const at::IntArrayRef sizes = *features;
    TORCH_CHECK_VALUE(std::all_of(sizes.begin(), sizes.end(), [](auto n) { return n > 0; }),
                      Derived::kName, ": expected num_features to be positive, got ",
                      text(*features));
  }
}

template <class Derived, class Options>
void NormImpl<Derived, Options>::create() {
  if (options.num_features()) {
    create(options.num_features()->vec(), options.device().value_or(at::kCPU), [] {});
  }
}

// Nothing can be unregistered again, so that has to wait until `use`, the first use, has succeeded.
template <class Derived, class Options>
template <class Use>
void NormImpl<Derived, Options>::create(std::vector<std::int64_t> features, c10::Device device,
                                        const Use& use) {
  check_features(features);
  const auto given_features = options.num_features();
  const auto given_device = options.device();
  const auto state = this->state();
  try {
    options.num_features(std::move(features));
    options.device(device);
    const auto values = initial_values(state);
    for (std::size_t i = 0; i < state.size(); ++i) state[i].tensor = values[i];
    use();
    assign(state, values);
  } catch (...) {
    for (const auto& entry : state) entry.tensor.reset();
    options.num_features(given_features);
    options.device(given_device);
    throw;
  }
  initialized_ = true;
}

template <class Derived, class Options>
template <class Use>
void NormImpl<Derived, Options>::init(const at::Tensor& x, const Use& use) {
  if (initialized_ && fits_one_axis(x, *options.num_features(), options.axis())) return use();
  const auto sizes = feature_sizes(Derived::kName, x, options.axis());
  if (!initialized_) {
    return create({sizes.begin(), sizes.end()}, options.device().value_or(x.device()), use);
  }
  check_feature_sizes(Derived::kName, sizes, *options.num_features(), options.axis());
  use();
}

template <class Derived, class Options>
void NormImpl<Derived, Options>::init(const at::Tensor& x) {
  init(x, [] {});
}

template <class Derived, class Options>
void NormImpl<Derived, Options>::check_features(at::IntArrayRef features) const {
  TORCH_CHECK_VALUE(features.size() == options.axis().vec().size(), Derived::kName,
                    ": expected num_features to hold one size for each axis of ",
                    at::IntArrayRef(options.axis()), ", got ", text(IntList(features.vec())));
}

template <class Derived, class Options>
auto NormImpl<Derived, Options>::state() -> std::vector<State> {
  const auto or_constant = [](const Initializer& given, double value) {
    return given ? given : constant(value);
  };
  std::vector<State> state;
  if (options.use_scale()) {
    state.push_back({"scale", scale, true, or_constant(options.scale_init(), 1.0)});
  }
  if (options.use_bias()) {
    state.push_back({"bias", bias, true, or_constant(options.bias_init(), 0.0)});
  }
  return state;
}

// Initialized tensors for all state, which are not part of the module yet.
template <class Derived, class Options>
std::vector<at::Tensor> NormImpl<Derived, Options>::initial_values(
    const std::vector<State>& state) const {
  at::NoGradGuard no_grad;
  std::vector<at::Tensor> values;
  for (const auto& [name, tensor, is_parameter, initialize] : state) {
    const auto dtype = is_parameter ? options.param_dtype() : statistics_dtype_;
    auto value = tensor.defined() ? tensor.detach().clone()
                                  : at::empty(*options.num_features(),
                                              at::device(*options.device()).dtype(dtype));
    if (is_parameter) {
      value.set_requires_grad(tensor.defined() ? tensor.requires_grad() : !required_grad_);
    }
    initialize(value);
    values.push_back(std::move(value));
  }
  return values;
}

// Copies the values into the state that is registered, and registers them where none is.
template <class Derived, class Options>
void NormImpl<Derived, Options>::assign(const std::vector<State>& state,
                                        const std::vector<at::Tensor>& values) {
  at::NoGradGuard no_grad;
  const auto parameters = this->named_parameters(/*recurse=*/false);
  const auto buffers = this->named_buffers(/*recurse=*/false);
  for (std::size_t i = 0; i < state.size(); ++i) {
    const auto& [name, tensor, is_parameter, initialize] = state[i];
    if ((is_parameter ? parameters : buffers).contains(name)) {
      tensor.copy_(values[i]);
    } else if (is_parameter) {
      tensor = this->register_parameter(name, values[i], values[i].requires_grad());
    } else {
      tensor = this->register_buffer(name, values[i]);
    }
  }
}

// Also called on a copy that clone() is making: its members still are those of the original, but
// nothing is registered. Then the new tensors take their dtype, device and requires_grad.
template <class Derived, class Options>
void NormImpl<Derived, Options>::reset() {
  if (!initialized_) return;
  const auto state = this->state();
  assign(state, initial_values(state));
}

template <class Derived, class Options>
void NormImpl<Derived, Options>::freeze(bool mode, bool affine) {
  if (required_grad_) {
    set_requires_grad(scale, required_grad_->first);
    set_requires_grad(bias, required_grad_->second);
    required_grad_.reset();
  }
  frozen_ = mode;
  if (mode && affine) {
    const auto requires_grad = [](const at::Tensor& t) {
      return !t.defined() || t.requires_grad();
    };
    required_grad_.emplace(requires_grad(scale), requires_grad(bias));
    set_requires_grad(scale, false);
    set_requires_grad(bias, false);
  }
}

template <class Derived, class Options>
void NormImpl<Derived, Options>::load(torch::serialize::InputArchive& archive) {
  const auto state = this->state();
  std::vector<at::Tensor> values(state.size());
  bool any = false;
  for (std::size_t i = 0; i < state.size(); ++i) {
    any |= archive.try_read(state[i].name, values[i], /*is_buffer=*/!state[i].is_parameter);
  }
  if (!initialized_ && !any) return;  // saved by a module that was lazy, too

  at::IntArrayRef shape;
  for (std::size_t i = 0; i < state.size(); ++i) {
    TORCH_CHECK(values[i].defined(), Derived::kName, ": expected ", state[i].name,
                " in the archive, found none");
    if (i == 0) shape = initialized_ ? at::IntArrayRef(*options.num_features()) : values[0].sizes();
    TORCH_CHECK_VALUE(values[i].sizes() == shape, Derived::kName, ": expected ", state[i].name,
                      " to have shape ", shape, ", got ", values[i].sizes());
  }
  const auto copy = [&] {
    at::NoGradGuard no_grad;
    for (std::size_t i = 0; i < state.size(); ++i) state[i].tensor.copy_(values[i]);
  };
  if (initialized_) return copy();
  create(shape.vec(), options.device().value_or(values.front().device()), copy);
}

template <class Derived, class Options>
template <class Convert>
void NormImpl<Derived, Options>::convert(at::ScalarType dtype, const Convert& convert_all) {
  TORCH_CHECK_TYPE(at::isFloatingType(dtype), Derived::kName,
                   ": expected dtype to be floating point, got ", dtype_name(dtype));
  std::vector<std::pair<at::Tensor, at::Tensor>> kept;
  for (const auto& [name, tensor, is_parameter, initialize] : state()) {
    if (is_half(dtype) && !is_parameter && tensor.defined()) {
      kept.emplace_back(tensor, tensor.detach());
    }
  }
  convert_all();
  for (const auto& [tensor, value] : kept) tensor.set_data(value.to(tensor.device()));
  options.param_dtype(dtype);
  if (!is_half(dtype)) statistics_dtype_ = dtype;
}

template <class Derived, class Options>
void NormImpl<Derived, Options>::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  convert(dtype, [&] { torch::nn::Module::to(device, dtype, non_blocking); });
  options.device(device);
}

template <class Derived, class Options>
void NormImpl<Derived, Options>::to(torch::Dtype dtype, bool non_blocking) {
  convert(dtype, [&] { torch::nn::Module::to(dtype, non_blocking); });
}

template <class Derived, class Options>
void NormImpl<Derived, Options>::to(torch::Device device, bool non_blocking) {
  torch::nn::Module::to(device, non_blocking);
  options.device(device);
}

template <class Derived, class Options>
void NormImpl<Derived, Options>::pretty_print(std::ostream& stream) const {
  stream << "normcore::" << Derived::kName << "(num_features=";
  if (options.num_features()) {
    stream << *options.num_features();
  } else {
    stream << "None";
  }
  stream << ", axis=" << options.axis();
  print_options(stream);
  stream << ", epsilon=" << options.epsilon();
  if (!options.dtype()) {
    stream << ", dtype=None";
  } else if (*options.dtype() != at::kFloat) {
    stream << ", dtype=" << dtype_name(*options.dtype());
  }
  if (options.param_dtype() != at::kFloat) {
    stream << ", param_dtype=" << dtype_name(options.param_dtype());
  }
  if (!options.use_bias()) stream << ", use_bias=false";
  if (!options.use_scale()) stream << ", use_scale=false";
  print_optional(stream, "axis_name", options.axis_name());
  print_optional(stream, "axis_index_groups", options.axis_index_groups());
  if (options.sync_weighting() != "count") {
    stream << ", sync_weighting=" << options.sync_weighting();
  }
  print_optional(stream, "activation", options.activation());
  if (frozen_) stream << ", frozen=true";
  stream << ')';
}

template <class Derived, class Options>
at::ScalarType NormImpl<Derived, Options>::result_dtype(const at::Tensor& x) const {
  if (options.dtype()) return *options.dtype();
  auto dtype = x.scalar_type();
  for (const auto& parameter : {scale, bias}) {
    if (parameter.defined()) dtype = c10::promoteTypes(dtype, parameter.scalar_type());
  }
  return c10::isIntegralType(dtype, /*includeBool=*/true) ? at::kFloat : dtype;
}

template <class Derived, class Options>
at::Tensor NormImpl<Derived, Options>::floating_point(const at::Tensor& x) const {
  if (x.is_floating_point() || x.is_complex()) return x;
  return x.to(c10::promoteTypes(result_dtype(x), at::kFloat));
}

template class NormImpl<BatchNormImpl, BatchNormOptions>;
template class NormImpl<GroupNormImpl, GroupNormOptions>;

}  // namespace detail

BatchNormImpl::BatchNormImpl(BatchNormOptions options) : NormImpl(std::move(options)) { create(); }

auto BatchNormImpl::state() -> std::vector<State> {
  auto state = NormImpl::state();
  state.push_back({"mean", mean, false, constant(0.0)});
  state.push_back({"var", var, false, constant(1.0)});
  return state;
}

void BatchNormImpl::print_options(std::ostream& stream) const {
  stream << ", momentum=" << options.momentum();
}

at::Tensor BatchNormImpl::forward(const at::Tensor& x, std::optional<bool> use_running_average,
                                  const at::Tensor& mask, const at::Tensor& residual) {
  at::Tensor y;
  init(x, [&] {
    const bool batch = use_running_average ? !*use_running_average : is_training() && !is_frozen();
    const auto group = batch || debug_sync() ? group_of(kName, options) : std::nullopt;
    y = normcore::batch_norm(floating_point(x), mean, var, scale, bias,
                             BatchNormFuncOptions()
                                 .training(batch)
                                 .momentum(1.0 - options.momentum())
                                 .eps(options.epsilon())
                                 .axis(options.axis())
                                 .mask(mask)
                                 .activation(options.activation())
                                 .residual(residual)
                                 .unbiased(false)
                                 .dtype(result_dtype(x))
                                 .group(group)
                                 .sync_weighting(options.sync_weighting()));
  });
  return y;
}

GroupNormImpl::GroupNormImpl(GroupNormOptions options) : NormImpl(std::move(options)) {
  check_group_options(this->options);
  create();
}

void GroupNormImpl::check_features(at::IntArrayRef features) const {
  NormImpl::check_features(features);
  count_groups(options, product(features));
}

void GroupNormImpl::print_options(std::ostream& stream) const {
  if (options.group_size()) {
    stream << ", group_size=" << *options.group_size();
  } else {
    stream << ", num_groups=" << options.num_groups().value_or(kDefaultNumGroups);
  }
  print_optional(stream, "reduction_axes", options.reduction_axes());
}

at::Tensor GroupNormImpl::forward(const at::Tensor& x, const at::Tensor& mask,
                                  const at::Tensor& residual) {
  at::Tensor y;
  init(x, [&] {
    const auto num_groups = count_groups(options, product(*options.num_features()));
    y = normcore::group_norm(floating_point(x), num_groups, scale, bias,
                             GroupNormFuncOptions()
                                 .eps(options.epsilon())
                                 .axis(options.axis())
                                 .reduction_axes(options.reduction_axes())
                                 .mask(mask)
                                 .activation(options.activation())
                                 .residual(residual)
                                 .dtype(result_dtype(x))
                                 .group(group_of(kName, options))
                                 .sync_weighting(options.sync_weighting()));
  });
  return y;
}

}  // namespace normcore
