#include "normcore/kernels/sync.h"

#include <algorithm>

#include "check.h"
#include "cpu/backward.h"
#include "cpu/forward.h"

namespace normcore::kernels {
namespace {

template <class A>
void moments(const SyncMomentsArgs& args, const CpuPlan& plan, void* workspace,
             const CpuExecutor& executor) {
  run_forward(args.input, args.num_groups, Pass::kForward,
              PartStatistics<A>{args.by_rank, args.sums}, {}, plan, workspace, executor);
}

template <class A>
void apply(const SyncApplyArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor) {
  const GivenStatistics<A> statistics{args.input.eps, args.mean, args.var, args.rstd};
  run_forward(args.input, args.num_groups, Pass::kInference, statistics, {args.y}, plan, workspace,
              executor);
}

}  // namespace

Status run(const SyncMomentsArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor) {
  if (args.input.extent.numel() == 0) return Status::success();
  if (const Status status = check_args(args); !status.ok()) return status;
  if (compute_type(args.input.x.dtype) == DType::kFloat64) {
    moments<double>(args, plan, workspace, executor);
  } else {
    moments<float>(args, plan, workspace, executor);
  }
  return Status::success();
}

Status run(const SyncApplyArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor) {
  if (args.input.extent.numel() == 0) return Status::success();
  if (const Status status = check_args(args); !status.ok()) return status;
  if (compute_type(args.input.x.dtype) == DType::kFloat64) {
    apply<double>(args, plan, workspace, executor);
  } else {
    apply<float>(args, plan, workspace, executor);
  }
  return Status::success();
}

Status run(const SyncStatisticsArgs& args, const CpuExecutor& executor) {
  if (const Status status = check_args(args); !status.ok()) return status;
  const double weight = args.running.mean ? running_weight(args.running) : 0.0;
  constexpr std::int64_t kGrain = 4096;
  executor.parallel_for(args.slices, kGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t slice = begin; slice < end; ++slice) {
      const auto statistics = SyncStatistics::of(args.own[slice], args.total[slice], args.by_rank);
      args.mean[slice] = statistics.mean;
      args.var[slice] = statistics.var;
      args.share[slice] = statistics.share;
      update_running(args.running, weight, slice, statistics.batch);
    }
  });
  if (args.running.num_batches_tracked != nullptr &&
      std::any_of(args.total, args.total + args.slices,
                  [](const MomentSums& slice) { return slice.count != 0.0; })) {
    ++*args.running.num_batches_tracked;
  }
  return Status::success();
}

Status run(const SyncGradientSumsArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor) {
  if (const Status status = check_slices(args.input, args.num_groups); !status.ok()) return status;
  BackwardCall call{args.input, args.num_groups,           args.grad_y, args.mean,
                    args.rstd,  /*batch_statistics=*/true, {}};
  call.grad.scale = args.grad_scale;
  call.grad.bias = args.grad_bias;
  call.is_partial = true;
  call.sums = args.sums;
  return run_backward(call, plan, workspace, executor);
}

Status run(const SyncGradientArgs& args, const CpuPlan& plan, void* workspace,
           const CpuExecutor& executor) {
  if (const Status status = check_args(args); !status.ok()) return status;
  BackwardCall call{args.input, args.num_groups,           args.grad_y, args.mean,
                    args.rstd,  /*batch_statistics=*/true, {}};
  call.grad.x = args.grad_x;
  call.grad.residual = args.grad_residual;
  call.is_partial = true;
  call.whole = args.sums;
  call.share = args.share;
  return run_backward(call, plan, workspace, executor);
}

}  // namespace normcore::kernels
