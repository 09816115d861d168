// Plain float64 reference of the norms, for tests only: the formulas of batch_norm.h, group_norm.h
// and, for the double backward pass, norm_input.h written with scalar loops, two-pass moments and
// sums in long double, and one rounding when a result is stored. The args structs, shapes, layouts,
// absent tensors and empty inputs are those of the kernels; beyond their contract any output may
// have any DType (float64 with any x), so that results can be read before their last rounding.
#pragma once

#include <cstdint>

#include "normcore/kernels/batch_norm.h"
#include "normcore/kernels/group_norm.h"

namespace normcore::kernels::reference {

// Element `index` of a tensor as float64 (exact), and the value rounded to nearest even into the
// tensor's DType: beyond the largest finite value it becomes infinite, subnormals are kept, NaN
// becomes the quiet NaN.
double load(ConstTensor tensor, std::int64_t index);
void store(MutableTensor tensor, std::int64_t index, double value);

void batch_norm_forward(const BatchNormForwardArgs& args);
void batch_norm_inference(const BatchNormInferenceArgs& args);
void batch_norm_backward(const BatchNormBackwardArgs& args);
void batch_norm_double_backward(const BatchNormDoubleBackwardArgs& args);

void group_norm_forward(const GroupNormForwardArgs& args);
void group_norm_backward(const GroupNormBackwardArgs& args);
void group_norm_double_backward(const GroupNormDoubleBackwardArgs& args);

}  // namespace normcore::kernels::reference
