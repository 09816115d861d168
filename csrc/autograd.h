// First derivatives of the norms: one graph node for all of them. It keeps what the backward
// operator needs and calls it through the dispatcher, which chooses the fused kernel or, where a
// graph of the backward is wanted, the differentiable formula. `Norm` holds the other arguments of
// that operator:
//   static constexpr const char* kNodeName
//   kernels::Activation activation
//   Gradients backward(grad_output, operands, mean, rstd, output_mask) const
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

template <class Norm>
class NormNode final : public ta::Node {
 public:
  void save_operands(const Operands& operands, Norm norm) {
    norm_ = std::move(norm);
    input_ = ta::SavedVariable(operands.input, /*is_output=*/false);
    weight_ = ta::SavedVariable(operands.weight, /*is_output=*/false);
    mask_ = ta::SavedVariable(operands.mask, /*is_output=*/false);
    if (has_activation()) {
      bias_ = ta::SavedVariable(operands.bias, /*is_output=*/false);
      residual_ = ta::SavedVariable(operands.residual, /*is_output=*/false);
    } else if (has(operands.bias)) {
      // Only its shape and dtype matter: without the version counter, it may change before the
      // backward pass.
      bias_ = ta::SavedVariable(operands.bias->variable_data(), /*is_output=*/false);
    }
  }

  void save_statistics(const Tensor& mean, const Tensor& rstd) {
    mean_ = ta::SavedVariable(mean, /*is_output=*/false);
    rstd_ = ta::SavedVariable(rstd, /*is_output=*/false);
  }

  std::string name() const override { return Norm::kNodeName; }

  ta::variable_list apply(ta::variable_list&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return backward(norm_, gradients[0], wanted(), unpacked());
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto* variable : saved()) variable->reset_data();
  }

  void compiled_args(ta::CompiledNodeArgs& args) const override {
    for (const auto* variable : const_cast<NormNode*>(this)->saved()) {
      args.collect(*variable, /*is_output=*/false);
    }
    Norm::for_each_member(norm_, [&](const auto& member) { args.collect(to_packed(member)); });
  }

  // A call of apply_functional() in the graph of compiled autograd, on stand-ins of its tensors.
  ta::variable_list apply_with_saved(const ta::variable_list& gradients,
                                     ta::SwapSavedVariables& swap) override {
    for (auto* variable : saved()) swap.before(*variable);
    dynamo::PackedArgs packed;
    for (const auto& tensor : unpacked()) packed.pack(tensor);
    Norm::for_each_member(norm_, [&](const auto& member) { packed.pack(to_packed(member)); });
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
    for (auto* variable : saved()) swap.after(*variable);
    return result;
  }

 private:
  static constexpr std::size_t kSaved = 7;

  std::array<ta::SavedVariable*, kSaved> saved() {
    return {&input_, &weight_, &bias_, &residual_, &mask_, &mean_, &rstd_};
  }
  std::array<Tensor, kSaved> unpacked() {
    std::array<Tensor, kSaved> tensors;
    for (std::size_t i = 0; i < kSaved; ++i) tensors[i] = saved()[i]->unpack();
    return tensors;
  }
  OutputMask wanted() const {
    OutputMask mask;
    for (std::size_t i = 0; i < mask.size(); ++i) mask[i] = task_should_compute_output(i);
    return mask;
  }
  bool has_activation() const { return norm_.activation != kernels::Activation::kNone; }

  // Gradients of input, weight, bias and residual; `tensors` in the order of saved().
  static ta::variable_list backward(const Norm& norm, const Tensor& grad_output, OutputMask wanted,
                                    const std::array<Tensor, kSaved>& tensors) {
    ta::variable_list result(4);
    if (!grad_output.defined()) return result;
    if (wanted[3] && norm.activation == kernels::Activation::kNone) {
      result[3] = grad_output;
      wanted[3] = false;
    }
    if (wanted == OutputMask{}) return result;
    const auto& [input, weight, bias, residual, mask, mean, rstd] = tensors;
    const auto w = to_optional(weight), b = to_optional(bias), r = to_optional(residual),
               m = to_optional(mask);
    auto [grad_input, grad_weight, grad_bias, grad_residual] =
        norm.backward(grad_output, {input, w, b, r, m}, mean, rstd, wanted);
    result[0] = std::move(grad_input);
    result[1] = std::move(grad_weight);
    result[2] = std::move(grad_bias);
    if (wanted[3]) result[3] = std::move(grad_residual);
    return result;
  }

  static ta::variable_list apply_functional(const ta::variable_list& gradients,
                                            const std::vector<c10::IValue>& values) {
    dynamo::PackedArgs packed(values);
    std::array<Tensor, kSaved> tensors;
    for (auto& tensor : tensors) tensor = packed.unpack<Tensor>();
    Norm norm;
    Norm::for_each_member(norm, [&](auto& member) {
      using Member = std::decay_t<decltype(member)>;
      member = static_cast<Member>(packed.unpack<decltype(to_packed(member))>());
    });
    const auto mask = packed.unpack<std::vector<bool>>();
    OutputMask wanted;
    std::copy(mask.begin(), mask.end(), wanted.begin());
    return backward(norm, gradients[0], wanted, tensors);
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

  Norm norm_;
  ta::SavedVariable input_, weight_, bias_, residual_, mask_, mean_, rstd_;
};

// Nodes are owned by std::shared_ptr in older releases of torch and by c10::intrusive_ptr in newer
// ones.
using NodePtr = decltype(ta::Edge::function);

template <class Node>
auto make_node() {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<ta::Node>>) {
    return std::shared_ptr<Node>(new Node(), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Node>();
  }
}

template <class Ptr>
void announce(const Ptr& node) {
  if constexpr (requires { fire_node_creation_hooks(node); }) fire_node_creation_hooks(node);
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
    node_ = make_node<NormNode<Norm>>();
    node_->set_next_edges(ta::collect_next_edges(input, weight, bias, residual));
    node_->save_operands(operands, make_norm());
  }

  void attach(const Tensor& y, const Tensor& mean, const Tensor& rstd) const {
    if (!node_) return;
    node_->save_statistics(mean, rstd);
    const NodePtr node(node_);
    ta::set_history(y, node);
    announce(node);
  }

 private:
  decltype(make_node<NormNode<Norm>>()) node_{};
};

template <class MakeNorm>
Recorder(const Operands&, MakeNorm&&) -> Recorder<std::invoke_result_t<MakeNorm>>;

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
