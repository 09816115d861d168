#include <ATen/functorch/DynamicLayer.h>
#include <c10/util/Exception.h>

#include "context.h"

namespace normcore {

// Collectives have no rules of torch.func: a transform around a composite operator sees them as they
// are, and only the innermost one sees the graph node and the tangent that stand for them.
void check_transforms(const char* op) {
  using at::functorch::TransformType;
  int derivatives = 0;
  for (const auto& layer : at::functorch::getDynamicLayerStack()) {
    const auto key = layer.key();
    TORCH_CHECK_NOT_IMPLEMENTED(
        key != TransformType::Vmap, op,
        ": expected group to be None or of one rank under torch.vmap; call it outside of vmap");
    if (key == TransformType::Grad || key == TransformType::Jvp) ++derivatives;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      derivatives <= 1, op,
      ": expected group to be None or of one rank under transforms of torch.func within each "
      "other, got ",
      derivatives, "; torch.autograd.grad with create_graph=True gives second derivatives");
}

}  // namespace normcore
