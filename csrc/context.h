// What surrounds a call of a public operator, where that changes what the call does.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/graph_task.h>

#include "dispatch.h"

namespace normcore {

inline bool is_in_mode(c10::impl::TorchDispatchModeKey mode) {
  return c10::impl::TorchDispatchModeTLS::get_mode(mode).has_value();
}

// Whether operators become nodes of a graph (torch.compile, export, make_fx). There a norm that is
// a fixed affine map is left to the compiler, which fuses it or folds it into a convolution.
inline bool is_recorded() { return is_in_mode(c10::impl::TorchDispatchModeKey::PROXY); }

// Whether this is the forward pass of a checkpoint inside of a backward pass: its batch has been
// counted before. A graph that is recorded there, or about to be, will run elsewhere as well.
inline bool is_recomputed(const Tensor& input) {
  using c10::impl::TorchDispatchModeKey;
  return torch::autograd::get_current_graph_task_id() >= 0 && !is_recorded() &&
         !is_in_mode(TorchDispatchModeKey::FAKE) && !is_in_mode(TorchDispatchModeKey::FUNCTIONAL) &&
         !input.key_set().has(c10::DispatchKey::Functionalize);
}

// Whether torch.func transforms the call.
inline bool is_transformed() {
  using c10::DispatchKey;
  using c10::impl::tls_is_dispatch_key_included;
  return tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerBackMode);
}

// NotImplementedError where torch.func transforms a call whose ranks share statistics in a way that
// would lose what the collectives do: torch.vmap, and transforms within each other.
void check_transforms(const char* op);

}  // namespace normcore
