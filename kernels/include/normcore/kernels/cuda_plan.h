// How one call will run on a CUDA device: a pure function of the problem and of facts about the
// device, so that every choice can be tested and printed on a machine that has none.
//   kPack    slices of a few vectors: several in a block, in registers; x is read once
//   kBlock   one slice per block, in registers; x is read once
//   kCluster a slice is held by up to 16 blocks of a cluster, in shared memory; x is read once
//   kTeam    the same, by many blocks of a grid whose blocks all run together; x is read once
//   kSplit   any slice: blocks reduce chunks, a launch merges these in order, a third one applies; x is
//            read twice
//   kStream  nothing to reduce: one pointwise launch
//   kRun     group norm of one value per channel: a slice is a run of neighbouring elements, which
//            one launch reads from memory once, and again from the cache if it is long
// Results are the same bits from run to run. They do not depend on the number of samples if the plan is
// batch invariant; otherwise it may look at it to fill the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "normcore/kernels/plan.h"

namespace normcore::kernels {

// By default an H100 or H200.
struct CudaDevice {
  int multiprocessors = 132;
  int max_cluster = 16;     // blocks of a cluster; 1 where there are none
  bool cooperative = true;  // whether all blocks of a grid can be made to run together
  std::size_t shared_bytes = std::size_t{228} << 10;  // shared memory of a multiprocessor
};

enum class CudaPath : std::uint8_t { kPack, kBlock, kCluster, kTeam, kSplit, kStream, kRun };

struct CudaOptions {
  bool batch_invariant = false;
  // For tests and benchmarks: a path that has to be taken (an illegal one gives no plan), and the
  // largest block, a multiple of 32 up to 256.
  std::optional<CudaPath> path;
  int max_threads = 256;
  // That grids whose blocks all run together leave to other kernels.
  int spare_multiprocessors = 0;
};

struct CudaPlan {
  CudaPath path = CudaPath::kStream;
  Layout layout = Layout::kNCS;  // as which the tensor is treated: some are of both
  int width = 1;                 // elements per vector: up to 16 bytes of x, or 1
  int vectors = 1;               // per thread, at once
  int batches = 1;               // of so many vectors, one after the other (but kPack, kBlock)
  int threads = 32;              // per block
  int lanes = 32;   // neighbouring threads that share a chunk of a slice (kNCS) or of a
                    // tile of columns (kNSC), or a run
  int columns = 0;  // kNSC: channels of such a tile
  std::int64_t rows_per_chunk = 0;     // kNSC
  std::int64_t samples_per_block = 1;  // backward pass of group norm: samples whose parameter
                                       // gradients are summed by the same threads (kRun: block)
  int team = 1;                        // kCluster, kTeam: blocks that hold a slice
  bool is_plain = false;               // no mask, no partial vectors, one dtype
  std::int64_t blocks = 0;             // of the first launch
  std::int64_t apply_blocks = 0;       // of the last (kSplit)
  std::size_t shared_bytes = 0;        // dynamic shared memory per block
  std::size_t workspace_bytes = 0;
  std::int64_t counters = 0;  // 32-bit counters that are 0 before and after the call
  const char* reason = "";    // why this path, static storage
};

// Nothing if options.path cannot run the problem, or the grid were larger than any device takes, or a
// double backward pass would need a workspace of several times the tensor: of channels of a few values
// in slices that do not fit into a block, and of float64.
std::optional<CudaPlan> plan_cuda(const Problem& problem, const CudaDevice& device,
                                  const CudaOptions& options = {});

// The device as far as it can be used, after it had no room for the teams of a plan
// (StatusCode::kNoRoom): with smaller clusters, or without a cooperative grid.
CudaDevice with_less_room(const CudaDevice& device, const CudaPlan& plan);

// "pack", "block", "cluster", "team", "split", "stream", "run"; the path of such a name.
const char* name_of(CudaPath path);
std::optional<CudaPath> cuda_path_of(std::string_view name);

// One line for people: path, vectors, grid, workspace and reason.
std::string describe(const CudaPlan& plan);

}  // namespace normcore::kernels
