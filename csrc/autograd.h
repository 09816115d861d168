// Derivatives of the norms. A call of a forward operator gets a graph node that calls the backward
// operator; where a graph of the backward pass is wanted, a call of that one gets a node that calls
// the double backward operator. Derivatives of higher order and in forward mode are those of the
// formulas (formulas.h). `Norm` holds the arguments that the operators of a norm share:
//   static constexpr const char* kNodeName, * kDoubleNodeName
//   kernels::Activation activation
//   Gradients backward(grad_output, operands, mean, rstd, output_mask) const
//   DoubleGradients double_backward(cotangents, grad_output, operands, mean, rstd, output_mask) const
//   for_each_member(self, f)                   f(member) for all of them: compiled autograd tells nodes
//                                              apart by them, and hands them on to its graph
// Derivatives flow to input, weight, bias and residual; masks and statistics have none.
#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "checks.h"
#include "formulas.h"

namespace normcore::autograd {

namespace ta = torch::autograd;
namespace dynamo = torch::dynamo::autograd;

inline OptionalTensor to_optional(const Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

// A graph node that keeps tensors, and calls an operator on them and on the gradients that come in.
// `Rule` says which:
//   static constexpr std::size_t kSaved, kResults      tensors that are kept, gradients that go out
//   static const char* name()
//   for_each_member(self, f)                            f(member) for what else it holds
//   variable_list backward(gradients, wanted, tensors) const
//   kConcernsOthers, if other processes wait for it     it is called without gradients, too
template <class Rule>
class OperatorNode final : public ta::Node {
 public:
  using Tensors = std::array<Tensor, Rule::kSaved>;
  using Wanted = std::array<bool, Rule::kResults>;

  explicit OperatorNode(Rule rule) : rule_(std::move(rule)) {}

  void save(std::size_t index, const OptionalTensor& t) {
    saved_[index] = ta::SavedVariable(t, /*is_output=*/false);
  }

  std::string name() const override { return Rule::name(); }

  ta::variable_list apply(ta::variable_list&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return run(rule_, gradients, wanted(), unpacked());
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved_) variable.reset_data();
  }

  void compiled_args(ta::CompiledNodeArgs& args) const override {
    for (const auto& variable : saved_) args.collect(variable, /*is_output=*/false);
    Rule::for_each_member(rule_, [&](const auto& member) { args.collect(to_packed(member)); });
  }

  // A call of apply_functional() in the graph of compiled autograd, on stand-ins of its tensors.
  ta::variable_list apply_with_saved(const ta::variable_list& gradients,
                                     ta::SwapSavedVariables& swap) override {
    for (auto& variable : saved_) swap.before(variable);
    dynamo::PackedArgs packed;
    for (const auto& tensor : unpacked()) packed.pack(tensor);
    Rule::for_each_member(rule_, [&](const auto& member) { packed.pack(to_packed(member)); });
    const auto mask = wanted();
    packed.pack(std::vector<bool>(mask.begin(), mask.end()));
    std::vector<at::TypePtr> schema;
    for (const auto& value : packed.vec()) {
      schema.push_back(value.isTensor() ? at::TensorType::get() : value.type());
    }
    const auto& compiler = dynamo::getPyCompilerInterface();
    const auto function = compiler->bind_function(swap.get_py_compiler(), name(), apply_functional,
                                                  schema, /*is_custom_function=*/true);
    using Metadata = std::vector<std::optional<ta::InputMetadata>>;
    auto result = compiler->call_function(
        swap.get_py_compiler(), "apply_functional", function, gradients, packed.vec(),
        dynamo::IValuePacker<Metadata>::pack(dynamo::get_input_metadata(next_edges())));
    for (auto& variable : saved_) swap.after(variable);
    return result;
  }

 private:
  Tensors unpacked() {
    Tensors tensors;
    for (std::size_t i = 0; i < tensors.size(); ++i) tensors[i] = saved_[i].unpack();
    return tensors;
  }
  Wanted wanted() const {
    Wanted mask;
    for (std::size_t i = 0; i < mask.size(); ++i) mask[i] = task_should_compute_output(i);
    return mask;
  }

  static ta::variable_list run(const Rule& rule, const ta::variable_list& gradients,
                               const Wanted& wanted, const Tensors& tensors) {
    const auto is_defined = [](const Tensor& t) { return t.defined(); };
    constexpr bool kIsCalled = requires { Rule::kConcernsOthers; };
    const bool has_gradient = std::any_of(gradients.begin(), gradients.end(), is_defined);
    if (wanted == Wanted{} || !(has_gradient || kIsCalled)) {
      return ta::variable_list(Rule::kResults);
    }
    return rule.backward(gradients, wanted, tensors);
  }

  static ta::variable_list apply_functional(const ta::variable_list& gradients,
                                            const std::vector<c10::IValue>& values) {
    dynamo::PackedArgs packed(values);
    Tensors tensors;
    for (auto& tensor : tensors) tensor = packed.unpack<Tensor>();
    Rule rule;
    Rule::for_each_member(rule, [&](auto& member) {
      using Member = std::decay_t<decltype(member)>;
      member = static_cast<Member>(packed.unpack<decltype(to_packed(member))>());
    });
    const auto mask = packed.unpack<std::vector<bool>>();
    Wanted wanted;
    std::copy(mask.begin(), mask.end(), wanted.begin());
    return run(rule, gradients, wanted, tensors);
  }

  // A member as compiled autograd stores it: it knows no enumerations.
  template <class Member>
  static auto to_packed(const Member& member) {
    if constexpr (std::is_enum_v<Member>) {
      return static_cast<std::int64_t>(member);
    } else {
      return member;
    }
  }

  Rule rule_;
  std::array<ta::SavedVariable, Rule::kSaved> saved_;
};

// The tensors that a norm's nodes keep.
enum SavedTensor : std::size_t {
  kInput,
  kWeight,
  kBias,
  kResidual,  // or its relu_bits
  kMask,
  kMean,
  kRstd,
  kGradOutput,  // of double backward only
};

// Operands for the duration of a call.
class SavedOperands {
 public:
  template <std::size_t kSaved>
  explicit SavedOperands(const std::array<Tensor, kSaved>& tensors)
      : input_(tensors[kInput]),
        weight_(to_optional(tensors[kWeight])),
        bias_(to_optional(tensors[kBias])),
        residual_(to_optional(tensors[kResidual])),
        mask_(to_optional(tensors[kMask])) {}
  Operands get() const { return {input_, weight_, bias_, residual_, mask_}; }

 private:
  const Tensor& input_;
  OptionalTensor weight_, bias_, residual_, mask_;
};

// From the gradient of y to those of input, weight, bias and residual.
template <class Norm>
struct BackwardRule {
  static constexpr std::size_t kSaved = kGradOutput, kResults = 4;
  static const char* name() { return Norm::kNodeName; }

  Norm norm;

  template <class Self, class F>
  static void for_each_member(Self& self, F&& f) {
    Norm::for_each_member(self.norm, f);
  }

  ta::variable_list backward(const ta::variable_list& gradients, OutputMask wanted,
                             const std::array<Tensor, kSaved>& tensors) const {
    ta::variable_list result(kResults);
    const auto& grad_output = gradients[0];
    if (wanted[3] && norm.activation == kernels::Activation::kNone) {
      result[3] = grad_output;
      wanted[3] = false;
    }
    if (wanted == OutputMask{}) return result;
    const SavedOperands operands(tensors);
    auto [input, weight, bias, residual] =
        norm.backward(grad_output, operands.get(), tensors[kMean], tensors[kRstd], wanted);
    result[0] = std::move(input);
    result[1] = std::move(weight);
    result[2] = std::move(bias);
    if (wanted[3]) result[3] = std::move(residual);
    return result;
  }
};

// From the gradients of those to the ones of grad_output, input, weight, bias and residual.
template <class Norm>
struct DoubleBackwardRule {
  static constexpr std::size_t kSaved = kGradOutput + 1, kResults = 5;
  static const char* name() { return Norm::kDoubleNodeName; }

  Norm norm;

  template <class Self, class F>
  static void for_each_member(Self& self, F&& f) {
    Norm::for_each_member(self.norm, f);
  }

  ta::variable_list backward(const ta::variable_list& gradients, const DoubleOutputMask& wanted,
                             const std::array<Tensor, kSaved>& tensors) const {
    const SavedOperands operands(tensors);
    const auto input = to_optional(gradients[0]), weight = to_optional(gradients[1]),
               bias = to_optional(gradients[2]), residual = to_optional(gradients[3]);
    auto result = norm.double_backward({input, weight, bias, residual}, tensors[kGradOutput],
                                       operands.get(), tensors[kMean], tensors[kRstd], wanted);
    return std::apply([](auto&... t) { return ta::variable_list{std::move(t)...}; }, result);
  }
};

// Nodes are owned by std::shared_ptr in older releases of torch and by c10::intrusive_ptr in newer
// ones.
using NodePtr = decltype(ta::Edge::function);

template <class Node, class... Args>
auto make_node(Args&&... args) {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<ta::Node>>) {
    return std::shared_ptr<Node>(new Node(std::forward<Args>(args)...),
                                 [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Node>(std::forward<Args>(args)...);
  }
}

template <class Ptr>
void announce(const Ptr& node) {
  if constexpr (requires { fire_node_creation_hooks(node); }) fire_node_creation_hooks(node);
}

template <class Node>
void save_operands(Node& node, const Operands& operands, bool has_activation) {
  node.save(kInput, operands.input);
  node.save(kWeight, operands.weight);
  node.save(kMask, operands.mask);
  if (has_activation) {
    node.save(kBias, operands.bias);
    node.save(kResidual, operands.residual);
  } else if (has(operands.bias)) {
    // Only its shape and dtype matter: without the version counter, it may change before the
    // backward pass.
    node.save(kBias, operands.bias->variable_data());
  }
}

// Records one call: constructed before the operator runs, attached to its output after. Does
// nothing, and does not ask for the norm, where no operand requires grad.
template <class Norm>
class Recorder {
 public:
  template <class MakeNorm>
  Recorder(const Operands& operands, MakeNorm&& make_norm) {
    const auto& [input, weight, bias, residual, mask] = operands;
    if (!ta::compute_requires_grad(input, weight, bias, residual)) return;
    const Norm norm = make_norm();
    node_ = make_node<Node>(BackwardRule<Norm>{norm});
    node_->set_next_edges(ta::collect_next_edges(input, weight, bias, residual));
    const bool has_activation = norm.activation != kernels::Activation::kNone;
    const OptionalTensor none;
    save_operands(*node_, {input, weight, bias, none, mask}, has_activation);
    if (has_activation) residual_ = residual;
  }

  // relu_bits, if there are any, are kept instead of the residual.
  void attach(const Tensor& y, const Tensor& mean, const Tensor& rstd,
              const Tensor& relu_bits = {}) const {
    if (!node_) return;
    node_->save(kResidual, relu_bits.defined() ? OptionalTensor(relu_bits) : residual_);
    node_->save(kMean, mean);
    node_->save(kRstd, rstd);
    const NodePtr node(node_);
    ta::set_history(y, node);
    announce(node);
  }

 private:
  using Node = OperatorNode<BackwardRule<Norm>>;
  decltype(make_node<Node>(std::declval<BackwardRule<Norm>>())) node_{};
  OptionalTensor residual_;  // kept only once it is known that there are no bits
};

template <class MakeNorm>
Recorder(const Operands&, MakeNorm&&) -> Recorder<std::invoke_result_t<MakeNorm>>;

// Gives the results of a backward pass a derivative.
template <class Norm>
void record_backward(const Gradients& gradients, const Tensor& grad_output,
                     const Operands& operands, const Norm& norm, const Tensor& mean,
                     const Tensor& rstd) {
  const bool has_activation = norm.activation != kernels::Activation::kNone;
  const auto& [input, weight, bias, residual, mask] = operands;
  const OptionalTensor none;
  const auto node =
      make_node<OperatorNode<DoubleBackwardRule<Norm>>>(DoubleBackwardRule<Norm>{norm});
  // Without an activation the gradients do not depend on what is added.
  node->set_next_edges(ta::collect_next_edges(
      grad_output, input, weight, has_activation ? bias : none, has_activation ? residual : none));
  save_operands(*node, operands, has_activation);
  node->save(kMean, mean);
  node->save(kRstd, rstd);
  node->save(kGradOutput, grad_output);
  const NodePtr base(node);
  std::apply([&](const auto&... t) { (ta::set_history(t, base), ...); }, gradients);
  announce(base);
}

// ---- forward mode

inline Tensor tangent_of(const Tensor& t) {
  return t.defined() ? t._fw_grad(/*level=*/0) : Tensor();
}
inline Tensor tangent_of(const OptionalTensor& t) {
  return t.has_value() ? tangent_of(*t) : Tensor();
}
inline Tensor without_tangent(const Tensor& t) {
  return tangent_of(t).defined() ? t._fw_primal(/*level=*/0) : t;
}
inline OptionalTensor without_tangent(const OptionalTensor& t) {
  return has(t) ? OptionalTensor(without_tangent(*t)) : t;
}

template <class... Tensors>
bool have_tangent(const Tensors&... tensors) {
  return (tangent_of(tensors).defined() || ...);
}

// Whether a derivative of a call is wanted, in either mode.
template <class... Tensors>
bool is_differentiated(const Tensors&... tensors) {
  return ta::compute_requires_grad(tensors...) || have_tangent(tensors...);
}

// Gives y its tangent, if an operand has one. `check` makes the CheckedNorm.
template <class MakeNorm>
void propagate_tangents(const Tensor& y, const Operands& operands, MakeNorm&& check,
                        const SavedStatistics& saved) {
  const auto& [input, weight, bias, residual, mask] = operands;
  const Tangents tangents{tangent_of(input), tangent_of(weight), tangent_of(bias),
                          tangent_of(residual)};
  const auto is_absent = [](const auto&... t) { return (!t.defined() && ...); };
  if (is_absent(tangents.input, tangents.weight, tangents.bias, tangents.residual)) return;
  const auto x = without_tangent(input);
  const auto w = without_tangent(weight), b = without_tangent(bias), r = without_tangent(residual);
  const Operands primals{x, w, b, r, mask};
  y._set_fw_grad(norm_tangent_formula(primals, tangents, check(primals), saved), /*level=*/0,
                 /*is_inplace_op=*/false);
}

}  // namespace normcore::autograd
