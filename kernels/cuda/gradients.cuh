// Sums of the backward pass: over a channel (of one sample, for group norm), and from there to what
// grad_x needs of a slice and to the gradients of scale and bias.
#pragma once

#include <cmath>

#include "cuda/call.h"
#include "cuda/epilogue.cuh"
#include "cuda/reduce.cuh"
#include "cuda/statistics.cuh"
#include "plan/cuda_constants.h"

namespace normcore::kernels::cuda {

// Over values of a channel: g, g * (x - center), and how many values count.
template <class A>
struct PartialSums {
  A g, g_centered, count;

  template <int kWidth, class T, class Affines>
  __device__ void add(const Vector<T, kWidth>& x, const A (&gradient)[kWidth], unsigned counting,
                      int i, const Affines& affine) {
    // What is masked out and has no gradient is 0 even if x is not a number.
    if ((counting >> i & 1) == 0 && gradient[i] == A{0}) return;
    g += gradient[i];
    g_centered = std::fma(gradient[i], convert_from<A>(x[i]) - affine[i].center, g_centered);
  }
};

__device__ inline void merge(ChannelSums& total, const ChannelSums& other) {
  total.g += other.g;
  total.g_centered += other.g_centered;
  total.count += other.count;
}

// All sums that `items` ask for, by the whole block: sum i has `terms` terms, of which `lanes`
// neighbouring threads (a power of two up to 32) take turns. term(i, j) gives PartialSums; the
// first of the lanes calls store(i, ChannelSums).
template <class Term, class Store>
__device__ void sum_terms(std::uint32_t items, std::uint32_t terms, unsigned lanes, Term term,
                          Store store) {
  const unsigned group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  for (std::uint32_t first = 0; first < items; first += blockDim.x / lanes) {
    const std::uint32_t item = first + group;
    ChannelSums sums{0.0, 0.0, 0.0};
    for (std::uint32_t j = lane; item < items && j < terms; j += lanes) {
      const auto part = term(item, j);
      sums.g += static_cast<double>(part.g);
      sums.g_centered += static_cast<double>(part.g_centered);
      sums.count += static_cast<double>(part.count);
    }
    sums.g = warp_sum(sums.g, lanes);
    sums.g_centered = warp_sum(sums.g_centered, lanes);
    sums.count = warp_sum(sums.count, lanes);
    if (item < items && lane == 0) store(item, sums);
  }
}

// The lanes that `terms` terms deserve.
__device__ inline unsigned lanes_for(std::uint32_t terms) {
  unsigned lanes = 1;
  while (lanes < kWarp && lanes < terms) lanes *= 2;
  return lanes;
}

// A channel's gradients of scale and bias in one sample, or in all of batch norm's.
__device__ inline void store_parameters(const BackwardCall& call, std::int64_t sample,
                                        std::int64_t channel, double scale, double bias) {
  const std::int64_t c = call.input.extent.c;
  if (call.parameters != nullptr) {
    const std::int64_t block = sample / call.samples_per_block;
    ParameterSums& out = call.parameters[block * c + channel];
    // The same thread adds the samples of a block one after the other.
    if (sample % call.samples_per_block == 0) out = {0.0, 0.0};
    out.scale += scale;
    out.bias += bias;
    return;
  }
  const std::int64_t i = call.input.affine_per_sample ? sample * c + channel : channel;
  if (call.grad.scale) store_element(call.grad.scale, i, scale);
  if (call.grad.bias) store_element(call.grad.bias, i, bias);
}

// Completes a slice of `channels` channels: stores the gradients of its parameters and returns what
// grad_x needs. sums(i) are those of channel first_channel + i. Called by `lanes` neighbouring
// threads of a warp, all of whose threads take part.
template <class A, class Sums>
__device__ SliceGradient<A> finish_slice(const BackwardCall& call, bool is_active,
                                         const SliceStatistics<A>& statistics, std::int64_t sample,
                                         std::int64_t first_channel, std::uint32_t channels,
                                         unsigned lane, unsigned lanes, Sums sums) {
  double count = 0.0, h = 0.0, h_centered = 0.0;
  for (std::uint32_t i = lane; is_active && i < channels; i += lanes) count += sums(i).count;
  count = warp_sum(count, lanes);
  // A slice without a valid value has NaN statistics: where no g comes in, none goes out.
  const bool is_empty = call.batch_statistics && count == 0.0;
  const double rstd = is_empty ? 0.0 : static_cast<double>(statistics.rstd);
  const double rounding = is_empty ? 0.0 : static_cast<double>(statistics.rounding);
  for (std::uint32_t i = lane; is_active && i < channels; i += lanes) {
    const ChannelSums channel = sums(i);
    const double g_centered = channel.g_centered - rounding * channel.g;
    const std::int64_t at =
        (call.input.affine_per_sample ? sample * call.input.extent.c : 0) + first_channel + i;
    const double scale = call.input.scale ? load_element<double>(call.input.scale, at) : 1.0;
    h += scale * channel.g;
    h_centered += scale * g_centered;
    store_parameters(call, sample, first_channel + i, g_centered * rstd, channel.g);
  }
  h = warp_sum(h, lanes);
  h_centered = warp_sum(h_centered, lanes);
  if (!call.batch_statistics) return {A{0}, A{0}, A{0}};
  const double slope = -rstd * rstd * rstd * h_centered / count;
  const double offset = -rstd * h / count - slope * rounding;
  // With nothing else in the slice y does not depend on x: exactly 0, not the difference of equal terms.
  const Extent& e = call.input.extent;
  const std::int64_t size = e.s * (call.num_groups == 0 ? e.n : e.c / call.num_groups);
  if (count == 1.0 && size == 1) return {A{0}, A{0}, A{1}};
  return {static_cast<A>(slope), static_cast<A>(offset), A{0}};
}

}  // namespace normcore::kernels::cuda
