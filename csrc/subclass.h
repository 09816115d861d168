// What the operators ask about inputs of tensor subclasses (normcore/subclass.h).
#pragma once

#include "dispatch.h"

namespace normcore {

void prepare_subclass(const Tensor& input);
bool is_spread(const Tensor& input, const OptionalTensor& running_mean, at::IntArrayRef axis);

}  // namespace normcore
