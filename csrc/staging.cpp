#include "staging.h"

#include <normcore/settings.h>

#include "backend.h"

namespace normcore {

Staging::Staging(const Operands& operands, const CheckedNorm<std::int64_t>& norm, Samples samples,
                 bool is_aligned)
    // CUDA kernels choose the order of a sum by alignment too, which tells views of one batch apart.
    : mapping_(operands.input, norm.axes, samples), is_aligned_(is_aligned || batch_invariant()) {
  input_.extent = mapping_.extent();
  input_.layout = mapping_.layout();
  input_.x = read(operands.input);
  input_.scale = read_vector(value_or_undefined(operands.weight));
  input_.bias = read_vector(value_or_undefined(operands.bias));
  input_.affine_per_sample = norm.affine_per_sample;
  input_.residual = read(value_or_undefined(operands.residual));
  input_.activation = norm.activation;
  input_.eps = norm.eps;
  if (has(operands.mask)) {
    const bool rows = mapping_.is_row_mask(*operands.mask);
    owned_.push_back(rows ? mapping_.arrange_row_mask(*operands.mask)
                          : mapping_.arrange_mask(*operands.mask));
    input_.mask = {static_cast<const std::uint8_t*>(owned_.back().const_data_ptr()),
                   rows ? kernels::MaskKind::kRow : kernels::MaskKind::kElement};
  }
}

kernels::ConstTensor Staging::read(const Tensor& t) {
  if (!t.defined()) return {};
  owned_.push_back(mapping_.arrange(t));
  if (t.is_cuda() && is_aligned_ && !backend::is_aligned(owned_.back())) {
    owned_.back() = owned_.back().clone();
  }
  return backend::const_view(owned_.back());
}

kernels::MutableTensor Staging::write(const Tensor& result) {
  if (!result.defined()) return {};
  auto buffer = mapping_.buffer_for(result);
  const auto view = backend::mutable_view(buffer);
  if (!buffer.is_same(result)) pending_.emplace_back(result, std::move(buffer));
  return view;
}

kernels::ConstTensor Staging::read_vector(const Tensor& t) {
  if (!t.defined()) return {};
  owned_.push_back(t.contiguous());
  return backend::const_view(owned_.back());
}

kernels::MutableTensor Staging::update_vector(const Tensor& t) {
  if (!t.defined()) return {};
  auto buffer = t.contiguous();
  const auto view = backend::mutable_view(buffer);
  if (!buffer.is_same(t)) pending_.emplace_back(t, std::move(buffer));
  return view;
}

kernels::NormGradients Staging::write(const Gradients& gradients) {
  const auto& [input, weight, bias, residual] = gradients;
  return {write(input), backend::mutable_view(weight), backend::mutable_view(bias),
          write(residual)};
}

kernels::GradientCotangents Staging::read(const Cotangents& cotangents) {
  return {read(value_or_undefined(cotangents.input)),
          read_vector(value_or_undefined(cotangents.weight)),
          read_vector(value_or_undefined(cotangents.bias)),
          read(value_or_undefined(cotangents.residual))};
}

void Staging::finish() {
  for (const auto& [result, buffer] : pending_) result.copy_(buffer);
}

}  // namespace normcore
