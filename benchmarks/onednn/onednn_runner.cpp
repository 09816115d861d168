// One norm of oneDNN, timed when asked: the peer `onednn` of `python -m benchmarks run`.
//   onednn_runner                                prints {"version": "2.6.3"}
//   onednn_runner OP LAYOUT DTYPE SIZE GROUPS    such as bn_forward channels_last float32 8x64x7x7 32
// Prints {"iterations": n}, then for every line it reads {"microseconds": t}: the time of a call as
// the mean of n calls, n so that they take 2 ms. Without what the case needs: {"error": "why"}.
// Results are written to memory that was written before; running statistics are not updated.
#include <algorithm>
#include <chrono>
#include <iostream>
#include <oneapi/dnnl/dnnl.hpp>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#define HAS_GROUP_NORM \
  (DNNL_VERSION_MAJOR > 3 || (DNNL_VERSION_MAJOR == 3 && DNNL_VERSION_MINOR >= 3))

namespace {

using dnnl::memory;
using dnnl::normalization_flags;
using dnnl::prop_kind;
using Arguments = std::unordered_map<int, memory>;

constexpr double kMinimumSeconds = 2e-3;
constexpr float kEpsilon = 1e-5F;

struct Case {
  bool group_norm, backward, inference;
  memory::desc x;  // and of every other tensor of its size
  memory::dim groups;
  memory::dims statistics;  // size of mean and variance
  memory::dim channels;
};

Case parse(const std::string& op, const std::string& layout, const std::string& dtype,
           const std::string& size, const std::string& groups) {
  using tag = memory::format_tag;
  const bool known = op == "bn_forward" || op == "bn_eval" || op == "bn_backward" ||
                     op == "gn_forward" || op == "gn_backward";
  if (!known) throw std::invalid_argument("the runner has no " + op);
  memory::dims dims;
  std::istringstream fields(size);
  for (std::string field; std::getline(fields, field, 'x');) dims.push_back(std::stoll(field));
  if (dims.size() < 2 || dims.size() > 5) throw std::invalid_argument("the runner has no " + size);
  const tag plain[] = {tag::nc, tag::ncw, tag::nchw, tag::ncdhw};
  const tag last[] = {tag::nc, tag::nwc, tag::nhwc, tag::ndhwc};
  const auto type = dtype == "float32"    ? memory::data_type::f32
                    : dtype == "bfloat16" ? memory::data_type::bf16
                                          : memory::data_type::f16;
  Case c;
  c.group_norm = op[0] == 'g';
  c.backward = op.substr(3) == "backward";
  c.inference = op.substr(3) == "eval";
  c.x = memory::desc(dims, type, (layout == "contiguous" ? plain : last)[dims.size() - 2]);
  c.groups = std::stoll(groups);
  c.channels = dims[1];
  c.statistics = c.group_norm ? memory::dims{dims[0], c.groups} : memory::dims{c.channels};
  return c;
}

#if DNNL_VERSION_MAJOR >= 3
dnnl::primitive make_primitive(const Case& c, const dnnl::engine& engine,
                               normalization_flags flags) {
  const auto kind = c.inference ? prop_kind::forward_inference : prop_kind::forward_training;
#if HAS_GROUP_NORM
  if (c.group_norm) {
    const dnnl::group_normalization_forward::primitive_desc forward(engine, kind, c.x, c.x,
                                                                    c.groups, kEpsilon, flags);
    if (!c.backward) return dnnl::group_normalization_forward(forward);
    return dnnl::group_normalization_backward(
        {engine, prop_kind::backward, c.x, c.x, c.x, c.groups, kEpsilon, flags, forward});
  }
#endif
  const dnnl::batch_normalization_forward::primitive_desc forward(engine, kind, c.x, c.x, kEpsilon,
                                                                  flags);
  if (!c.backward) return dnnl::batch_normalization_forward(forward);
  return dnnl::batch_normalization_backward(
      {engine, prop_kind::backward, c.x, c.x, c.x, kEpsilon, flags, forward});
}
#else
dnnl::primitive make_primitive(const Case& c, const dnnl::engine& engine,
                               normalization_flags flags) {
  const auto kind = c.inference ? prop_kind::forward_inference : prop_kind::forward_training;
  const dnnl::batch_normalization_forward::primitive_desc forward({kind, c.x, kEpsilon, flags},
                                                                  engine);
  if (!c.backward) return dnnl::batch_normalization_forward(forward);
  return dnnl::batch_normalization_backward(
      {{prop_kind::backward, c.x, c.x, kEpsilon, flags}, engine, forward});
}
#endif

// Values from 0.5 to 1.5, which serve as variances too.
memory filled(const memory::desc& desc, const dnnl::engine& engine, dnnl::stream& stream) {
#if DNNL_VERSION_MAJOR >= 3
  const memory::dims dims = desc.get_dims();
#else
  const memory::dims dims = desc.dims();
#endif
  memory::dims strides(dims.size(), 1);
  for (size_t i = dims.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * dims[i];
  memory plain({dims, memory::data_type::f32, strides}, engine);
  auto* values = static_cast<float*>(plain.get_data_handle());
  unsigned state = 1;
  for (memory::dim i = 0; i < strides[0] * dims[0]; ++i) {
    state = state * 1664525U + 1013904223U;
    values[i] = 0.5F + static_cast<float>(state >> 8) * 0x1p-24F;
  }
  memory result(desc, engine);
  dnnl::reorder(plain, result).execute(stream, plain, result);
  stream.wait();
  return result;
}

Arguments make_arguments(const Case& c, const dnnl::engine& engine, dnnl::stream& stream) {
  const auto f32 = memory::data_type::f32;
  const memory::desc parameter({c.channels}, f32, memory::format_tag::a);
  const memory::desc statistic(c.statistics, f32,
                               c.group_norm ? memory::format_tag::ab : memory::format_tag::a);
  Arguments arguments;
  const auto add = [&](int name, const memory::desc& desc) {
    arguments[name] = filled(desc, engine, stream);
  };
  add(DNNL_ARG_SRC, c.x);
  add(DNNL_ARG_SCALE, parameter);
  add(DNNL_ARG_SHIFT, parameter);
  add(DNNL_ARG_MEAN, statistic);
  add(DNNL_ARG_VARIANCE, statistic);
  if (c.backward) {
    add(DNNL_ARG_DIFF_DST, c.x);
    add(DNNL_ARG_DIFF_SRC, c.x);
    add(DNNL_ARG_DIFF_SCALE, parameter);
    add(DNNL_ARG_DIFF_SHIFT, parameter);
  } else {
    add(DNNL_ARG_DST, c.x);
  }
  return arguments;
}

void serve(const Case& c) {
  if (c.group_norm && !HAS_GROUP_NORM) {
    throw std::runtime_error("this version of oneDNN has no group normalization");
  }
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  auto flags = normalization_flags::use_scale | normalization_flags::use_shift;
  if (c.inference) flags |= normalization_flags::use_global_stats;
  const dnnl::primitive primitive = make_primitive(c, engine, flags);
  const Arguments arguments = make_arguments(c, engine, stream);
  const auto seconds = [&](long iterations) {
    const auto start = std::chrono::steady_clock::now();
    for (long i = 0; i < iterations; ++i) primitive.execute(stream, arguments);
    stream.wait();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  seconds(1);
  long iterations = 1;
  // Twice, as other load on the machine must not make it look long enough.
  while (std::min(seconds(iterations), seconds(iterations)) < kMinimumSeconds) iterations *= 2;
  std::cout << "{\"iterations\": " << iterations << "}" << std::endl;
  for (std::string line; std::getline(std::cin, line);) {
    const double t = 1e6 * seconds(iterations) / static_cast<double>(iterations);
    std::cout << "{\"microseconds\": " << t << "}" << std::endl;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 1) {
    const auto* v = dnnl::version();
    std::cout << "{\"version\": \"" << v->major << '.' << v->minor << '.' << v->patch << "\"}\n";
    return 0;
  }
  try {
    if (argc != 6) throw std::invalid_argument("expected OP LAYOUT DTYPE SIZE GROUPS");
    serve(parse(argv[1], argv[2], argv[3], argv[4], argv[5]));
  } catch (const std::exception& error) {
    std::cout << "{\"error\": \"" << error.what() << "\"}\n";
    return 1;
  }
}
