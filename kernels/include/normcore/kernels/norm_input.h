// What the forward and the backward pass of every norm have in common: the input tensor, the affine
// parameters, the mask of the statistics and the fused epilogue
//   y = activation((x - mean) * (rstd * scale) + bias + residual),   rstd = 1 / sqrt(var + eps).
//   x         extent and layout below, any DType
//   scale     [c], or [n][c] when affine_per_sample (group norm only); absent: 1. Any DType
//   bias      like scale; absent: 0. Its dtype may differ from scale's
//   residual  extent and layout of x; any DType (float64 only with float64 x)
//   mask      true counts for the statistics; outputs are computed everywhere
// All arithmetic is done in compute_type(x.dtype); there is one rounding, when y is stored. Squares of
// deviations are summed in it: in float32 those from the mean have to stay below 1e17.
#pragma once

#include "normcore/kernels/activation.h"
#include "normcore/kernels/types.h"

namespace normcore::kernels {

struct NormInput {
  Extent extent;
  Layout layout = Layout::kNCS;
  ConstTensor x;
  ConstTensor scale;
  ConstTensor bias;
  bool affine_per_sample = false;
  ConstTensor residual;
  Mask mask;
  Activation activation = Activation::kNone;
  double eps = 1e-5;
};

// Gradients of a norm; a null pointer is a gradient that nobody asked for (it costs nothing).
//   x         extent, layout and dtype of x
//   scale     shape of scale; any DType
//   bias      shape of bias; any DType
//   residual  extent and layout of x, any DType; only with an activation (without one it is grad_y)
struct NormGradients {
  MutableTensor x;
  MutableTensor scale;
  MutableTensor bias;
  MutableTensor residual;
};

}  // namespace normcore::kernels
