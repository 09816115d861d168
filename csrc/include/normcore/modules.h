// Batch and group normalization as torch::nn modules with the semantics of treex and Flax linen:
// any feature axis, features taken from the first input if they are left open, decay-style
// momentum, the biased running variance, freezing that survives train(). Options, defaults, state
// names and bits are those of the Python modules normcore.BatchNorm and normcore.GroupNorm.
//   y = activation((x - mean) * (rstd * scale) + bias + residual),   rstd = 1 / sqrt(var + epsilon)
// x: any rank >= 1; float64, float32, bfloat16, float16 or an integer dtype; y has its shape and
// memory format. Statistics and arithmetic are at least float32, with one rounding at the end.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any_value.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <optional>
#include <ostream>
#include <utility>
#include <vector>

#include "normcore/export.h"
#include "normcore/options.h"

namespace normcore {
namespace detail {

/// What both norms share: the affine parameters, lazy features, freezing, and the rules for
/// conversion, cloning, serialization and printing.
template <class Derived, class Options>
class NORMCORE_API NormImpl : public torch::nn::Cloneable<Derived> {
 public:
  /// Gives parameters and statistics their initial values, in place. Nothing for a lazy module.
  /// Changes nothing if an initializer throws.
  void reset() override;

  /// Takes the number of features from `x`, if it is open yet, else checks it. Updates no
  /// statistics. A module without num_features has no parameters before this or its first
  /// forward(), so call it before making the optimizer.
  void init(const at::Tensor& x);

  /// Whether the number of features is known, so that parameters and statistics exist.
  bool is_initialized() const noexcept { return initialized_; }

  /// Freezes the statistics and, with `affine`, sets requires_grad to false on scale and bias. It
  /// survives train(); unfreeze() restores the former requires_grad.
  void freeze(bool mode = true, bool affine = true);

  /// Undoes freeze().
  void unfreeze() { freeze(false); }

  bool is_frozen() const noexcept { return frozen_; }

  /// Copies the values of the archive into this module, whose dtypes stay; gives a lazy module its
  /// features. Throws before anything changes if a tensor is missing or has another shape.
  void load(torch::serialize::InputArchive& archive) override;

  /// Conversion to float16 or bfloat16 leaves the statistics alone, any other converts them too.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;

  void pretty_print(std::ostream& stream) const override;

  /// The options of the constructor; num_features, param_dtype and device follow the state.
  /// What a call reads (axis, momentum, epsilon, dtype, activation, ...) may be changed any time.
  Options options;

  /// The learned scale; undefined without use_scale, and in a lazy module.
  at::Tensor scale;

  /// The learned bias; undefined without use_bias, and in a lazy module.
  at::Tensor bias;

 protected:
  /// A parameter, or a statistic that takes part in no gradient, and how to initialize it.
  struct State {
    const char* name;
    at::Tensor& tensor;
    bool is_parameter;
    Initializer initialize;
  };

  explicit NormImpl(Options options);

  /// All state that the options ask for; its tensors are undefined in a lazy module.
  virtual std::vector<State> state();

  /// Checks the sizes of the feature axes before the state takes their shape.
  virtual void check_features(at::IntArrayRef features) const;

  /// Writes ", name=value" for the options that only this norm has.
  virtual void print_options(std::ostream& stream) const = 0;

  /// Creates the state of a module whose number of features is given. Called by the constructors.
  void create();

  /// init(x), then `use()`. If anything throws, a lazy module stays lazy.
  template <class Use>
  void init(const at::Tensor& x, const Use& use);

  /// x in a floating point dtype, as the operators want it.
  at::Tensor floating_point(const at::Tensor& x) const;

  /// The dtype of the output for the input x.
  at::ScalarType result_dtype(const at::Tensor& x) const;

 private:
  template <class Use>
  void create(std::vector<std::int64_t> features, c10::Device device, const Use& use);
  std::vector<at::Tensor> initial_values(const std::vector<State>& state) const;
  void assign(const std::vector<State>& state, const std::vector<at::Tensor>& values);
  template <class Convert>
  void convert(at::ScalarType dtype, const Convert& convert_all);

  bool initialized_ = false;
  bool frozen_ = false;
  at::ScalarType statistics_dtype_ = at::kFloat;
  // What freeze() found: whether scale and bias required a gradient.
  std::optional<std::pair<bool, bool>> required_grad_;
};

}  // namespace detail

/// Batch normalization of any feature axis.
///
/// Statistics of the batch are taken over every axis but `options.axis()`; the running ones then
/// become `momentum * running + (1 - momentum) * batch`, with the biased variance. A call uses and
/// updates the statistics of the batch if `use_running_average` is false, or if it is not given
/// and the module is training and not frozen; else it uses the running ones and changes nothing.
/// One value per channel is legal (y = bias), a channel without a valid element gives NaN and
/// keeps its running statistics, an empty input changes nothing.
///
/// State: parameters `scale`, `bias` in `param_dtype`; buffers `mean` (0 at first) and `var` (1) in
/// float32, all of the shape of the feature axes. A call never changes their dtype. Without
/// `num_features` the module is lazy: it has no parameters before its first input, so call
/// `init(x)`, or give `num_features`, before making the optimizer.
///
/// Errors: c10::ValueError, c10::TypeError, c10::IndexError, c10::NotImplementedError, and
/// c10::DistBackendError if a rank fails. The constructor refuses options that can never be right, a
/// call refuses an input that has other features than the module. A call that throws changes
/// nothing: the running statistics stay as they are, a lazy module stays lazy.
///
/// `axis_name` is the name of a process group in c10d, or "world" for the default group: the
/// statistics of a batch are those of all its ranks, each of which has to make the call. Without
/// any group the statistics are local. A name that is unknown while torch.distributed's default
/// group exists is a c10::ValueError; groups that a program without it has registered under other
/// names cannot be seen, since c10d does not list its groups.
///
/// ```
/// normcore::BatchNorm norm(normcore::BatchNormOptions().num_features(64).axis(1).momentum(0.9));
/// auto y = norm->forward(torch::randn({8, 64, 32, 32}));
/// ```
class NORMCORE_API BatchNormImpl : public detail::NormImpl<BatchNormImpl, BatchNormOptions> {
 public:
  static constexpr const char* kName = "BatchNorm";

  explicit BatchNormImpl(BatchNormOptions options = {});

  /// Normalizes `x`. `mask` (any dtype, broadcasts to x; nonzero counts) restricts the statistics
  /// of the batch, `residual` (shape of x) is added before the activation; undefined: absent.
  at::Tensor forward(const at::Tensor& x, std::optional<bool> use_running_average = {},
                     const at::Tensor& mask = {}, const at::Tensor& residual = {});

  /// The running mean; undefined in a lazy module.
  at::Tensor mean;

  /// The running variance; undefined in a lazy module.
  at::Tensor var;

 protected:
  std::vector<State> state() override;
  void print_options(std::ostream& stream) const override;

  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(std::optional<bool>())},
                           {2, torch::nn::AnyValue(at::Tensor())},
                           {3, torch::nn::AnyValue(at::Tensor())})
};

/// Group normalization of any feature axis.
///
/// The channels are divided into `num_groups` blocks of neighbours (or blocks of `group_size`);
/// mean and biased variance are taken for each sample and block. Training, evaluation and freeze()
/// make no difference to the result. One value per group is legal (y = bias), and a group without
/// a valid element gives NaN.
///
/// State: parameters `scale`, `bias` in `param_dtype`, of the shape of the feature axes. Without
/// `num_features` the module is lazy: it has no parameters before its first input, so call
/// `init(x)`, or give `num_features`, before making the optimizer.
///
/// Errors: c10::ValueError (also for both num_groups and group_size, or one that does not divide
/// the channels), c10::TypeError, c10::IndexError, c10::NotImplementedError, as for BatchNorm;
/// so is `axis_name`. A call that throws changes nothing: a lazy module stays lazy.
///
/// ```
/// normcore::GroupNorm norm(normcore::GroupNormOptions().num_groups(8).axis(1).activation("silu"));
/// auto y = norm->forward(torch::randn({8, 64, 32, 32}));
/// ```
class NORMCORE_API GroupNormImpl : public detail::NormImpl<GroupNormImpl, GroupNormOptions> {
 public:
  static constexpr const char* kName = "GroupNorm";

  explicit GroupNormImpl(GroupNormOptions options = {});

  /// Normalizes `x`. `mask` (any dtype, broadcasts to x; nonzero counts) restricts the statistics,
  /// `residual` (shape of x) is added before the activation; undefined: absent.
  at::Tensor forward(const at::Tensor& x, const at::Tensor& mask = {},
                     const at::Tensor& residual = {});

 protected:
  void check_features(at::IntArrayRef features) const override;
  void print_options(std::ostream& stream) const override;

  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(at::Tensor())},
                           {2, torch::nn::AnyValue(at::Tensor())})
};

namespace detail {
extern template class NormImpl<BatchNormImpl, BatchNormOptions>;
extern template class NormImpl<GroupNormImpl, GroupNormOptions>;
}  // namespace detail

/// Holder of a shared pointer to a `BatchNormImpl`, as all modules of torch::nn have one.
TORCH_MODULE(BatchNorm);

/// Holder of a shared pointer to a `GroupNormImpl`, as all modules of torch::nn have one.
TORCH_MODULE(GroupNorm);

}  // namespace normcore
