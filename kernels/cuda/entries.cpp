// The entries: checks of the args, the problem they pose, and the passes over its layout.
#include <cstdint>

#include "check.h"
#include "cuda/call.h"
#include "cuda/passes.h"
#include "normcore/kernels/cuda.h"
#include "plan/cuda_tiling.h"

namespace normcore::kernels {
namespace {

Status check_plan(const Problem& problem, const CudaPlan& plan, const CudaWorkspace& workspace) {
  if (plan.width > 1 && !problem.aligned) {
    return Status::invalid("vectors need tensors that are aligned to 16 bytes");
  }
  if (plan.workspace_bytes != 0 && workspace.data == nullptr) {
    return Status::invalid("the plan needs a workspace");
  }
  if (plan.counters != 0 && workspace.counters == nullptr) {
    return Status::invalid("the plan needs counters");
  }
  return Status::success();
}

template <class T>
T* part(const CudaWorkspace& workspace, std::size_t offset) {
  return reinterpret_cast<T*>(static_cast<unsigned char*>(workspace.data) + offset);
}

Status start(cuda::ForwardCall call, const Problem& problem, const CudaPlan& plan,
             const CudaWorkspace& workspace, CudaStream stream) {
  if (const Status status = check_plan(problem, plan, workspace); !status.ok()) return status;
  const CudaWorkspaceLayout layout = cuda_workspace_layout(problem, plan);
  call.records = part<void>(workspace, layout.records);
  call.counters = workspace.counters;
  if (plan.path == CudaPath::kRun) {
    return cuda::runs_forward(call, runs_tiling(problem, plan), plan, stream);
  }
  return plan.layout == Layout::kNCS
             ? cuda::planes_forward(call, planes_tiling(problem, plan), plan, stream)
             : cuda::rows_forward(call, rows_tiling(problem, plan), plan, stream);
}

// Of either backward pass.
template <class Call>
Status start_gradient(Call call, const Problem& problem, const CudaPlan& plan,
                      const CudaWorkspace& workspace, CudaStream stream) {
  const bool wants_parameters = call.grad.scale || call.grad.bias;
  if (problem.extent.numel() == 0) {
    const std::int64_t samples = call.input.affine_per_sample ? call.input.extent.n : 1;
    if (!wants_parameters || samples * call.input.extent.c == 0) return Status::success();
    return cuda::sum_parameters(call, samples * call.input.extent.c, 0, stream);
  }
  if (!problem.reduces && !problem.applies) return Status::success();
  if (const Status status = check_plan(problem, plan, workspace); !status.ok()) return status;
  const CudaWorkspaceLayout layout = cuda_workspace_layout(problem, plan);
  call.samples_per_block = plan.samples_per_block;
  if (plan.path == CudaPath::kSplit || call.whole != nullptr) {
    call.slices = part<void>(workspace, layout.slices);
  }
  if (call.whole != nullptr) {
    const Extent& e = problem.extent;
    const std::int64_t slices = call.num_groups == 0 ? e.c : e.n * call.num_groups;
    if (const Status status = cuda::sync_slices(call, slices, stream); !status.ok()) return status;
  }
  call.records = part<void>(workspace, layout.records);
  call.channel_sums = part<void>(workspace, layout.channel_sums);
  call.counters = workspace.counters;
  const bool sums_parameters = layout.sample_blocks != 0 && wants_parameters;
  if (sums_parameters) call.parameters = part<cuda::ParameterSums>(workspace, layout.parameters);
  const auto run = [&] {
    if (plan.path == CudaPath::kRun) {
      return cuda::runs_gradient(call, runs_tiling(problem, plan), plan, stream);
    }
    return plan.layout == Layout::kNCS
               ? cuda::planes_gradient(call, planes_tiling(problem, plan), plan, stream)
               : cuda::rows_gradient(call, rows_tiling(problem, plan), plan, stream);
  };
  const Status status = run();
  if (!status.ok() || !sums_parameters) return status;
  return cuda::sum_parameters(call, call.input.extent.c, layout.sample_blocks, stream);
}

// What the args of both backward passes of a norm have in common.
template <class Args>
void set_gradient(cuda::BackwardCall& call, const Args& args) {
  call.input = args.input;
  call.grad_y = args.grad_y;
  call.rstd = args.rstd;
  call.grad = args.grad;
}
template <class Args>
void set_batch_norm(cuda::BackwardCall& call, const Args& args) {
  set_gradient(call, args);
  call.mean = args.mean;
  call.batch_statistics = args.batch_statistics;
}
template <class Args>
void set_group_norm(cuda::BackwardCall& call, const Args& args) {
  set_gradient(call, args);
  call.num_groups = args.num_groups;
  call.mean = {args.mean, DType::kFloat64};
}

// Of slices that are parts of longer ones.
template <class Args>
void set_part(cuda::BackwardCall& call, const Args& args) {
  call.input = args.input;
  call.num_groups = args.num_groups;
  call.grad_y = args.grad_y;
  call.mean = args.mean;
  call.rstd = args.rstd;
  call.is_partial = true;
}

Status start(const cuda::BackwardCall& call, const Problem& problem, const CudaPlan& plan,
             const CudaWorkspace& workspace, CudaStream stream) {
  if (problem.extent.numel() != 0) {
    const Status status = check_gradients(call.input, call.grad_y, call.mean, call.rstd, call.grad);
    if (!status.ok()) return status;
  }
  return start_gradient(call, problem, plan, workspace, stream);
}

Status start(const cuda::DoubleBackwardCall& call, const Problem& problem, const CudaPlan& plan,
             const CudaWorkspace& workspace, CudaStream stream) {
  if (problem.extent.numel() != 0) {
    const Status status = check_double_backward(call.input, call.grad_y, call.mean, call.rstd,
                                                call.cotangents, call.grad_grad_y, call.grad);
    if (!status.ok()) return status;
  }
  return start_gradient(call, problem, plan, workspace, stream);
}

}  // namespace

Status run(const BatchNormForwardArgs& args, const CudaPlan& plan, const CudaWorkspace& workspace,
           CudaStream stream) {
  if (args.input.extent.numel() == 0) return Status::success();
  if (const Status status = check_args(args); !status.ok()) return status;
  cuda::ForwardCall call;
  call.input = args.input;
  call.y = args.y;
  call.mean = args.mean;
  call.rstd = args.rstd;
  call.relu_bits = args.relu_bits;
  call.running = args.running;
  if (call.relu_bits != nullptr && plan.width != elements_per_relu_byte(args.input.x.dtype)) {
    return Status::invalid("relu_bits need x, residual and y that are aligned to 16 bytes");
  }
  return start(call, problem_of(args), plan, workspace, stream);
}

Status run(const BatchNormInferenceArgs& args, const CudaPlan& plan, const CudaWorkspace& workspace,
           CudaStream stream) {
  if (args.input.extent.numel() == 0) return Status::success();
  if (const Status status = check_args(args); !status.ok()) return status;
  cuda::ForwardCall call;
  call.input = args.input;
  call.input.mask = {};
  call.y = args.y;
  call.rstd = args.rstd;
  call.given_mean = args.running_mean;
  call.given_var = args.running_var;
  return start(call, problem_of(args), plan, workspace, stream);
}

Status run(const BatchNormBackwardArgs& args, const CudaPlan& plan, const CudaWorkspace& workspace,
           CudaStream stream) {
  cuda::BackwardCall call;
  set_batch_norm(call, args);
  return start(call, problem_of(args), plan, workspace, stream);
}

Status run(const BatchNormDoubleBackwardArgs& args, const CudaPlan& plan,
           const CudaWorkspace& workspace, CudaStream stream) {
  cuda::DoubleBackwardCall call;
  set_batch_norm(call, args);
  call.cotangents = args.cotangents;
  call.grad_grad_y = args.grad_grad_y;
  return start(call, problem_of(args), plan, workspace, stream);
}

Status run(const GroupNormForwardArgs& args, const CudaPlan& plan, const CudaWorkspace& workspace,
           CudaStream stream) {
  if (args.input.extent.numel() == 0) return Status::success();
  if (const Status status = check_args(args); !status.ok()) return status;
  cuda::ForwardCall call;
  call.input = args.input;
  call.num_groups = args.num_groups;
  call.y = args.y;
  call.mean = args.mean;
  call.rstd = args.rstd;
  return start(call, problem_of(args), plan, workspace, stream);
}

Status run(const GroupNormBackwardArgs& args, const CudaPlan& plan, const CudaWorkspace& workspace,
           CudaStream stream) {
  if (const Status status = check_groups(args.input, args.num_groups); !status.ok()) return status;
  cuda::BackwardCall call;
  set_group_norm(call, args);
  return start(call, problem_of(args), plan, workspace, stream);
}

Status run(const GroupNormDoubleBackwardArgs& args, const CudaPlan& plan,
           const CudaWorkspace& workspace, CudaStream stream) {
  if (const Status status = check_groups(args.input, args.num_groups); !status.ok()) return status;
  cuda::DoubleBackwardCall call;
  set_group_norm(call, args);
  call.cotangents = args.cotangents;
  call.grad_grad_y = args.grad_grad_y;
  return start(call, problem_of(args), plan, workspace, stream);
}

Status run(const SyncMomentsArgs& args, const CudaPlan& plan, const CudaWorkspace& workspace,
           CudaStream stream) {
  if (args.input.extent.numel() == 0) return Status::success();
  if (const Status status = check_args(args); !status.ok()) return status;
  cuda::ForwardCall call;
  call.input = args.input;
  call.num_groups = args.num_groups;
  call.sums = args.sums;
  call.by_rank = args.by_rank;
  return start(call, problem_of(args), plan, workspace, stream);
}

Status run(const SyncApplyArgs& args, const CudaPlan& plan, const CudaWorkspace& workspace,
           CudaStream stream) {
  if (args.input.extent.numel() == 0) return Status::success();
  if (const Status status = check_args(args); !status.ok()) return status;
  cuda::ForwardCall call;
  call.input = args.input;
  call.input.mask = {};
  call.num_groups = args.num_groups;
  call.y = args.y;
  call.rstd = args.rstd;
  call.given_mean = args.mean;
  call.given_var = args.var;
  return start(call, problem_of(args), plan, workspace, stream);
}

Status run(const SyncStatisticsArgs& args, CudaStream stream) {
  if (const Status status = check_args(args); !status.ok()) return status;
  if (args.slices == 0) return Status::success();
  return cuda::sync_statistics(args, stream);
}

Status run(const SyncGradientSumsArgs& args, const CudaPlan& plan, const CudaWorkspace& workspace,
           CudaStream stream) {
  if (const Status status = check_slices(args.input, args.num_groups); !status.ok()) return status;
  cuda::BackwardCall call;
  set_part(call, args);
  call.grad.scale = args.grad_scale;
  call.grad.bias = args.grad_bias;
  call.sums = args.sums;
  return start(call, problem_of(args), plan, workspace, stream);
}

Status run(const SyncGradientArgs& args, const CudaPlan& plan, const CudaWorkspace& workspace,
           CudaStream stream) {
  if (const Status status = check_args(args); !status.ok()) return status;
  cuda::BackwardCall call;
  set_part(call, args);
  call.grad.x = args.grad_x;
  call.grad.residual = args.grad_residual;
  call.whole = args.sums;
  call.share = args.share;
  return start(call, problem_of(args), plan, workspace, stream);
}

}  // namespace normcore::kernels
