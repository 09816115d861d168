// The second of kSplit's launches: from the records of chunks to statistics, or in a backward pass to
// what is known of slices and the gradients of parameters. A block takes some slices; neighbouring
// threads take neighbouring items (slices forward, their channels backward), whose records lie beside
// each other in a kNSC tensor, and lanes take turns at an item's records. The order of sums depends on
// the number of records and of channels in a slice only.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/backward_pass.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/double_backward_pass.cuh"
#include "cuda/gradients.cuh"
#include "cuda/passes.h"
#include "cuda/statistics.cuh"
#include "plan/cuda_constants.h"

namespace normcore::kernels::cuda {
namespace {

// Of `items` items the sum of `terms` records, by the whole block: record(i, j) gives the j-th of item i,
// one thread calls store(i, Sums). Dynamic shared memory holds a Sums per thread.
template <class Sums, class Record, class Store>
__device__ void merge_items(const MergeTiling& tiling, std::uint32_t items, Record record,
                            Store store) {
  constexpr unsigned kInFlight = records_in_flight(sizeof(record(0, 0)));
  Sums* const handed_over = dynamic_shared<Sums>();
  const unsigned width = blockDim.x / tiling.lanes, lane = threadIdx.x / width;
  for (std::uint32_t first = 0; first < items; first += width) {
    const std::uint32_t item = first + threadIdx.x % width;
    Sums total{};
    for (std::uint32_t term = lane; item < items && term < tiling.terms;
         term += kInFlight * tiling.lanes) {
      decltype(record(0, 0)) parts[kInFlight];
#pragma unroll
      for (unsigned k = 0; k < kInFlight; ++k) {
        const std::uint32_t at = term + k * tiling.lanes;
        parts[k] = record(item, at < tiling.terms ? at : term);
      }
#pragma unroll
      for (unsigned k = 0; k < kInFlight; ++k) {
        if (term + k * tiling.lanes < tiling.terms) merge(total, static_cast<Sums>(parts[k]));
      }
    }
    for (unsigned half = tiling.lanes / 2; half != 0; half /= 2) {
      if (half <= lane && lane < 2 * half) handed_over[threadIdx.x] = total;
      __syncthreads();
      if (lane < half) merge(total, handed_over[threadIdx.x + half * width]);
      __syncthreads();
    }
    if (item < items && lane == 0) store(item, total);
  }
}

__device__ std::uint32_t slices_of_block(const MergeTiling& tiling, std::int64_t first) {
  const std::int64_t left = tiling.slices - first;
  return left < tiling.slices_per_block ? static_cast<std::uint32_t>(left)
                                        : tiling.slices_per_block;
}

// Record: ShiftedSums of a chunk of planes, or ColumnSums of a channel in a chunk of rows.
template <class A, class Record>
__global__ void __launch_bounds__(kMergeThreads, 1)
    merge_forward_kernel(const __grid_constant__ ForwardCall call,
                         const __grid_constant__ MergeTiling tiling) {
  const auto* const records = static_cast<const Record*>(call.records);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * tiling.slices_per_block;
  merge_items<ShiftedSums>(
      tiling, slices_of_block(tiling, first),
      [&](std::uint32_t item, std::uint32_t term) -> Record {
        if (!tiling.is_rows) return records[(first + item) * tiling.records + term];
        const std::uint32_t chunk = tiling.by_channels.quotient(term);
        return records[tiling.row_record(first + item, term - chunk * tiling.channels, chunk)];
      },
      [&](std::uint32_t item, const ShiftedSums& sums) {
        save_reduced<A>(call, first + item, to_moments(sums));
      });
}

// Pass: of the arithmetic type; its Sums<double> are the records.
template <class Pass>
__global__ void __launch_bounds__(kMergeThreads, 1)
    merge_gradient_kernel(const __grid_constant__ typename Pass::Call call,
                          const __grid_constant__ MergeTiling tiling) {
  using Totals = typename Pass::template Sums<double>;
  using Slice = typename Pass::Slice;
  const auto* const records = static_cast<const Totals*>(call.records);
  const std::uint32_t channels = tiling.channels;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * tiling.slices_per_block;
  const std::uint32_t slices = slices_of_block(tiling, first);
  Totals* const totals = static_cast<Totals*>(call.channel_sums) + first * channels;
  merge_items<Totals>(
      tiling, slices * channels,
      [&](std::uint32_t item, std::uint32_t term) -> Totals {
        const std::uint32_t slice = tiling.by_channels.quotient(item);
        const std::uint32_t channel = item - slice * channels;
        if (tiling.is_rows) return records[tiling.row_record(first + slice, channel, term)];
        return records[(first + slice) * tiling.records + channel * tiling.terms + term];
      },
      [&](std::uint32_t item, const Totals& sums) { totals[item] = sums; });
  __syncthreads();
  const unsigned lanes = lanes_for(channels, blockDim.x / tiling.slices_per_block),
                 lane = threadIdx.x % lanes;
  for (std::uint32_t at = 0; at < slices; at += blockDim.x / lanes) {
    const std::uint32_t own = at + threadIdx.x / lanes;
    const bool is_active = own < slices;
    const std::int64_t slice = first + (is_active ? own : 0);
    const std::int64_t sample = tiling.by_slices_per_sample.quotient_of(slice);
    const std::int64_t channel = (slice - sample * tiling.slices_per_sample) * channels;
    const Totals* const sums = totals + (slice - first) * channels;
    const Slice finished = Pass::finish_slice(
        call, is_active, /*stores=*/true, Pass::statistics(call, slice), sample, channel, channels,
        lane, lanes, [&](std::uint32_t i) { return sums[i]; });
    if (is_active && lane == 0) static_cast<Slice*>(call.slices)[slice] = finished;
  }
}

template <class Sums, class Call>
Status launch_merge(void (*kernel)(Call, MergeTiling), const Call& call, const MergeTiling& tiling,
                    CudaStream stream) {
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(tiling.blocks()));
  config.block = dim3(kMergeThreads);
  config.dynamic_shared = kMergeThreads * sizeof(Sums);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  return to_status(launch(kernel, config, call, tiling));
}

template <class Pass>
Status merge_pass(const typename Pass::Call& call, const MergeTiling& tiling, CudaStream stream) {
  return launch_merge<typename Pass::template Sums<double>>(merge_gradient_kernel<Pass>, call,
                                                            tiling, stream);
}

// Calls f(TypeTag<A>) with the arithmetic type of the call.
template <class Call, class F>
Status visit_arithmetic(const Call& call, F f) {
  const bool is_double = compute_type(call.input.x.dtype) == DType::kFloat64;
  return is_double ? f(TypeTag<double>{}) : f(TypeTag<float>{});
}

}  // namespace

Status merge_chunks(const ForwardCall& call, const MergeTiling& tiling, CudaStream stream) {
  return visit_arithmetic(call, [&](auto tag) {
    using A = typename decltype(tag)::type;
    const auto kernel = tiling.is_rows ? merge_forward_kernel<A, ColumnSums<A>>
                                       : merge_forward_kernel<A, ShiftedSums>;
    return launch_merge<ShiftedSums>(kernel, call, tiling, stream);
  });
}

Status merge_chunks(const BackwardCall& call, const MergeTiling& tiling, CudaStream stream) {
  return visit_arithmetic(call, [&](auto tag) {
    return merge_pass<BackwardPass<typename decltype(tag)::type, 1, false>>(call, tiling, stream);
  });
}

Status merge_chunks(const DoubleBackwardCall& call, const MergeTiling& tiling, CudaStream stream) {
  return visit_arithmetic(call, [&](auto tag) {
    using A = typename decltype(tag)::type;
    return has_curved_sums(call, tiling.width)
               ? merge_pass<DoubleBackwardPass<A, 1, false, true>>(call, tiling, stream)
               : merge_pass<DoubleBackwardPass<A, 1, false, false>>(call, tiling, stream);
  });
}

}  // namespace normcore::kernels::cuda
