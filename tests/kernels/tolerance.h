// How far a kernel's result may be from the float64 reference: every bound of the kernel tests is
// derived here.
//
//   u         unit roundoff of compute_type(x.dtype): 2^-24 or 2^-53 (there the reference's own
//             error is as large: 2^-52)
//   f         u * (4 + sqrt(min(count, 1024))), the error of a sum of `count` terms relative to the
//             sum of their magnitudes: chains of about 1024 additions per lane, whose errors are
//             random walks, merged in float64
//   mean, var each value enters relative to a pivot near the mean: |dmean| <= 2 f std,
//             |dvar| <= 4 f var
//   rstd      |drstd| <= (u + 2 f var / (var + eps)) rstd
//   z         (x - mean) * a + bias + residual, a = rstd * scale: a few u of every term, and the
//             errors of the statistics. 16-bit x may be computed as x * a + (bias - mean * a),
//             which adds u (|x| + |mean|) |a|
//   y         |act'| <= 1.13 times the error of z, kActivationUlps u of the result, half an ulp of
//             y's DType
//   backward  mean and rstd are given; |act''| <= 1. Sums S1 = sum g, S2 = sum g xhat have error f
//             against the sum of magnitudes plus the sum of the terms' own errors; grad_x adds a
//             few u of each of its three terms
//   double    likewise for the formula of norm_input.h: a product or a sum of terms adds to their
//   backward  errors a few u of their magnitudes, a sum over positions f times the sum of
//             magnitudes; |act'''| <= 1. What a dtype cannot hold may become infinite
//
// Inputs of the tests are drawn so that the random walk and the pivot are what they are for
// independent values.
#pragma once

#include <cstdint>
#include <vector>

#include "normcore/kernels/norm_input.h"

namespace normcore::kernels::testing {

inline constexpr double kActivationUlps = 8.0;
// Derivatives are sums of terms such as z sigmoid(z) (1 - sigmoid(z)), which may be larger than the
// sum.
inline constexpr double kDerivativeUlps = 16.0;

// Statistics of every slice as the reference has them; num_groups = 0 is batch norm (slice =
// channel).
struct Statistics {
  std::int64_t num_groups = 0;
  std::vector<double> mean, rstd;
  bool from_batch = true;  // false: given, hence without error, and constants of the backward pass
};

struct ForwardBounds {
  std::vector<double> y;                // per element
  std::vector<double> mean, var, rstd;  // per slice
};

struct BackwardBounds {
  std::vector<double> x, residual;  // per element
  std::vector<double> scale, bias;  // per parameter
};

struct DoubleBackwardBounds {
  std::vector<double> grad_y, x, residual;  // per element
  std::vector<double> scale, bias;          // per parameter
};

// Half the distance between neighbouring values of `dtype` at `value`.
double half_ulp(DType dtype, double value);

// |sum error| / sum |terms|.
double sum_error(DType x, double count);

ForwardBounds forward_bounds(const NormInput& input, const Statistics& statistics, DType y);

BackwardBounds backward_bounds(const NormInput& input, const Statistics& statistics,
                               ConstTensor grad_y, const NormGradients& grad);

// Where the derivative of kReLU is not determined, any value it may have is within the bound.
DoubleBackwardBounds double_backward_bounds(const NormInput& input, const Statistics& statistics,
                                            ConstTensor grad_y,
                                            const GradientCotangents& cotangents, DType grad_grad_y,
                                            const NormGradients& grad);

// Positions whose z is within its error of 0: there the derivative of kReLU is not determined.
std::vector<std::int64_t> kink_positions(const NormInput& input, const Statistics& statistics);

}  // namespace normcore::kernels::testing
