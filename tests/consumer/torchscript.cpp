// An application that runs a TorchScript file with normcore's operators and knows nothing of the
// library but its umbrella header. FILE is written by exchange.py and holds the expected outputs.
//   torchscript FILE
#include <normcore/normcore.h>
#include <torch/script.h>

#include <cstdlib>
#include <iostream>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: torchscript FILE\n";
    return EXIT_FAILURE;
  }
  auto module = torch::jit::load(argv[1]);
  const auto x = module.attr("x").toTensor();
  for (const bool training : {false, true}) {
    module.train(training);
    const auto y = module.forward({x}).toTensor();
    if (!y.equal(module.attr(training ? "y_train" : "y_eval").toTensor())) {
      std::cerr << "torchscript: failed: the bits of Python with training " << training << '\n';
      return EXIT_FAILURE;
    }
  }
  std::cout << "torchscript: passed\n";
}
