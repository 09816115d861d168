// Process groups of torch.distributed (c10d), which operators know by name: what they ask for, and
// the sum over ranks, a functional collective, so that graphs hold it as a node like any other.
#pragma once

#include <string>
#include <string_view>

#include "dispatch.h"

namespace normcore {

using OptionalGroup = std::optional<std::string>;

// Ranks that share the statistics of a norm.
struct Ranks {
  std::string group;  // empty: this process alone
  std::int64_t size = 1;
  bool by_rank = false;  // statistics are means over ranks, not over values
  explicit operator bool() const { return !group.empty(); }
};

// Those of the arguments of an operator; this process alone if the group has no other. ValueError:
// no group has that name, or `sync_weighting` is neither "count" nor "rank".
Ranks check_ranks(const char* op, OptionalString group, std::string_view sync_weighting);

// The name of the group that an axis of a module stands for: "world" is the default one, others are
// names of groups. None without a process group. ValueError: no group has that name.
OptionalGroup group_of_axis(const char* op, const std::string& axis_name);

// What a rank is about to do, for people (normcore/settings.h). Nothing happens unless that is
// asked for, nor while a graph is recorded.
struct Intent {
  bool training = true;
  std::int64_t num_groups = 0;  // 0: batch norm
  c10::SymInt slices;
};
void check_agreement(const char* op, const Tensor& input, const Intent& intent, const Ranks& ranks);

// The sum over ranks, element by element, on every rank; waits for it where the device has no
// streams. It is not differentiable. What goes wrong among the ranks is an error that names `op`.
Tensor all_reduce(const char* op, const Tensor& t, const std::string& group);

// The same as an operator with derivatives of any order: the gradient of every rank's share is the
// sum of the gradients of all ranks' results.
Tensor differentiable_all_reduce(const Tensor& t, const std::string& group);

}  // namespace normcore
