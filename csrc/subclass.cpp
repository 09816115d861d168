#include "subclass.h"

#include "normcore/subclass.h"

namespace normcore {
namespace {

SubclassHooks hooks;

bool is_subclass(const Tensor& t) { return t.key_set().has(c10::DispatchKey::Python); }

}  // namespace

void set_subclass_hooks(const SubclassHooks& given) { hooks = given; }

void prepare_subclass(const Tensor& input) {
  if (hooks.prepare != nullptr && is_subclass(input)) hooks.prepare(input);
}

bool is_spread(const Tensor& input, const OptionalTensor& running_mean, at::IntArrayRef axis) {
  return hooks.is_spread != nullptr && is_subclass(input) &&
         hooks.is_spread(input, running_mean, axis);
}

}  // namespace normcore
