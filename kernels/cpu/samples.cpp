#include "cpu/samples.h"

#include <algorithm>
#include <cstdint>

#include "cpu/element.h"
#include "cpu/parameters.h"
#include "cpu/primitives.h"
#include "plan/cpu_geometry.h"

namespace normcore::kernels {
namespace {

// What both passes share: the parts of the workspace, and the arguments of a block of samples.
template <class A>
class Samples {
 public:
  Samples(const NormInput& input, const Problem& problem, const CpuPlan& plan, void* workspace)
      : input_(input),
        geometry_(problem),
        plan_(plan),
        layout_(workspace_layout(problem, plan)),
        base_(static_cast<char*>(workspace)) {
    set_affine();
  }

  const SamplesGeometry& geometry() const { return geometry_; }
  double* parameters() const { return reinterpret_cast<double*>(base_ + layout_.affine); }
  A* scratch(std::int64_t task) const {
    return reinterpret_cast<A*>(base_ + layout_.affine + layout_.parameters +
                                static_cast<std::size_t>(task) * layout_.slot());
  }

  // Calls body(task, tile) for all tiles.
  template <class Body>
  void for_each_tile(const CpuExecutor& executor, const Body& body) const {
    executor.parallel_for(plan_.tasks, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t last = (task + 1) * plan_.tiles / plan_.tasks;
        for (std::int64_t t = task * plan_.tiles / plan_.tasks; t < last; ++t) body(task, t);
      }
    });
  }

  // Of `samples` samples from `sample` on, as far as they belong to the tile.
  void set_args(std::int64_t task, std::int64_t tile, std::int64_t sample, std::int64_t samples,
                SamplesArgs<A>& args) const {
    args.samples = samples;
    args.shape = {geometry_.slices(tile), geometry_.slice_size()};
    args.stride = geometry_.columns();
    args.slice_stride = geometry_.slices_per_sample();
    args.scale_stride = input_.affine_per_sample && input_.scale ? geometry_.columns() : 0;
    args.bias_stride = input_.affine_per_sample && input_.bias ? geometry_.columns() : 0;
    args.x = advance(input_.x, offset(tile, sample));
    args.residual = advance(input_.residual, offset(tile, sample));
    args.activation = input_.activation;
    const std::int64_t column = geometry_.first_slice(tile) * geometry_.slice_size();
    args.scale = scale_ + sample * args.scale_stride + column;
    args.bias = bias_ + sample * args.bias_stride + column;
    args.scratch = scratch(task);
    args.scratch_stride = geometry_.padded_columns();
  }
  std::int64_t slice(std::int64_t tile, std::int64_t sample) const {
    return sample * geometry_.slices_per_sample() + geometry_.first_slice(tile);
  }
  std::int64_t offset(std::int64_t tile, std::int64_t sample) const {
    return slice(tile, sample) * geometry_.slice_size();
  }

 private:
  // Scale and bias of every column: the tensors themselves, or copies in the workspace.
  void set_affine() {
    auto* const copies = reinterpret_cast<A*>(base_);
    const std::int64_t rows = input_.affine_per_sample ? input_.extent.n : 1;
    scale_ = of_columns(input_.scale, A{1}, copies);
    bias_ = of_columns(input_.bias, A{0}, copies + rows * geometry_.columns());
  }
  const A* of_columns(ConstTensor parameter, A absent, A* out) const {
    const std::int64_t s = geometry_.positions();
    if (!parameter) {
      std::fill_n(out, geometry_.columns(), absent);
      return out;
    }
    if (s == 1 && parameter.dtype == kArithmeticType<A>) {
      return static_cast<const A*>(parameter.data);
    }
    const std::int64_t count = affine_count(input_);
    visit_dtype(parameter.dtype, [&](auto tag) {
      const auto* const values = static_cast<const typename decltype(tag)::type*>(parameter.data);
      for (std::int64_t i = 0; i < count; ++i) {
        std::fill_n(out + i * s, s, static_cast<A>(to_double(values[i])));
      }
    });
    return out;
  }

  const NormInput& input_;
  SamplesGeometry geometry_;
  const CpuPlan& plan_;
  WorkspaceLayout layout_;
  char* base_;
  const A* scale_ = nullptr;
  const A* bias_ = nullptr;
};

}  // namespace

template <class A>
void run_samples(const GroupNormForwardArgs& args, const CpuPlan& plan, void* workspace,
                 const CpuExecutor& executor) {
  const Problem problem(args.input, args.num_groups, Pass::kForward);
  const Samples<A> samples(args.input, problem, plan, workspace);
  const auto simd = primitives<A>();
  const SamplesGeometry& g = samples.geometry();
  samples.for_each_tile(executor, [&](std::int64_t task, std::int64_t tile) {
    const std::int64_t first = g.first_sample(tile), slice = samples.slice(tile, first);
    SamplesForwardArgs<A> of_tile;
    samples.set_args(task, tile, first, g.samples(tile), of_tile);
    of_tile.eps = args.input.eps;
    of_tile.y = advance(args.y, samples.offset(tile, first));
    of_tile.mean = args.mean + slice;
    of_tile.rstd = static_cast<A*>(args.rstd.data) + slice;
    simd.normalize_samples(of_tile);
  });
}

template <class A>
void run_samples(const BackwardCall& call, const CpuPlan& plan, void* workspace,
                 const CpuExecutor& executor) {
  const bool wants_parameters = call.grad.scale || call.grad.bias;
  if (!wants_parameters && !call.grad.x && !call.grad.residual) return;
  const Problem problem(call.input, call.num_groups, Pass::kBackward);
  const Samples<A> samples(call.input, problem, plan, workspace);
  const auto simd = primitives<A>();
  const SamplesGeometry& g = samples.geometry();
  const std::int64_t c = call.input.extent.c, s = g.positions();
  const bool per_sample = call.input.affine_per_sample;

  samples.for_each_tile(executor, [&](std::int64_t task, std::int64_t tile) {
    A* const scale_sums = samples.scratch(task) + g.kBackwardArrays * g.padded_columns();
    A* const bias_sums = scale_sums + g.padded_columns();
    const auto run = [&](std::int64_t first, std::int64_t count) {
      SamplesBackwardArgs<A> args;
      samples.set_args(task, tile, first, count, args);
      const std::int64_t offset = samples.offset(tile, first), slice = samples.slice(tile, first);
      args.grad_y = advance(call.grad_y, offset);
      args.mean = static_cast<const double*>(call.mean.data) + slice;
      args.rstd = static_cast<const A*>(call.rstd.data) + slice;
      args.grad_x = advance(call.grad.x, offset);
      args.grad_residual = advance(call.grad.residual, offset);
      if (wants_parameters) {
        std::fill_n(scale_sums, g.kSumArrays * g.padded_columns(), A{0});
        args.scale_sums = scale_sums;
        args.bias_sums = bias_sums;
      }
      simd.gradient_of_samples(args);
    };
    const std::int64_t first_channel = g.first_slice(tile) * g.channels_per_slice(),
                       channels = g.slices(tile) * g.channels_per_slice();
    // Calls store(channel, scale, bias).
    const auto for_each_channel = [&](const auto& store) {
      for (std::int64_t i = 0; wants_parameters && i < channels; ++i) {
        double scale = 0.0, bias = 0.0;
        for (std::int64_t at = i * s; at < (i + 1) * s; ++at) {
          scale += scale_sums[at];
          bias += bias_sums[at];
        }
        store(first_channel + i, scale, bias);
      }
    };
    const std::int64_t first = g.first_sample(tile), count = g.samples(tile);
    if (per_sample) {
      for (std::int64_t sample = first; sample < first + count; ++sample) {
        run(sample, 1);
        for_each_channel([&](std::int64_t i, double scale, double bias) {
          store_parameters(call.grad, sample * c + i, scale, bias);
        });
      }
      return;
    }
    run(first, count);
    for_each_channel([&](std::int64_t i, double scale, double bias) {
      const PartialParameters out(samples.parameters(), g.block(tile), c, i);
      *out.scale = scale;
      *out.bias = bias;
    });
  });
  if (wants_parameters && !per_sample) {
    fold_parameters(call.grad, samples.parameters(), g.blocks(), c, executor);
  }
}

template void run_samples<float>(const GroupNormForwardArgs&, const CpuPlan&, void*,
                                 const CpuExecutor&);
template void run_samples<double>(const GroupNormForwardArgs&, const CpuPlan&, void*,
                                  const CpuExecutor&);
template void run_samples<float>(const BackwardCall&, const CpuPlan&, void*, const CpuExecutor&);
template void run_samples<double>(const BackwardCall&, const CpuPlan&, void*, const CpuExecutor&);

}  // namespace normcore::kernels
