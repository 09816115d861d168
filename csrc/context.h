// What surrounds a call of a public operator, where that changes what the call does.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/graph_task.h>

#include "dispatch.h"

namespace normcore {

// Whether operators become nodes of a graph (torch.compile, export, make_fx). There a norm that is
// a fixed affine map is left to the compiler, which fuses it or folds it into a convolution.
inline bool is_recorded() {
  using c10::impl::TorchDispatchModeTLS;
  return TorchDispatchModeTLS::get_mode(c10::impl::TorchDispatchModeKey::PROXY).has_value();
}

// Whether this is the forward pass of a checkpoint inside of a backward pass: its batch has been
// counted before. A graph that is recorded there will run elsewhere as well.
inline bool is_recomputed(const Tensor& input) {
  const auto keys = input.key_set();
  return torch::autograd::get_current_graph_task_id() >= 0 && !is_recorded() &&
         !keys.has(c10::DispatchKey::Python) && !keys.has(c10::DispatchKey::Functionalize);
}

// Whether torch.func transforms the call.
inline bool is_transformed() {
  using c10::DispatchKey;
  using c10::impl::tls_is_dispatch_key_included;
  return tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerBackMode);
}

}  // namespace normcore
