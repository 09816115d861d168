#include "cpu/samples.h"

#include <algorithm>
#include <cstdint>

#include "cpu/element.h"
#include "cpu/parameters.h"
#include "cpu/primitives.h"
#include "plan/cpu_geometry.h"

namespace normcore::kernels {
namespace {

// What all passes share: the parts of the workspace, and the arguments of a block of samples.
template <class A>
class Samples {
 public:
  // A parameter of every column, and how far it is to the next sample's.
  struct Parameter {
    const A* data;
    std::int64_t stride;
  };

  Samples(const NormInput& input, const Problem& problem, const CpuPlan& plan, void* workspace)
      : input_(input),
        geometry_(problem),
        plan_(plan),
        layout_(workspace_layout(problem, plan)),
        base_(static_cast<char*>(workspace)),
        sums_(geometry_.scratch_arrays(problem.pass) * geometry_.padded_columns()),
        scale_(parameter(input.scale, A{1}, 0)),
        bias_(parameter(input.bias, A{0}, 1)) {}

  const SamplesGeometry& geometry() const { return geometry_; }
  double* parameters() const { return reinterpret_cast<double*>(base_ + layout_.affine); }
  A* scratch(std::int64_t task) const {
    return reinterpret_cast<A*>(base_ + layout_.affine + layout_.parameters +
                                static_cast<std::size_t>(task) * layout_.slot());
  }
  A* sums(std::int64_t task) const { return scratch(task) + sums_; }  // kSumArrays arrays

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
    args.x = advance(input_.x, offset(tile, sample));
    args.residual = advance(input_.residual, offset(tile, sample));
    args.activation = input_.activation;
    set_parameter(scale_, tile, sample, args.scale, args.scale_stride);
    set_parameter(bias_, tile, sample, args.bias, args.bias_stride);
    args.scratch = scratch(task);
    args.scratch_stride = geometry_.padded_columns();
  }
  void set_parameter(const Parameter& parameter, std::int64_t tile, std::int64_t sample,
                     const A*& data, std::int64_t& stride) const {
    data = parameter.data + sample * parameter.stride + offset(tile, 0);
    stride = parameter.stride;
  }
  // The tensor itself, or the copy of that number in the workspace.
  Parameter parameter(ConstTensor tensor, A absent, std::int64_t number) const {
    const std::int64_t rows = input_.affine_per_sample ? input_.extent.n : 1;
    A* const copy = reinterpret_cast<A*>(base_) + number * rows * geometry_.columns();
    return {of_columns(tensor, absent, copy),
            input_.affine_per_sample && tensor ? geometry_.columns() : 0};
  }
  std::int64_t slice(std::int64_t tile, std::int64_t sample) const {
    return sample * geometry_.slices_per_sample() + geometry_.first_slice(tile);
  }
  std::int64_t offset(std::int64_t tile, std::int64_t sample) const {
    return slice(tile, sample) * geometry_.slice_size();
  }

 private:
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
  std::int64_t sums_;
  Parameter scale_, bias_;
};

bool wants_any(const NormGradients& grad) {
  return grad.x || grad.scale || grad.bias || grad.residual;
}

// Calls gradient(args, offset, tile, sample) with the arguments that backward passes share of all
// samples, `offset` values from the start; sums the gradients of the parameters.
template <class Args, class A, class Gradient>
void run_backward_samples(const Samples<A>& samples, const BackwardCall& call,
                          const CpuExecutor& executor, const Gradient& gradient) {
  const bool wants_parameters = call.grad.scale || call.grad.bias;
  const SamplesGeometry& g = samples.geometry();
  const std::int64_t c = call.input.extent.c, s = g.positions();
  const bool per_sample = call.input.affine_per_sample;

  samples.for_each_tile(executor, [&](std::int64_t task, std::int64_t tile) {
    A* const scale_sums = samples.sums(task);
    A* const bias_sums = scale_sums + g.padded_columns();
    const auto run = [&](std::int64_t first, std::int64_t count) {
      Args args;
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
      gradient(args, offset, tile, first);
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
  if (!wants_any(call.grad)) return;
  const Problem problem(call.input, call.num_groups, Pass::kBackward);
  const Samples<A> samples(call.input, problem, plan, workspace);
  const auto simd = primitives<A>();
  run_backward_samples<SamplesBackwardArgs<A>>(
      samples, call, executor, [&](const auto& args, auto...) { simd.gradient_of_samples(args); });
}

template <class A>
void run_samples(const DoubleBackwardCall& call, const CpuPlan& plan, void* workspace,
                 const CpuExecutor& executor) {
  const BackwardCall& backward = call.backward;
  if (!wants_any(backward.grad) && !call.grad_grad_y) return;
  const Problem problem(backward.input, backward.num_groups, Pass::kDoubleBackward);
  const Samples<A> samples(backward.input, problem, plan, workspace);
  const auto scale = samples.parameter(call.cotangents.scale, A{0}, 2),
             bias = samples.parameter(call.cotangents.bias, A{0}, 3);
  const auto simd = primitives<A>();
  run_backward_samples<SamplesDoubleBackwardArgs<A>>(
      samples, backward, executor,
      [&](auto& args, std::int64_t offset, std::int64_t tile, std::int64_t sample) {
        args.cotangent_x = advance(call.cotangents.x, offset);
        args.cotangent_residual = advance(call.cotangents.residual, offset);
        samples.set_parameter(scale, tile, sample, args.cotangent_scale,
                              args.cotangent_scale_stride);
        samples.set_parameter(bias, tile, sample, args.cotangent_bias, args.cotangent_bias_stride);
        args.grad_grad_y = advance(call.grad_grad_y, offset);
        simd.double_gradient_of_samples(args);
      });
}

template void run_samples<float>(const GroupNormForwardArgs&, const CpuPlan&, void*,
                                 const CpuExecutor&);
template void run_samples<double>(const GroupNormForwardArgs&, const CpuPlan&, void*,
                                  const CpuExecutor&);
template void run_samples<float>(const BackwardCall&, const CpuPlan&, void*, const CpuExecutor&);
template void run_samples<double>(const BackwardCall&, const CpuPlan&, void*, const CpuExecutor&);
template void run_samples<float>(const DoubleBackwardCall&, const CpuPlan&, void*,
                                 const CpuExecutor&);
template void run_samples<double>(const DoubleBackwardCall&, const CpuPlan&, void*,
                                  const CpuExecutor&);

}  // namespace normcore::kernels
