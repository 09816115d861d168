"""Runs one functional call forward and backward and compares every result with the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import reference
import torch
from tolerance import assert_close, compute_dtype
from torch import Tensor

import normcore.functional as NF

DIFFERENTIABLE = ("weight", "bias", "residual")


def away_from_zero(z: Tensor, residual: Tensor) -> Tensor:
    """`residual` changed so that no `z` (which holds it) is near the kink of relu."""
    return torch.where(z.abs() < 0.05, residual + 0.25, residual)


def call(
    function: Callable[..., Tensor], x: Tensor, dy: Tensor | None, **arguments: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of x, weight, bias and residual; `x` keeps its strides."""
    differentiable = {
        name: t.detach().requires_grad_()
        for name, t in {"x": x, **arguments}.items()
        if name in ("x", *DIFFERENTIABLE) and t is not None
    }
    arguments |= {name: t for name, t in differentiable.items() if name != "x"}
    y = function(differentiable["x"], **arguments)
    if dy is None:
        return y, {}
    grads = torch.autograd.grad(y, list(differentiable.values()), dy)
    return y, dict(zip(differentiable, grads))


def compare(got: dict[str, Tensor], expected: reference.Expected, compute: torch.dtype) -> None:
    for name, value in got.items():
        assert_close(
            value,
            expected.value[name],
            compute=compute,
            length=expected.length,
            magnitude=expected.magnitude.get(name),
            name=name,
        )


def cotangent(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A gradient of the output in its dtype, contiguous whatever the layout of `x`."""
    return torch.randn(x.shape, dtype=torch.float64).to(dtype or x.dtype)


def check_batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    **arguments: Any,
) -> Tensor:
    arguments = {"training": True, **arguments}
    if arguments.get("activation") == "relu":
        spare = {k: v for k, v in arguments.items() if k != "activation"}
        z = reference.batch_norm(x, running_mean, running_var, **spare).value["y"]
        arguments["residual"] = away_from_zero(z, arguments["residual"])
    dy = cotangent(x, dtype)
    expected = reference.batch_norm(x, running_mean, running_var, dy=dy, **arguments)
    running = {
        name: t.clone()
        for name, t in (("mean", running_mean), ("var", running_var))
        if t is not None
    }
    y, grads = call(
        NF.batch_norm,
        x,
        dy,
        running_mean=running.get("mean"),
        running_var=running.get("var"),
        dtype=dtype,
        **arguments,
    )
    assert y.dtype == (dtype or x.dtype)
    assert all(grads[n].dtype == t.dtype for n, t in {"x": x, **arguments}.items() if n in grads)
    compute = compute_dtype(x, dtype, *(arguments.get(name) for name in DIFFERENTIABLE))
    compare({"y": y, **grads, **running}, expected, compute)
    if not arguments["training"]:
        for name, before in (("mean", running_mean), ("var", running_var)):
            assert before is not None
            assert torch.equal(running[name], before)
    return y


def check_group_norm(
    x: Tensor, num_groups: int, *, dtype: torch.dtype | None = None, **arguments: Any
) -> Tensor:
    if arguments.get("activation") == "relu":
        spare = {k: v for k, v in arguments.items() if k != "activation"}
        z = reference.group_norm(x, num_groups, **spare).value["y"]
        arguments["residual"] = away_from_zero(z, arguments["residual"])
    dy = cotangent(x, dtype)
    expected = reference.group_norm(x, num_groups, dy=dy, **arguments)
    y, grads = call(NF.group_norm, x, dy, num_groups=num_groups, dtype=dtype, **arguments)
    assert y.dtype == (dtype or x.dtype)
    assert all(grads[n].dtype == t.dtype for n, t in {"x": x, **arguments}.items() if n in grads)
    compute = compute_dtype(x, dtype, *(arguments.get(name) for name in DIFFERENTIABLE))
    compare({"y": y, **grads}, expected, compute)
    return y
