#include "normcore/kernels/group_norm.h"

#include "cpu/backward.h"
#include "cpu/check.h"
#include "cpu/forward.h"

namespace normcore::kernels {
namespace {

bool groups_divide(const NormInput& input, std::int64_t num_groups) {
  return num_groups > 0 && input.extent.c % num_groups == 0;
}

template <class A>
void forward(const GroupNormForwardArgs& args, const CpuPlan& plan, void* workspace,
             const CpuExecutor& executor) {
  const BatchStatistics<A> statistics{args.input.eps, args.mean, args.rstd};
  run_forward(args.input, args.num_groups, Pass::kForward, statistics, args.y, plan, workspace,
              executor);
}

}  // namespace

Status group_norm_forward(const GroupNormForwardArgs& args, const CpuPlan& plan, void* workspace,
                          const CpuExecutor& executor) {
  if (args.input.extent.numel() == 0) return Status::success();
  if (const Status status = check_input(args.input, args.y); !status.ok()) return status;
  if (args.mean == nullptr || !args.rstd) return Status::invalid("mean and rstd must be given");
  if (!groups_divide(args.input, args.num_groups))
    return Status::invalid("num_groups must divide c");
  if (compute_type(args.input.x.dtype) == DType::kFloat64) {
    forward<double>(args, plan, workspace, executor);
  } else {
    forward<float>(args, plan, workspace, executor);
  }
  return Status::success();
}

Status group_norm_backward(const GroupNormBackwardArgs& args, const CpuPlan& plan, void* workspace,
                           const CpuExecutor& executor) {
  if (!groups_divide(args.input, args.num_groups))
    return Status::invalid("num_groups must divide c");
  const ConstTensor mean{args.mean, DType::kFloat64};
  return run_backward({args.input, args.num_groups, args.grad_y, mean, args.rstd, true, args.grad},
                      plan, workspace, executor);
}

}  // namespace normcore::kernels
