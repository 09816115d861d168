// An application that uses the functions and modules of an installed normcore. With FILE (written
// by exchange.py) it reads the state that Python saved into modules of its own, checks that they
// give the same bits, and writes the batch norm to SAVED for exchange.py to check.
//   app [FILE SAVED]
#include <normcore/normcore.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/serialize.h>

#include <cstdlib>
#include <iostream>
#include <string>

namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::cerr << "app: failed: " << what << '\n';
  std::exit(EXIT_FAILURE);
}

void use_functions() {
  const auto x = at::randn({4, 6, 5}).requires_grad_();
  auto mean = at::zeros({6}), var = at::ones({6});
  const auto y =
      normcore::batch_norm(x, mean, var, {}, {}, normcore::BatchNormFuncOptions().training(true));
  const auto z =
      normcore::group_norm(y, 3, {}, {}, normcore::GroupNormFuncOptions().activation("gelu"));
  z.square().sum().backward();
  require(x.grad().isfinite().all().item<bool>(), "finite gradients");
  require(!mean.equal(at::zeros({6})), "updated running statistics");
}

void use_modules() {
  torch::nn::Sequential net(
      normcore::BatchNorm(normcore::BatchNormOptions().axis(1).activation("relu")),
      normcore::GroupNorm(normcore::GroupNormOptions().num_groups(2).axis(1)));
  net->forward(at::randn({4, 6, 5})).square().sum().backward();
  require(net->parameters().size() == 4, "four parameters");
  net->eval();
  const auto x = at::randn({2, 6, 5});
  require(net->forward(x).equal(net->forward(x)), "a repeatable evaluation");
}

void exchange_with_python(const std::string& file, const std::string& saved) {
  torch::serialize::InputArchive archive, batch_norm_archive, group_norm_archive;
  archive.load_from(file);
  archive.read("batch_norm", batch_norm_archive);
  archive.read("group_norm", group_norm_archive);
  const auto read = [&](const char* name) {
    at::Tensor tensor;
    archive.read(name, tensor, /*is_buffer=*/true);
    return tensor;
  };

  normcore::BatchNorm batch_norm(
      normcore::BatchNormOptions().axis(1).momentum(0.9).activation("relu"));
  normcore::GroupNorm group_norm(normcore::GroupNormOptions()
                                     .num_groups(4)
                                     .axis(1)
                                     .epsilon(1e-3)
                                     .dtype(at::kBFloat16)
                                     .activation("silu"));
  batch_norm->load(batch_norm_archive);
  group_norm->load(group_norm_archive);
  torch::save(batch_norm, saved);

  const auto x = read("x");
  batch_norm->eval();
  require(group_norm->forward(batch_norm->forward(x)).equal(read("y_eval")),
          "the bits of Python in evaluation");
  batch_norm->train();
  require(group_norm->forward(batch_norm->forward(x)).equal(read("y_train")),
          "the bits of Python in training");
  require(batch_norm->mean.equal(read("mean_after")) && batch_norm->var.equal(read("var_after")),
          "the running statistics of Python");
}

}  // namespace

int main(int argc, char** argv) {
  use_functions();
  use_modules();
  if (argc == 3) exchange_with_python(argv[1], argv[2]);
  std::cout << "app: passed\n";
}
