// Statistics of a slice on the device: from sums about a pivot to what is saved, blended into the
// running statistics and used to normalise. The mean is carried as center + rounding, so that
// float32 results do not suffer from large means.
#pragma once

#include "cuda/call.h"
#include "cuda/elements.cuh"
#include "cuda/reduce.cuh"
#include "normcore/kernels/moments.h"

namespace normcore::kernels::cuda {

// ShiftedSums of the rows of a chunk in one column, in the arithmetic type.
template <class A>
struct alignas(16) ColumnSums {
  A count, pivot, sum, square;
  __device__ explicit operator ShiftedSums() const {
    return {static_cast<double>(count), static_cast<double>(pivot), static_cast<double>(sum),
            static_cast<double>(square)};
  }
};

// The same values about another pivot.
__device__ inline ShiftedSums move_pivot(const ShiftedSums& sums, double pivot) {
  const double shift = sums.pivot - pivot;
  return {sums.count, pivot, sums.sum + sums.count * shift,
          sums.square + shift * (2.0 * sums.sum + sums.count * shift)};
}

// Both together, about the pivot of the first that has a value.
__device__ inline void merge(ShiftedSums& total, const ShiftedSums& other) {
  if (other.count == 0.0) return;
  if (total.count == 0.0) {
    total = other;
    return;
  }
  const ShiftedSums part = move_pivot(other, total.pivot);
  total.count += part.count;
  total.sum += part.sum;
  total.square += part.square;
}

__device__ inline Moments to_moments(const ShiftedSums& sums) {
  return Moments::from_shifted_sums(sums.count, sums.pivot, sums.sum, sums.square);
}

// Sums of `records` sets, of which these `lanes` neighbouring threads take turns; record(i) gives
// the i-th. All lanes get the result, about the mean: sets without a value have no say in it.
template <class Record>
__device__ ShiftedSums merge_records(std::uint64_t records, unsigned lane, unsigned lanes,
                                     Record record) {
  double firsts[2] = {0.0, 0.0}, first_sums[2];
  for (std::uint64_t i = lane; i < records; i += lanes) {
    const ShiftedSums own = record(i);
    firsts[0] += own.count;
    if (own.count != 0.0) firsts[1] += own.count * own.pivot + own.sum;
  }
  sum_over_lanes(firsts, lanes, first_sums);
  const double count = first_sums[0], mean = count == 0.0 ? 0.0 : first_sums[1] / count;
  double seconds[2] = {0.0, 0.0}, second_sums[2];
  for (std::uint64_t i = lane; i < records; i += lanes) {
    const ShiftedSums own = record(i);
    if (own.count == 0.0) continue;
    const ShiftedSums part = move_pivot(own, mean);
    seconds[0] += part.sum;
    seconds[1] += part.square;
  }
  sum_over_lanes(seconds, lanes, second_sums);
  return {count, mean, second_sums[0], second_sums[1]};
}

template <class A>
struct SliceStatistics {
  A center, rounding, rstd;

  __device__ static SliceStatistics of(double mean, A rstd) {
    const A center = static_cast<A>(mean);
    return {center, static_cast<A>(mean - static_cast<double>(center)), rstd};
  }
};

template <class A>
__device__ A reciprocal_std(double var, double eps) {
  return static_cast<A>(1.0 / sqrt(var + eps));
}

// Weight of the new batch in the running statistics.
__device__ inline double running_weight(const RunningStatistics& running) {
  if (!running.cumulative) return running.momentum;
  return 1.0 / static_cast<double>(*running.num_batches_tracked + 1);
}

__device__ inline void update_running(const RunningStatistics& running, std::int64_t channel,
                                      const Moments& batch) {
  if (!running.mean || batch.count == 0.0) return;
  const double weight = running_weight(running);
  const auto blend = [&](const MutableTensor& statistic, double value) {
    const double old = load_element<double>(statistic, channel);
    store_element(statistic, channel, (1.0 - weight) * old + weight * value);
  };
  const double divisor = running.unbiased && batch.count > 1.0 ? batch.count - 1.0 : batch.count;
  blend(running.mean, batch.mean);
  blend(running.var, batch.m2 / divisor);
}

__device__ inline double mean_of(const Moments& batch) {
  return batch.count == 0.0 ? nan("") : batch.mean;
}

template <class A>
__device__ SliceStatistics<A> statistics_of(const ForwardCall& call, const Moments& batch) {
  return SliceStatistics<A>::of(mean_of(batch),
                                reciprocal_std<A>(batch.variance(), call.input.eps));
}

// For one thread per slice.
template <class A>
__device__ SliceStatistics<A> save_statistics(const ForwardCall& call, std::int64_t slice,
                                              const Moments& batch) {
  const auto statistics = statistics_of<A>(call, batch);
  call.mean[slice] = mean_of(batch);
  static_cast<A*>(call.rstd.data)[slice] = statistics.rstd;
  update_running(call.running, slice, batch);
  return statistics;
}

// What a reduction ends with: statistics, or moments of a part of a slice.
template <class A>
__device__ void save_reduced(const ForwardCall& call, std::int64_t slice, const Moments& batch) {
  if (call.sums != nullptr) {
    call.sums[slice] = MomentSums::of(batch, call.by_rank);
  } else {
    save_statistics<A>(call, slice, batch);
  }
}

// Those that a former launch saved, or the given ones.
template <class A>
__device__ SliceStatistics<A> load_statistics(const ForwardCall& call, std::int64_t slice) {
  if (call.given_mean) {
    return SliceStatistics<A>::of(
        load_element<double>(call.given_mean, slice),
        reciprocal_std<A>(load_element<double>(call.given_var, slice), call.input.eps));
  }
  return SliceStatistics<A>::of(call.mean[slice], static_cast<const A*>(call.rstd.data)[slice]);
}

template <class A>
__device__ SliceStatistics<A> load_statistics(const BackwardCall& call, std::int64_t slice) {
  return SliceStatistics<A>::of(load_element<double>(call.mean, slice),
                                static_cast<const A*>(call.rstd.data)[slice]);
}

// Counts the batch, after every block has read the old count. `counter` is used for a cumulative
// average only, in the launch that reads the count.
__device__ inline void count_batch(const RunningStatistics& running, unsigned* counter) {
  if (running.num_batches_tracked == nullptr) return;
  const bool last = running.cumulative && counter != nullptr ? is_last_block(counter, gridDim.x)
                                                             : blockIdx.x == 0;
  if (last && threadIdx.x == 0) ++*running.num_batches_tracked;
}

}  // namespace normcore::kernels::cuda
