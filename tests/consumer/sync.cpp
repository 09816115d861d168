// One of several processes that normalize together, none of which has Python: a process group of
// c10d, with a backend of the application's own. FOLDER holds the part of the batch that this rank
// has, and takes what comes of it; sync.py writes the former, starts the ranks and checks the latter.
//   sync FOLDER RANK RANKS
#include <normcore/normcore.h>
#include <torch/torch.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/FileStore.hpp>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>
#include <vector>

namespace {

using torch::Tensor;

constexpr const char* kGroup = "dp";
constexpr std::chrono::seconds kTimeout{60};

// Sums over ranks through a store. The wheels of torch lack headers that those of c10d's own
// backends include: gloo's and NCCL's.
class StoreBackend : public c10d::Backend {
 public:
  StoreBackend(c10::intrusive_ptr<c10d::Store> store, int rank, int ranks)
      : Backend(rank, ranks), store_(std::move(store)) {}

  const std::string getBackendName() const override { return "store"; }

  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<Tensor>& tensors,
                                           const c10d::AllreduceOptions& options) override {
    TORCH_CHECK_NOT_IMPLEMENTED(options.reduceOp == c10d::ReduceOp::SUM,
                                "StoreBackend: expected a sum");
    for (const auto& tensor : tensors) sum(tensor);
    auto future =
        c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
    future->markCompleted(tensors);
    return c10d::Work::create_from_future(future);
  }

 private:
  void sum(const Tensor& tensor) {
    const auto key = [call = calls_++](int rank) {
      return std::to_string(call) + "/" + std::to_string(rank);
    };
    const auto own = tensor.contiguous();
    const auto* const begin = static_cast<const std::uint8_t*>(own.const_data_ptr());
    store_->set(key(getRank()), std::vector<std::uint8_t>(begin, begin + own.nbytes()));
    tensor.zero_();
    for (int rank = 0; rank < getSize(); ++rank) {  // in one order: the same bits on all ranks
      auto part = store_->get(key(rank));
      tensor.add_(torch::from_blob(part.data(), tensor.sizes(), tensor.options()));
    }
  }

  c10::intrusive_ptr<c10d::Store> store_;
  std::int64_t calls_ = 0;
};

// The process group under its name; c10d's registry does not keep it alive.
class Group {
 public:
  Group(const std::string& file, int rank, int ranks) {
    const auto store = c10::make_intrusive<c10d::FileStore>(file, ranks);
    store->setTimeout(kTimeout);  // a rank that has failed must not keep the others waiting
    group_ = c10::make_intrusive<c10d::ProcessGroup>(store, rank, ranks);
    group_->setBackend(c10::kCPU, c10d::ProcessGroup::BackendType::CUSTOM,
                       c10::make_intrusive<StoreBackend>(store, rank, ranks));
    group_->setGroupName(kGroup);
    c10d::register_process_group(kGroup, group_);
  }
  ~Group() { c10d::unregister_process_group(kGroup); }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

 private:
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
};

// The tensors of this rank by name, in the format of torch.save.
class Tensors {
 public:
  Tensors() : dict_(c10::StringType::get(), c10::TensorType::get()) {}
  explicit Tensors(const std::string& path) : Tensors() {
    std::ifstream file(path, std::ios::binary);
    const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
    dict_ = torch::pickle_load(bytes).toGenericDict();
  }
  Tensor operator[](const std::string& name) const { return dict_.at(name).toTensor().clone(); }
  void insert(const std::string& name, const Tensor& tensor) {
    dict_.insert(name, tensor.detach());
  }
  void write(const std::string& path) const {
    const auto bytes = torch::pickle_save(dict_);
    std::ofstream file(path, std::ios::binary);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size())).flush();
    TORCH_CHECK(file, "cannot write ", path);
  }

 private:
  c10::impl::GenericDict dict_;
};

// y, its gradients, and those of a penalty on the gradient of x.
void differentiate(const std::string& norm, const Tensor& y, const Tensor& grad_y, const Tensor& x,
                   const Tensor& weight, const Tensor& bias, Tensors& results) {
  const auto grad = torch::autograd::grad({y}, {x, weight, bias}, {grad_y}, /*retain_graph=*/true,
                                          /*create_graph=*/true);
  const auto second = torch::autograd::grad({grad[0].square().sum()}, {x, weight});
  results.insert(norm + ".y", y);
  results.insert(norm + ".grad_x", grad[0]);
  results.insert(norm + ".grad_weight", grad[1]);
  results.insert(norm + ".grad_bias", grad[2]);
  results.insert(norm + ".second_x", second[0]);
  results.insert(norm + ".second_weight", second[1]);
}

void batch_norm(const Tensors& given, Tensors& results) {
  const auto x = given["samples"].requires_grad_();
  const auto weight = given["weight"].requires_grad_(), bias = given["bias"].requires_grad_();
  const auto mean = given["mean"], var = given["var"];
  auto options = normcore::BatchNormFuncOptions().group(kGroup);
  const auto y = normcore::batch_norm(x, mean, var, weight, bias, options.training(true));
  differentiate("batch_norm", y, given["grad_samples"], x, weight, bias, results);
  results.insert("batch_norm.mean", mean);
  results.insert("batch_norm.var", var);
  results.insert("batch_norm.eval",
                 normcore::batch_norm(x, mean, var, weight, bias, options.training(false)));
}

void batch_norm_module(const Tensors& given, Tensors& results) {
  const auto x = given["samples"].requires_grad_();
  normcore::BatchNorm norm(normcore::BatchNormOptions()
                               .axis(1)
                               .momentum(0.9)
                               .dtype(torch::kDouble)
                               .axis_name(kGroup)
                               .activation("silu"));
  norm->init(x);
  norm->to(torch::kDouble);
  {
    const torch::NoGradGuard guard;
    norm->scale.copy_(given["weight"]);
    norm->bias.copy_(given["bias"]);
  }
  const auto y = norm->forward(x);
  differentiate("module", y, given["grad_samples"], x, norm->scale, norm->bias, results);
  results.insert("module.mean", norm->mean);
  results.insert("module.var", norm->var);
  norm->eval();
  results.insert("module.eval", norm->forward(x));
}

void group_norm(const Tensors& given, Tensors& results) {
  const auto x = given["rows"].requires_grad_();
  const auto weight = given["weight"].requires_grad_(), bias = given["bias"].requires_grad_();
  const auto y = normcore::group_norm(x, /*num_groups=*/2, weight, bias,
                                      normcore::GroupNormFuncOptions().group(kGroup));
  differentiate("group_norm", y, given["grad_rows"], x, weight, bias, results);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: sync FOLDER RANK RANKS\n";
    return EXIT_FAILURE;
  }
  const std::string folder = std::string(argv[1]) + "/", rank = argv[2];
  const Group group(folder + "store", std::stoi(rank), std::stoi(argv[3]));
  const Tensors given(folder + "given" + rank + ".pt");
  Tensors results;
  batch_norm(given, results);
  batch_norm_module(given, results);
  group_norm(given, results);
  results.write(folder + "results" + rank + ".pt");
}
