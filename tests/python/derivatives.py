"""Norms as functions of their operands, for the tests of derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

ACTIVATIONS = [None, "relu", "silu", "gelu", "gelu_tanh"]
MODES = ["train", "eval", "group", "group of some axes"]


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def norm(mode: str, **options: Any) -> Callable[..., Tensor]:
    """f(x, weight, bias, residual) of an input with 4 channels on axis 1."""
    ops = torch.ops.normcore
    mean, var = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5

    def function(
        x: Tensor, w: Tensor | None = None, b: Tensor | None = None, r: Tensor | None = None
    ) -> Tensor:
        given = options | ({} if r is None else {"residual": r})
        if mode == "group":
            return ops.group_norm(x, 2, w, b, **given)
        if mode == "group of some axes":
            return ops.group_norm(x, 2, w, b, reduction_axes=[0, 1], **given)
        if mode == "eval":
            return ops.batch_norm(x, mean, var, w, b, **given)
        return ops.batch_norm(x, mean.clone(), var.clone(), w, b, True, **given)

    return function


def grad_by_formula(
    y: Tensor, inputs: Sequence[Tensor], dy: Tensor, **options: bool
) -> tuple[Tensor, ...]:
    """torch.autograd.grad of a norm. A tangent, though of zeros, makes it take the formula that
    stands beside the kernel (csrc/formulas.h)."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(dy, torch.zeros_like(dy))
        grads = torch.autograd.grad(y, inputs, dual, **options)
        return tuple(forward_ad.unpack_dual(grad).primal for grad in grads)
