// An application without Python that runs packages of AOTInductor, written by aot_inductor.py: one of
// plain aten operations, and one that calls an operator of normcore.
//   aot_inductor FOLDER
#include <normcore/normcore.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <cstdlib>
#include <iostream>
#include <string>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: aot_inductor FOLDER\n";
    return EXIT_FAILURE;
  }
  for (const std::string name : {"decomposed", "operator"}) {
    const auto path = std::string(argv[1]) + "/" + name;
    const auto data = torch::jit::load(path + ".pt");
    torch::inductor::AOTIModelPackageLoader package(path + ".pt2");
    const auto y = package.run({data.attr("x").toTensor()}).at(0);
    const auto error = (y - data.attr("y").toTensor()).abs().max().item<double>();
    std::cout << "aot_inductor: " << name << ": " << y.sizes() << ", largest difference " << error
              << '\n';
    if (!(error < 1e-5)) return EXIT_FAILURE;
  }
  std::cout << "aot_inductor: passed\n";
}
