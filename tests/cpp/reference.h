// Normalization spelled out in float64 with plain tensor functions, and the helpers that compare a
// result with it. Statistics are taken over `reduced`, kept as size-1 axes; weight and bias come in
// a shape that broadcasts to x. All inputs are float64; nothing is owned.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <functional>
#include <string>
#include <vector>

namespace normcore::testing {

using at::Tensor;

struct Moments {
  Tensor mean;
  Tensor var;  // biased
};

inline Moments moments(const Tensor& x, at::IntArrayRef reduced) {
  const auto mean = x.mean(reduced, /*keepdim=*/true);
  return {mean, (x - mean).square().mean(reduced, /*keepdim=*/true)};
}

inline Tensor normalize(const Tensor& x, const Moments& m, double eps) {
  return (x - m.mean) * (m.var + eps).rsqrt();
}

// The largest |got - want|, which may be `factor` units in the last place of the largest |want|.
inline ::testing::AssertionResult is_close(const Tensor& got, const Tensor& want,
                                           double factor = 16) {
  if (got.sizes() != want.sizes()) {
    return ::testing::AssertionFailure() << "shape " << got.sizes() << ", not " << want.sizes();
  }
  const auto epsilon = got.scalar_type() == at::kDouble     ? 0x1p-52
                       : got.scalar_type() == at::kFloat    ? 0x1p-23
                       : got.scalar_type() == at::kBFloat16 ? 0x1p-7
                                                            : 0x1p-10;
  const auto allowed = factor * epsilon * want.abs().max().item<double>();
  const auto error = (got.to(at::kDouble) - want).abs().max().item<double>();
  if (error <= allowed) return ::testing::AssertionSuccess();  // false for NaN
  return ::testing::AssertionFailure() << "off by " << error << ", allowed are " << allowed;
}

inline ::testing::AssertionResult is_equal(const Tensor& got, const Tensor& want) {
  if (got.scalar_type() == want.scalar_type() && at::equal(got, want)) {
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure() << got << "\nis not\n" << want;
}

using Function = std::function<Tensor(const std::vector<Tensor>&)>;

// Gradients of (f(inputs) * direction).sum() by autograd.
inline std::vector<Tensor> gradients(const Function& f, const std::vector<Tensor>& inputs,
                                     const Tensor& direction, bool create_graph = false) {
  return torch::autograd::grad({f(inputs)}, inputs, {direction}, /*retain_graph=*/true,
                               create_graph);
}

// Compares these gradients with central differences. With the step h = cbrt(epsilon), truncation
// (h^2) and rounding (epsilon / h) are both near 4e-11 times derivatives of at most a few hundred.
inline void expect_gradients(const Function& f, std::vector<Tensor> inputs) {
  for (auto& input : inputs) input = input.detach().clone().requires_grad_();
  const auto direction = at::randn_like(f(inputs).detach());
  const auto analytic = gradients(f, inputs, direction);
  constexpr double kStep = 6e-6;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    at::NoGradGuard no_grad;
    auto numeric = at::empty_like(inputs[i]);
    for (std::int64_t k = 0; k < inputs[i].numel(); ++k) {
      const auto shifted = [&](double step) {
        auto moved = inputs;
        moved[i] = inputs[i].detach().clone();
        moved[i].view(-1)[k] += step;
        return (f(moved) * direction).sum().item<double>();
      };
      numeric.view(-1)[k] = (shifted(kStep) - shifted(-kStep)) / (2 * kStep);
    }
    const auto error = (analytic[i] - numeric).abs().max().item<double>();
    EXPECT_LT(error, 1e-7) << "gradient of input " << i;
  }
}

// Compares the derivative along random tangents with the one that gradients give.
inline void expect_tangents(const Function& f, const std::vector<Tensor>& inputs) {
  std::vector<Tensor> leaves, tangents, duals;
  const auto level = torch::autograd::ForwardADLevel::get_next_idx();
  for (const auto& input : inputs) {
    leaves.push_back(input.detach().requires_grad_());
    tangents.push_back(at::randn_like(input));
    duals.push_back(
        at::_make_dual(input.detach(), tangents.back(), static_cast<std::int64_t>(level)));
  }
  const auto tangent = f(duals)._fw_grad(level).clone();
  torch::autograd::ForwardADLevel::release_idx(level);
  const auto direction = at::randn_like(tangent);
  double want = 0.0;
  const auto by_input = gradients(f, leaves, direction);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    want += (by_input[i] * tangents[i]).sum().item<double>();
  }
  EXPECT_NEAR((tangent * direction).sum().item<double>(), want, 1e-11);
}

// expect_gradients() of the gradients.
inline void expect_second_gradients(const Function& f, const std::vector<Tensor>& inputs) {
  const auto direction = at::randn_like(f(inputs).detach());
  const auto first = [&](const std::vector<Tensor>& values) {
    auto leaves = values;
    for (auto& leaf : leaves) {
      if (!leaf.requires_grad()) leaf = leaf.detach().requires_grad_();
    }
    at::AutoGradMode enable_grad(true);
    std::vector<Tensor> flat;
    for (const auto& g : gradients(f, leaves, direction, /*create_graph=*/true)) {
      flat.push_back(g.reshape(-1));
    }
    return at::cat(flat);
  };
  expect_gradients(first, inputs);
}

// `call` throws an `Error` whose message contains `text`.
template <class Error>
void expect_error(const std::function<void()>& call, const std::string& text) {
  try {
    call();
    ADD_FAILURE() << "no error: " << text;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what_without_backtrace()).find(text), std::string::npos)
        << error.what_without_backtrace();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another type of error: " << error.what();
  }
}

}  // namespace normcore::testing
