// What the operators ask about inputs of tensor subclasses.
#pragma once

#include "checks.h"
#include "normcore/subclass.h"

namespace normcore {

bool is_dtensor(const Tensor& t);
// The same of an input. It raises if the others, or what a norm updates, do not go with it.
bool is_dtensor(const char* op, const Operands& operands, const RunningState& running = {});
// Of a DTensor.
bool is_spread(const Tensor& input, const RunningState& running, at::IntArrayRef axis);
Tensor gathered(const Tensor& sum);

}  // namespace normcore
