// Small kernels that are right with Bug::kNone and wrong in one way each otherwise: what the emulator
// is expected to catch. "Race only": nothing but the race detector can, as the emulator's order of
// accesses gives the right values by chance.
#pragma once

#include <cstddef>
#include <cstdint>

namespace normcore::kernels::testing {

enum class Bug : std::uint8_t {
  kNone,
  // block_sum
  kNoBarrier,           // between the write and the read of shared memory
  kBarrierInBranches,   // one barrier per branch
  kBarrierInOneBranch,  // the other branch has none
  kReadsPastTheEnd,     // of the input
  kWritesPastShared,    // memory
  kLaneOutsideOfMask,   // a shuffle without a lane that takes part
  kLeavesEarly,         // before a barrier that others meet
  kSharedUnasked,       // static and dynamic memory are too much together
  kSharedOverAsked,     // more dynamic memory than was asked for
  kSharedOverDevice,    // more than devices have
  kStaticOverExpected,  // more than the launch counts on
  // exchange_sum
  kShuffleForBarrier,   // between the write and the read of a warp; race only
  kOverwritesTooEarly,  // what another thread still reads; race only
  // ticket_sum
  kMergesFromItself,   // the order depends on the block that is last
  kTicketBeforeWrite,  // of the partial sum
  kTicketNotReset,
  kTicketRelaxed,      // orders nothing; race only
  kTicketReleaseOnly,  // nor does this where partial sums are read; race only
  // cluster_sum
  kNoClusterBarrier,  // before a peer's memory is read
  kLeavesCluster,     // while a peer may read its memory
  kArrivesTooEarly,   // before the write that peers read; race only
  // team_sum
  kNoTeamBarrier,   // between the blocks of a cooperative launch
  kNotCooperative,  // a barrier between blocks that need not run together
};

// Sum of n values by one block of 64 threads.
void block_sum(const float* x, int n, float* sum, Bug bug);
// The same, with threads that exchange values through shared memory.
void exchange_sum(const float* x, int n, float* sum, Bug bug);
// By `blocks` blocks of 32 threads; the last one to arrive merges. partials: [blocks], of 8 bytes as
// the race detector remembers 4 accesses to each 8 bytes: it must not have to forget one.
void ticket_sum(const float* x, int n, int blocks, double* partials, unsigned* ticket, float* sum,
                Bug bug);
// By a cluster of 4 blocks of 32 threads; every block stores the sum. sums: [4].
void cluster_sum(const float* x, int n, float* sums, Bug bug);
// By `blocks` blocks that run together; every block stores the sum. partials, sums: [blocks].
void team_sum(const float* x, int n, int blocks, double* partials, unsigned* counter, float* sums,
              Bug bug);

// 1, by a kernel with the most static shared memory, started by the kernels' launch().
float large_static(std::size_t dynamic_shared);

}  // namespace normcore::kernels::testing
