#include <normcore/normcore.h>
#include <torch/torch.h>

#include <iostream>

int main() {
  torch::nn::Sequential net(
      torch::nn::Conv2d(torch::nn::Conv2dOptions(3, 16, 3)),
      normcore::BatchNorm(normcore::BatchNormOptions().axis(1).momentum(0.9).activation("relu")),
      torch::nn::Conv2d(torch::nn::Conv2dOptions(16, 32, 3)),
      normcore::GroupNorm(normcore::GroupNormOptions().num_groups(8).axis(1)));
  auto loss = net->forward(torch::randn({8, 3, 16, 16})).square().mean();
  loss.backward();  // the features came from the input: 16 and 32

  auto y = normcore::group_norm(torch::randn({2, 6, 5}), /*num_groups=*/3);
  std::cout << net << '\n' << y.sizes() << '\n';
}
