// Speed of the CPU kernels alone, on one thread, without torch: every op and layout on the shapes
// of tests/shapes/shapes.txt that are worth measuring, as bytes per second of minimal traffic
// (forward 2, backward 3, double backward 5 tensors). Another file of shapes may come first.
//   normcore_kernels_benchmark [SHAPES.txt] --benchmark_filter=group_norm
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "normcore/kernels/batch_norm.h"
#include "normcore/kernels/group_norm.h"

namespace normcore::kernels {
namespace {

enum class Operation {
  kBatchNormForward,
  kBatchNormInference,
  kBatchNormBackward,
  kBatchNormDoubleBackward,
  kGroupNormForward,
  kGroupNormBackward,
  kGroupNormDoubleBackward,
  kGroupNormSiluForward,
  kGroupNormSiluBackward,
  kGroupNormSiluDoubleBackward,
  // relu(norm + residual), whose backward pass reads the residual or the bits that the forward pass left
  kResidualForward,
  kResidualBackward,
  kReluBitsForward,
  kReluBitsBackward
};

const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::kBatchNormForward:
      return "batch_norm_forward";
    case Operation::kBatchNormInference:
      return "batch_norm_inference";
    case Operation::kBatchNormBackward:
      return "batch_norm_backward";
    case Operation::kBatchNormDoubleBackward:
      return "batch_norm_double_backward";
    case Operation::kGroupNormForward:
      return "group_norm_forward";
    case Operation::kGroupNormBackward:
      return "group_norm_backward";
    case Operation::kGroupNormDoubleBackward:
      return "group_norm_double_backward";
    case Operation::kGroupNormSiluForward:
      return "group_norm_silu_forward";
    case Operation::kGroupNormSiluBackward:
      return "group_norm_silu_backward";
    case Operation::kGroupNormSiluDoubleBackward:
      return "group_norm_silu_double_backward";
    case Operation::kResidualForward:
      return "residual_forward";
    case Operation::kResidualBackward:
      return "residual_backward";
    case Operation::kReluBitsForward:
      return "relu_bits_forward";
    case Operation::kReluBitsBackward:
      return "relu_bits_backward";
  }
  return "";
}

// Tensors that have to be read or written.
int tensors_of(Operation operation) {
  switch (operation) {
    case Operation::kBatchNormBackward:
    case Operation::kGroupNormBackward:
    case Operation::kGroupNormSiluBackward:
    case Operation::kResidualForward:
    case Operation::kReluBitsForward:
      return 3;
    case Operation::kResidualBackward:
    case Operation::kReluBitsBackward:
      return 4;
    case Operation::kBatchNormDoubleBackward:
    case Operation::kGroupNormDoubleBackward:
    case Operation::kGroupNormSiluDoubleBackward:
      return 5;
    default:
      return 2;
  }
}

bool has_silu(Operation operation) {
  return operation == Operation::kGroupNormSiluForward ||
         operation == Operation::kGroupNormSiluBackward ||
         operation == Operation::kGroupNormSiluDoubleBackward;
}

bool has_residual(Operation operation) {
  return operation == Operation::kResidualForward || operation == Operation::kResidualBackward ||
         operation == Operation::kReluBitsForward || operation == Operation::kReluBitsBackward;
}

struct Case {
  std::string name;
  Extent extent;
  std::int64_t groups;
};

std::vector<Case> read_cases(const char* path) {
  std::vector<Case> cases;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream fields(line);
    Case c;
    if (line.empty() || line[0] == '#') continue;
    fields >> c.name >> c.extent.n >> c.extent.c >> c.extent.s >> c.groups;
    if (c.extent.numel() >= 1 << 12) cases.push_back(c);
  }
  return cases;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<void, Free>;

Memory allocate(std::size_t bytes) {
  return Memory(std::aligned_alloc(64, (bytes + 127) / 64 * 64));
}

// A tensor of small values that are exact in every dtype.
Memory make_tensor(std::int64_t size, DType dtype) {
  Memory memory = allocate(static_cast<std::size_t>(size) * size_of(dtype));
  for (std::int64_t i = 0; i < size; ++i) {
    if (dtype == DType::kFloat32) {
      static_cast<float*>(memory.get())[i] = static_cast<float>(i % 61) / 64.0f;
    } else {  // bfloat16: 1 to 2 in steps of 1/128
      static_cast<std::uint16_t*>(memory.get())[i] = static_cast<std::uint16_t>(0x3f80 + i % 61);
    }
  }
  return memory;
}

void run_serially(void*, std::int64_t count, std::int64_t, CpuExecutor::Body body, void* context) {
  body(context, 0, count);
}

void measure(benchmark::State& state, Operation operation, const Case& c, Layout layout,
             DType dtype) {
  const CpuExecutor executor{nullptr, run_serially, 1};
  const std::int64_t size = c.extent.numel();
  const Memory x = make_tensor(size, dtype), grad_y = make_tensor(size, dtype),
               cotangent = make_tensor(size, dtype), out = make_tensor(size, dtype),
               out_too = make_tensor(size, dtype), residual = make_tensor(size, dtype);
  const auto channels = static_cast<std::size_t>(c.extent.c);
  const auto slices = static_cast<std::size_t>(c.extent.n) * channels;
  const std::vector<float> scale(channels, 1.5f), bias(channels, 0.5f), zeros(channels, 0.0f);
  std::vector<float> grad_scale(channels), grad_bias(channels), rstd(slices, 1.0f);
  std::vector<double> mean(slices, 0.0);
  NormInput input;
  input.extent = c.extent;
  input.layout = layout;
  input.x = {x.get(), dtype};
  input.scale = {scale.data()};
  input.bias = {bias.data()};
  if (has_silu(operation)) input.activation = Activation::kSiLU;
  if (has_residual(operation)) {
    input.residual = {residual.get(), dtype};
    input.activation = Activation::kReLU;
  }
  std::vector<std::uint8_t> bits(static_cast<std::size_t>(size));
  NormInput input_of_bits = input;
  input_of_bits.residual = {};
  input_of_bits.relu_bits = bits.data();
  const MutableTensor y{out.get(), dtype}, saved_rstd{rstd.data()};
  const NormGradients grad{y, {grad_scale.data()}, {grad_bias.data()}, {}};
  // As a gradient penalty needs it.
  const GradientCotangents cotangents{{cotangent.get(), dtype}, {}, {}, {}};
  const MutableTensor grad_grad_y{out_too.get(), dtype};
  NormGradients residual_grad = grad;
  residual_grad.residual = {out_too.get(), dtype};
  const NormGradients second_grad{y, {grad_scale.data()}, {}, {}};
  // Calls body(args) with the args of the operation.
  const auto with_args = [&](const auto& body) {
    const auto residual_backward = [&](const NormInput& operands) {
      return body(BatchNormBackwardArgs{operands,
                                        {grad_y.get(), dtype},
                                        {mean.data(), DType::kFloat64},
                                        {rstd.data()},
                                        true,
                                        residual_grad});
    };
    switch (operation) {
      case Operation::kResidualBackward:
        return residual_backward(input);
      case Operation::kReluBitsBackward:
        return residual_backward(input_of_bits);
      case Operation::kReluBitsForward:
        return body(BatchNormForwardArgs{input, {}, y, mean.data(), saved_rstd, bits.data()});
      case Operation::kResidualForward:
      case Operation::kBatchNormForward:
        return body(BatchNormForwardArgs{input, {}, y, mean.data(), saved_rstd});
      case Operation::kBatchNormInference:
        return body(BatchNormInferenceArgs{input, {zeros.data()}, {scale.data()}, y, saved_rstd});
      case Operation::kBatchNormBackward:
        return body(BatchNormBackwardArgs{input,
                                          {grad_y.get(), dtype},
                                          {mean.data(), DType::kFloat64},
                                          {rstd.data()},
                                          true,
                                          grad});
      case Operation::kBatchNormDoubleBackward:
        return body(BatchNormDoubleBackwardArgs{input,
                                                {grad_y.get(), dtype},
                                                {mean.data(), DType::kFloat64},
                                                {rstd.data()},
                                                true,
                                                cotangents,
                                                grad_grad_y,
                                                second_grad});
      case Operation::kGroupNormForward:
      case Operation::kGroupNormSiluForward:
        return body(GroupNormForwardArgs{input, c.groups, y, mean.data(), saved_rstd});
      case Operation::kGroupNormDoubleBackward:
      case Operation::kGroupNormSiluDoubleBackward:
        return body(GroupNormDoubleBackwardArgs{input,
                                                c.groups,
                                                {grad_y.get(), dtype},
                                                mean.data(),
                                                {rstd.data()},
                                                cotangents,
                                                grad_grad_y,
                                                second_grad});
      case Operation::kGroupNormBackward:
      case Operation::kGroupNormSiluBackward:
        break;
    }
    return body(GroupNormBackwardArgs{
        input, c.groups, {grad_y.get(), dtype}, mean.data(), {rstd.data()}, grad});
  };
  CpuPlan plan;
  with_args([&](const auto& args) { plan = plan_cpu(problem_of(args), 1); });
  const Memory workspace = allocate(plan.workspace_bytes);
  Status status;
  for (auto _ : state) {
    with_args(
        [&](const auto& args) { status = kernels::run(args, plan, workspace.get(), executor); });
    if (!status.ok()) {
      state.SkipWithError(status.message);
      break;
    }
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * size * static_cast<std::int64_t>(size_of(dtype)) *
                          tensors_of(operation));
  state.SetLabel(describe(plan));
}

void register_all(const char* shapes) {
  for (const Case& c : read_cases(shapes)) {
    for (const auto operation :
         {Operation::kBatchNormForward, Operation::kBatchNormInference,
          Operation::kBatchNormBackward, Operation::kBatchNormDoubleBackward,
          Operation::kGroupNormForward, Operation::kGroupNormBackward,
          Operation::kGroupNormDoubleBackward, Operation::kGroupNormSiluForward,
          Operation::kGroupNormSiluBackward, Operation::kGroupNormSiluDoubleBackward,
          Operation::kResidualForward, Operation::kReluBitsForward, Operation::kResidualBackward,
          Operation::kReluBitsBackward}) {
      for (const auto layout : {Layout::kNCS, Layout::kNSC}) {
        for (const auto dtype : {DType::kFloat32, DType::kBFloat16}) {
          const std::string name = std::string(name_of(operation)) + "/" + c.name + "/" +
                                   (layout == Layout::kNCS ? "ncs" : "nsc") + "/" +
                                   (dtype == DType::kFloat32 ? "float32" : "bfloat16");
          benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
            measure(state, operation, c, layout, dtype);
          })->MinTime(0.05);
        }
      }
    }
  }
}

}  // namespace
}  // namespace normcore::kernels

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  const bool has_shapes = argc == 2 && argv[1][0] != '-';
  normcore::kernels::register_all(has_shapes ? argv[1] : NORMCORE_SHAPES);
  if (has_shapes) --argc;
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
