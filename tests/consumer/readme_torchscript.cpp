#include <normcore/normcore.h>  // registers the operators that the file calls
#include <torch/script.h>

#include <iostream>

int main(int argc, char** argv) {
  if (argc != 2) return 1;
  auto net = torch::jit::load(argv[1]);
  std::cout << net.forward({torch::ones({1, 10})}).toTensor().sizes() << '\n';
}
