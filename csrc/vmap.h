// What batching rules share: the tensors of a call under torch.vmap without their wrappers, the
// mapped axis in front. A rule makes one call of the same operator out of them, in which the mapped
// axis is another feature axis (statistics and parameters of its own), another kept axis, or a
// reduced one.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/functorch/DynamicLayer.h>
#include <ATen/functorch/PlumbingHelper.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "checks.h"

namespace normcore::vmap {

// The innermost vmap. While it lives, operators are not mapped by it again.
class Level {
 public:
  // All tensors of the call.
  template <class... Tensors>
  explicit Level(const Tensors&... tensors) {
    (find_size(tensors), ...);
  }

  bool is_mapped(const Tensor& t) const { return at::functorch::isBatchedAtLevel(t, id_); }
  bool is_mapped(const OptionalTensor& t) const { return has(t) && is_mapped(*t); }
  template <class... Tensors>
  bool any_mapped(const Tensors&... tensors) const {
    return (is_mapped(tensors) || ...);
  }

  // [B, *shape]: a view, whether the tensor is mapped or the same for all.
  Tensor front(const Tensor& t) const {
    const auto [value, axis] = at::functorch::unwrapTensorAtLevel(t, id_);
    if (axis.has_value()) return value.movedim(*axis, 0);
    c10::SymDimVector shape{size_};
    for (const auto& size : t.sym_sizes()) shape.push_back(size);
    return t.unsqueeze(0).expand_symint(shape);
  }
  OptionalTensor front(const OptionalTensor& t) const {
    return has(t) ? OptionalTensor(front(*t)) : std::nullopt;
  }

  // The same, of a tensor that broadcasts to `rank` axes.
  OptionalTensor front_of_rank(const OptionalTensor& t, std::int64_t rank) const {
    if (!is_mapped(t)) return t;
    auto result = front(*t);
    while (result.dim() < rank + 1) result = result.unsqueeze(1);
    return result;
  }

  // A result [B, *shape]; undefined stays undefined.
  Tensor wrap(const Tensor& t) const {
    return t.defined() ? at::functorch::makeBatched(t, /*bdim=*/0, id_) : t;
  }
  // A result [B * n, *shape].
  Tensor wrap_flat(const Tensor& t, const c10::SymInt& n) const {
    return wrap(t.unflatten_symint(0, {size_, n}));
  }

 private:
  static std::int64_t current() {
    const auto layer = at::functorch::maybeCurrentDynamicLayer();
    TORCH_INTERNAL_ASSERT(layer.has_value());
    return layer->layerId();
  }
  void find_size(const Tensor& t) {
    if (!is_mapped(t)) return;
    const auto [value, axis] = at::functorch::unwrapTensorAtLevel(t, id_);
    size_ = value.sym_size(*axis);
  }
  void find_size(const OptionalTensor& t) {
    if (has(t)) find_size(*t);
  }

  c10::impl::ExcludeDispatchKeyGuard guard_{c10::DispatchKey::FuncTorchBatched};
  std::int64_t id_ = current();
  c10::SymInt size_ = 0;
};

// Axes of a tensor behind the mapped one; negative ones count from the end.
inline at::DimVector shifted(at::IntArrayRef axes) {
  at::DimVector result;
  for (const auto axis : axes) result.push_back(axis < 0 ? axis : axis + 1);
  return result;
}
inline at::DimVector with_mapped_axis(at::IntArrayRef axes) {
  auto result = shifted(axes);
  result.push_back(0);
  return result;
}

}  // namespace normcore::vmap
