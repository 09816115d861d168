// The vector loops under all CPU norms, compiled once per instruction set and chosen at run time. A
// primitive reduces or transforms dense runs of values; it knows nothing of batch, groups, threads
// or the order in which partial results are merged (the drivers do). `A` is the
// type of arithmetic: float, or double for float64 tensors.
//
// Three shapes of work:
//   runs     contiguous values that share one set of coefficients (a plane of an NCS tensor)
//   rows     contiguous values with one set of coefficients per column (rows of an NSC tensor)
//   samples  contiguous slices, each a few values, that are normalized from end to end
// Pointers need only the alignment of their element. Inputs and outputs do not overlap.
#pragma once

#include <cstdint>

#include "normcore/kernels/moments.h"
#include "normcore/kernels/norm_input.h"

namespace normcore::kernels {

// Rows per call of moments_of_rows and sums_of_rows, at most: bounds the float32 chains of the
// former's accumulators.
inline constexpr std::int64_t kMaxRows = 1024;

// `records` independent reductions, each over `runs` runs of `length` values. Strides count
// elements.
struct RunBlock {
  std::int64_t records = 1, record_stride = 0;
  std::int64_t runs = 1, run_stride = 0;
  std::int64_t length = 0;
};

// Mask bytes of a RunBlock or of rows; null: every value counts.
struct MaskBlock {
  const std::uint8_t* data = nullptr;
  std::int64_t record_stride = 0, run_stride = 0;  // runs: like the strides of the RunBlock
  bool per_row = false;                            // rows: one byte per row, not per value
};

// Moments of columns, as separate arrays so that they fold quickly.
struct ColumnMoments {
  double* mean = nullptr;
  double* m2 = nullptr;
  double* count = nullptr;
};

// Coefficients (NaNs among them are canonical) of z = (x - center) * scale + shift + residual, and
// in the backward pass of grad_x = scale * g + mask * (slope * (x - center) + offset): one per run,
// or one per column.
template <class A>
struct Coefficients {
  const A* center = nullptr;
  const A* scale = nullptr;
  const A* shift = nullptr;
  const A* slope = nullptr;  // null: statistics are constants, grad_x = scale * g
  const A* offset = nullptr;
};

template <class A>
struct ApplyArgs {
  ConstTensor x;
  ConstTensor residual;
  MutableTensor y;
  std::uint8_t* relu_bits = nullptr;  // of float arithmetic; may be absent
  Activation activation = Activation::kNone;
  Coefficients<A> coefficients;
  bool stream = false;  // y will not be read before it leaves the caches: write past them
};

template <class A>
struct GradientArgs {
  ConstTensor x;
  ConstTensor grad_y;
  ConstTensor residual;
  const std::uint8_t* relu_bits = nullptr;  // instead of residual
  MaskBlock mask;
  Activation activation = Activation::kNone;
  Coefficients<A> coefficients;
  MutableTensor grad_x;         // read by gradient_of_* only
  MutableTensor grad_residual;  // likewise; either may be absent
  bool stream = false;          // grad_x, like y of ApplyArgs
  A* kept_gradient = nullptr;   // written by sums_of_* of an activation: g
  std::int64_t kept_run_stride = 0;
};

// Sums of the double backward pass over the values of a channel: with u the cotangent of grad_x less
// u_center, t that of grad_residual, and
//   q = scale * u + tangent_slope * d + tangent_offset + t,  d = x - center
//   g = grad_y * activation'(z),  b = grad_y * activation''(z)
// those of u and u d over what counts for the statistics, and of g, g d, g u, b, b d, b d d, b q and
// b q d over all.
enum DoubleSum { kU, kUD, kG, kGD, kGU, kB, kBD, kBDD, kBQ, kBQD };
inline constexpr int kFlatSums = 5, kCurvedSums = 10;  // without and with a second derivative

// Further coefficients: q as above, grad_grad_y = activation'(z) * q, grad_residual = k = b * q and
//   grad_x = g_gain * g + scale * k + mask * (u_gain * u + slope * d + offset).
template <class A>
struct DoubleCoefficients : Coefficients<A> {
  const A* tangent_slope = nullptr;
  const A* tangent_offset = nullptr;
  const A* g_gain = nullptr;
  const A* u_gain = nullptr;
  const A* u_center = nullptr;
};

template <class A>
struct DoubleBackwardArgs {
  ConstTensor x;
  ConstTensor grad_y;
  ConstTensor residual;
  ConstTensor cotangent_x;         // either may be absent
  ConstTensor cotangent_residual;  // likewise
  MaskBlock mask;
  Activation activation = Activation::kNone;
  DoubleCoefficients<A> coefficients;
  MutableTensor grad_grad_y;  // read by double_gradient_of_* only; any may be absent
  MutableTensor grad_x;
  MutableTensor grad_residual;
};

// Neighbouring dense slices of `size` values each.
struct SampleShape {
  std::int64_t slices = 0, size = 0;
  std::int64_t columns() const { return slices * size; }
};

// What all passes over neighbouring samples, or the same part of each, take. Scale and bias are
// given for every column. The strides lead to the next sample's tensors, statistics and parameters.
template <class A>
struct SamplesArgs {
  std::int64_t samples = 0;
  SampleShape shape;  // of the part
  std::int64_t stride = 0, slice_stride = 0, scale_stride = 0, bias_stride = 0;
  ConstTensor x;
  ConstTensor residual;
  Activation activation = Activation::kNone;
  const A* scale = nullptr;
  const A* bias = nullptr;
  A* scratch = nullptr;  // arrays as SamplesGeometry counts them, this far from each other
  std::int64_t scratch_stride = 0;
};

template <class A>
struct SamplesForwardArgs : SamplesArgs<A> {
  double eps = 0.0;
  MutableTensor y;
  double* mean = nullptr;
  A* rstd = nullptr;
};

template <class A>
struct SamplesBackwardArgs : SamplesArgs<A> {
  ConstTensor grad_y;
  const double* mean = nullptr;
  const A* rstd = nullptr;
  MutableTensor grad_x;  // either may be absent
  MutableTensor grad_residual;
  A* scale_sums = nullptr;  // of columns, added to; both or none
  A* bias_sums = nullptr;
};

// The outputs that the backward pass has, too, are here those of the double backward pass. The
// cotangents of grad_scale and grad_bias are given like scale and bias.
template <class A>
struct SamplesDoubleBackwardArgs : SamplesBackwardArgs<A> {
  ConstTensor cotangent_x;         // either may be absent
  ConstTensor cotangent_residual;  // likewise
  const A* cotangent_scale = nullptr;
  const A* cotangent_bias = nullptr;
  std::int64_t cotangent_scale_stride = 0, cotangent_bias_stride = 0;
  MutableTensor grad_grad_y;  // may be absent
};

template <class A>
struct Primitives {
  // out[record] = moments of the record's values.
  void (*moments_of_runs)(ConstTensor x, const RunBlock& block, const MaskBlock& mask,
                          Moments* out);
  // out[column] = moments of a column over `rows` <= kMaxRows rows of `width` values.
  void (*moments_of_rows)(ConstTensor x, std::int64_t rows, std::int64_t width,
                          const MaskBlock& mask, const ColumnMoments& out);
  // y of `count` neighbouring runs of `length` values.
  void (*apply_runs)(const ApplyArgs<A>& args, std::int64_t count, std::int64_t length);
  void (*apply_rows)(const ApplyArgs<A>& args, std::int64_t rows, std::int64_t width);
  // g[record] = sum of g, g_centered[record] = sum of g * (x - center) over the record's values;
  // coefficients are indexed by record. Whole vectors are written: the arrays end with a cache
  // line.
  void (*sums_of_runs)(const GradientArgs<A>& args, const RunBlock& block, A* g, A* g_centered);
  // The same sums of columns over `rows` rows.
  void (*sums_of_rows)(const GradientArgs<A>& args, std::int64_t rows, std::int64_t width, A* g,
                       A* g_centered);
  // grad_x and grad_residual of `count` neighbouring runs of `length` values; the mask's
  // record_stride leads from run to run.
  void (*gradient_of_runs)(const GradientArgs<A>& args, std::int64_t count, std::int64_t length);
  void (*gradient_of_rows)(const GradientArgs<A>& args, std::int64_t rows, std::int64_t width);
  // out[i * stride + record] = the DoubleSum i over the record's values, kFlatSums of them or, with
  // a curved activation, kCurvedSums; there is room for all. Coefficients and whole vectors as in
  // sums_of_runs.
  void (*double_sums_of_runs)(const DoubleBackwardArgs<A>& args, const RunBlock& block, A* out,
                              std::int64_t stride);
  // The same sums of columns over `rows` rows.
  void (*double_sums_of_rows)(const DoubleBackwardArgs<A>& args, std::int64_t rows,
                              std::int64_t width, A* out, std::int64_t stride);
  // What the double backward pass gives over the extent, of runs and rows as in gradient_of_*.
  void (*double_gradient_of_runs)(const DoubleBackwardArgs<A>& args, std::int64_t count,
                                  std::int64_t length);
  void (*double_gradient_of_rows)(const DoubleBackwardArgs<A>& args, std::int64_t rows,
                                  std::int64_t width);
  // Statistics of every slice of every sample, and y.
  void (*normalize_samples)(const SamplesForwardArgs<A>& args);
  // grad_x, grad_residual, and the samples' part in the sums over columns.
  void (*gradient_of_samples)(const SamplesBackwardArgs<A>& args);
  // The same of the double backward pass, and grad_grad_y.
  void (*double_gradient_of_samples)(const SamplesDoubleBackwardArgs<A>& args);
};

// The primitives of the best instruction set that this CPU offers.
template <class A>
Primitives<A> primitives();

}  // namespace normcore::kernels
