#include "normcore/kernels/batch_norm.h"

#include "check.h"
#include "cpu/backward.h"
#include "cpu/double_backward.h"
#include "cpu/forward.h"

namespace normcore::kernels {
namespace {

template <class A>
void forward(const BatchNormForwardArgs& args, const CpuPlan& plan, void* workspace,
             const CpuExecutor& executor) {
  const double weight = args.running.mean ? running_weight(args.running) : 0.0;
  const BatchStatistics<A> statistics{args.input.eps, args.mean, args.rstd, args.running, weight};
  run_forward(args.input, 0, Pass::kForward, statistics, {args.y, args.relu_bits}, plan, workspace,
              executor);
}

template <class A>
void inference(const BatchNormInferenceArgs& args, const CpuPlan& plan, void* workspace,
               const CpuExecutor& executor) {
  const GivenStatistics<A> statistics{args.input.eps, args.running_mean, args.running_var,
                                      args.rstd};
  run_forward(args.input, 0, Pass::kInference, statistics, {args.y}, plan, workspace, executor);
}

}  // namespace

Status run(const BatchNormForwardArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor) {
  if (args.input.extent.numel() == 0) return Status::success();
  if (const Status status = check_args(args); !status.ok()) return status;
  if (compute_type(args.input.x.dtype) == DType::kFloat64) {
    forward<double>(args, plan, workspace, executor);
  } else {
    forward<float>(args, plan, workspace, executor);
  }
  if (args.running.num_batches_tracked != nullptr) ++*args.running.num_batches_tracked;
  return Status::success();
}

Status run(const BatchNormInferenceArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor) {
  if (args.input.extent.numel() == 0) return Status::success();
  if (const Status status = check_args(args); !status.ok()) return status;
  if (compute_type(args.input.x.dtype) == DType::kFloat64) {
    inference<double>(args, plan, workspace, executor);
  } else {
    inference<float>(args, plan, workspace, executor);
  }
  return Status::success();
}

Status run(const BatchNormBackwardArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor) {
  return run_backward(
      {args.input, 0, args.grad_y, args.mean, args.rstd, args.batch_statistics, args.grad}, plan,
      workspace, executor);
}

Status run(const BatchNormDoubleBackwardArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor) {
  return run_double_backward(
      {{args.input, 0, args.grad_y, args.mean, args.rstd, args.batch_statistics, args.grad},
       args.cotangents,
       args.grad_grad_y},
      plan, workspace, executor);
}

}  // namespace normcore::kernels
