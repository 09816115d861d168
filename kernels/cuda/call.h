// The arguments of the CUDA kernels of every norm: what the public args structs say, with the
// workspace of the call. Passed by value; pointers are device pointers. Internal to kernels/cuda.
#pragma once

#include "normcore/kernels/cuda.h"
#include "normcore/kernels/norm_input.h"
#include "normcore/kernels/sync.h"
#include "normcore/kernels/types.h"
#include "plan/cuda_constants.h"
#include "plan/cuda_tiling.h"

namespace normcore::kernels::cuda {

// kResident: one launch, what is reduced stays in registers. kTeam: one launch, it stays in the shared
// memory of one or several blocks (kCluster and CudaPath::kTeam). kReduce and kApply: the first and the
// last launch of kSplit, with merge.cu in between; kApply alone is kStream.
enum class Stage : std::uint8_t { kResident, kTeam, kReduce, kApply };

// For how many blocks of a kernel a multiprocessor has to have registers: kPlain kernels of kSplit and
// kStream hold nothing, and need few; plans count on room for what team_blocks() says.
constexpr int blocks_at_once(bool is_plain, Stage stage, int of_split) {
  if (stage == Stage::kTeam) return team_blocks(is_plain);
  return is_plain && stage != Stage::kResident ? of_split : 1;
}

// Of a set of values: how many count, sum (x - pivot) and sum (x - pivot)^2 over them.
struct ShiftedSums {
  double count, pivot, sum, square;
};

// Gradients of a channel's scale and bias.
struct ParameterSums {
  double scale, bias;
};

static_assert(sizeof(ShiftedSums) == kShiftedSumsBytes);
static_assert(sizeof(ParameterSums) == kParameterSumsBytes);

struct ForwardCall {
  NormInput input;
  std::int64_t num_groups = 0;  // 0: batch norm
  MutableTensor y;
  double* mean = nullptr;             // saved; null with given statistics
  MutableTensor rstd;                 // saved
  std::uint8_t* relu_bits = nullptr;  // saved; or null
  RunningStatistics running;
  ConstTensor given_mean, given_var;  // statistics that are not those of x
  MomentSums* sums = nullptr;         // of parts of slices (sync.h): instead of mean and rstd
  bool by_rank = false;
  void* records = nullptr;  // workspace: ShiftedSums of every chunk, ColumnSums of its channels; of
                            // CudaPath::kTeam, those of team.cuh
  unsigned* counters = nullptr;
};

// Sums and slices are of the types of the pass (backward_pass.cuh, double_backward_pass.cuh).
struct BackwardCall {
  NormInput input;
  std::int64_t num_groups = 0;
  ConstTensor grad_y;
  ConstTensor mean, rstd;
  bool batch_statistics = true;
  NormGradients grad;
  // Of slices that are parts of longer ones (sync.h): where their sums go, or those of the whole
  // slices and the weight of a value in the statistics.
  bool is_partial = false;
  GradientSums* sums = nullptr;
  const GradientSums* whole = nullptr;
  const double* share = nullptr;
  std::int64_t samples_per_block = 1;
  void* slices = nullptr;  // workspace: what kApply takes of every slice; null where nothing
                           // flows through the statistics, or one launch does
  ParameterSums* parameters = nullptr;  // workspace: per block of samples and channel; null where
                                        // nothing is left to be summed
  void* records = nullptr;  // workspace: sums per chunk and channel in it, or those of team.cuh
  void* channel_sums = nullptr;  // workspace: sums per sample and channel
  unsigned* counters = nullptr;
};

// Its grad: those of x, scale, bias and residual.
struct DoubleBackwardCall : BackwardCall {
  GradientCotangents cotangents;
  MutableTensor grad_grad_y;
};

}  // namespace normcore::kernels::cuda
