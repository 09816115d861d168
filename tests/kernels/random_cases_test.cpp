// Norms of random shapes and options, the same in every run, beside the reference: combinations that
// nobody thought of.
#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <random>
#include <vector>

#include "norm_checks.h"
#include "runner.h"

namespace normcore::kernels::testing {
namespace {

class Draw {
 public:
  explicit Draw(std::uint64_t seed) : bits_(seed) {}

  std::int64_t from(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(bits_() % static_cast<std::uint64_t>(high - low + 1));
  }
  bool one_in(std::int64_t number) { return from(1, number) == 1; }
  template <class Choices>
  auto any_of(const Choices& choices) {
    return choices[from(0, static_cast<std::int64_t>(std::size(choices)) - 1)];
  }

 private:
  std::mt19937_64 bits_;
};

// Of up to so many values.
NormCase random_case(Draw& draw, std::int64_t most) {
  NormCase c;
  do {
    c.extent = {draw.from(1, 5), draw.from(1, 300), draw.from(1, 400)};
    c.layout = draw.any_of(kBothLayouts);
    // Whole vectors as often as not.
    std::int64_t& width = c.layout == Layout::kNCS ? c.extent.s : c.extent.c;
    if (draw.one_in(2)) width = (width + 7) / 8 * 8;
  } while (c.extent.numel() > most);
  if (draw.one_in(2)) {
    std::vector<std::int64_t> divisors;
    for (std::int64_t d = 1; d <= c.extent.c; ++d) {
      if (c.extent.c % d == 0) divisors.push_back(d);
    }
    c.num_groups = draw.any_of(divisors);
    c.affine_per_sample = draw.one_in(4);
  }
  c.x = draw.any_of(kAllDTypes);
  constexpr DType kBeside[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  c.y = draw.one_in(4) && c.x != DType::kFloat64 ? draw.any_of(kBeside) : c.x;
  if (draw.one_in(4)) c.scale.reset();
  if (draw.one_in(4)) c.bias.reset();
  if (draw.one_in(3)) c.residual = c.y;
  if (draw.one_in(3)) c.mask = draw.one_in(2) ? MaskKind::kRow : MaskKind::kElement;
  c.activation = draw.any_of(kAllActivations);
  c.cumulative = draw.one_in(4);
  return c;
}

class RandomCases : public ::testing::TestWithParam<std::uint64_t> {};

INSTANTIATE_TEST_SUITE_P(All, RandomCases, ::testing::Range<std::uint64_t>(0, 16));

TEST_P(RandomCases, AgreeWithTheReference) {
  Draw draw(GetParam());
  const int cases = runners_are_slow() ? 8 : 40;
  for (int i = 0; i < cases; ++i) {
    Inputs inputs(random_case(draw, runners_are_slow() ? 8000 : 40000));
    check_forward(inputs);
    check_backward(inputs);
    const NormCase& c = inputs.norm_case;
    if (c.num_groups == 0 && fits_relu_bits(inputs.norm_input())) check_relu_bits(c);
  }
}

}  // namespace
}  // namespace normcore::kernels::testing
