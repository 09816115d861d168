#include "norm_case.h"

#include <cmath>
#include <fstream>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "positions.h"

namespace normcore::kernels::testing {
namespace {

// splitmix64: the same numbers from every standard library.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  // Variance 1, tails to +-3.5: a sum of four uniforms.
  double normal() { return (uniform() + uniform() + uniform() + uniform() - 2.0) * std::sqrt(3.0); }

 private:
  std::uint64_t next() {
    state_ += 0x9e3779b97f4a7c15u;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  std::uint64_t state_;
};

std::uint64_t seed_of(const Extent& e) {
  return static_cast<std::uint64_t>(e.n * 1000003 + e.c * 10007 + e.s * 101);
}

Tensor draw_tensor(Random& random, DType dtype, std::int64_t count, Placement placement,
                   double mean, double std) {
  Tensor tensor(dtype, count, placement);
  for (std::int64_t i = 0; i < count; ++i) tensor.set(i, mean + std * random.normal());
  return tensor;
}

}  // namespace

const std::vector<Shape>& shapes() {
  static const std::vector<Shape> table = [] {
    std::vector<Shape> rows;
    std::ifstream file(NORMCORE_SHAPES_FILE);
    if (!file) throw std::runtime_error("cannot read " NORMCORE_SHAPES_FILE);
    for (std::string line; std::getline(file, line);) {
      if (line.empty() || line[0] == '#') continue;
      std::istringstream fields(line);
      Shape row;
      if (!(fields >> row.name >> row.extent.n >> row.extent.c >> row.extent.s >> row.num_groups)) {
        throw std::runtime_error("bad line: " + line);
      }
      rows.push_back(row);
    }
    return rows;
  }();
  return table;
}

std::ostream& operator<<(std::ostream& stream, const Shape& shape) { return stream << shape.name; }

const Shape& shape(const std::string& name) {
  for (const Shape& row : shapes()) {
    if (row.name == name) return row;
  }
  throw std::runtime_error("no shape " + name);
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
  }
  return "?";
}

const char* name_of(Layout layout) { return layout == Layout::kNCS ? "NCS" : "NSC"; }

const char* name_of(Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return "none";
    case Activation::kReLU:
      return "relu";
    case Activation::kSiLU:
      return "silu";
    case Activation::kGelu:
      return "gelu";
    case Activation::kGeluTanh:
      return "gelu_tanh";
  }
  return "?";
}

std::string to_string(const NormCase& c) {
  const auto name = [](const std::optional<DType>& dtype) {
    return dtype ? name_of(*dtype) : "absent";
  };
  std::ostringstream text;
  text << (c.num_groups == 0 ? "batch_norm" : "group_norm") << " {" << c.extent.n << ", "
       << c.extent.c << ", " << c.extent.s << "} " << name_of(c.layout)
       << " groups=" << c.num_groups << " x=" << name_of(c.x) << " y=" << name_of(c.y)
       << " scale=" << name(c.scale) << " bias=" << name(c.bias) << " residual=" << name(c.residual)
       << " per_sample=" << c.affine_per_sample << " mask=" << static_cast<int>(c.mask)
       << " activation=" << name_of(c.activation) << " mean=" << c.mean
       << " placement=" << static_cast<int>(c.placement);
  return text.str();
}

std::vector<NormCase> variants(const Shape& shape, Layout layout, DType x, bool group_norm) {
  const DType f32 = DType::kFloat32;
  NormCase plain;
  plain.extent = shape.extent;
  plain.layout = layout;
  plain.num_groups = group_norm ? shape.num_groups : 0;
  plain.x = plain.y = x;
  plain.scale = plain.bias = x;

  std::vector<NormCase> cases(11, plain);
  cases[1].activation = Activation::kReLU;
  cases[1].scale = cases[1].bias = f32;
  cases[1].residual = x;
  cases[1].placement = Placement::kBegin;

  cases[2].activation = Activation::kSiLU;
  cases[2].y = f32;
  cases[2].bias = f32;
  cases[2].residual = x;
  cases[2].running = x;
  cases[2].placement = Placement::kShift;

  cases[3].activation = Activation::kGelu;
  cases[3].y = DType::kBFloat16;
  cases[3].scale = std::nullopt;
  cases[3].residual = f32;
  cases[3].unbiased = false;

  cases[4].activation = Activation::kGeluTanh;
  cases[4].scale = x == DType::kFloat16 ? DType::kBFloat16 : DType::kFloat16;
  cases[4].bias = std::nullopt;
  cases[4].placement = Placement::kBegin;
  cases[4].cumulative = true;

  cases[5].scale = cases[5].bias = std::nullopt;
  cases[5].mask = MaskKind::kRow;
  cases[5].running_statistics = false;

  cases[6].activation = Activation::kReLU;
  cases[6].mask = MaskKind::kElement;
  cases[6].scale = f32;
  cases[6].residual = x;
  cases[6].placement = Placement::kShift;

  cases[7].activation = Activation::kSiLU;
  cases[7].mask = MaskKind::kRow;
  cases[7].y = DType::kFloat16;
  cases[7].scale = cases[7].bias = f32;
  cases[7].running = DType::kFloat64;

  cases[8].residual = DType::kBFloat16;
  cases[8].affine_per_sample = group_norm;
  cases[8].placement = Placement::kShift;

  cases[9].mask = MaskKind::kElement;
  cases[9].activation = Activation::kGelu;
  cases[9].affine_per_sample = group_norm;
  cases[9].placement = Placement::kBegin;

  cases[10].activation = Activation::kSiLU;
  cases[10].residual = x;
  cases[10].scale = cases[10].bias = f32;

  // Larger shapes take every third one, beginning with another one for another dtype.
  if (shape.extent.numel() <= 2048) return cases;
  std::vector<NormCase> some;
  for (std::size_t i = static_cast<std::size_t>(x) % 3; i < cases.size(); i += 3) {
    some.push_back(cases[i]);
  }
  return some;
}

Inputs::Inputs(const NormCase& c) : norm_case(c) {
  const Extent& e = c.extent;
  Random random(seed_of(e));
  const auto draw = [&](DType dtype, std::int64_t count, double mean, double std) {
    return draw_tensor(random, dtype, count, c.placement, mean, std);
  };
  x = draw(c.x, e.numel(), c.mean, 1.0);
  grad_y = draw(c.y, e.numel(), 0.1, 1.0);
  if (c.scale) scale = draw(*c.scale, c.affine_count(), 1.0, 0.3);
  if (c.bias) bias = draw(*c.bias, c.affine_count(), 0.2, 0.5);
  if (c.residual) residual = draw(*c.residual, e.numel(), -0.1, 0.7);
  running_mean = draw(c.running, e.c, c.mean, 0.2);
  running_var = Tensor(c.running, e.c, c.placement);
  for (std::int64_t i = 0; i < e.c; ++i) running_var.set(i, 0.5 + random.uniform());

  if (c.mask == MaskKind::kNone) return;
  const bool per_row = c.mask == MaskKind::kRow;
  const std::int64_t entries = per_row ? e.n * e.s : e.numel();
  mask = GuardedBuffer(static_cast<std::size_t>(entries), 1, c.placement);
  for (std::int64_t i = 0; i < entries; ++i) mask.data()[i] = random.uniform() < 0.7 ? 1 : 0;
  if (!c.garbage_under_mask) return;
  for_each_position(e, [&](std::int64_t n, std::int64_t channel, std::int64_t s) {
    // Half of the masked-out positions keep their value and an upstream gradient.
    if (counts(norm_input(), n, channel, s) || random.uniform() < 0.5) return;
    const std::int64_t i = index_of(e, c.layout, n, channel, s);
    x.set(i, std::numeric_limits<double>::quiet_NaN());
    grad_y.set(i, 0.0);
  });
}

NormInput Inputs::norm_input() const {
  NormInput input;
  input.extent = norm_case.extent;
  input.layout = norm_case.layout;
  input.x = x.view();
  input.scale = scale.view();
  input.bias = bias.view();
  input.affine_per_sample = norm_case.affine_per_sample;
  input.residual = residual.view();
  input.mask = {mask.data(), norm_case.mask};
  input.activation = norm_case.activation;
  input.eps = norm_case.eps;
  return input;
}

std::vector<std::pair<std::string, const GuardedBuffer*>> Inputs::buffers() const {
  return {{"x", &x.buffer()},
          {"scale", &scale.buffer()},
          {"bias", &bias.buffer()},
          {"residual", &residual.buffer()},
          {"grad_y", &grad_y.buffer()},
          {"running_mean", &running_mean.buffer()},
          {"running_var", &running_var.buffer()},
          {"mask", &mask}};
}

Cotangents::Cotangents(const NormCase& c) {
  Random random(seed_of(c.extent) + 1);
  const auto draw = [&](DType dtype, std::int64_t count, double mean, double std) {
    return draw_tensor(random, dtype, count, c.placement, mean, std);
  };
  x = draw(c.x, c.extent.numel(), c.cotangent_mean, 1.0);
  scale = draw(c.y, c.affine_count(), -0.2, 0.8);
  bias = draw(c.y, c.affine_count(), 0.4, 0.8);
  residual = draw(c.y, c.extent.numel(), 0.1, 0.7);
}

GradientCotangents Cotangents::view() const {
  return {x.view(), scale.view(), bias.view(), residual.view()};
}

std::vector<std::pair<std::string, const GuardedBuffer*>> Cotangents::buffers() const {
  return {{"cotangent of grad_x", &x.buffer()},
          {"cotangent of grad_scale", &scale.buffer()},
          {"cotangent of grad_bias", &bias.buffer()},
          {"cotangent of grad_residual", &residual.buffer()}};
}

}  // namespace normcore::kernels::testing
