// Every number that the choices of plan_cuda() and the shape of the CUDA kernels depend on, beside
// the problem and the device. How some of them were found on an H200 is in docs/cuda_speed.md.
#pragma once

#include <cstddef>
#include <cstdint>

namespace normcore::kernels {

inline constexpr unsigned kWarp = 32;
inline constexpr std::int64_t kVectorBytes = 16;  // largest access of a thread
inline constexpr std::int64_t kSectorBytes = 32;  // of memory: read as a whole or not at all

// ---- what the kernels are compiled for

// The kernels of a pass. Vectors that a thread holds: forward of x, backward of x and grad_y (or the
// gradient behind the activation in the arithmetic type), double backward of the cotangent of grad_x
// as well, where sums of many kinds leave registers for fewer and shorter ones.
struct CudaKernels {
  int vectors;                        // of kSplit and kStream
  int resident_vectors, few_vectors;  // of kPack and kBlock, for many and for few
  int plain_team_vectors;  // of kCluster and kTeam, which hold others in shared memory; 0: none
  std::int64_t max_width;  // elements of a vector

  constexpr int team_vectors(bool is_plain) const {
    return is_plain ? plain_team_vectors : plain_team_vectors / 2;
  }

  // Of elements of so many bytes.
  constexpr std::int64_t width(std::size_t bytes) const {
    const std::int64_t whole = kVectorBytes / static_cast<std::int64_t>(bytes);
    return whole < max_width ? whole : max_width;
  }
};
inline constexpr CudaKernels kForwardKernels{8, 8, 2, 4, kVectorBytes},
    kBackwardKernels{4, 4, 1, 2, kVectorBytes}, kDoubleBackwardKernels{4, 2, 2, 0, 4};
// Vectors of a run that a thread holds, forward and in the backward passes, and those that it should
// have before more threads share a run.
inline constexpr int kRunForwardVectors = 4, kRunGradientVectors = 2, kRunVectorsPerLane = 2;
// Forward, how many at once where nothing is held.
inline constexpr int kApplyVectors = 4;

// Largest block, which is also that of kSplit and kStream: what its threads hold leaves registers for
// a second one in a multiprocessor, so that one loads while the other computes (but for sums of rows in
// the double backward pass).
inline constexpr int kMaxThreads = 256;

// Shared memory per block, static and dynamic together: what a kernel gets without asking, and what
// every device from sm_80 on has for one that asks.
inline constexpr std::size_t kDefaultShared = 48 << 10, kOptInShared = 99 << 10;
// The most static memory of a kernel: what it leaves of the above for the dynamic part, which plans
// limit to less than there is.
inline constexpr std::size_t kMaxStaticShared = 7 << 10;
inline constexpr std::size_t kDefaultDynamicShared = kDefaultShared - kMaxStaticShared;
inline constexpr std::size_t kMaxDynamicShared = 88 << 10;
static_assert(kMaxDynamicShared + kMaxStaticShared <= kOptInShared);
// What the system takes of every block.
inline constexpr std::size_t kReservedShared = 1 << 10;

// Records of so many bytes that a thread of a merge loads before it waits for the first.
constexpr unsigned records_in_flight(std::size_t bytes) {
  constexpr std::size_t kBytes = 128;
  return bytes * 4 < kBytes ? static_cast<unsigned>(kBytes / bytes) : 4;
}

// Block that merges the records of chunks; those that a lane should have before there are more lanes.
inline constexpr std::uint32_t kMergeThreads = kMaxThreads, kMergedRecords = 4;
// Block of the sum over blocks of samples: neighbouring channels, and lanes over the blocks.
inline constexpr int kParameterChannels = 8, kParameterLanes = 32;

// ---- what plan_cuda() aims at

// Rows: neighbouring bytes that a tile of columns should have, and lanes of a row of kSplit without
// vectors.
inline constexpr std::int64_t kRowBytes = 128, kNarrowColumnLanes = 32;
// Blocks of a cluster: the most, which not every device has room for, and those that it has. More than
// these hold what does not fit otherwise, they do not fill an idle device.
inline constexpr int kMaxCluster = 16, kPortableCluster = 8;
// Of 16 multiprocessors those that have a place in clusters of more than two blocks: 124 of 132 on an H200
// (docs/cuda_speed.md).
inline constexpr int kClusterPlaces = 15;
// kCluster and kTeam: blocks that a multiprocessor has room for, in shared memory and, of plain kernels, in
// registers; the shortest rows of a tile, unless shorter ones fill the device.
inline constexpr int kTeamBlocksPerMultiprocessor = 2;
constexpr int team_blocks(bool is_plain) { return is_plain ? kTeamBlocksPerMultiprocessor : 1; }
inline constexpr std::int64_t kTeamRowBytes = 64;
// kSplit and kStream: blocks before chunks grow, and the most batches of a chunk, so that float32 sums
// stay short.
inline constexpr std::int64_t kPlanesForwardBlocksPerMultiprocessor = 16,
                              kPlanesBackwardBlocksPerMultiprocessor = 4, kMaxPlanesBatches = 8;
inline constexpr std::int64_t kRowsBlocksPerMultiprocessor = 2, kMaxRowsBatches = 32;
// Blocks of samples that parameter gradients of group norm are summed over: some, or more to fill the
// device with blocks of threads.
inline constexpr std::int64_t kSampleBlocks = 512, kMaxSampleBlocks = 2048;
inline constexpr std::int64_t kResidentBlocksPerMultiprocessor = 2;
// Runs: the most batches, beyond which a block would be alone with too much.
inline constexpr int kMaxRunBatches = 8;
// Backward passes over runs: blocks, and the most samples whose parameter gradients a thread adds up in
// the arithmetic type.
inline constexpr std::int64_t kRunBlocksPerMultiprocessor = 4, kMaxRunSamples = 256;
// Double backward: the most bytes of workspace per byte of x, beyond some. Slices that need more are
// too short for kSplit, and better off without a kernel.
inline constexpr std::size_t kMaxWorkspaceRatio = 4, kFreeWorkspace = std::size_t{16} << 20;
// Of the parts of a workspace.
inline constexpr std::size_t kWorkspaceAlignment = 256;

}  // namespace normcore::kernels
