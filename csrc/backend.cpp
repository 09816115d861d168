#include "backend.h"

#include <ATen/Parallel.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <normcore/kernels/cuda_plan.h>
#include <normcore/settings.h>

#include <algorithm>
#include <cstddef>
#include <optional>

#include "checks.h"
#include "wanted_path.h"

#if defined(NORMCORE_CUDA)
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <normcore/kernels/cuda.h>
#endif

namespace normcore::backend {
namespace {

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
void run_on_cpu(const char* op, const Args& args) {
  const auto executor = cpu_executor();
  const auto plan = kernels::plan_cpu(problem_of(args), executor.num_threads);
  // On the stack if it is small: to a norm of a few values an allocation matters.
  alignas(64) std::byte on_stack[8192];
  c10::DataPtr allocated;
  void* workspace = on_stack;
  if (plan.workspace_bytes > sizeof(on_stack)) {
    allocated = c10::GetCPUAllocator()->allocate(plan.workspace_bytes);
    workspace = allocated.get();
  }
  check(kernels::run(args, plan, workspace, executor), op);
}

// By the settings of the library.
std::optional<kernels::CudaPlan> cuda_plan(const kernels::Problem& problem,
                                           const kernels::CudaDevice& device) {
  kernels::CudaOptions options;
  options.batch_invariant = batch_invariant();
  options.path = wanted_cuda_path();
  options.spare_multiprocessors = spare_multiprocessors();
  if (options.path) {
    if (const auto plan = kernels::plan_cuda(problem, device, options)) return plan;
    options.path.reset();
  }
  return kernels::plan_cuda(problem, device, options);
}

#if defined(NORMCORE_CUDA)

kernels::CudaStream stream_of(c10::Device device) {
  return {c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle()};
}

template <class Args>
kernels::Status run_plan(const Args& args, const kernels::CudaPlan& plan, c10::Device device) {
  // Zeroed for every call and not kept: graphs may record the call, and torch may have redirected its
  // allocator to the pool of one.
  at::Tensor workspace, counters;
  kernels::CudaWorkspace memory;
  if (plan.workspace_bytes != 0) {
    workspace = at::empty({static_cast<std::int64_t>(plan.workspace_bytes)},
                          at::device(device).dtype(at::kByte));
    memory.data = workspace.mutable_data_ptr();
  }
  if (plan.counters != 0) {
    counters = at::zeros({plan.counters}, at::device(device).dtype(at::kInt));
    memory.counters = reinterpret_cast<unsigned*>(counters.mutable_data_ptr<std::int32_t>());
  }
  return kernels::run(args, plan, memory, stream_of(device));
}

template <class Args>
bool try_on_cuda(const char* op, const Args& args, c10::Device device) {
  const c10::DeviceGuard guard(device);
  kernels::CudaDevice facts;
  check(kernels::query_device(device.index(), facts), op);
  const kernels::Problem problem = problem_of(args);
  while (const auto plan = cuda_plan(problem, facts)) {
    const kernels::Status status = run_plan(args, *plan, device);
    if (status.code != kernels::StatusCode::kNoRoom) {
      check(status, op);
      return true;
    }
    facts = with_less_room(facts, *plan);
  }
  return false;
}

#endif

template <class Args>
bool try_on(const char* op, const Args& args, c10::Device device) {
  if (device.is_cpu()) {
    run_on_cpu(op, args);
    return true;
  }
#if defined(NORMCORE_CUDA)
  if (device.is_cuda()) return try_on_cuda(op, args, device);
#endif
  TORCH_CHECK_NOT_IMPLEMENTED(false, op, ": no kernels for device ", device,
                              " in this build; move the tensors to the CPU",
                              device.is_cuda() ? ", or build normcore with nvcc" : "");
}

template <class Args>
void run_on(const char* op, const Args& args, c10::Device device) {
  TORCH_CHECK(try_on(op, args, device), op, ": the input is too large for a CUDA grid");
}

}  // namespace

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

kernels::ConstTensor const_view(const at::Tensor& t) {
  if (!t.defined()) return {};
  return {t.const_data_ptr(), to_dtype(t.scalar_type())};
}

kernels::MutableTensor mutable_view(const at::Tensor& t) {
  if (!t.defined()) return {};
  return {t.mutable_data_ptr(), to_dtype(t.scalar_type())};
}

bool is_aligned(const at::Tensor& t) {
  constexpr std::uintptr_t kVectorBytes = 16;
  const bool has_data = !t.is_meta() && !t.key_set().has(c10::DispatchKey::Python);
  const auto address = has_data ? reinterpret_cast<std::uintptr_t>(t.const_data_ptr())
                                : static_cast<std::uintptr_t>(t.storage_offset()) * t.itemsize();
  return address % kVectorBytes == 0;
}

std::string describe_plan(const kernels::Problem& problem, c10::Device device) {
  if (device.is_cpu()) return describe(kernels::plan_cpu(problem, at::get_num_threads()));
  TORCH_CHECK_NOT_IMPLEMENTED(device.is_cuda(),
                              "explain: expected device to be a CPU or CUDA device, got ", device);
  kernels::CudaDevice facts;
#if defined(NORMCORE_CUDA)
  int ordinal = device.has_index() ? device.index() : 0;
  if (!device.has_index() && c10::impl::hasDeviceGuardImpl(device.type())) {
    const c10::impl::VirtualGuardImpl guard(device.type());
    if (guard.deviceCount() != 0) ordinal = guard.getDevice().index();
  }
  if (!kernels::query_device(ordinal, facts).ok()) facts = {};
#endif
  const auto plan = cuda_plan(problem, facts);
  return plan ? describe(*plan) : "too large for a CUDA grid";
}

void run(const kernels::BatchNormForwardArgs& args, c10::Device device) {
  run_on("batch_norm", args, device);
}
void run(const kernels::BatchNormInferenceArgs& args, c10::Device device) {
  run_on("batch_norm", args, device);
}
void run(const kernels::BatchNormBackwardArgs& args, c10::Device device) {
  run_on("batch_norm", args, device);
}
void run(const kernels::GroupNormForwardArgs& args, c10::Device device) {
  run_on("group_norm", args, device);
}
void run(const kernels::GroupNormBackwardArgs& args, c10::Device device) {
  run_on("group_norm", args, device);
}
void run(const kernels::SyncMomentsArgs& args, c10::Device device) {
  run_on(norm_name(args.num_groups), args, device);
}
void run(const kernels::SyncApplyArgs& args, c10::Device device) {
  run_on(norm_name(args.num_groups), args, device);
}
void run(const kernels::SyncGradientSumsArgs& args, c10::Device device) {
  run_on(norm_name(args.num_groups), args, device);
}
void run(const kernels::SyncGradientArgs& args, c10::Device device) {
  run_on(norm_name(args.num_groups), args, device);
}
void run(const kernels::SyncStatisticsArgs& args, [[maybe_unused]] c10::Device device) {
#if defined(NORMCORE_CUDA)
  if (device.is_cuda()) {
    const c10::DeviceGuard guard(device);
    return check(kernels::run(args, stream_of(device)), "batch_norm");
  }
#endif
  check(kernels::run(args, cpu_executor()), "batch_norm");
}
bool try_run(const kernels::BatchNormDoubleBackwardArgs& args, c10::Device device) {
  return try_on("batch_norm", args, device);
}
bool try_run(const kernels::GroupNormDoubleBackwardArgs& args, c10::Device device) {
  return try_on("group_norm", args, device);
}

}  // namespace normcore::backend
