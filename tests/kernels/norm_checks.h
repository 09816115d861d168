// The checks that every call of a norm must pass. check_*() runs the kernel and the reference on
// the same tensors and expects that
//   - every output lies within the bound of tolerance.h, NaN where the reference has NaN;
//   - runners that must not differ (executors, schedules) give the same bits;
//   - nothing outside of an output, and no input, is written (guarded_buffer.h).
#pragma once

#include <string>
#include <vector>

#include "norm_case.h"
#include "runner.h"
#include "tolerance.h"

namespace normcore::kernels::testing {

struct Output {
  std::string name;
  Tensor tensor;
};
using Outputs = std::vector<Output>;
const Tensor& find(const Outputs& outputs, const std::string& name);

// Which gradients are asked for.
struct Wanted {
  bool x = true, scale = true, bias = true, residual = true;
};
struct WantedOfDoubleBackward {
  bool grad_y = true;
  Wanted grad;
};

// The kernels, with NaN-filled outputs; none if the runner cannot run the call. Forward: y, mean,
// rstd and, for batch norm, running_mean, running_var. Inference: y, rstd. Backward: grad_x,
// grad_scale, grad_bias and, with an activation, grad_residual. Double backward: those and
// grad_grad_y. relu_bits: written by a forward pass, read instead of the residual by a backward pass.
Outputs run_forward(const Inputs& inputs, const Runner& runner = default_runner(),
                    std::uint8_t* relu_bits = nullptr);
Outputs run_inference(const Inputs& inputs, const Runner& runner = default_runner());
Outputs run_backward(const Inputs& inputs, const Statistics& statistics, const Wanted& wanted = {},
                     const Runner& runner = default_runner(),
                     const std::uint8_t* relu_bits = nullptr);
Outputs run_double_backward(const Inputs& inputs, const Cotangents& cotangents,
                            const Statistics& statistics, const WantedOfDoubleBackward& wanted = {},
                            const Runner& runner = default_runner());

// The reference on the same tensors, with every output in float64.
Outputs reference_forward(const Inputs& inputs);
Outputs reference_backward(const Inputs& inputs, const Statistics& statistics,
                           const Wanted& wanted);
Outputs reference_double_backward(const Inputs& inputs, const Cotangents& cotangents,
                                  const Statistics& statistics,
                                  const WantedOfDoubleBackward& wanted = {});

// Statistics that the reference finds; rstd rounded as the kernels save it when `rounded`.
Statistics batch_statistics(const Inputs& inputs, bool rounded);
Statistics running_statistics(const Inputs& inputs, bool rounded);

void check_forward(const Inputs& inputs);
void check_inference(const Inputs& inputs);
// Not const: zeroes grad_y where the derivative of the activation is undetermined.
void check_backward(Inputs& inputs, bool from_batch = true, const Wanted& wanted = {});
void check_double_backward(Inputs& inputs, const Cotangents& cotangents, bool from_batch = true,
                           const WantedOfDoubleBackward& wanted = {});

// Of a batch norm that has bits of ReLU (norm_input.h): that the forward pass writes them, and nothing else
// changes; that the backward pass gives the same bits with them as with the residual;
// if that has another dtype than x, in its gradient.
void check_relu_bits(const NormCase& c);

// That results of either pass, by whatever means, are within the bounds.
void expect_forward(const Inputs& inputs, const std::vector<Outputs>& results);
void expect_backward(const Inputs& inputs, const Statistics& statistics, const Wanted& wanted,
                     const std::vector<Outputs>& results);

// Zeroes grad_y where it would make a gradient undetermined or NaN.
void zero_undetermined_gradients(Inputs& inputs, const Statistics& statistics);

// |actual - expected| <= bound for every element.
void expect_near(const std::string& name, const std::vector<double>& actual,
                 const std::vector<double>& expected, const std::vector<double>& bound);
void expect_same_bits(const std::string& what, const Outputs& actual, const Outputs& expected);

// sqrt(sum (actual - expected)^2 / sum expected^2)
double relative_norm_error(const std::vector<double>& actual, const std::vector<double>& expected);

}  // namespace normcore::kernels::testing
