#include "cpu/forward.h"

#include <algorithm>

#include "cpu/coefficients.h"
#include "cpu/sweep.h"

namespace normcore::kernels {
namespace {

// What both layouts share.
template <class A, class Statistics>
struct ForwardCall {
  const NormInput& input;
  std::int64_t num_groups;
  const Statistics& statistics;
  ForwardOutputs outputs;
  bool stream;
  Affine<A> affine;
  Primitives<A> simd;

  ApplyArgs<A> apply_args(std::int64_t offset, const Coefficients<A>& coefficients) const {
    return {advance(input.x, offset),
            advance(input.residual, offset),
            advance(outputs.y, offset),
            advance_relu_bits(outputs.relu_bits, input.x.dtype, offset),
            input.activation,
            coefficients,
            stream};
  }
};

template <class A, class Statistics>
class PlanesForward {
 public:
  static constexpr bool kPrepares = false;

  PlanesForward(const ForwardCall<A, Statistics>& call, const Problem& problem)
      : call_(call), geometry_(problem) {}

  std::int64_t pieces(std::int64_t tile) const {
    return call_.outputs.y ? geometry_.pieces(geometry_.tile(tile)) : 0;
  }
  std::int64_t chunk_grain() const { return 2; }

  void reduce(std::int64_t tile_index, std::int64_t index, char*, void* partial) const {
    const PlanesTile tile = geometry_.tile(tile_index);
    const RunChunk chunk = geometry_.chunk(tile, index);
    const std::int64_t offset = tile.offset + chunk.offset;
    const RunBlock block{geometry_.records(tile), geometry_.record_stride(), chunk.runs,
                         geometry_.run_stride(), chunk.length};
    const MaskBlock mask =
        mask_of_runs(call_.input.mask, offset, chunk.row_mask_offset, block.record_stride,
                     block.run_stride, geometry_.row_mask_run_stride());
    call_.simd.moments_of_runs(advance(call_.input.x, offset), block, mask,
                               static_cast<Moments*>(partial));
  }

  void finish(std::int64_t index, char* state, const Partials& partials) const {
    const PlanesTile tile = geometry_.tile(index);
    const TileState<A> out = tile_state(state);
    // Batch norm: every plane is a slice; group norm: the first record is the slice.
    const std::int64_t per_slice = call_.num_groups == 0 ? 1 : tile.planes;
    for (std::int64_t p = 0; p < tile.planes; p += per_slice) {
      const std::int64_t channel = tile.first_channel + p;
      const std::int64_t slice = call_.num_groups == 0 ? channel : index;
      out.set_affine(p, per_slice, call_.statistics(slice, merged(partials, p)), call_.affine,
                     tile.sample, channel);
    }
  }

  void apply(std::int64_t tile_index, std::int64_t index, char* state) const {
    const PlanesTile tile = geometry_.tile(tile_index);
    const PlanePiece piece = geometry_.piece(tile, index);
    call_.simd.apply_runs(
        call_.apply_args(tile.offset + piece.offset, tile_state(state).view(piece.first_plane)),
        piece.planes, piece.length);
  }

 private:
  TileState<A> tile_state(char* state) const {
    return TileState<A>(state, geometry_.max_planes(), 3);
  }
  Moments merged(const Partials& partials, std::int64_t record) const {
    Moments total;
    for (std::int64_t k = 0; k < geometry_.chunks(); ++k) {
      total.merge(static_cast<const Moments*>(partials[k])[record]);
    }
    return total;
  }

  const ForwardCall<A, Statistics>& call_;
  PlanesGeometry geometry_;
};

template <class A, class Statistics>
class RowsForward {
 public:
  static constexpr bool kPrepares = false;

  RowsForward(const ForwardCall<A, Statistics>& call, const Problem& problem)
      : call_(call),
        geometry_(problem),
        chunks_(problem.pass == Pass::kInference ? 0 : geometry_.chunks()) {}

  std::int64_t pieces(std::int64_t) const { return call_.outputs.y ? geometry_.chunks() : 0; }
  std::int64_t chunk_grain() const { return 1; }

  void reduce(std::int64_t tile, std::int64_t index, char*, void* partial) const {
    const RowChunk chunk = geometry_.chunk(index);
    const std::int64_t offset = this->offset(tile, chunk);
    call_.simd.moments_of_rows(
        advance(call_.input.x, offset), chunk.rows, chunk.columns,
        mask_of_rows(call_.input.mask, offset, tile * geometry_.rows() + chunk.first_row),
        columns(partial));
  }

  void finish(std::int64_t tile, char* state, const Partials& partials) const {
    const TileState<A> out = tile_state(state);
    const std::int64_t c = call_.input.extent.c;
    const ColumnMoments total{out.scratch, out.scratch + c, out.scratch + 2 * c};
    std::fill_n(out.scratch, 3 * c, 0.0);
    for (std::int64_t k = 0; k < chunks_; ++k) {
      const ColumnMoments part = columns(partials[k]);
      for (std::int64_t at = 0; at < geometry_.chunk(k).columns; at += c) merge(total, part, at, c);
    }
    const std::int64_t groups = call_.num_groups == 0 ? c : call_.num_groups, d = c / groups;
    for (std::int64_t g = 0; g < groups; ++g) {
      const auto statistics = call_.statistics(tile * groups + g, slice_of(total, g * d, d));
      out.set_affine(g * d, d, statistics, call_.affine, tile, g * d);
    }
    out.repeat(c, geometry_.width());
  }

  void apply(std::int64_t tile, std::int64_t index, char* state) const {
    const RowChunk chunk = geometry_.chunk(index);
    call_.simd.apply_rows(call_.apply_args(offset(tile, chunk), tile_state(state).view(0)),
                          chunk.rows, chunk.columns);
  }

 private:
  std::int64_t offset(std::int64_t tile, const RowChunk& chunk) const {
    return geometry_.offset(tile) + chunk.first_row * call_.input.extent.c;
  }
  TileState<A> tile_state(char* state) const { return TileState<A>(state, geometry_.width(), 3); }
  ColumnMoments columns(void* partial) const {
    auto* p = static_cast<double*>(partial);
    return {p, p + geometry_.width(), p + 2 * geometry_.width()};
  }
  // The moments of `d` neighbouring channels. Their counts differ only under a mask of single
  // values; equal counts need no division per channel.
  Moments slice_of(const ColumnMoments& channels, std::int64_t first, std::int64_t d) const {
    const double* const mean = channels.mean + first;
    const double* const m2 = channels.m2 + first;
    const double* const count = channels.count + first;
    Moments slice{count[0], mean[0], m2[0]};
    if (call_.input.mask.kind == MaskKind::kElement) {
      for (std::int64_t i = 1; i < d; ++i) slice.merge({count[i], mean[i], m2[i]});
      return slice;
    }
    double shift = 0.0, squares = 0.0;
    for (std::int64_t i = 1; i < d; ++i) shift += mean[i] - mean[0];
    slice.mean += shift / static_cast<double>(d);
    for (std::int64_t i = 0; i < d; ++i) {
      const double delta = mean[i] - slice.mean;
      squares += delta * delta;
    }
    for (std::int64_t i = 1; i < d; ++i) slice.m2 += m2[i];
    slice.m2 += count[0] * squares;
    slice.count *= static_cast<double>(d);
    return slice;
  }
  // Chan's formula for `c` columns at once, without branches so that it vectorises.
  static void merge(const ColumnMoments& total, const ColumnMoments& part, std::int64_t at,
                    std::int64_t c) {
    for (std::int64_t i = 0; i < c; ++i) {
      const double added = part.count[at + i], count = total.count[i] + added;
      const double weight = added / std::max(count, 1.0);
      const double delta = part.mean[at + i] - total.mean[i];
      total.mean[i] += delta * weight;
      total.m2[i] += part.m2[at + i] + delta * weight * (delta * total.count[i]);
      total.count[i] = count;
    }
  }

  const ForwardCall<A, Statistics>& call_;
  RowsGeometry geometry_;
  std::int64_t chunks_;
};

}  // namespace

template <class Statistics>
void run_forward(const NormInput& input, std::int64_t num_groups, Pass pass,
                 const Statistics& statistics, const ForwardOutputs& outputs, const CpuPlan& plan,
                 void* workspace, const CpuExecutor& executor) {
  const Problem problem(input, num_groups, pass);
  const WorkspaceLayout layout = workspace_layout(problem, plan);
  using A = typename Statistics::Arithmetic;
  auto* base = static_cast<char*>(workspace);
  const ForwardCall<A, Statistics> call{
      input,          num_groups,  statistics,
      outputs,        plan.stream, Affine<A>(input, reinterpret_cast<A*>(base)),
      primitives<A>()};
  char* const slots = base + layout.affine + layout.parameters;
  if (input.layout == Layout::kNCS) {
    run_tiles(PlanesForward<A, Statistics>(call, problem), problem, plan, layout, slots, executor);
  } else {
    run_tiles(RowsForward<A, Statistics>(call, problem), problem, plan, layout, slots, executor);
  }
}

template void run_forward(const NormInput&, std::int64_t, Pass, const BatchStatistics<float>&,
                          const ForwardOutputs&, const CpuPlan&, void*, const CpuExecutor&);
template void run_forward(const NormInput&, std::int64_t, Pass, const BatchStatistics<double>&,
                          const ForwardOutputs&, const CpuPlan&, void*, const CpuExecutor&);
template void run_forward(const NormInput&, std::int64_t, Pass, const GivenStatistics<float>&,
                          const ForwardOutputs&, const CpuPlan&, void*, const CpuExecutor&);
template void run_forward(const NormInput&, std::int64_t, Pass, const GivenStatistics<double>&,
                          const ForwardOutputs&, const CpuPlan&, void*, const CpuExecutor&);
template void run_forward(const NormInput&, std::int64_t, Pass, const PartStatistics<float>&,
                          const ForwardOutputs&, const CpuPlan&, void*, const CpuExecutor&);
template void run_forward(const NormInput&, std::int64_t, Pass, const PartStatistics<double>&,
                          const ForwardOutputs&, const CpuPlan&, void*, const CpuExecutor&);

}  // namespace normcore::kernels
