#include "process_group.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

#include "autograd.h"
#include "context.h"
#include "normcore/settings.h"

namespace normcore {
namespace {

// The name under which torch.distributed registers the default process group.
constexpr const char* kDefaultGroup = "0";

// The process group of that name; null if there is none.
c10::intrusive_ptr<c10d::ProcessGroup> find_group(const std::string& name) {
#if TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 15)
  if (!c10d::is_process_group_registered(name)) return {};
  return c10d::resolve_process_group(name);
#else  // no query without an exception
  try {
    return c10d::resolve_process_group(name);
  } catch (const c10::Error&) {
    return {};
  }
#endif
}

c10::OperatorHandle find_collective(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

// Called boxed: the schemas of the collectives differ between releases of torch.
template <class... Arguments>
Tensor call_collective(const c10::OperatorHandle& collective, const Tensor& t,
                       const Arguments&... arguments) {
  static const auto wait_tensor = find_collective("_c10d_functional::wait_tensor");
  torch::jit::Stack stack{t, arguments...};
  collective.callBoxed(stack);
  wait_tensor.callBoxed(stack);
  return stack.front().toTensor();
}

Tensor call_all_reduce(const Tensor& t, const std::string& group) {
  static const auto collective = find_collective("_c10d_functional::all_reduce");
  return call_collective(collective, t, std::string("sum"), group);
}

Tensor call_all_gather(const Tensor& t, std::int64_t ranks, const std::string& group) {
  static const auto collective = find_collective("_c10d_functional::all_gather_into_tensor");
  return call_collective(collective, t, ranks, group);
}

// Runs a collective below autograd. What goes wrong there is an error that names the operator.
template <class Collective>
Tensor run_collective(const char* op, const std::string& group, const Collective& collective) {
  try {
    const at::AutoDispatchBelowAutograd guard;
    return collective();
  } catch (const std::exception& error) {
    const auto* const own = dynamic_cast<const c10::Error*>(&error);
    const bool is_memory = dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr;
    // Backends throw errors of c10 or of the standard library; others come from Python.
    const bool is_known =
        own != nullptr || dynamic_cast<const std::runtime_error*>(&error) != nullptr;
    if (is_memory || !is_known) throw;
    TORCH_CHECK_WITH(DistBackendError, false, op, ": expected every rank of group '", group,
                     "' to call it with the same arguments, got: ",
                     own != nullptr ? own->what_without_backtrace() : error.what());
  }
}

// The derivative of a sum over ranks is one. Other ranks wait for the gradient of this one, which is
// 0 where it has none.
struct AllReduceRule {
  static constexpr std::size_t kSaved = 1, kResults = 1;
  static constexpr bool kConcernsOthers = true;
  static const char* name() { return "NormcoreAllReduceBackward"; }

  std::string group;

  template <class Self, class F>
  static void for_each_member(Self& self, F&& f) {
    f(self.group);
  }

  autograd::ta::variable_list backward(const autograd::ta::variable_list& gradients,
                                       const std::array<bool, 1>&,
                                       const std::array<Tensor, 1>& shares) const {
    const auto& gradient = gradients[0];
    return {op::all_reduce_sum().call(gradient.defined() ? gradient : at::zeros_like(shares[0]),
                                      group)};
  }
};

Tensor all_reduce_sum(const Tensor& t, std::string_view group) {
  const std::string name(group);
  using Node = autograd::OperatorNode<AllReduceRule>;
  decltype(autograd::make_node<Node>(std::declval<AllReduceRule>())) node{};
  if (autograd::ta::compute_requires_grad(t)) {
    node = autograd::make_node<Node>(AllReduceRule{name});
    node->set_next_edges(autograd::ta::collect_next_edges(t));
    node->save(0, t.detach());
  }
  const auto sum = [&](const Tensor& shares) {
    return run_collective("batch_norm or group_norm", name,
                          [&] { return call_all_reduce(shares, name); });
  };
  const auto result = sum(autograd::without_tangent(t));
  if (node) autograd::ta::set_history(result, autograd::NodePtr(node));
  if (const auto tangent = autograd::tangent_of(t); tangent.defined()) {
    result._set_fw_grad(sum(tangent), /*level=*/0, /*is_inplace_op=*/false);
  }
  return result;
}

}  // namespace

Ranks check_ranks(const char* op, OptionalString group, std::string_view sync_weighting) {
  TORCH_CHECK_VALUE(sync_weighting == "count" || sync_weighting == "rank", op,
                    ": expected sync_weighting to be 'count' or 'rank', got '", sync_weighting,
                    "'");
  if (!group.has_value()) return {};
  std::string name(*group);
  const auto found = find_group(name);
  TORCH_CHECK_VALUE(found, op, ": expected group to be the name of a process group, got '", name,
                    "'");
  if (found->getSize() == 1) return {};
  return {std::move(name), found->getSize(), sync_weighting == "rank"};
}

// c10d cannot list its groups. Those of torch.distributed never exist without the default one.
OptionalGroup group_of_axis(const char* op, const std::string& axis_name) {
  if (find_group(axis_name)) return axis_name;
  if (!find_group(kDefaultGroup)) return {};
  TORCH_CHECK_VALUE(axis_name == "world", op,
                    ": expected axis_name to be 'world' or the name of a process group, got '",
                    axis_name, "'");
  return kDefaultGroup;
}

void check_agreement(const char* op, const Tensor& input, const Intent& intent,
                     const Ranks& ranks) {
  using c10::impl::TorchDispatchModeKey;
  if (!debug_sync() || is_recorded() || is_in_mode(TorchDispatchModeKey::FAKE)) return;
  enum { kTraining, kNumGroups, kSlices, kByRank, kGradient, kNumbers };
  const bool has_gradient = c10::GradMode::is_enabled() && input.requires_grad();
  const std::vector<std::int64_t> own{intent.training, intent.num_groups,
                                      intent.slices.guard_int(__FILE__, __LINE__), ranks.by_rank,
                                      intent.training && has_gradient};
  const auto of_all = run_collective(op, ranks.group, [&] {
                        return call_all_gather(at::tensor(own, at::kLong).to(input.device()),
                                               ranks.size, ranks.group);
                      }).cpu();
  const auto* const values = of_all.const_data_ptr<std::int64_t>();
  std::ostringstream text;
  bool agree = true;
  for (std::int64_t rank = 0; rank < ranks.size; ++rank) {
    const auto* const of_rank = values + rank * kNumbers;
    agree = agree && std::equal(own.begin(), own.end(), of_rank);
    text << (rank == 0 ? "" : "; ") << "rank " << rank << ": "
         << (of_rank[kNumGroups] == 0 ? "batch_norm" : "group_norm") << " in "
         << (of_rank[kTraining] != 0 ? "training" : "evaluation") << ", " << of_rank[kSlices]
         << " statistics, sync_weighting '" << (of_rank[kByRank] != 0 ? "rank" : "count") << "'"
         << (of_rank[kGradient] != 0 ? ", with" : ", without") << " a gradient of the input";
  }
  TORCH_CHECK_VALUE(agree, op, ": expected the same call on every rank of group '", ranks.group,
                    "', got ", text.str());
}

Tensor all_reduce(const char* op, const Tensor& t, const std::string& group) {
  return run_collective(op, group, [&] { return call_all_reduce(t, group); });
}

Tensor differentiable_all_reduce(const Tensor& t, const std::string& group) {
  return op::all_reduce_sum().call(t, group);
}

TORCH_LIBRARY_IMPL(normcore, CompositeImplicitAutograd, m) {
  m.impl("_all_reduce_sum", TORCH_FN(all_reduce_sum));
}

// Without autograd (inference_mode) a tensor subclass would see the composite operator itself.
TORCH_LIBRARY_IMPL(normcore, Python, m) { m.impl("_all_reduce_sum", TORCH_FN(all_reduce_sum)); }

}  // namespace normcore
