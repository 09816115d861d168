// Where the backward passes go, in either layout: the drivers of sweep.h over tiles, chunks and
// pieces. What is computed there is that of `Pass`, which is a first or a second derivative:
//   kPass, Arithmetic
//   input(), num_groups(), parameters()
//   needs_sums(), needs_sweep()           whether there is a first and a second sweep
//   sums()                                per channel: arrays_of(kPass).sums or fewer
//   prepare(state, entry, slice, sample, channel, channels)
//                                         coefficients of the first sweep, of channels of one slice
//   finish_slice(state, entry, slice, sample, channel, channels, count, sums)
//                                         those of the second sweep; stores gradients of
//                                         parameters. `count` values count for the statistics
//   sums_of_runs(place, block, partial, stride), sums_of_rows(place, rows, width, partial, stride)
//   gradient_of_runs(place, planes, length), gradient_of_rows(place, rows, width)
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "cpu/coefficients.h"
#include "cpu/parameters.h"
#include "cpu/primitives.h"
#include "cpu/sweep.h"
#include "plan/cpu_geometry.h"

namespace normcore::kernels {

// Sums of channels (in one sample, for group norm), an array for each.
class ChannelSums {
 public:
  ChannelSums(double* data, std::int64_t stride) : data_(data), stride_(stride) {}
  double* operator[](int sum) const { return data_ + sum * stride_; }
  ChannelSums from(std::int64_t channel) const { return {data_ + channel, stride_}; }

  // Adds what a chunk gave, or begins with it.
  template <class A>
  void add(const A* partial, std::int64_t partial_stride, int sums, std::int64_t channels,
           bool is_first) const {
    for (int k = 0; k < sums; ++k) {
      double* const total = (*this)[k];
      const A* const part = partial + k * partial_stride;
      for (std::int64_t i = 0; i < channels; ++i) total[i] = (is_first ? 0.0 : total[i]) + part[i];
    }
  }

 private:
  double* data_;
  std::int64_t stride_;
};

// A chunk or piece: its first value in the tensors, its mask, its coefficients and, in the state of
// its tile, what is kept of it between the sweeps.
template <class A>
struct Place {
  std::int64_t offset;
  MaskBlock mask;
  TileState<A> coefficients;
  std::int64_t entry;  // first of the coefficients
  char* state;
  std::int64_t kept_offset, kept_run_stride;
};

// Values of a slice that count for its statistics.
inline std::int64_t count_ones(const std::uint8_t* mask, std::int64_t size) {
  return std::count_if(mask, mask + size, [](std::uint8_t v) { return v != 0; });
}

template <class Pass>
class PlanesDriver {
 public:
  using A = typename Pass::Arithmetic;
  static constexpr bool kPrepares = true;

  PlanesDriver(const Pass& pass, const Problem& problem) : pass_(pass), geometry_(problem) {}

  std::int64_t pieces(std::int64_t tile) const {
    return pass_.needs_sweep() ? geometry_.pieces(geometry_.tile(tile)) : 0;
  }
  std::int64_t chunk_grain() const { return 2; }

  void prepare(std::int64_t index, char* state) const {
    const PlanesTile tile = geometry_.tile(index);
    const TileState<A> out = tile_state(state);
    const std::int64_t step = planes_per_slice(tile);
    for (std::int64_t p = 0; p < tile.planes; p += step) {
      const std::int64_t channel = tile.first_channel + p;
      pass_.prepare(out, p, slice(index, channel), tile.sample, channel, step);
    }
  }

  void reduce(std::int64_t tile_index, std::int64_t index, char* state, void* partial) const {
    const PlanesTile tile = geometry_.tile(tile_index);
    const RunChunk chunk = geometry_.chunk(tile, index);
    const RunBlock block{geometry_.records(tile), geometry_.record_stride(), chunk.runs,
                         geometry_.run_stride(), chunk.length};
    pass_.sums_of_runs(place(tile, chunk, 0, state), block, static_cast<A*>(partial),
                       max_records());
  }

  void finish(std::int64_t index, char* state, const Partials& partials) const {
    if (!pass_.needs_sums()) return;
    const PlanesTile tile = geometry_.tile(index);
    const TileState<A> out = tile_state(state);
    const ChannelSums sums(out.scratch, tile.planes);
    for (std::int64_t k = 0; k < geometry_.chunks(); ++k) {
      sums.add(static_cast<const A*>(partials[k]), max_records(), pass_.sums(), tile.planes,
               k == 0);
    }
    const std::int64_t step = planes_per_slice(tile);
    for (std::int64_t p = 0; p < tile.planes; p += step) {
      const std::int64_t channel = tile.first_channel + p;
      pass_.finish_slice(out, p, slice(index, channel), tile.sample, channel, step,
                         count(tile.sample, channel, step), sums.from(p));
    }
  }

  void apply(std::int64_t tile_index, std::int64_t index, char* state) const {
    const PlanesTile tile = geometry_.tile(tile_index);
    const PlanePiece piece = geometry_.piece(tile, index);
    pass_.gradient_of_runs(place(tile, piece, piece.first_plane, state), piece.planes,
                           piece.length);
  }

 private:
  TileState<A> tile_state(char* state) const {
    return TileState<A>(state, geometry_.max_planes(), arrays_of(Pass::kPass).coefficients);
  }
  std::int64_t max_records() const { return TileState<A>::padded(geometry_.max_records()); }
  bool group_norm() const { return pass_.num_groups() != 0; }
  std::int64_t planes_per_slice(const PlanesTile& tile) const {
    return group_norm() ? tile.planes : 1;
  }
  std::int64_t slice(std::int64_t tile, std::int64_t channel) const {
    return group_norm() ? tile : channel;
  }
  template <class Part>
  Place<A> place(const PlanesTile& tile, const Part& part, std::int64_t entry, char* state) const {
    const std::int64_t offset = tile.offset + part.offset;
    const auto mask =
        mask_of_runs(pass_.input().mask, offset, part.row_mask_offset, geometry_.record_stride(),
                     geometry_.run_stride(), geometry_.row_mask_run_stride());
    return {offset,
            mask,
            tile_state(state),
            entry,
            state,
            part.kept_offset,
            geometry_.kept_run_stride()};
  }
  double count(std::int64_t first, std::int64_t channel, std::int64_t channels) const {
    const NormInput& in = pass_.input();
    const auto [n, c, s] = in.extent;
    const std::int64_t last = group_norm() ? first + 1 : n;
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

  const Pass& pass_;
  PlanesGeometry geometry_;
};

template <class Pass>
class RowsDriver {
 public:
  using A = typename Pass::Arithmetic;
  static constexpr bool kPrepares = true;

  RowsDriver(const Pass& pass, const Problem& problem) : pass_(pass), geometry_(problem) {}

  std::int64_t pieces(std::int64_t) const { return pass_.needs_sweep() ? geometry_.chunks() : 0; }
  std::int64_t chunk_grain() const { return 1; }

  void prepare(std::int64_t tile, char* state) const {
    const TileState<A> out = tile_state(state);
    const std::int64_t c = pass_.input().extent.c, groups = slices_per_tile(), d = c / groups;
    for (std::int64_t group = 0; group < groups; ++group) {
      pass_.prepare(out, group * d, tile * groups + group, tile, group * d, d);
    }
    out.repeat(c, geometry_.width());
  }

  void reduce(std::int64_t tile, std::int64_t index, char* state, void* partial) const {
    const RowChunk chunk = geometry_.chunk(index);
    pass_.sums_of_rows(place(tile, chunk, state), chunk.rows, chunk.columns,
                       static_cast<A*>(partial), geometry_.width());
  }

  void finish(std::int64_t tile, char* state, const Partials& partials) const {
    if (!pass_.needs_sums()) return;
    const TileState<A> out = tile_state(state);
    const std::int64_t c = pass_.input().extent.c, groups = slices_per_tile(), d = c / groups;
    const ChannelSums sums(out.scratch, c);
    for (std::int64_t k = 0; k < geometry_.chunks(); ++k) {
      for (std::int64_t at = 0; at < geometry_.chunk(k).columns; at += c) {
        sums.add(static_cast<const A*>(partials[k]) + at, geometry_.width(), pass_.sums(), c,
                 k + at == 0);
      }
    }
    static_assert(arrays_of(Pass::kPass).merged > arrays_of(Pass::kPass).sums);
    auto* const counts = reinterpret_cast<std::int64_t*>(sums[arrays_of(Pass::kPass).sums]);
    count_valid(tile, counts);
    for (std::int64_t group = 0; group < groups; ++group) {
      const auto count =
          std::accumulate(counts + group * d, counts + (group + 1) * d, std::int64_t{0});
      pass_.finish_slice(out, group * d, tile * groups + group, tile, group * d, d,
                         static_cast<double>(count), sums.from(group * d));
    }
    out.repeat(c, geometry_.width());
  }

  void apply(std::int64_t tile, std::int64_t index, char* state) const {
    const RowChunk chunk = geometry_.chunk(index);
    pass_.gradient_of_rows(place(tile, chunk, state), chunk.rows, chunk.columns);
  }

 private:
  TileState<A> tile_state(char* state) const {
    return TileState<A>(state, geometry_.width(), arrays_of(Pass::kPass).coefficients);
  }
  std::int64_t slices_per_tile() const {
    return pass_.num_groups() != 0 ? pass_.num_groups() : pass_.input().extent.c;
  }
  Place<A> place(std::int64_t tile, const RowChunk& chunk, char* state) const {
    const NormInput& in = pass_.input();
    const std::int64_t offset = geometry_.offset(tile) + chunk.first_row * in.extent.c;
    const auto mask = mask_of_rows(in.mask, offset, tile * geometry_.rows() + chunk.first_row);
    return {offset, mask, tile_state(state), 0, state, chunk.first_row * in.extent.c, 0};
  }
  // Values of each channel that count for the statistics.
  void count_valid(std::int64_t tile, std::int64_t* counts) const {
    const NormInput& in = pass_.input();
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

  const Pass& pass_;
  RowsGeometry geometry_;
};

template <class Pass>
void run_gradient(const Pass& pass, const Problem& problem, const CpuPlan& plan,
                  WorkspaceLayout layout, char* workspace, const CpuExecutor& executor) {
  if (!pass.needs_sums() && !pass.needs_sweep()) return;
  char* const slots = workspace + layout.affine + layout.parameters;
  if (!pass.needs_sums()) layout.chunks = 0;
  if (pass.input().layout == Layout::kNCS) {
    run_tiles(PlanesDriver<Pass>(pass, problem), problem, plan, layout, slots, executor);
  } else {
    run_tiles(RowsDriver<Pass>(pass, problem), problem, plan, layout, slots, executor);
  }
  pass.parameters().fold(executor);
}

}  // namespace normcore::kernels
