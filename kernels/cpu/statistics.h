// Where the statistics of a slice come from and go to: batch moments that are saved for the
// backward pass and blended into running statistics, statistics that are given, and moments that
// leave to be added to those of other ranks.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/element.h"
#include "normcore/kernels/batch_norm.h"
#include "normcore/kernels/moment_sums.h"
#include "normcore/kernels/moments.h"

namespace normcore::kernels {

// mean as float64; rstd as it is saved, so that forward and backward use the same value.
template <class A>
struct SliceStatistics {
  double mean = 0.0;
  A rstd = 0;
};

template <class A>
A reciprocal_std(double var, double eps) {
  return static_cast<A>(1.0 / std::sqrt(var + eps));
}

// Weight of the new batch in the running statistics.
inline double running_weight(const RunningStatistics& running) {
  if (!running.cumulative) return running.momentum;
  return 1.0 / static_cast<double>(*running.num_batches_tracked + 1);
}

// running = (1 - weight) * running + weight * batch for one channel; nothing for an empty one.
inline void update_running(const RunningStatistics& running, double weight, std::int64_t channel,
                           const Moments& batch) {
  if (!running.mean || batch.count == 0.0) return;
  const auto blend = [&](const MutableTensor& stat, double value) {
    const double old = load_element(stat, channel);
    store_element(stat, channel, (1.0 - weight) * old + weight * value);
  };
  const double divisor = running.unbiased && batch.count > 1.0 ? batch.count - 1.0 : batch.count;
  blend(running.mean, batch.mean);
  blend(running.var, batch.m2 / divisor);
}

// Statistics of a batch: saved, and blended into the running ones of batch norm.
template <class A>
struct BatchStatistics {
  using Arithmetic = A;
  double eps;
  double* mean;
  MutableTensor rstd;
  RunningStatistics running = {};
  double weight = 0.0;  // of this batch in the running statistics

  SliceStatistics<A> operator()(std::int64_t slice, const Moments& batch) const {
    const SliceStatistics<A> out{batch.count == 0.0 ? std::nan("") : batch.mean,
                                 reciprocal_std<A>(batch.variance(), eps)};
    mean[slice] = out.mean;
    static_cast<A*>(rstd.data)[slice] = out.rstd;
    update_running(running, weight, slice, batch);
    return out;
  }
};

// Moments of a part of a slice (sync.h): nothing is normalised with them.
template <class A>
struct PartStatistics {
  using Arithmetic = A;
  bool by_rank;
  MomentSums* sums;

  SliceStatistics<A> operator()(std::int64_t slice, const Moments& part) const {
    sums[slice] = MomentSums::of(part, by_rank);
    return {};
  }
};

// Statistics that are given.
template <class A>
struct GivenStatistics {
  using Arithmetic = A;
  double eps;
  ConstTensor mean, var;
  MutableTensor rstd;

  SliceStatistics<A> operator()(std::int64_t slice, const Moments&) const {
    const SliceStatistics<A> out{load_element(mean, slice),
                                 reciprocal_std<A>(load_element(var, slice), eps)};
    static_cast<A*>(rstd.data)[slice] = out.rstd;
    return out;
  }
};

}  // namespace normcore::kernels
