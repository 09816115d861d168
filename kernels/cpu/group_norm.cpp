#include "normcore/kernels/group_norm.h"

#include "check.h"
#include "cpu/backward.h"
#include "cpu/double_backward.h"
#include "cpu/forward.h"
#include "cpu/samples.h"

namespace normcore::kernels {
namespace {

template <class A>
void forward(const GroupNormForwardArgs& args, const CpuPlan& plan, void* workspace,
             const CpuExecutor& executor) {
  if (plan.path == CpuPath::kSample) return run_samples<A>(args, plan, workspace, executor);
  const BatchStatistics<A> statistics{args.input.eps, args.mean, args.rstd};
  run_forward(args.input, args.num_groups, Pass::kForward, statistics, {args.y}, plan, workspace,
              executor);
}

}  // namespace

Status run(const GroupNormForwardArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor) {
  if (args.input.extent.numel() == 0) return Status::success();
  if (const Status status = check_args(args); !status.ok()) return status;
  if (compute_type(args.input.x.dtype) == DType::kFloat64) {
    forward<double>(args, plan, workspace, executor);
  } else {
    forward<float>(args, plan, workspace, executor);
  }
  return Status::success();
}

Status run(const GroupNormBackwardArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor) {
  if (const Status status = check_groups(args.input, args.num_groups); !status.ok()) return status;
  const ConstTensor mean{args.mean, DType::kFloat64};
  return run_backward({args.input, args.num_groups, args.grad_y, mean, args.rstd, true, args.grad},
                      plan, workspace, executor);
}

Status run(const GroupNormDoubleBackwardArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor) {
  if (const Status status = check_groups(args.input, args.num_groups); !status.ok()) return status;
  const ConstTensor mean{args.mean, DType::kFloat64};
  return run_double_backward(
      {{args.input, args.num_groups, args.grad_y, mean, args.rstd, true, args.grad},
       args.cotangents,
       args.grad_grad_y},
      plan, workspace, executor);
}

}  // namespace normcore::kernels
