"""First and second derivatives in float64 on a device, on every way through the kernels."""

from __future__ import annotations

import pytest
import torch
from devices import needs_cuda
from shape_list import Shape
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from workloads import NORMS, Workload, image, name_of

pytestmark = needs_cuda

# float64 slices of several blocks have more than 256 * 8 * 2 elements.
SHAPES = [
    image("few_vectors", (2, 4, 3, 2), 2),
    image("several_blocks", (2, 2, 70, 71), 1),
    image("rows", (2, 4, 3, 2), 2, "channels_last"),
    image("several_blocks_of_rows", (2, 4, 40, 41), 2, "channels_last"),
]


@pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("norm", NORMS)
def test_both_orders(norm: str, shape: Shape, activation: str | None) -> None:
    f64 = torch.float64
    workload = Workload.random(
        norm, shape, f64, parameters=f64, statistics=f64, residual=True, activation=activation
    ).to("cuda")
    options = {k: v for k, v in workload.operands.items() if k not in ("weight", "bias")}
    residual = options.pop("residual")

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        # A call must not see the running statistics of the one before.
        fresh = {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}
        return workload.function(x, weight=weight, bias=bias, residual=residual, **fresh)

    tensors = (workload.x, workload.operands["weight"], workload.operands["bias"], residual)
    inputs = tuple(t.detach().requires_grad_() for t in tensors)
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)
