// Backward passes over runs, by one kernel. What a Pass is: backward_pass.cuh. A block goes through the
// samples of a chunk in some groups, so that each thread stays with its channels: it adds up their
// gradients of scale and bias in shared memory.
#pragma once

#include <cuda_runtime.h>

#include "cuda/call.h"
#include "cuda/gradients.cuh"
#include "cuda/parameters.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"
#include "cuda/runs.cuh"
#include "cuda/statistics.cuh"
#include "plan/cuda_constants.h"

namespace normcore::kernels::cuda {

template <class Pass>
class RunsGradient {
 public:
  static constexpr int kWidth = Pass::kWidth, kHeld = kRunGradientVectors;
  using A = typename Pass::A;
  using Call = typename Pass::Call;
  using Part = RunPart<kWidth, kHeld, Pass::kPlain>;
  using Coefficients = PerColumn<typename Pass::Coefficients, kWidth>;
  using Operands = typename Pass::Operands;
  using Parameters = typename Pass::Parameters;
  using Slice = typename Pass::Slice;

  __device__ RunsGradient(const Call& call, const RunsTiling& tiling)
      : call_(call),
        tiling_(tiling),
        lane_(threadIdx.x % tiling.lanes),
        unit_(threadIdx.x / tiling.lanes),
        row_lane_(unit_ / tiling.groups_per_block),
        wants_parameters_(call.grad.scale || call.grad.bias) {
    const std::int64_t chunk = tiling.by_group_tiles.quotient_of(blockIdx.x);
    const auto tile = static_cast<std::uint32_t>(blockIdx.x - chunk * tiling.group_tiles);
    chunk_ = chunk;
    first_group_ = tile * tiling.groups_per_block;
    group_ = first_group_ + unit_ % tiling.groups_per_block;
    has_unit_ = row_lane_ < tiling.row_lanes && group_ < tiling.groups;
  }

  __device__ void run() const {
    const bool sums_parameters = call_.parameters != nullptr;
    if (sums_parameters) {
      for (std::uint32_t i = 0; i < tiling_.vectors_per_lane() * 2 * kWidth; ++i) own_sum(i) = A{0};
    }
    const std::int64_t first = chunk_ * call_.samples_per_block;
    // Every thread takes as many steps, as all of a warp or block take part in sums.
    for (std::int64_t at = 0; at < call_.samples_per_block; at += tiling_.row_lanes) {
      const std::int64_t sample = first + at + row_lane_;
      const bool is_active =
          has_unit_ && sample < tiling_.samples && at + row_lane_ < call_.samples_per_block;
      take(Part(tiling_, is_active ? sample : 0, is_active ? group_ : 0, lane_, is_active));
    }
    if (!sums_parameters) return;
    __syncthreads();
    store_sums();
  }

 private:
  __device__ void load(const Part& run, std::uint32_t batch, Operands (&operands)[kHeld]) const {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const std::uint32_t vector = run.vector(batch, k);
      if (run.has(vector)) operands[k].load(call_, run.index(vector), Span{0, kWidth});
    }
  }

  // Calls f(vector, operands, terms, bits of the elements that count, coefficients, parameters) for all
  // vectors of the thread.
  template <class F>
  __device__ void for_each_vector(const Part& run, const SliceStatistics<A>& statistics,
                                  const Slice& slice, Operands (&operands)[kHeld], F f) const {
    for (std::uint32_t batch = 0; batch < run.batches(); ++batch) {
      if (run.batches() > 1) load(run, batch, operands);
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const std::uint32_t vector = run.vector(batch, k);
        if (!run.has(vector)) continue;
        operands[k].keep_packed();
        keep_order();
        Parameters parameters[kWidth];
        load_parameters(call_, affine_index(call_.input, run.sample(), run.channel(vector)),
                        parameters);
        Coefficients coefficients;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          coefficients.values[i] = Pass::coefficients(statistics, slice, parameters[i]);
        }
        const unsigned counting = run.counting(call_.input.mask, vector);
        f(vector, operands[k],
          Pass::terms(call_, operands[k], run.index(vector), Span{0, kWidth}, counting,
                      coefficients),
          counting, coefficients, parameters);
      }
    }
  }

  template <int kPhase>
  __device__ void sum(const Part& run, const SliceStatistics<A>& statistics, Slice& slice,
                      Operands (&operands)[kHeld]) const {
    A sums[Pass::kRunSums] = {};
    for_each_vector(run, statistics, slice, operands,
                    [&](std::uint32_t, const Operands& in, const auto& terms, unsigned counting,
                        const Coefficients& coefficients, const Parameters(&parameters)[kWidth]) {
                      sums[0] += static_cast<A>(__popc(counting));
#pragma unroll
                      for (int i = 0; i < kWidth; ++i) {
                        Pass::template add_to_run<kPhase>(call_, sums, in, terms, counting, i,
                                                          coefficients[i], parameters[i]);
                      }
                    });
    double totals[Pass::kRunSums];
    sum_over_lanes(sums, tiling_.lanes, totals);
    Pass::template finish_run<kPhase>(call_, statistics, totals, slice);
  }

  __device__ void take(const Part& run) const {
    Operands operands[kHeld];
    if (run.batches() == 1) load(run, 0, operands);
    const auto statistics = Pass::statistics(call_, run.slice());
    Slice slice = Pass::prepare(call_, run.sample(), run.first_channel());
    sum<0>(run, statistics, slice, operands);
    if constexpr (Pass::kRunPhases > 1) sum<1>(run, statistics, slice, operands);
    if (!Pass::applies(call_) && !wants_parameters_) return;
    for_each_vector(
        run, statistics, slice, operands,
        [&](std::uint32_t vector, const Operands& in, const auto& terms, unsigned counting,
            const Coefficients& coefficients, const Parameters(&)[kWidth]) {
          Pass::apply(call_, in, terms, run.index(vector), Span{0, kWidth}, counting, coefficients);
          if (!wants_parameters_) return;
          const std::uint32_t first = (vector - lane_) / tiling_.lanes * 2 * kWidth;
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            A scale{0}, bias{0};
            Pass::add_parameters(call_, scale, bias, in, terms, counting, i, coefficients[i],
                                 statistics, slice);
            if (call_.parameters == nullptr) {
              store_parameters(call_, run.sample(), run.channel(vector) + i,
                               static_cast<double>(scale), static_cast<double>(bias));
            } else {
              own_sum(first + 2 * i) += scale;
              own_sum(first + 2 * i + 1) += bias;
            }
          }
        });
  }

  // Shared memory: of each vector of a thread, sums of scale and bias of each element.
  __device__ A& sum_of(std::uint32_t i, unsigned thread) const {
    return dynamic_shared<A>()[i * blockDim.x + thread];
  }
  __device__ A& own_sum(std::uint32_t i) const { return sum_of(i, threadIdx.x); }

  // Over the rows of lanes, in order.
  __device__ void store_sums() const {
    const std::uint32_t width = tiling_.vectors * kWidth;
    const std::uint32_t left = tiling_.groups - first_group_;
    const std::uint32_t groups = left < tiling_.groups_per_block ? left : tiling_.groups_per_block;
    for (std::uint32_t column = threadIdx.x; column < groups * width; column += blockDim.x) {
      const std::uint32_t unit = tiling_.by_width.quotient(column);
      const std::uint32_t channel = column - unit * width, vector = channel / kWidth;
      const std::uint32_t lane = vector % tiling_.lanes;
      const std::uint32_t i = (vector / tiling_.lanes * kWidth + channel % kWidth) * 2;
      ParameterSums total{0.0, 0.0};
      for (std::uint32_t row = 0; row < tiling_.row_lanes; ++row) {
        const unsigned thread = (row * tiling_.groups_per_block + unit) * tiling_.lanes + lane;
        total.scale += static_cast<double>(sum_of(i, thread));
        total.bias += static_cast<double>(sum_of(i + 1, thread));
      }
      const std::int64_t first = static_cast<std::int64_t>(first_group_) * width;
      call_.parameters[chunk_ * call_.input.extent.c + first + column] = total;
    }
  }

  const Call& call_;
  const RunsTiling& tiling_;
  std::int64_t chunk_;
  unsigned lane_, unit_, row_lane_;
  std::uint32_t first_group_, group_;
  bool has_unit_, wants_parameters_;
};

template <class Pass>
__global__ void __launch_bounds__(kMaxThreads, 1)
    runs_gradient_kernel(const __grid_constant__ typename Pass::Call call,
                         const __grid_constant__ RunsTiling tiling) {
  RunsGradient<Pass>(call, tiling).run();
}

}  // namespace normcore::kernels::cuda
