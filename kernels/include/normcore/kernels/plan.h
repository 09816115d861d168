// How one call will run: a pure function of shape, dtype, threads and cache size, so that every
// choice can be tested and printed without running anything. The reduction tree (chunk, fold) of
// kNCS depends on the shape of one slice only, that of kNSC on the shape of the rows that its slices
// share. It never depends on the number of threads or of samples beside those of the slice: results
// are bit-identical for every executor, and for every batch size where a slice lies in one sample.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "normcore/kernels/norm_input.h"

namespace normcore::kernels {

enum class Pass : std::uint8_t { kForward, kInference, kBackward, kDoubleBackward };

// Whether it reduces every channel of a slice by itself, for gradients of parameters.
constexpr bool is_backward(Pass pass) {
  return pass == Pass::kBackward || pass == Pass::kDoubleBackward;
}

// What a plan may look at. num_groups = 0 is batch norm (one slice per channel).
struct Problem {
  Extent extent;
  Layout layout = Layout::kNCS;
  DType dtype = DType::kFloat32;  // of x
  MaskKind mask = MaskKind::kNone;
  bool affine_per_sample = false;
  std::int64_t num_groups = 0;
  Pass pass = Pass::kForward;
  Activation activation = Activation::kNone;
  // A pass needs statistics or sums over slices; it writes a result over the extent.
  bool reduces = true, applies = true;
  // Slices are parts of longer ones (sync.h): what is reduced leaves, and comes back in a later call.
  bool is_partial = false;
  // CUDA only: every tensor over the extent starts at a multiple of 16 bytes, and has the dtype of x;
  // running statistics are cumulative.
  bool aligned = true, uniform = true, cumulative = false;

  Problem() = default;
  Problem(const NormInput& input, std::int64_t num_groups, Pass pass)
      : extent(input.extent),
        layout(input.layout),
        dtype(input.x.dtype),
        mask(input.mask.kind),
        affine_per_sample(input.affine_per_sample),
        num_groups(num_groups),
        pass(pass),
        activation(input.activation) {}
};

enum class CpuPath : std::uint8_t {
  kSample,  // a task owns whole samples of short slices: it normalizes one after the other
  kSlice,   // a task owns whole slices: it reduces, then applies while the slice is in cache
  kChunk,   // all chunks of all slices are reduced in parallel, then all pieces are applied in
            // parallel
};

struct CpuPlan {
  CpuPath path = CpuPath::kSlice;
  std::int64_t chunk =
      0;  // kNCS: values of a run, kNSC: (folded) rows that are reduced in compute_type arithmetic
  std::int64_t fold = 1;    // kNSC: rows treated as one row of fold * c columns
  std::int64_t tiles = 0;   // slices, groups of slices or blocks of samples, finished together
  std::int64_t chunks = 0;  // chunks per tile
  std::int64_t tasks = 1;   // kSample, kSlice: ranges of tiles that run in parallel
  bool stream = false;      // the output leaves no trace in the caches: it is larger than they are
  bool keep = false;        // the backward pass keeps the gradient behind the activation for its
                            // second sweep; otherwise it computes it again
  std::size_t workspace_bytes = 0;
  const char* reason = "";  // why this path, static storage
};

// Bytes of this machine's last level of cache; a guess where it does not tell.
std::int64_t last_level_cache();

CpuPlan plan_cpu(const Problem& problem, int num_threads,
                 std::int64_t cache_bytes = last_level_cache());

// One line for people: path, chunk, workspace and reason.
std::string describe(const CpuPlan& plan);

// Name of the instruction set that the CPU kernels use on this machine, e.g. "AVX2".
const char* simd_target();

}  // namespace normcore::kernels
