// What the modules refuse, in the words of the Python modules: the type of the error and its whole
// text. Whatever is refused leaves the module as it was.
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "module_test.h"

namespace normcore::testing {
namespace {

class ModuleErrors : public Modules {};

// "ValueError: " and its text.
std::string error_of(const std::function<void()>& call) {
  try {
    call();
    return "no error";
  } catch (const c10::ValueError& error) {
    return std::string("ValueError: ") + error.what_without_backtrace();
  } catch (const c10::IndexError& error) {
    return std::string("IndexError: ") + error.what_without_backtrace();
  } catch (const c10::TypeError& error) {
    return std::string("TypeError: ") + error.what_without_backtrace();
  } catch (const std::exception& error) {
    return std::string("another type of error: ") + error.what();
  }
}

template <class Module>
std::string text_of(const char* type, const std::string& rule) {
  return std::string(type) + ": " + Module::ContainedType::kName + ": " + rule;
}

// The options and the tensors of a module.
struct Snapshot {
  std::string text;
  std::vector<Tensor> values;
};

template <class Module>
Snapshot snapshot(const Module& module) {
  Snapshot result{printed(module), {}};
  for (const auto& tensors : {module->parameters(), module->buffers()}) {
    for (const auto& tensor : tensors) result.values.push_back(tensor.detach().clone());
  }
  return result;
}

// `call` throws the error `want` and changes nothing.
template <class Module>
void expect_refused(const Module& module, const std::function<void()>& call,
                    const std::string& want) {
  const bool was_initialized = module->is_initialized();
  const auto before = snapshot(module);
  EXPECT_EQ(error_of(call), want);
  const auto after = snapshot(module);
  EXPECT_EQ(module->is_initialized(), was_initialized);
  EXPECT_EQ(after.text, before.text);
  ASSERT_EQ(after.values.size(), before.values.size());
  for (std::size_t i = 0; i < after.values.size(); ++i) {
    EXPECT_TRUE(is_equal(after.values[i], before.values[i]));
  }
}

// `options` are right; each row makes one of them wrong.
template <class Module, class Options>
void expect_wrong_options_refused(const Options& options) {
  const auto with = [&] { return options; };
  const auto grouped = [&](std::vector<std::vector<std::int64_t>> groups) {
    return with().axis_name("world").axis_index_groups(std::move(groups));
  };
  const std::string partition =
      "expected axis_index_groups to be a partition of the ranks 0..N-1, got ";
  const std::string activations =
      "expected activation to be None, relu, silu, gelu or gelu_tanh, got ";
  constexpr auto kInfinity = std::numeric_limits<double>::infinity();
  const std::vector<std::pair<Options, std::string>> rows{
      {with().sync_weighting("mean"),
       "expected sync_weighting to be 'count' or 'rank', got 'mean'"},
      {with().axis_index_groups({{{0, 1}}}),
       "expected axis_name to be given with axis_index_groups, got None"},
      {grouped({{0, 0}}), partition + "[[0, 0]]"},
      {grouped({{0, 1}, {1, 2}}), partition + "[[0, 1], [1, 2]]"},
      {grouped({{0}, {2}}), partition + "[[0], [2]]"},
      {grouped({{1, 2}}), partition + "[[1, 2]]"},
      {grouped({{0, -1}}), partition + "[[0, -1]]"},
      {grouped({{0, 1}, {}}), partition + "[[0, 1], []]"},
      {grouped({}), partition + "[]"},
      {with().activation("tanh"), activations + "tanh"},
      {with().activation(""), activations},
      {with().epsilon(-1.0), "expected epsilon to be finite and >= 0, got -1"},
      {with().epsilon(std::nan("")), "expected epsilon to be finite and >= 0, got nan"},
      {with().epsilon(kInfinity), "expected epsilon to be finite and >= 0, got inf"},
      {with().dtype(at::kInt), "expected dtype to be None or floating point, got int32"},
      {with().dtype(at::kComplexFloat),
       "expected dtype to be None or floating point, got complex64"},
      {with().param_dtype(at::kInt), "expected param_dtype to be floating point, got int32"},
      {with().param_dtype(at::kInt).num_features(3),
       "expected param_dtype to be floating point, got int32"},
      {with().axis(std::vector<std::int64_t>{}), "expected at least one axis, got []"},
      {with().axis({1, 1}), "expected axis without duplicates, got [1, 1]"},
      {with().num_features(0), "expected num_features to be positive, got 0"},
      {with().num_features(-1), "expected num_features to be positive, got -1"},
      {with().num_features({3, 0}).axis({1, 2}),
       "expected num_features to be positive, got [3, 0]"},
      {with().num_features({3, 4}),
       "expected num_features to hold one size for each axis of [-1], got [3, 4]"},
      {with().num_features(3).axis({1, 2}),
       "expected num_features to hold one size for each axis of [1, 2], got 3"},
  };
  for (const auto& [wrong, rule] : rows) {
    EXPECT_EQ(error_of([&, &wrong = wrong] { Module module(wrong); }),
              text_of<Module>("ValueError", rule));
  }
}

TEST_F(ModuleErrors, NameTheWrongOption) {
  expect_wrong_options_refused<BatchNorm>(BatchNormOptions());
  expect_wrong_options_refused<GroupNorm>(GroupNormOptions().num_groups(1));
  // Neighbours of what is refused.
  BatchNorm(BatchNormOptions().epsilon(0.0).axis_name("world").axis_index_groups({{{2, 0}, {1}}}));
  GroupNorm(GroupNormOptions().dtype(std::nullopt).param_dtype(at::kHalf).axis({1, -1}));
}

TEST_F(ModuleErrors, NameWrongGroups) {
  const std::vector<std::pair<GroupNormOptions, std::string>> rows{
      {GroupNormOptions().num_groups(4).group_size(2),
       "expected either num_groups or group_size to be given, got num_groups=4 and group_size=2"},
      {GroupNormOptions().num_groups(0), "expected num_groups to be positive, got 0"},
      {GroupNormOptions().num_groups(-2), "expected num_groups to be positive, got -2"},
      {GroupNormOptions().group_size(0), "expected group_size to be positive, got 0"},
      {GroupNormOptions().group_size(-1), "expected group_size to be positive, got -1"},
      {GroupNormOptions().num_features(16),
       "expected num_groups to divide the number of channels (16), got 32"},
      {GroupNormOptions().num_features(16).group_size(3),
       "expected group_size to divide the number of channels (16), got 3"},
  };
  for (const auto& [wrong, rule] : rows) {
    const auto want = text_of<GroupNorm>("ValueError", rule);
    EXPECT_EQ(error_of([&, &wrong = wrong] { GroupNorm gn(wrong); }), want);

    // The same once the options of a module become wrong.
    GroupNorm gn(GroupNormOptions().num_groups(1));
    const auto x = at::randn({2, 16});
    gn->init(x);
    gn->options.num_groups(wrong.num_groups()).group_size(wrong.group_size());
    expect_refused(gn, [&] { gn->forward(x); }, want);
  }
  GroupNorm lazy(GroupNormOptions().num_groups(2));
  const auto want = text_of<GroupNorm>(
      "ValueError", "expected num_groups to divide the number of channels (5), got 2");
  expect_refused(lazy, [&] { lazy->forward(at::randn({2, 5})); }, want);
  expect_refused(lazy, [&] { lazy->init(at::randn({2, 5})); }, want);
}

template <class Module>
void expect_calls_refused(Module module, const Tensor& x, const std::string& want) {
  expect_refused(module, [&] { module->forward(x); }, want);
  expect_refused(module, [&] { module->init(x); }, want);
  module->eval();
  expect_refused(module, [&] { module->forward(x); }, want);
  module->train();
}

template <class Module, class Options>
void expect_wrong_inputs_refused(const Options& options) {
  struct Row {
    IntList num_features;
    IntList axis;
    std::optional<std::vector<std::int64_t>> x;  // its shape; empty: undefined
    const char* type;
    const char* rule;
    bool lazy = false;  // refused by a lazy module, too
  };
  const std::vector<Row> rows{
      {3, 1, {{4, 6, 5}}, "ValueError", "expected 3 features on axis [1], got 6"},
      {3, 1, {{4, 1, 5}}, "ValueError", "expected 3 features on axis [1], got 1"},
      {3, 1, {{4, 0, 5}}, "ValueError", "expected 3 features on axis [1], got 0"},
      {3, -1, {{3, 6}}, "ValueError", "expected 3 features on axis [-1], got 6"},
      {{2, 3},
       {1, 2},
       {{4, 3, 2}},
       "ValueError",
       "expected features of shape [2, 3] on axis [1, 2], got [3, 2]"},
      {{2, 3},
       {-1, 0},
       {{1, 5, 6}},
       "ValueError",
       "expected features of shape [2, 3] on axis [-1, 0], got [1, 6]"},
      {{2, 3},
       {1, -1},
       {{4, 6}},
       "ValueError",
       "expected axis without duplicates, got [1, -1]",
       /*lazy=*/true},
      {3,
       2,
       {{4, 3}},
       "IndexError",
       "expected axis in [-2, 1] for an input of rank 2, got 2",
       /*lazy=*/true},
      {{2, 3},
       {0, -4},
       {{2, 3, 4}},
       "IndexError",
       "expected axis in [-3, 2] for an input of rank 3, got -4",
       /*lazy=*/true},
      {3, 1, std::nullopt, "ValueError", "expected x to be a defined tensor, got an undefined one",
       /*lazy=*/true},
  };
  for (const auto& row : rows) {
    const auto x = row.x ? at::randn(*row.x) : Tensor();
    const auto want = text_of<Module>(row.type, row.rule);
    for (const bool affine : {true, false}) {
      auto given = options;
      given.axis(row.axis).use_scale(affine).use_bias(affine);
      if (row.lazy) expect_calls_refused(Module(given), x, want);
      expect_calls_refused(Module(given.num_features(row.num_features)), x, want);
    }
  }
}

TEST_F(ModuleErrors, NameTheWrongInput) {
  expect_wrong_inputs_refused<BatchNorm>(BatchNormOptions());
  expect_wrong_inputs_refused<GroupNorm>(GroupNormOptions().num_groups(1));
}

TEST_F(ModuleErrors, NameAnAxisThatNoLongerFits) {
  BatchNorm bn(BatchNormOptions().num_features(3).axis(1));
  const auto x = at::randn({4, 3, 5});
  bn->options.axis({1, 2});
  expect_calls_refused(
      bn, x, "ValueError: BatchNorm: expected features of shape [3] on axis [1, 2], got [3, 5]");
  bn->options.axis(std::vector<std::int64_t>{});
  expect_calls_refused(bn, x,
                       "ValueError: BatchNorm: expected features of shape [3] on axis [], got []");
  bn->options.axis(-2);
  bn->forward(x);
}

TEST_F(ModuleErrors, NameTheDtypeOfAConversion) {
  BatchNorm bn(BatchNormOptions().num_features(3)), lazy;
  for (auto module : {bn, lazy}) {
    const std::string want = "TypeError: BatchNorm: expected dtype to be floating point, got int32";
    expect_refused(module, [&] { module->to(at::kInt); }, want);
    expect_refused(module, [&] { module->to(at::Device(at::kCPU), at::kInt); }, want);
  }
}

TEST_F(ModuleErrors, LeaveLazyModulesWithoutFeaturesAlone) {
  BatchNorm bn;
  EXPECT_EQ(bn->forward(at::randn({4, 0})).sizes(), at::IntArrayRef({4, 0}));
  bn->init(at::randn({5, 0}));
  expect_calls_refused(bn, at::randn({4, 3}),
                       "ValueError: BatchNorm: expected 0 features on axis [-1], got 3");
}

}  // namespace
}  // namespace normcore::testing
