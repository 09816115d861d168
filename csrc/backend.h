// From tensors to kernel entries and back to errors: the only file that knows on which device a
// norm runs. Pointers are those of the tensors; nothing is copied. A call plans, takes its
// workspace from torch's allocator, runs with torch's threads and turns a failed Status into an
// error. Tensors on a device without kernels: NotImplementedError.
#pragma once

#include <ATen/core/Tensor.h>
#include <normcore/kernels/batch_norm.h>
#include <normcore/kernels/group_norm.h>
#include <normcore/kernels/sync.h>

#include <string>

namespace normcore::backend {

kernels::DType to_dtype(at::ScalarType dtype);

// An undefined tensor is an absent one.
kernels::ConstTensor const_view(const at::Tensor& t);
kernels::MutableTensor mutable_view(const at::Tensor& t);

void run(const kernels::BatchNormForwardArgs& args, c10::Device device);
void run(const kernels::BatchNormInferenceArgs& args, c10::Device device);
void run(const kernels::BatchNormBackwardArgs& args, c10::Device device);
void run(const kernels::GroupNormForwardArgs& args, c10::Device device);
void run(const kernels::GroupNormBackwardArgs& args, c10::Device device);
void run(const kernels::SyncMomentsArgs& args, c10::Device device);
void run(const kernels::SyncStatisticsArgs& args, c10::Device device);
void run(const kernels::SyncApplyArgs& args, c10::Device device);
void run(const kernels::SyncGradientSumsArgs& args, c10::Device device);
void run(const kernels::SyncGradientArgs& args, c10::Device device);
// False, and nothing has happened, where a device has no kernel for the call (cuda_plan.h).
bool try_run(const kernels::BatchNormDoubleBackwardArgs& args, c10::Device device);
bool try_run(const kernels::GroupNormDoubleBackwardArgs& args, c10::Device device);

// Whether CUDA kernels may read it in vectors. Tensors without data: as if storage were aligned.
bool is_aligned(const at::Tensor& t);

// The plan of a call on the device, which need not exist on this machine, in one line for people.
std::string describe_plan(const kernels::Problem& problem, c10::Device device);

}  // namespace normcore::backend
