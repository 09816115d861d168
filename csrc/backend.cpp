#include "backend.h"

#include <ATen/Parallel.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace normcore::backend {
namespace {

kernels::DType to_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return kernels::DType::kFloat64;
    case at::kFloat:
      return kernels::DType::kFloat32;
    case at::kBFloat16:
      return kernels::DType::kBFloat16;
    case at::kHalf:
      return kernels::DType::kFloat16;
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernel dtype for ", dtype);
  }
}

void parallel_for(void* /*context*/, std::int64_t count, std::int64_t grain,
                  kernels::CpuExecutor::Body body, void* body_context) {
  at::parallel_for(0, count, std::max<std::int64_t>(grain, 1),
                   [=](std::int64_t begin, std::int64_t end) { body(body_context, begin, end); });
}

// at::parallel_for runs inline inside a parallel region, whatever the number of threads.
kernels::CpuExecutor cpu_executor() {
  return {nullptr, parallel_for, at::in_parallel_region() ? 1 : at::get_num_threads()};
}

void check(const kernels::Status& status, const char* op) {
  TORCH_CHECK(status.ok(), op, ": ", status.message);
}

template <class Args>
using CpuEntry = kernels::Status (*)(const Args&, const kernels::CpuPlan&, void*,
                                     const kernels::CpuExecutor&);

template <class Args>
void run(const char* op, CpuEntry<Args> entry, const Args& args, std::int64_t num_groups,
         kernels::Pass pass, c10::Device device) {
  TORCH_CHECK_NOT_IMPLEMENTED(device.is_cpu(), op, ": no kernels for device ", device,
                              " in this build; move the tensors to the CPU");
  const auto executor = cpu_executor();
  const auto plan = kernels::plan_cpu({args.input, num_groups, pass}, executor.num_threads);
  const auto workspace = c10::GetCPUAllocator()->allocate(plan.workspace_bytes);
  check(entry(args, plan, workspace.get(), executor), op);
}

constexpr std::int64_t kOneSlicePerChannel = 0;

}  // namespace

kernels::ConstTensor const_view(const at::Tensor& t) {
  if (!t.defined()) return {};
  return {t.const_data_ptr(), to_dtype(t.scalar_type())};
}

kernels::MutableTensor mutable_view(const at::Tensor& t) {
  if (!t.defined()) return {};
  return {t.mutable_data_ptr(), to_dtype(t.scalar_type())};
}

void run(const kernels::BatchNormForwardArgs& args, c10::Device device) {
  run("batch_norm", kernels::batch_norm_forward, args, kOneSlicePerChannel, kernels::Pass::kForward,
      device);
}

void run(const kernels::BatchNormInferenceArgs& args, c10::Device device) {
  run("batch_norm", kernels::batch_norm_inference, args, kOneSlicePerChannel,
      kernels::Pass::kInference, device);
}

void run(const kernels::BatchNormBackwardArgs& args, c10::Device device) {
  run("batch_norm", kernels::batch_norm_backward, args, kOneSlicePerChannel,
      kernels::Pass::kBackward, device);
}

void run(const kernels::GroupNormForwardArgs& args, c10::Device device) {
  run("group_norm", kernels::group_norm_forward, args, args.num_groups, kernels::Pass::kForward,
      device);
}

void run(const kernels::GroupNormBackwardArgs& args, c10::Device device) {
  run("group_norm", kernels::group_norm_backward, args, args.num_groups, kernels::Pass::kBackward,
      device);
}

}  // namespace normcore::backend
