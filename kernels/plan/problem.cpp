#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "normcore/kernels/batch_norm.h"
#include "normcore/kernels/group_norm.h"
#include "normcore/kernels/sync.h"
#include "plan/cpu_geometry.h"
#include "plan/cuda_constants.h"

namespace normcore::kernels {
namespace {

constexpr std::int64_t kBatchNorm = 0;

bool are_aligned(std::initializer_list<const void*> pointers) {
  std::uintptr_t bits = 0;
  for (const void* pointer : pointers) bits |= reinterpret_cast<std::uintptr_t>(pointer);
  return bits % static_cast<std::uintptr_t>(kVectorBytes) == 0;
}

// Of x and the tensors beside it; absent ones have it.
bool have_one_dtype(const NormInput& input, std::initializer_list<ConstTensor> others) {
  const auto has_it = [&](const ConstTensor& t) { return !t || t.dtype == input.x.dtype; };
  return has_it(input.residual) && std::all_of(others.begin(), others.end(), has_it);
}

Problem forward(const NormInput& input, std::int64_t num_groups, Pass pass, ConstTensor y) {
  Problem p(input, num_groups, pass);
  p.aligned = are_aligned({input.x.data, input.residual.data, y.data});
  p.uniform = have_one_dtype(input, {y});
  return p;
}

Problem backward(const NormInput& input, std::int64_t num_groups, ConstTensor grad_y,
                 const NormGradients& grad, bool batch_statistics) {
  Problem p(input, num_groups, Pass::kBackward);
  p.aligned = are_aligned(
      {input.x.data, input.residual.data, grad_y.data, grad.x.data, grad.residual.data});
  p.uniform = have_one_dtype(input, {grad_y, grad.x, grad.residual});
  p.reduces = grad.scale || grad.bias || (grad.x && batch_statistics);
  p.applies = grad.x || grad.residual;
  return p;
}

Problem double_backward(const NormInput& input, std::int64_t num_groups, ConstTensor grad_y,
                        const GradientCotangents& cotangents, ConstTensor grad_grad_y,
                        const NormGradients& grad, bool batch_statistics) {
  Problem p(with_rows_of_channels(input), num_groups, Pass::kDoubleBackward);
  p.aligned =
      are_aligned({input.x.data, input.residual.data, grad_y.data, cotangents.x.data,
                   cotangents.residual.data, grad_grad_y.data, grad.x.data, grad.residual.data});
  p.uniform = have_one_dtype(
      input, {grad_y, cotangents.x, cotangents.residual, grad_grad_y, grad.x, grad.residual});
  p.applies = grad_grad_y || grad.x || grad.residual;
  const bool through_statistics = grad.x || (cotangents.x && p.applies);
  p.reduces = grad.scale || grad.bias || (batch_statistics && through_statistics);
  return p;
}

}  // namespace

Problem problem_of(const BatchNormForwardArgs& args) {
  Problem p = forward(args.input, kBatchNorm, Pass::kForward, args.y);
  p.cumulative = args.running.cumulative && args.running.num_batches_tracked != nullptr;
  return p;
}
Problem problem_of(const BatchNormInferenceArgs& args) {
  return forward(args.input, kBatchNorm, Pass::kInference, args.y);
}
Problem problem_of(const BatchNormBackwardArgs& args) {
  return backward(args.input, kBatchNorm, args.grad_y, args.grad, args.batch_statistics);
}
Problem problem_of(const BatchNormDoubleBackwardArgs& args) {
  return double_backward(args.input, kBatchNorm, args.grad_y, args.cotangents, args.grad_grad_y,
                         args.grad, args.batch_statistics);
}
Problem problem_of(const SyncMomentsArgs& args) {
  Problem p = forward(args.input, args.num_groups, Pass::kForward, {});
  p.applies = false;
  p.is_partial = true;
  return p;
}
Problem problem_of(const SyncApplyArgs& args) {
  Problem p = forward(args.input, args.num_groups, Pass::kInference, args.y);
  p.is_partial = true;
  return p;
}
Problem problem_of(const SyncGradientSumsArgs& args) {
  const NormGradients grad{{}, args.grad_scale, args.grad_bias, {}};
  Problem p = backward(args.input, args.num_groups, args.grad_y, grad, true);
  p.reduces = p.reduces || args.sums != nullptr;
  p.is_partial = true;
  return p;
}
Problem problem_of(const SyncGradientArgs& args) {
  const NormGradients grad{args.grad_x, {}, {}, args.grad_residual};
  Problem p = backward(args.input, args.num_groups, args.grad_y, grad, false);
  p.is_partial = true;
  return p;
}
Problem problem_of(const GroupNormForwardArgs& args) {
  return forward(args.input, args.num_groups, Pass::kForward, args.y);
}
Problem problem_of(const GroupNormBackwardArgs& args) {
  return backward(args.input, args.num_groups, args.grad_y, args.grad, true);
}
Problem problem_of(const GroupNormDoubleBackwardArgs& args) {
  return double_backward(args.input, args.num_groups, args.grad_y, args.cotangents,
                         args.grad_grad_y, args.grad, true);
}

}  // namespace normcore::kernels
