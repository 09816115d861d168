// Modules inside other modules, as text and beside process groups.
#include <torch/nn/modules/container/sequential.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>
#include <vector>

#include "module_test.h"

namespace normcore::testing {
namespace {

TEST_F(Modules, WorkInSequential) {
  torch::nn::Sequential net(BatchNorm(BatchNormOptions().axis(1).activation("relu")),
                            GroupNorm(GroupNormOptions().num_groups(2).axis(1)));
  const auto x = at::randn({4, 6, 5}).requires_grad_();
  const auto y = net->forward(x);
  EXPECT_EQ(net->parameters().size(), 4);
  y.sin().sum().backward();
  for (const auto& parameter : net->parameters()) {
    EXPECT_GT(parameter.grad().abs().max().item<double>(), 0.0);
  }
  EXPECT_TRUE(x.grad().isfinite().all().item<bool>());

  const auto archive = saved(net);
  torch::nn::Sequential restored(BatchNorm(BatchNormOptions().axis(1).activation("relu")),
                                 GroupNorm(GroupNormOptions().num_groups(2).axis(1)));
  load(restored, archive);
  net->eval();
  restored->eval();
  EXPECT_TRUE(is_equal(restored->forward(x), net->forward(x)));

  const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(net->clone());
  EXPECT_TRUE(is_equal(copy->forward(x), net->forward(x)));

  torch::nn::AnyModule any(BatchNorm(BatchNormOptions().axis(1)));
  EXPECT_TRUE(is_close(any.forward(x, std::optional<bool>(true)),
                       x.detach().to(at::kDouble) / std::sqrt(1.0 + 1e-5)));
}

TEST_F(Modules, DescribeThemselves) {
  EXPECT_EQ(printed(BatchNorm()),
            "normcore::BatchNorm(num_features=None, axis=-1, momentum=0.99, epsilon=1e-05)");
  BatchNorm bn(BatchNormOptions()
                   .num_features({3, 4})
                   .axis({1, 2})
                   .dtype(std::nullopt)
                   .param_dtype(at::kDouble)
                   .use_bias(false)
                   .activation("relu"));
  bn->freeze();
  EXPECT_EQ(printed(bn),
            "normcore::BatchNorm(num_features=[3, 4], axis=[1, 2], momentum=0.99, epsilon=1e-05, "
            "dtype=None, param_dtype=float64, use_bias=false, activation=relu, frozen=true)");
  EXPECT_EQ(printed(BatchNorm(BatchNormOptions()
                                  .axis_name("data")
                                  .axis_index_groups({{{0, 2}, {1}}})
                                  .sync_weighting("rank"))),
            "normcore::BatchNorm(num_features=None, axis=-1, momentum=0.99, epsilon=1e-05, "
            "axis_name=data, axis_index_groups=[[0, 2], [1]], sync_weighting=rank)");
  EXPECT_EQ(printed(GroupNorm()),
            "normcore::GroupNorm(num_features=None, axis=-1, num_groups=32, epsilon=1e-05)");
  EXPECT_EQ(printed(GroupNorm(GroupNormOptions()
                                  .num_features(6)
                                  .group_size(2)
                                  .reduction_axes({-1})
                                  .dtype(at::kHalf)
                                  .use_scale(false))),
            "normcore::GroupNorm(num_features=6, axis=-1, group_size=2, reduction_axes=-1, "
            "epsilon=1e-05, dtype=float16, use_scale=false)");
}

// A process group that c10d knows by its name for the lifetime of this.
class RegisteredGroup {
 public:
  RegisteredGroup(std::string name, int size)
      : name_(std::move(name)), group_(c10::make_intrusive<c10d::ProcessGroup>(/*rank=*/0, size)) {
    c10d::register_process_group(name_, group_);  // does not own it
  }
  RegisteredGroup(const RegisteredGroup&) = delete;
  RegisteredGroup& operator=(const RegisteredGroup&) = delete;
  ~RegisteredGroup() { c10d::unregister_process_group(name_); }

  // Gives it a backend for tensors on the CPU.
  template <class Backend>
  c10::intrusive_ptr<Backend> use() {
    auto backend = c10::make_intrusive<Backend>(group_->getSize());
    group_->setBackend(at::kCPU, c10d::ProcessGroup::BackendType::CUSTOM, backend);
    group_->setGroupName(name_);
    return backend;
  }

 private:
  std::string name_;
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
};

TEST_F(Modules, FindTheProcessGroupOfAxisName) {
  const auto x = at::randn({4, 6});
  const auto want = BatchNorm()->forward(x);
  const auto expect_local = [&](const char* name) {
    EXPECT_TRUE(is_equal(BatchNorm(BatchNormOptions().axis_name(name))->forward(x), want));
    GroupNorm(GroupNormOptions().num_groups(2).axis_name(name))->forward(x);
  };
  const auto expect_unknown = [&](const char* name) {
    BatchNorm bn(BatchNormOptions().axis_name(name));
    GroupNorm gn(GroupNormOptions().num_groups(2).axis_name(name));
    const char* text = "expected axis_name to be 'world' or the name of a process group, got '";
    expect_error<c10::ValueError>([&] { bn->forward(x); }, text + std::string(name));
    expect_error<c10::ValueError>([&] { gn->forward(x); }, text + std::string(name));
    bn->forward(x, /*use_running_average=*/true);
  };

  expect_local("data");  // no group at all: one rank
  expect_local("world");
  {
    const RegisteredGroup world("0", 1);
    expect_unknown("data");
    expect_local("world");
    const RegisteredGroup data("data", 1);
    expect_local("data");
  }
  {
    const RegisteredGroup world("0", 2);
    expect_unknown("data");
    const RegisteredGroup data("data", 1);  // this rank alone
    expect_local("data");
  }
}

// All ranks of the group do the same: a sum over them is a multiple of one.
class EqualRanks : public c10d::Backend {
 public:
  explicit EqualRanks(int size) : c10d::Backend(/*rank=*/0, size) {}
  const std::string getBackendName() const override { return "equal"; }
  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors,
                                           const c10d::AllreduceOptions&) override {
    ++calls;
    for (const auto& t : tensors) t.mul_(getSize());
    auto future =
        c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
    future->markCompleted(tensors);
    return c10d::Work::create_from_future(future);
  }
  int calls = 0;
};

TEST_F(Modules, CombineStatisticsOfSeveralRanks) {
  RegisteredGroup group("data", 3);
  const auto backend = group.use<EqualRanks>();
  const auto x = at::randn({4, 6, 5}), grad = at::randn_like(x);
  const auto expect_same = [&](auto local, auto shared) {
    const auto x1 = x.clone().requires_grad_(), x2 = x.clone().requires_grad_();
    const auto want = local->forward(x1), y = shared->forward(x2);
    EXPECT_TRUE(at::allclose(y, want, 1e-5, 1e-6));
    want.backward(grad);
    y.backward(grad);
    EXPECT_TRUE(at::allclose(x2.grad(), x1.grad(), 1e-5, 1e-6));
    EXPECT_TRUE(at::allclose(shared->scale.grad(), local->scale.grad(), 1e-5, 1e-5));
    EXPECT_EQ(std::exchange(backend->calls, 0), 2);  // one in each pass
  };
  const auto options = BatchNormOptions().axis(1);
  BatchNorm local(options), shared(BatchNormOptions(options).axis_name("data"));
  expect_same(local, shared);
  EXPECT_TRUE(at::allclose(shared->mean, local->mean));
  EXPECT_TRUE(at::allclose(shared->var, local->var));
  shared->forward(x, /*use_running_average=*/true);
  EXPECT_EQ(backend->calls, 0);
  const auto groups = GroupNormOptions().num_groups(2).axis(1);
  expect_same(GroupNorm(groups), GroupNorm(GroupNormOptions(groups).axis_name("data")));
  expect_same(GroupNorm(groups),
              GroupNorm(GroupNormOptions(groups).axis_name("data").sync_weighting("rank")));
}

TEST_F(Modules, ErrorsOfSeveralRanksNameTheOperator) {
  const auto x = at::randn({4, 6});
  const RegisteredGroup two_ranks("data", 2);  // without a backend
  BatchNorm bn(BatchNormOptions().num_features(6).axis_name("data"));
  GroupNorm gn(GroupNormOptions().num_groups(2).axis_name("data"));
  const std::string text = ": expected every rank of group 'data' to call it";
  expect_error<c10::DistBackendError>([&] { bn->forward(x); }, "batch_norm" + text);
  expect_error<c10::DistBackendError>([&] { gn->forward(x); }, "group_norm" + text);
  EXPECT_TRUE(is_equal(bn->mean, at::zeros({6})));
  bn->forward(x, /*use_running_average=*/true);
}

TEST_F(Modules, GroupsOfSeveralRanks) {
  using Groups = std::vector<std::vector<std::int64_t>>;
  RegisteredGroup group("data", 4);
  const auto backend = group.use<EqualRanks>();
  const auto x = at::randn({4, 6});
  const auto norm = [](const Groups& groups) {
    return BatchNorm(BatchNormOptions().axis_name("data").axis_index_groups(groups));
  };
  norm({{0, 2, 3, 1}})->forward(x);
  EXPECT_EQ(std::exchange(backend->calls, 0), 1);
  EXPECT_TRUE(is_equal(norm({{0}, {1}, {2}, {3}})->forward(x), BatchNorm()->forward(x)));
  EXPECT_EQ(backend->calls, 0);
  expect_error<c10::NotImplementedError>([&] { norm({{0, 1}, {2, 3}})->forward(x); },
                                         "register a process group for each of them");
  expect_error<c10::ValueError>([&] { norm({{0, 1}})->forward(x); },
                                "expected axis_index_groups to be a partition of the 4 ranks");
}

}  // namespace
}  // namespace normcore::testing
