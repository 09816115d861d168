// Sums of channels (of one sample, for group norm) in the backward passes, from the threads that
// start them to the gradients of scale and bias. A set of sums is Sums<Value>: sums of Value, of which
// one is the `count` of values that count, and for_each(a, b, f) calls f(sum of a, the same of b).
#pragma once

#include <cstdint>

#include "cuda/call.h"
#include "cuda/elements.cuh"
#include "cuda/reduce.cuh"

namespace normcore::kernels::cuda {

template <class Total, class Part>
__device__ void merge(Total& total, const Part& part) {
  Total::for_each(total, part, [](double& a, auto b) { a += static_cast<double>(b); });
}

// All sums that `items` ask for, by the whole block: sum i has `terms` terms, of which `lanes`
// neighbouring threads (a power of two up to 32) take turns. term(i, j) gives Sums of any value; the
// first of the lanes calls store(i, total).
template <class Total, class Term, class Store>
__device__ void sum_terms(std::uint32_t items, std::uint32_t terms, unsigned lanes, Term term,
                          Store store) {
  const unsigned group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  for (std::uint32_t first = 0; first < items; first += blockDim.x / lanes) {
    const std::uint32_t item = first + group;
    Total total{};
    for (std::uint32_t j = lane; item < items && j < terms; j += lanes) merge(total, term(item, j));
    Total::for_each(total, total, [&](double& sum, double own) { sum = warp_sum(own, lanes); });
    if (item < items && lane == 0) store(item, total);
  }
}

// A channel's gradients of scale and bias in one sample, or in all of batch norm's. They are those of the
// tensor, unless group norm has several samples with the same scale and bias.
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
  const std::int64_t i = affine_index(call.input, sample, channel);
  if (call.grad.scale) store_element(call.grad.scale, i, scale);
  if (call.grad.bias) store_element(call.grad.bias, i, bias);
}

__device__ inline std::int64_t slice_index(const BackwardCall& call, std::int64_t sample,
                                           std::int64_t channel) {
  if (call.num_groups == 0) return channel;
  return sample * call.num_groups + channel / (call.input.extent.c / call.num_groups);
}

// Values of a slice, masked-out ones included.
__device__ inline std::int64_t slice_size(const BackwardCall& call) {
  const Extent& e = call.input.extent;
  return e.s * (call.num_groups == 0 ? e.n : e.c / call.num_groups);
}

}  // namespace normcore::kernels::cuda
