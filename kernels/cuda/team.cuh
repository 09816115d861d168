// Blocks that hold a slice together: each reduces its chunk, they meet once to exchange what they got,
// and every one of them finishes the slice. In a cluster (kCluster) a block reads the others' records in
// their shared memory; in a cooperative grid (kTeam), whose teams go through the slices in turns, in the
// workspace, and the barrier is a counter in memory. All threads of a block call each function together.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"
#include "plan/cuda_tiling.h"

namespace normcore::kernels::cuda {

// A block publishes `count` records at a time.
template <class Record>
class Team {
 public:
  // `shared`: the block's memory for them; `workspace` and `counters`: of all teams of a cooperative grid.
  __device__ Team(const TeamTiling& tiling, Record* shared, void* workspace, unsigned* counters,
                  std::uint32_t count)
      : tiling_(tiling),
        shared_(shared),
        count_(count),
        index_(tiling.by_blocks.quotient(blockIdx.x)),
        rank_(blockIdx.x - index_ * tiling.blocks) {
    if (tiling.is_cooperative) {
      // Two sets in turns: a block may publish the next records while others still read the last.
      workspace_ =
          static_cast<Record*>(workspace) + std::int64_t{index_} * 2 * tiling.blocks * count;
      counter_ = counters + index_;
    }
  }

  // Which one of the teams; which one of its blocks.
  __device__ std::uint32_t index() const { return index_; }
  __device__ std::uint32_t rank() const { return rank_; }

  // The records of a block: its own may be written before meet(), all are read behind it.
  __device__ Record* own() const { return tiling_.is_cooperative ? in_workspace(rank_) : shared_; }
  __device__ const Record* of(std::uint32_t rank) const {
    if (tiling_.is_cooperative) return in_workspace(rank);
    return tiling_.blocks == 1 ? shared_ : cluster_peer(shared_, rank);
  }

  __device__ void meet() {
    if (tiling_.is_cooperative) {
      __syncthreads();
      if (threadIdx.x == 0) {
        const unsigned all = (meetings_ + 1) * tiling_.blocks;
        fetch_add_acq_rel(counter_, 1);
        while (load_acquire(counter_) < all) pause();
      }
      __syncthreads();
    } else if (tiling_.blocks > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
  }

  // The records have been read, by all threads of the block, and will be written again.
  __device__ void next() {
    ++meetings_;
    if (!tiling_.is_cooperative && tiling_.blocks > 1) cluster_arrive_relaxed();
  }

  // Before the block ends: nobody reads its memory any more, and the counter is 0 again.
  __device__ void leave() const {
    if (tiling_.is_cooperative) {
      if (threadIdx.x != 0) return;
      const unsigned all = (meetings_ + 1) * tiling_.blocks;
      if (fetch_add_acq_rel(counter_, 1) == all - 1) store_relaxed(counter_, 0);
    } else if (tiling_.blocks > 1) {
      cluster_wait();
    }
  }

 private:
  __device__ Record* in_workspace(std::uint32_t rank) const {
    const std::uint32_t set = meetings_ % 2 * tiling_.blocks;
    return workspace_ + static_cast<std::int64_t>(set + rank) * count_;
  }

  const TeamTiling& tiling_;
  Record* shared_;
  Record* workspace_ = nullptr;
  unsigned* counter_ = nullptr;
  std::uint32_t count_, index_, rank_;
  unsigned meetings_ = 0;
};

// Calls f(item, whether it is the first, whether another one follows) for each of the items that this
// block's team takes, one after the other, `teams` apart, and lets the team part. A cluster takes one.
template <class Record, class F>
__device__ void for_each_item(Team<Record>& team, const TeamTiling& tiling, F f) {
  for (std::int64_t item = team.index(); item < tiling.items; item += tiling.teams) {
    const bool is_first = item == team.index();
    if (!is_first) __syncthreads();  // shared memory is free for the next item
    f(item, is_first, item + tiling.teams < tiling.items);
  }
  team.leave();
}

}  // namespace normcore::kernels::cuda
