#include "cpu/backward.h"

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "check.h"
#include "cpu/coefficients.h"
#include "cpu/element.h"
#include "cpu/parameters.h"
#include "cpu/samples.h"
#include "cpu/sweep.h"

namespace normcore::kernels {
namespace {

// Sums of g and g * (x - mean) of channels (in one sample, for group norm).
struct ChannelSums {
  double* g;
  double* g_centered;

  ChannelSums from(std::int64_t channel) const { return {g + channel, g_centered + channel}; }
};

// Adds what a chunk gave, or begins with it.
template <class A>
void add(const A* g, const A* g_centered, std::int64_t channels, bool is_first,
         const ChannelSums& sums) {
  for (std::int64_t i = 0; i < channels; ++i) {
    sums.g[i] = (is_first ? 0.0 : sums.g[i]) + g[i];
    sums.g_centered[i] = (is_first ? 0.0 : sums.g_centered[i]) + g_centered[i];
  }
}

// Sums of a slice: of scale * g and scale * g * (x - mean).
struct SliceSums {
  double h = 0.0, h_centered = 0.0;
};

// Moves the center of the channels' sums by `rounding`, and adds them up in chains that do not wait
// for each other.
template <class A>
SliceSums sums_of_slice(const A* scale, double rounding, std::int64_t channels,
                        const ChannelSums& sums) {
  constexpr int kChains = 4;
  double h[kChains] = {}, h_centered[kChains] = {};
  const auto add = [&](std::int64_t i, int k) {
    sums.g_centered[i] -= rounding * sums.g[i];
    h[k] += scale[i] * sums.g[i];
    h_centered[k] += scale[i] * sums.g_centered[i];
  };
  std::int64_t i = 0;
  for (; i + kChains <= channels; i += kChains) {
    for (int k = 0; k < kChains; ++k) add(i + k, k);
  }
  for (; i < channels; ++i) add(i, 0);
  return {(h[0] + h[1]) + (h[2] + h[3]),
          (h_centered[0] + h_centered[1]) + (h_centered[2] + h_centered[3])};
}

// What both layouts share: saved statistics, coefficients of grad_x and gradients of the
// parameters.
template <class A>
class Gradients {
 public:
  // `kept`: where g is kept behind the state of a tile; 0: nowhere.
  Gradients(const BackwardCall& call, const Problem& problem, bool stream, std::size_t kept,
            A* affine, double* parameters)
      : call_(call),
        stream_(stream),
        kept_(kept),
        affine_(call.input, affine),
        parameters_(parameters),
        block_(call.num_groups == 0 ? 1 : samples_per_block(problem.extent.n)),
        slice_size_(problem.extent.s * (call.num_groups == 0
                                            ? problem.extent.n
                                            : problem.extent.c / call.num_groups)) {}

  const BackwardCall& call() const { return call_; }
  bool group_norm() const { return call_.num_groups != 0; }

  // The sums are needed for grad_x only through the statistics; the second sweep only for grad_x
  // and grad_residual.
  bool needs_sums() const {
    return call_.grad.scale || call_.grad.bias || (call_.grad.x && call_.batch_statistics);
  }
  bool needs_sweep() const { return call_.grad.x || call_.grad.residual; }

  SliceStatistics<A> statistics(std::int64_t slice) const {
    return {load_element(call_.mean, slice), static_cast<const A*>(call_.rstd.data)[slice]};
  }

  // Of `channels` channels of one slice.
  void set_affine(const TileState<A>& out, std::int64_t entry, std::int64_t slice,
                  std::int64_t sample, std::int64_t channel, std::int64_t channels) const {
    out.set_affine(entry, channels, statistics(slice), affine_, sample, channel);
  }

  // One slice of `channels` channels with `count` values that count. The sums are those of g and
  // g * (x - center), as reduced; center differs from the mean by its rounding error.
  void finish_slice(const TileState<A>& out, std::int64_t entry, std::int64_t slice,
                    std::int64_t sample, std::int64_t channel, std::int64_t channels, double count,
                    const ChannelSums& sums) const {
    const SliceStatistics<A> stat = statistics(slice);
    // A slice without a valid value has NaN statistics: where no g comes in, none goes out.
    const bool is_empty = call_.batch_statistics && count == 0.0;
    const double rstd = is_empty ? 0.0 : stat.rstd;
    const double rounding =
        is_empty ? 0.0 : stat.mean - static_cast<double>(static_cast<A>(stat.mean));
    const A* const scale = affine_.scale(sample, channel);
    const auto [h, h_centered] = sums_of_slice(scale, rounding, channels, sums);
    store_parameters(sample, channel, channels, sums, rstd);
    if (!call_.batch_statistics) return;
    // With nothing else in the slice y does not depend on x: exactly 0, not the difference of equal
    // terms.
    if (count == 1.0 && slice_size_ == 1) {
      out.scale[entry] = out.slope[entry] = out.offset[entry] = A{0};
      return;
    }
    const double slope = -rstd * rstd * rstd * h_centered / count;
    const double offset = -rstd * h / count - slope * rounding;
    std::fill_n(out.slope + entry, channels, out.canonical(static_cast<A>(slope)));
    std::fill_n(out.offset + entry, channels, out.canonical(static_cast<A>(offset)));
  }

  GradientArgs<A> args(std::int64_t offset, const MaskBlock& mask,
                       const Coefficients<A>& coefficients) const {
    GradientArgs<A> out;
    out.x = advance(call_.input.x, offset);
    out.grad_y = advance(call_.grad_y, offset);
    out.residual = advance(call_.input.residual, offset);
    out.mask = mask;
    out.activation = call_.input.activation;
    out.coefficients = coefficients;
    out.grad_x = advance(call_.grad.x, offset);
    out.grad_residual = advance(call_.grad.residual, offset);
    out.stream = stream_;
    return out;
  }

  // What the first sweep keeps for the second one, if anything: g of the values from `offset` on.
  A* kept(char* state, std::int64_t offset) const {
    return kept_ == 0 ? nullptr : reinterpret_cast<A*>(state + kept_) + offset;
  }
  static void read_kept(const A* g, GradientArgs<A>& args) {
    if (g == nullptr) return;
    args.grad_y = {g, kArithmeticType<A>};
    args.residual = {};
    args.activation = Activation::kNone;
  }

  // Sums the partial parameter gradients of group norm over blocks of samples, in order.
  void fold_parameters(const CpuExecutor& executor) const {
    if (!partial_parameters()) return;
    const Extent& extent = call_.input.extent;
    kernels::fold_parameters(call_.grad, parameters_, ceil_div(extent.n, block_), extent.c,
                             executor);
  }

 private:
  bool partial_parameters() const {
    return group_norm() && !call_.input.affine_per_sample && (call_.grad.scale || call_.grad.bias);
  }

  // `first` is the index of the slice's first channel.
  void store_parameters(std::int64_t sample, std::int64_t first, std::int64_t channels,
                        const ChannelSums& sums, double rstd) const {
    const std::int64_t c = call_.input.extent.c;
    if (!partial_parameters()) {
      for (std::int64_t i = 0; i < channels; ++i) {
        kernels::store_parameters(call_.grad, sample * c + first + i, sums.g_centered[i] * rstd,
                                  sums.g[i]);
      }
      return;
    }
    const PartialParameters out(parameters_, sample / block_, c, first);
    const bool is_first = sample % block_ == 0;  // a block's samples come in order
    for (std::int64_t i = 0; i < channels; ++i) {
      out.scale[i] = (is_first ? 0.0 : out.scale[i]) + sums.g_centered[i] * rstd;
      out.bias[i] = (is_first ? 0.0 : out.bias[i]) + sums.g[i];
    }
  }

  const BackwardCall& call_;
  bool stream_;
  std::size_t kept_;
  Affine<A> affine_;
  double* parameters_;
  std::int64_t block_, slice_size_;
};

// Values of a slice that count for its statistics.
std::int64_t count_ones(const std::uint8_t* mask, std::int64_t size) {
  return std::count_if(mask, mask + size, [](std::uint8_t v) { return v != 0; });
}

template <class A>
class PlanesBackward {
 public:
  static constexpr bool kPrepares = true;

  PlanesBackward(const Gradients<A>& gradients, const Primitives<A>& simd, const Problem& problem)
      : gradients_(gradients), simd_(simd), geometry_(problem) {}

  std::int64_t pieces(std::int64_t tile) const {
    return gradients_.needs_sweep() ? geometry_.pieces(geometry_.tile(tile)) : 0;
  }
  std::int64_t chunk_grain() const { return 2; }

  void prepare(std::int64_t index, char* state) const {
    const PlanesTile tile = geometry_.tile(index);
    const TileState<A> out = tile_state(state);
    const std::int64_t step = planes_per_slice(tile);
    for (std::int64_t p = 0; p < tile.planes; p += step) {
      const std::int64_t channel = tile.first_channel + p;
      gradients_.set_affine(out, p, slice(index, channel), tile.sample, channel, step);
    }
  }

  void reduce(std::int64_t tile_index, std::int64_t index, char* state, void* partial) const {
    const PlanesTile tile = geometry_.tile(tile_index);
    const RunChunk chunk = geometry_.chunk(tile, index);
    const std::int64_t offset = tile.offset + chunk.offset;
    const RunBlock block{geometry_.records(tile), geometry_.record_stride(), chunk.runs,
                         geometry_.run_stride(), chunk.length};
    auto args =
        gradients_.args(offset, mask(offset, chunk.row_mask_offset), tile_state(state).view(0));
    args.kept_gradient = gradients_.kept(state, chunk.kept_offset);
    args.kept_run_stride = geometry_.kept_run_stride();
    auto* const g = static_cast<A*>(partial);
    simd_.sums_of_runs(args, block, g, g + max_records());
  }

  void finish(std::int64_t index, char* state, const Partials& partials) const {
    if (!gradients_.needs_sums()) return;
    const PlanesTile tile = geometry_.tile(index);
    const TileState<A> out = tile_state(state);
    const ChannelSums sums{out.scratch, out.scratch + tile.planes};
    for (std::int64_t k = 0; k < geometry_.chunks(); ++k) {
      const auto* const g = static_cast<const A*>(partials[k]);
      add(g, g + max_records(), tile.planes, k == 0, sums);
    }
    const std::int64_t step = planes_per_slice(tile);
    for (std::int64_t p = 0; p < tile.planes; p += step) {
      const std::int64_t channel = tile.first_channel + p;
      gradients_.finish_slice(out, p, slice(index, channel), tile.sample, channel, step,
                              count(tile.sample, channel, step), sums.from(p));
    }
  }

  void apply(std::int64_t tile_index, std::int64_t index, char* state) const {
    const PlanesTile tile = geometry_.tile(tile_index);
    const PlanePiece piece = geometry_.piece(tile, index);
    const std::int64_t offset = tile.offset + piece.offset;
    const auto coefficients =
        tile_state(state).view(piece.first_plane, gradients_.call().batch_statistics);
    auto args = gradients_.args(offset, mask(offset, piece.row_mask_offset), coefficients);
    gradients_.read_kept(gradients_.kept(state, piece.kept_offset), args);
    simd_.gradient_of_runs(args, piece.planes, piece.length);
  }

 private:
  TileState<A> tile_state(char* state) const {
    return TileState<A>(state, geometry_.max_planes(), 5);
  }
  std::int64_t max_records() const { return TileState<A>::padded(geometry_.max_records()); }
  std::int64_t planes_per_slice(const PlanesTile& tile) const {
    return gradients_.group_norm() ? tile.planes : 1;
  }
  std::int64_t slice(std::int64_t tile, std::int64_t channel) const {
    return gradients_.group_norm() ? tile : channel;
  }
  MaskBlock mask(std::int64_t offset, std::int64_t row_mask_offset) const {
    return mask_of_runs(gradients_.call().input.mask, offset, row_mask_offset,
                        geometry_.record_stride(), geometry_.run_stride(),
                        geometry_.row_mask_run_stride());
  }
  double count(std::int64_t first, std::int64_t channel, std::int64_t channels) const {
    const NormInput& in = gradients_.call().input;
    const auto [n, c, s] = in.extent;
    const std::int64_t last = gradients_.group_norm() ? first + 1 : n;
    std::int64_t total = 0;
    for (std::int64_t sample = first; sample < last; ++sample) {
      switch (in.mask.kind) {
        case MaskKind::kNone:
          total += channels * s;
          break;
        case MaskKind::kRow:
          total += channels * count_ones(in.mask.data + sample * s, s);
          break;
        case MaskKind::kElement:
          total += count_ones(in.mask.data + (sample * c + channel) * s, channels * s);
          break;
      }
    }
    return static_cast<double>(total);
  }

  const Gradients<A>& gradients_;
  const Primitives<A>& simd_;
  PlanesGeometry geometry_;
};

template <class A>
class RowsBackward {
 public:
  static constexpr bool kPrepares = true;

  RowsBackward(const Gradients<A>& gradients, const Primitives<A>& simd, const Problem& problem)
      : gradients_(gradients), simd_(simd), geometry_(problem) {}

  std::int64_t pieces(std::int64_t) const {
    return gradients_.needs_sweep() ? geometry_.chunks() : 0;
  }
  std::int64_t chunk_grain() const { return 1; }

  void prepare(std::int64_t tile, char* state) const {
    const TileState<A> out = tile_state(state);
    const std::int64_t c = gradients_.call().input.extent.c, groups = slices_per_tile(),
                       d = c / groups;
    for (std::int64_t group = 0; group < groups; ++group) {
      gradients_.set_affine(out, group * d, tile * groups + group, tile, group * d, d);
    }
    out.repeat(c, geometry_.width());
  }

  void reduce(std::int64_t tile, std::int64_t index, char* state, void* partial) const {
    const RowChunk chunk = geometry_.chunk(index);
    auto* const g = static_cast<A*>(partial);
    auto args = this->args(tile, chunk, state);
    args.kept_gradient = kept(chunk, state);
    simd_.sums_of_rows(args, chunk.rows, chunk.columns, g, g + geometry_.width());
  }

  void finish(std::int64_t tile, char* state, const Partials& partials) const {
    if (!gradients_.needs_sums()) return;
    const TileState<A> out = tile_state(state);
    const std::int64_t c = gradients_.call().input.extent.c, groups = slices_per_tile(),
                       d = c / groups;
    const ChannelSums sums{out.scratch, out.scratch + c};
    for (std::int64_t k = 0; k < geometry_.chunks(); ++k) {
      const auto* const g = static_cast<const A*>(partials[k]);
      const auto* const g_centered = g + geometry_.width();
      for (std::int64_t at = 0; at < geometry_.chunk(k).columns; at += c) {
        add(g + at, g_centered + at, c, k + at == 0, sums);
      }
    }
    auto* const counts = reinterpret_cast<std::int64_t*>(out.scratch + 2 * c);
    count_valid(tile, counts);
    for (std::int64_t group = 0; group < groups; ++group) {
      const auto count =
          std::accumulate(counts + group * d, counts + (group + 1) * d, std::int64_t{0});
      gradients_.finish_slice(out, group * d, tile * groups + group, tile, group * d, d,
                              static_cast<double>(count), sums.from(group * d));
    }
    out.repeat(c, geometry_.width());
  }

  void apply(std::int64_t tile, std::int64_t index, char* state) const {
    const RowChunk chunk = geometry_.chunk(index);
    auto args = this->args(tile, chunk, state);
    gradients_.read_kept(kept(chunk, state), args);
    simd_.gradient_of_rows(args, chunk.rows, chunk.columns);
  }

 private:
  TileState<A> tile_state(char* state) const { return TileState<A>(state, geometry_.width(), 5); }
  std::int64_t slices_per_tile() const {
    return gradients_.group_norm() ? gradients_.call().num_groups
                                   : gradients_.call().input.extent.c;
  }
  GradientArgs<A> args(std::int64_t tile, const RowChunk& chunk, char* state) const {
    const NormInput& in = gradients_.call().input;
    const std::int64_t offset = geometry_.offset(tile) + chunk.first_row * in.extent.c;
    const auto mask = mask_of_rows(in.mask, offset, tile * geometry_.rows() + chunk.first_row);
    return gradients_.args(offset, mask,
                           tile_state(state).view(0, gradients_.call().batch_statistics));
  }
  A* kept(const RowChunk& chunk, char* state) const {
    return gradients_.kept(state, chunk.first_row * gradients_.call().input.extent.c);
  }
  // Values of each channel that count for the statistics.
  void count_valid(std::int64_t tile, std::int64_t* counts) const {
    const NormInput& in = gradients_.call().input;
    const std::int64_t rows = geometry_.rows(), first = tile * rows, c = in.extent.c;
    if (in.mask.kind != MaskKind::kElement) {
      const bool is_masked = in.mask.kind == MaskKind::kRow;
      std::fill_n(counts, c, is_masked ? count_ones(in.mask.data + first, rows) : rows);
      return;
    }
    std::fill_n(counts, c, 0);
    for (std::int64_t row = first; row < first + rows; ++row) {
      const std::uint8_t* const mask = in.mask.data + row * c;
      for (std::int64_t i = 0; i < c; ++i) counts[i] += mask[i];
    }
  }

  const Gradients<A>& gradients_;
  const Primitives<A>& simd_;
  RowsGeometry geometry_;
};

template <class A>
void run_typed(const BackwardCall& call, const CpuPlan& plan, void* workspace,
               const CpuExecutor& executor) {
  const Problem problem(call.input, call.num_groups, Pass::kBackward);
  WorkspaceLayout layout = workspace_layout(problem, plan);
  auto* const base = static_cast<char*>(workspace);
  const Gradients<A> gradients(call, problem, plan.stream, plan.keep ? layout.before_kept() : 0,
                               reinterpret_cast<A*>(base),
                               reinterpret_cast<double*>(base + layout.affine));
  if (!gradients.needs_sums() && !gradients.needs_sweep()) return;
  char* const slots = base + layout.affine + layout.parameters;
  if (!gradients.needs_sums()) layout.chunks = 0;
  const auto simd = primitives<A>();
  if (call.input.layout == Layout::kNCS) {
    run_tiles(PlanesBackward<A>(gradients, simd, problem), problem, plan, layout, slots, executor);
  } else {
    run_tiles(RowsBackward<A>(gradients, simd, problem), problem, plan, layout, slots, executor);
  }
  gradients.fold_parameters(executor);
}

void zero(MutableTensor parameters, std::int64_t count) {
  for (std::int64_t i = 0; parameters && i < count; ++i) store_element(parameters, i, 0.0);
}

}  // namespace

Status run_backward(const BackwardCall& call, const CpuPlan& plan, void* workspace,
                    const CpuExecutor& executor) {
  const NormInput& input = call.input;
  if (input.extent.numel() == 0) {
    const std::int64_t count = input.extent.c * (input.affine_per_sample ? input.extent.n : 1);
    zero(call.grad.scale, count);
    zero(call.grad.bias, count);
    return Status::success();
  }
  if (const Status status = check_gradients(input, call.grad_y, call.mean, call.rstd, call.grad);
      !status.ok()) {
    return status;
  }
  const bool is_samples = plan.path == CpuPath::kSample;
  if (compute_type(input.x.dtype) == DType::kFloat64) {
    is_samples ? run_samples<double>(call, plan, workspace, executor)
               : run_typed<double>(call, plan, workspace, executor);
  } else {
    is_samples ? run_samples<float>(call, plan, workspace, executor)
               : run_typed<float>(call, plan, workspace, executor);
  }
  return Status::success();
}

}  // namespace normcore::kernels
