#include "subclass.h"

namespace normcore {
namespace {

SubclassHooks hooks;

bool is_subclass(const Tensor& t) { return t.key_set().has(c10::DispatchKey::Python); }

}  // namespace

void set_subclass_hooks(const SubclassHooks& given) { hooks = given; }

bool is_dtensor(const char* op, const Operands& operands, const RunningState& running) {
  const auto& [input, weight, bias, residual, mask] = operands;
  if (hooks.is_dtensor == nullptr || !is_subclass(input)) return false;
  std::vector<NamedTensor> others;
  const auto add = [&](const char* name, const OptionalTensor& t) {
    if (has(t)) others.push_back({name, *t});
  };
  add("weight", weight);
  add("bias", bias);
  add("residual", residual);
  add("mask", mask);
  add("running_mean", running.mean);
  add("running_var", running.var);
  add("num_batches_tracked", running.num_batches_tracked);
  return hooks.is_dtensor(op, input, others);
}

bool is_dtensor(const Tensor& t) {
  return hooks.is_dtensor != nullptr && is_subclass(t) && hooks.is_dtensor("", t, {});
}

bool is_spread(const Tensor& input, const RunningState& running, at::IntArrayRef axis) {
  return hooks.is_spread(input, running, axis);
}

Tensor gathered(const Tensor& sum) {
  return hooks.gathered != nullptr && is_subclass(sum) ? hooks.gathered(sum) : sum;
}

}  // namespace normcore
