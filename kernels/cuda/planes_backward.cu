// Backward pass over kNCS tensors: every stage of every path is this one kernel.
#include <cuda_runtime.h>

#include "cuda/dispatch.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/gradients.cuh"
#include "cuda/passes.h"
#include "cuda/planes.cuh"
#include "cuda/reduce.cuh"
#include "cuda/statistics.cuh"
#include "plan/cuda_constants.h"

namespace normcore::kernels::cuda {
namespace {

// What the leading lanes of each unit tell the others.
template <class A>
struct PlanesGradients {
  SliceGradient<A> of_unit[kMaxThreads];
};

template <class T, int kWidth, int kVectors, Stage kStage, bool kPlain>
class PlanesBackward {
 public:
  using A = Arithmetic<T>;

  __device__ PlanesBackward(const BackwardCall& call, const PlanesTiling& tiling)
      : call_(call),
        tiling_(tiling),
        lanes_(tiling.lanes),
        lane_(threadIdx.x % lanes_),
        unit_(threadIdx.x / lanes_),
        units_(blockDim.x / lanes_),
        records_(tiling.channels_per_chunk()),
        slots_(tiling.has_several_channels() ? lanes_ * kVectors * batches() : lanes_) {}

  // One chunk of one slice. All threads of the block get here together.
  __device__ void run(std::int64_t slice, std::uint32_t chunk_index, bool is_active) const {
    const PlanesChunk<kWidth, kPlain> chunk(call_.input, call_.num_groups, tiling_, slice,
                                            chunk_index);
    const auto statistics = load_statistics<A>(call_, slice);
    const std::uint32_t slots = is_active ? chunk.slots() : 0;

    Vector<T, kWidth> x[kVectors];
    Gradients grad_y[kVectors];
    load(chunk, slots, 0, x, grad_y);
    SliceGradient<A> gradient{A{0}, A{0}, A{0}};
    if constexpr (kStage != Stage::kApply) {
      sum_channels(chunk, slots, statistics, x, grad_y, slice, chunk_index);
      if constexpr (kStage == Stage::kReduce) {
        finish_split(chunk, slice, statistics);
        return;
      }
      gradient = finish_resident(chunk, is_active, statistics);
    } else if (call_.slice_gradients != nullptr) {
      gradient = static_cast<const SliceGradient<A>*>(call_.slice_gradients)[slice];
    }
    if (!call_.grad.x && !call_.grad.residual) return;

    const bool is_same_affine = chunk.has_one_affine(call_.input);
    Affine<A> affine = gradient.of(affine_at(chunk, statistics, chunk.first_segment()));
    for (std::uint32_t batch = 0; batch < batches(); ++batch) {
      if (batch != 0) load(chunk, slots, batch, x, grad_y);
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const std::uint32_t slot = slot_of(batch, k);
        if (slot >= slots) continue;
        const PlanesPosition p = chunk.at(slot);
        if (p.span.is_empty()) continue;
        keep_packed(x[k]);
        keep_packed(grad_y[k]);
        keep_order();
        if (!is_same_affine) affine = gradient.of(affine_at(chunk, statistics, p.segment));
        const unsigned counting = chunk.counting(call_.input.mask, p);
        A g[kWidth];
        output_gradient<kPlain>(call_, x[k], grad_y[k], p.index, p.span, counting, affine, g);
        apply_backward<kPlain>(call_, x[k], g, p.index, p.span, counting, affine, gradient);
      }
    }
  }

 private:
  using Gradients = GradientVector<kPlain, T, kWidth>;

  __device__ std::uint32_t batches() const {
    return kStage == Stage::kResident ? 1 : tiling_.batches;
  }
  __device__ std::uint32_t slot_of(std::uint32_t batch, int k) const {
    return lane_ + (batch * kVectors + k) * lanes_;
  }

  __device__ void load(const PlanesChunk<kWidth, kPlain>& chunk, std::uint32_t slots,
                       std::uint32_t batch, Vector<T, kWidth> (&x)[kVectors],
                       Gradients (&grad_y)[kVectors]) const {
    load_batch<kPlain>(call_, x, grad_y, [&](auto f) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const std::uint32_t slot = slot_of(batch, k);
        if (slot >= slots) continue;
        const PlanesPosition p = chunk.at(slot);
        f(k, p.index, p.span);
      }
    });
  }

  __device__ Affine<A> affine_at(const PlanesChunk<kWidth, kPlain>& chunk,
                                 const SliceStatistics<A>& statistics,
                                 std::uint32_t segment) const {
    return Affine<A>::of(call_.input, statistics, chunk.sample(segment), chunk.channel(segment));
  }

  // Shared memory: the sums of every channel (float64, so first), then those of every slot or lane.
  __device__ ChannelSums* channel_sums() const { return dynamic_shared<ChannelSums>(); }
  __device__ PartialSums<A>* slot_sums() const {
    return reinterpret_cast<PartialSums<A>*>(channel_sums() + records_ * units_);
  }
  __device__ ChannelSums* chunk_records(std::int64_t slice, std::uint32_t chunk) const {
    return call_.records + (slice * tiling_.chunks + chunk) * records_;
  }

  // Sums of the channels of a chunk: to shared memory, or to the workspace (kReduce).
  __device__ void sum_channels(const PlanesChunk<kWidth, kPlain>& chunk, std::uint32_t slots,
                               const SliceStatistics<A>& statistics,
                               Vector<T, kWidth> (&x)[kVectors], Gradients (&grad_y)[kVectors],
                               std::int64_t slice, std::uint32_t chunk_index) const {
    PartialSums<A>* const own = slot_sums() + unit_ * slots_;
    PartialSums<A> total{A{0}, A{0}, A{0}};
    const bool is_per_slot = tiling_.has_several_channels();
    for (std::uint32_t batch = 0; batch < batches(); ++batch) {
      if (batch != 0) load(chunk, slots, batch, x, grad_y);
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const std::uint32_t slot = slot_of(batch, k);
        if (is_per_slot) total = {A{0}, A{0}, A{0}};
        if (slot < slots) {
          const PlanesPosition p = chunk.at(slot);
          const unsigned counting = chunk.counting(call_.input.mask, p);
          keep_packed(x[k]);
          keep_packed(grad_y[k]);
          // Without an activation only the center is of interest.
          Affine<A> affine{statistics.center, A{0}, A{0}};
          if (call_.input.activation != Activation::kNone) {
            affine = affine_at(chunk, statistics, p.segment);
          }
          A g[kWidth];
          output_gradient<kPlain>(call_, x[k], grad_y[k], p.index, p.span, counting, affine, g);
          total.count += static_cast<A>(__popc(counting));
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            if (p.span.contains(i)) total.add(x[k], g, counting, i, affine);
          }
        }
        if (is_per_slot) own[slot] = total;
      }
    }
    if (!is_per_slot) own[lane_] = total;
    __syncthreads();
    const std::uint32_t terms = is_per_slot ? chunk.slots() / chunk.segments() : lanes_;
    const std::uint32_t records = is_per_slot ? chunk.segments() : 1;
    sum_terms(
        units_ * records, terms, lanes_for(terms),
        [&](std::uint32_t item, std::uint32_t term) {
          return slot_sums()[item / records * slots_ + item % records * terms + term];
        },
        [&](std::uint32_t item, const ChannelSums& sums) {
          if constexpr (kStage == Stage::kReduce) {
            chunk_records(slice, chunk_index)[item] = sums;
          } else {
            channel_sums()[item] = sums;
          }
        });
  }

  __device__ SliceGradient<A> finish_resident(const PlanesChunk<kWidth, kPlain>& chunk,
                                              bool is_active,
                                              const SliceStatistics<A>& statistics) const {
    __syncthreads();
    auto& shared = block_shared<PlanesGradients<A>>();
    if (lane_ < kWarp) {
      const unsigned lanes = lanes_ < kWarp ? lanes_ : kWarp;
      const ChannelSums* const sums = channel_sums() + unit_ * records_;
      const auto gradient =
          finish_slice<A>(call_, is_active, statistics, chunk.sample(0), chunk.channel(0), records_,
                          lane_, lanes, [&](std::uint32_t i) { return sums[i]; });
      if (lane_ == 0) shared.of_unit[unit_] = gradient;
    }
    __syncthreads();
    return shared.of_unit[unit_];
  }

  // The last block to arrive sums the records of the slice, channel by channel.
  __device__ void finish_split(const PlanesChunk<kWidth, kPlain>& chunk, std::int64_t slice,
                               const SliceStatistics<A>& statistics) const {
    if (!is_last_block(call_.counters + slice, tiling_.chunks)) return;
    const std::uint32_t channels = tiling_.is_group_norm ? tiling_.segments : 1;
    const std::uint32_t terms = tiling_.is_group_norm ? tiling_.pieces : tiling_.chunks;
    const ChannelSums* const records = chunk_records(slice, 0);
    ChannelSums* const channel_sums = call_.channel_sums + slice * channels;
    // A whole number of segments to a chunk, or of chunks to a segment: a channel's records are
    // neighbours either way, as only the last chunk has fewer of them.
    sum_terms(
        channels, terms, lanes_for(terms),
        [&](std::uint32_t channel, std::uint32_t term) { return records[channel * terms + term]; },
        [&](std::uint32_t channel, const ChannelSums& sums) { channel_sums[channel] = sums; });
    __syncthreads();
    if (threadIdx.x >= kWarp) return;
    const auto gradient =
        finish_slice<A>(call_, true, statistics, chunk.sample(0), chunk.channel(0), channels,
                        threadIdx.x, kWarp, [&](std::uint32_t i) { return channel_sums[i]; });
    if (threadIdx.x == 0) static_cast<SliceGradient<A>*>(call_.slice_gradients)[slice] = gradient;
  }

  const BackwardCall& call_;
  const PlanesTiling& tiling_;
  unsigned lanes_, lane_, unit_, units_;
  std::uint32_t records_, slots_;
};

template <class T, int kWidth, int kVectors, Stage kStage, bool kPlain>
__global__ void __launch_bounds__(kMaxThreads, blocks_at_once(kPlain, kStage, 2))
    planes_backward_kernel(const __grid_constant__ BackwardCall call,
                           const __grid_constant__ PlanesTiling tiling) {
  const PlanesBackward<T, kWidth, kVectors, kStage, kPlain> backward(call, tiling);
  const unsigned units = blockDim.x / tiling.lanes;
  const std::int64_t index =
      static_cast<std::int64_t>(blockIdx.x) * units + threadIdx.x / tiling.lanes;
  if constexpr (kStage == Stage::kResident) {
    // The samples of a block one after the other, for the sums over samples.
    const bool is_group_norm = call.num_groups != 0;
    const std::int64_t block = is_group_norm ? tiling.by_groups.quotient_of(index) : 0;
    const std::int64_t first = index + block * (call.samples_per_block - 1) * call.num_groups;
    for (std::int64_t i = 0; i < call.samples_per_block; ++i) {
      const std::int64_t slice = first + i * call.num_groups;
      const bool is_active = slice < tiling.slices;
      backward.run(is_active ? slice : 0, 0, is_active);
    }
  } else {
    const std::int64_t chunks = tiling.slices * tiling.chunks;
    const bool is_active = index < chunks;
    // What the first launch read last may still be in the cache.
    const std::int64_t at = !is_active ? 0 : kStage == Stage::kApply ? chunks - 1 - index : index;
    const std::int64_t slice = tiling.by_chunks.quotient_of(at);
    backward.run(slice, static_cast<std::uint32_t>(at - slice * tiling.chunks), is_active);
  }
}

}  // namespace

Status planes_backward(const BackwardCall& call, const PlanesTiling& tiling, const CudaPlan& plan,
                       CudaStream stream) {
  return for_each_stage<kBackwardFewVectors, kBackwardVectors>(
      call.input.x.dtype, plan, is_plain(call) && call.input.extent.s % plan.width == 0,
      [&]<class T, int kWidth, int kVectors, Stage kStage, bool kPlain>(std::int64_t blocks) {
        return launch_blocks(planes_backward_kernel<T, kWidth, kVectors, kStage, kPlain>, plan,
                             blocks, stream, call, tiling);
      });
}

}  // namespace normcore::kernels::cuda
