// Forward pass over runs.
#include <cuda_runtime.h>

#include <cmath>

#include "cuda/dispatch.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/parameters.cuh"
#include "cuda/passes.h"
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"
#include "cuda/runs.cuh"
#include "cuda/statistics.cuh"
#include "plan/cuda_constants.h"

namespace normcore::kernels::cuda {
namespace {

template <class T, int kWidth, bool kPlain>
__global__ void __launch_bounds__(kMaxThreads, 1)
    runs_forward_kernel(const __grid_constant__ ForwardCall call,
                        const __grid_constant__ RunsTiling tiling) {
  using A = Arithmetic<T>;
  constexpr int kHeld = kRunForwardVectors;
  const unsigned lanes = tiling.lanes, lane = threadIdx.x % lanes;
  const std::int64_t slice =
      static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
  const bool is_active = slice < tiling.slices();
  const std::int64_t sample = is_active ? tiling.by_groups.quotient_of(slice) : 0;
  const auto group = static_cast<std::uint32_t>(is_active ? slice - sample * tiling.groups : 0);
  const RunPart<kWidth, kHeld, kPlain> run(tiling, sample, group, lane, is_active);
  const T* const data = static_cast<const T*>(call.input.x.data);
  const Mask& mask = call.input.mask;

  Vector<T, kWidth> x[kHeld];
  const auto load = [&](std::uint32_t batch) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const std::uint32_t vector = run.vector(batch, k);
      if (run.has(vector)) x[k] = load_vector<T, kWidth>(data, run.index(vector), {0, kWidth});
    }
  };
  // Calls f(vector, its number) for all of the thread.
  const auto for_each_vector = [&](auto f) {
    for (std::uint32_t batch = 0; batch < run.batches(); ++batch) {
      if (run.batches() > 1) load(batch);
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const std::uint32_t vector = run.vector(batch, k);
        if (!run.has(vector)) continue;
        keep_packed(x[k]);
        f(x[k], vector);
      }
    }
  };
  if (run.batches() == 1) load(0);

  double count = static_cast<double>(tiling.vectors) * kWidth;
  const auto mean_about = [&](A reference) {
    A total[2] = {};
    for_each_vector([&](const Vector<T, kWidth>& values, std::uint32_t vector) {
      const unsigned counting = run.counting(mask, vector);
      if constexpr (!kPlain) total[1] += static_cast<A>(__popc(counting));
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const A value = convert_from<A>(values[i]);
        total[0] += (counting >> i & 1) != 0 ? value - reference : A{0};
      }
    });
    double sums[2];
    sum_over_lanes(total, lanes, sums);
    if constexpr (!kPlain) count = sums[1];
    return count == 0.0 ? A{0} : reference + static_cast<A>(sums[0] / count);
  };
  // About a value of the slice itself, so that equal values give exactly themselves. Under a mask no
  // value is known to count: the mean about 0 stands in.
  A reference = mask ? A{0} : convert_from<A>(data[run.start()]);
  if (mask) reference = mean_about(A{0});
  const A pivot = mean_about(reference);
  A total[2] = {};
  for_each_vector([&](const Vector<T, kWidth>& values, std::uint32_t vector) {
    const unsigned counting = run.counting(mask, vector);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const A value = convert_from<A>(values[i]);
      const A centered = (counting >> i & 1) != 0 ? value - pivot : A{0};
      total[0] += centered;
      total[1] = std::fma(centered, centered, total[1]);
    }
  });
  double sums[2];
  sum_over_lanes(total, lanes, sums);
  const Moments moments =
      to_moments(ShiftedSums{count, static_cast<double>(pivot), sums[0], sums[1]});
  // Every lane computes them, the first saves them.
  const auto statistics = statistics_of<A>(call, moments);
  if (is_active && lane == 0) save_statistics<A>(call, run.slice(), moments);

  for_each_vector([&](const Vector<T, kWidth>& values, std::uint32_t vector) {
    AffineParameters<A> parameters[kWidth];
    load_parameters(call, affine_index(call.input, run.sample(), run.channel(vector)), parameters);
    PerColumn<Affine<A>, kWidth> affine;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      affine.values[i] = Affine<A>::of(statistics, parameters[i].scale, parameters[i].bias);
    }
    apply_forward<kPlain>(call, values, run.index(vector), Span{0, kWidth}, affine);
  });
}

}  // namespace

Status runs_forward(const ForwardCall& call, const RunsTiling& tiling, const CudaPlan& plan,
                    CudaStream stream) {
  return for_each_run_kernel<kForwardKernels>(
      call.input.x.dtype, plan, [&]<class T, int kWidth, bool kPlain>() {
        return launch_blocks(runs_forward_kernel<T, kWidth, kPlain>, plan, plan.blocks, stream,
                             call, tiling);
      });
}

}  // namespace normcore::kernels::cuda
