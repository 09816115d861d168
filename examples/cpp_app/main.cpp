// Evaluates a network exported as TorchScript on held-out images, without Python.
//   evaluate_digits MODEL TEST
// MODEL maps images [N, 1, 8, 8] to class scores [N, 10]; TEST is a TorchScript container with the
// attributes images (float32 [N, 1, 8, 8]) and labels (int64 [N]). train_digits.py writes both.
#include <normcore/normcore.h>  // all it takes to know the operators in MODEL
#include <torch/script.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>

int main(int argc, char** argv) try {
  if (argc != 3) {
    std::cerr << "usage: " << argv[0] << " MODEL TEST\n";
    return EXIT_FAILURE;
  }
  c10::InferenceMode inference;
  auto model = torch::jit::load(argv[1]);
  const auto test = torch::jit::load(argv[2]);
  const auto images = test.attr("images").toTensor();
  const auto labels = test.attr("labels").toTensor();

  model.eval();
  const auto predicted = model.forward({images}).toTensor().argmax(1);
  const auto correct = predicted.eq(labels).sum().item<long>();
  const auto total = static_cast<long>(labels.numel());
  std::printf("C++ accuracy: %.4f (%ld/%ld)\n", static_cast<double>(correct) / total, correct,
              total);
  return EXIT_SUCCESS;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << '\n';
  return EXIT_FAILURE;
}
