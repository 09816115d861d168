// What the forward and the backward pass of every norm have in common: the input tensor, the affine
// parameters, the mask of the statistics and the fused epilogue
//   y = activation((x - mean) * (rstd * scale) + bias + residual),   rstd = 1 / sqrt(var + eps).
//   x         extent and layout below, any DType
//   scale     [c], or [n][c] when affine_per_sample (group norm only); absent: 1. Any DType
//   bias      like scale; absent: 0. Its dtype may differ from scale's
//   residual  extent and layout of x; any DType (float64 only with float64 x)
//   relu_bits instead of residual, for the derivative of kReLU (below)
//   mask      true counts for the statistics; outputs are computed everywhere
// All arithmetic is done in compute_type(x.dtype); there is one rounding, when y is stored. Squares of
// deviations are summed in it: in float32 those from the mean have to stay below 1e17.
#pragma once

#include "normcore/kernels/activation.h"
#include "normcore/kernels/host_device.h"
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
  const std::uint8_t* relu_bits = nullptr;
  Mask mask;
  Activation activation = Activation::kNone;
  double eps = 1e-5;
};

// What a forward pass of kReLU may leave for the backward pass, which then needs no residual: of every
// element whether z is greater than 0 (or NaN), as a bit. A byte holds those of the elements in 16 bytes
// of x, in the order of memory from its lowest bit on.
constexpr std::int64_t elements_per_relu_byte(DType dtype) {
  return 16 / static_cast<std::int64_t>(size_of(dtype));
}
// The positions of a channel (kNCS), or the channels of a position (kNSC), have to be whole bytes. There
// are none of float64.
inline bool fits_relu_bits(const NormInput& input) {
  const std::int64_t run = input.layout == Layout::kNCS ? input.extent.s : input.extent.c;
  return input.activation == Activation::kReLU && input.x.dtype != DType::kFloat64 &&
         run % elements_per_relu_byte(input.x.dtype) == 0;
}

// Entries of scale and of bias.
inline std::int64_t affine_count(const NormInput& input) {
  return input.extent.c * (input.affine_per_sample ? input.extent.n : 1);
}

// Where those of a channel are.
NORMCORE_HOST_DEVICE inline std::int64_t affine_index(const NormInput& input, std::int64_t sample,
                                                      std::int64_t channel) {
  return input.affine_per_sample ? sample * input.extent.c + channel : channel;
}

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

// What a double backward pass takes: gradients with respect to what the backward pass gave, shaped
// like those. Any DType (float64 only with float64 x); absent: 0.
struct GradientCotangents {
  ConstTensor x;
  ConstTensor scale;
  ConstTensor bias;
  ConstTensor residual;
};

// The double backward pass of every norm: the transposed derivative of (grad_y, x, scale, bias,
// residual) -> gradients (batch_norm.h, group_norm.h). With u, v, s and t the cotangents of grad_x,
// grad_scale, grad_bias and grad_residual, w_i the weight of a position in the statistics, and over
// the positions of a slice
//   p0 = sum w_i u,  p1 = sum w_i u xhat                   (0 for given statistics)
//   q = scale rstd (u - p0 - xhat p1) + v xhat + s + t     the tangent of z
//   g = grad_y activation'(z),  k = b q,  b = grad_y activation''(z)
//   H = sum scale g,  Hx = sum scale g xhat
//   E = sum (scale k + v g),  Ex = sum (scale k + v g) xhat
//   L = rstd (sum scale g u - p0 H - p1 Hx)
// where z = xhat scale + bias + residual, it gives
//   grad_grad_y   = activation'(z) q
//   grad_x        = rstd (v - rstd p1 scale) g + rstd scale k + w_i rstd (-rstd Hx u
//                   + xhat (2 rstd p1 Hx - Ex - L) - E + rstd (p0 Hx + p1 H))
//   grad_scale    = sum over a channel of rstd g (u - p0 - p1 xhat) + k xhat
//   grad_bias     = sum over a channel of k
//   grad_residual = k
// A masked-out value with grad_y = 0 counts as xhat = 0 where it is NaN or infinite. In a slice
// without a valid value grad_y = 0 gives what rstd = 0 would, any other NaN.
// Activations with a kink (kReLU) or none have activation'' = 0 and k = 0, whatever q is.

}  // namespace normcore::kernels
