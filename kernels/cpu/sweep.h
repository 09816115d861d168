// The order in which a norm is computed, for any layout and pass. A driver offers, for each tile,
//   prepare(tile, state)                 coefficients that the reduction needs, if kPrepares
//   reduce(tile, chunk, state, partial)  one leaf of the reduction tree
//   finish(tile, state, partials)        merges the leaves in order, stores statistics, completes
//                                        the coefficients
//   apply(tile, piece, state)            the second sweep
//   pieces(tile)                         number of pieces; tile 0 has the most
// run_tiles() calls them tile by tile or phase by phase as the plan says; the results are the same
// bits.
#pragma once

#include <hwy/cache_control.h>

#include <algorithm>
#include <cstdint>

#include "normcore/kernels/executor.h"
#include "plan/cpu_geometry.h"

namespace normcore::kernels {

// Chunk partials of a tile, in order.
class Partials {
 public:
  Partials(char* data, std::size_t stride) : data_(data), stride_(stride) {}
  void* operator[](std::int64_t chunk) const {
    return data_ + static_cast<std::size_t>(chunk) * stride_;
  }

 private:
  char* data_;
  std::size_t stride_;
};

template <class Driver>
void run_tiles(const Driver& driver, const Problem& problem, const CpuPlan& plan,
               const WorkspaceLayout& layout, char* slots, const CpuExecutor& executor) {
  const std::int64_t group = tiles_per_group(problem), groups = ceil_div(plan.tiles, group);
  const auto state = [&](std::int64_t slot) {
    return slots + static_cast<std::size_t>(slot) * layout.slot();
  };
  const auto partials = [&](std::int64_t slot) {
    return Partials(state(slot) + layout.state, layout.partial);
  };
  const std::int64_t chunks = layout.chunks;

  if (plan.path == CpuPath::kSlice) {
    executor.parallel_for(plan.tasks, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        char* const own = state(task);
        const std::int64_t first = task * groups / plan.tasks * group;
        const std::int64_t last = std::min((task + 1) * groups / plan.tasks * group, plan.tiles);
        for (std::int64_t tile = first; tile < last; ++tile) {
          if constexpr (Driver::kPrepares) driver.prepare(tile, own);
          for (std::int64_t k = 0; k < chunks; ++k) driver.reduce(tile, k, own, partials(task)[k]);
          driver.finish(tile, own, partials(task));
          // backwards: the end of the tile is what the cache still holds
          for (std::int64_t k = driver.pieces(tile) - 1; k >= 0; --k) driver.apply(tile, k, own);
        }
      }
      if (plan.stream) hwy::FlushStream();
    });
    return;
  }

  if constexpr (Driver::kPrepares) {
    executor.parallel_for(plan.tiles, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t tile = begin; tile < end; ++tile) driver.prepare(tile, state(tile));
    });
  }
  executor.parallel_for(plan.tiles * chunks, driver.chunk_grain(),
                        [&](std::int64_t begin, std::int64_t end) {
                          for (std::int64_t i = begin; i < end; ++i) {
                            const std::int64_t tile = i / chunks, k = i % chunks;
                            driver.reduce(tile, k, state(tile), partials(tile)[k]);
                          }
                        });
  executor.parallel_for(groups, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t tile = begin * group; tile < std::min(end * group, plan.tiles); ++tile) {
      driver.finish(tile, state(tile), partials(tile));
    }
  });
  const std::int64_t pieces = driver.pieces(0);
  executor.parallel_for(plan.tiles * pieces, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t tile = i / pieces, k = i % pieces;
      if (k < driver.pieces(tile)) driver.apply(tile, k, state(tile));
    }
    if (plan.stream) hwy::FlushStream();
  });
}

}  // namespace normcore::kernels
