// An application that uses the functions and modules of an installed normcore. With FILE (written
// by exchange.py) it loads the state that Python saved into modules of its own, checks that they
// give the same bits, and writes the batch norm to SAVED, for exchange.py to check.
//   app [FILE SAVED]
#include <normcore/normcore.h>
#include <normcore/version.h>
#include <torch/torch.h>

#include <cstdlib>
#include <iostream>
#include <string>

#define STRINGIFY(x) #x
#define TO_STRING(x) STRINGIFY(x)

namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::cerr << "app: failed: " << what << '\n';
  std::exit(EXIT_FAILURE);
}

void compare_with_torch() {
  const auto x = torch::randn({4, 6, 5, 3}, torch::requires_grad());
  torch::nn::Sequential net(
      normcore::BatchNorm(normcore::BatchNormOptions().axis(1)),
      normcore::GroupNorm(normcore::GroupNormOptions().num_groups(3).axis(1)));
  const auto y = net->forward(x);
  const auto want =
      torch::group_norm(torch::batch_norm(x, {}, {}, {}, {}, true, 0.1, 1e-5, false), 3);
  require(torch::allclose(y, want, 1e-5, 1e-5), "modules agree with torch");

  const auto grad_y = torch::randn_like(y);
  const auto grad = torch::autograd::grad({y}, {x}, {grad_y})[0];
  const auto want_grad = torch::autograd::grad({want}, {x}, {grad_y})[0];
  require(torch::allclose(grad, want_grad, 1e-4, 1e-5), "gradients agree with torch");

  const auto z =
      normcore::batch_norm(x, {}, {}, {}, {}, normcore::BatchNormFuncOptions().training(true));
  require(normcore::group_norm(z, 3).equal(y), "functions agree with modules");
}

void exchange_with_python(const std::string& file, const std::string& saved) {
  torch::serialize::InputArchive archive, batch_norm_archive, group_norm_archive;
  archive.load_from(file);
  archive.read("batch_norm", batch_norm_archive);
  archive.read("group_norm", group_norm_archive);
  const auto read = [&](const char* name) {
    torch::Tensor tensor;
    archive.read(name, tensor, /*is_buffer=*/true);
    return tensor;
  };

  normcore::BatchNorm batch_norm(
      normcore::BatchNormOptions().axis(1).momentum(0.9).activation("relu"));
  normcore::GroupNorm group_norm(normcore::GroupNormOptions()
                                     .num_groups(4)
                                     .axis(1)
                                     .epsilon(1e-3)
                                     .dtype(torch::kBFloat16)
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
  require(std::string(NORMCORE_TORCH_VERSION) ==
              TO_STRING(TORCH_VERSION_MAJOR) "." TO_STRING(TORCH_VERSION_MINOR),
          "the headers of the torch that normcore was built for");
  torch::manual_seed(0);
  compare_with_torch();
  if (argc == 3) exchange_with_python(argv[1], argv[2]);
  std::cout << "app: passed\n";
}
