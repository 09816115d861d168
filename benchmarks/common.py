"""What the benchmarks share: operands, the norms of both libraries, and facts about the source."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

import normcore

ROOT = Path(__file__).resolve().parents[1]
Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Operands:
    x: Tensor
    weight: Tensor
    bias: Tensor
    grad: Tensor
    groups: int
    residual: Tensor | None = None


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of `x` with the positions ("contiguous") or the channels next to each other."""
    if layout == "contiguous":
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def make_operands(
    size: Sequence[int],
    groups: int,
    layout: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    parameters: torch.dtype = torch.float32,
) -> Operands:
    """Random operands; scale and bias want gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def random(function: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        return function(shape, generator=generator, device=device)

    x = lay_out(random(torch.randn, size).to(dtype), layout)
    weight, bias = random(torch.rand, size[1:2]) + 0.5, random(torch.randn, size[1:2])
    weight, bias = (p.to(parameters).requires_grad_() for p in (weight, bias))
    return Operands(x, weight, bias, torch.randn_like(x), groups)


def with_residual(o: Operands) -> Operands:
    """A residual that wants its gradient, too."""
    return replace(o, residual=torch.randn_like(o.x).requires_grad_())


def batch_norms(o: Operands, training: bool) -> tuple[Norm, Norm]:
    """The batch norm of normcore and of torch."""
    # Running statistics of their own: a later call must not change what a backward has saved.
    their_mean, their_var = torch.zeros_like(o.bias), torch.ones_like(o.bias)
    our_mean, our_var = torch.zeros_like(o.bias), torch.ones_like(o.bias)

    def torch_norm(x: Tensor) -> Tensor:
        return torch_functional.batch_norm(x, their_mean, their_var, o.weight, o.bias, training)

    def our_norm(x: Tensor) -> Tensor:
        return normcore.functional.batch_norm(x, our_mean, our_var, o.weight, o.bias, training)

    return our_norm, torch_norm


def add_relu_batch_norms(o: Operands) -> tuple[Norm, Norm]:
    """relu(norm(x) + residual) in training: the end of a block of ResNet, in place in torch."""
    residual = torch.randn_like(o.x) if o.residual is None else o.residual
    _, torch_batch_norm = batch_norms(o, True)
    mean, var = torch.zeros_like(o.bias), torch.ones_like(o.bias)

    def torch_norm(x: Tensor) -> Tensor:
        return torch_batch_norm(x).add_(residual).relu_()

    def our_norm(x: Tensor) -> Tensor:
        return normcore.functional.batch_norm(
            x, mean, var, o.weight, o.bias, True, activation="relu", residual=residual
        )

    return our_norm, torch_norm


def group_norms(o: Operands, activation: str | None = None) -> tuple[Norm, Norm]:
    """The group norm of normcore and of torch; torch.nn.functional knows the activation."""

    def torch_norm(x: Tensor) -> Tensor:
        y = torch_functional.group_norm(x, o.groups, o.weight, o.bias)
        return getattr(torch_functional, activation)(y) if activation else y

    def our_norm(x: Tensor) -> Tensor:
        return normcore.functional.group_norm(x, o.groups, o.weight, o.bias, activation=activation)

    return our_norm, torch_norm


def backward_of(norm: Norm, o: Operands) -> Callable[[], tuple[Tensor, ...]]:
    """The backward pass of one call, for all gradients.

    On a device it runs on the stream that is current here.
    """
    x = o.x.detach().requires_grad_()
    y = norm(x)
    leaves = [x, o.weight, o.bias]
    if o.residual is not None:
        leaves.append(o.residual)
    return lambda: torch.autograd.grad(y, leaves, o.grad, retain_graph=True)


def double_backward_of(norm: Norm, o: Operands) -> Callable[[], tuple[Tensor, ...]]:
    """The double backward pass of one call, as a gradient penalty needs it.

    It takes a gradient of that of x, and gives those of grad_output, x and weight.
    """
    x, grad = o.x.detach().requires_grad_(), o.grad.detach().requires_grad_()
    (grad_x,) = torch.autograd.grad(norm(x), x, grad, create_graph=True)
    generator = torch.Generator(x.device).manual_seed(1)
    cotangent = torch.empty_like(x).normal_(generator=generator)
    leaves = (grad, x, o.weight)
    return lambda: torch.autograd.grad(grad_x, leaves, cotangent, retain_graph=True)


def commit() -> str:
    """Of the source tree this file is in, with a mark if files differ from it.

    A tree without its history takes it from the environment variable NORMCORE_COMMIT.
    """
    given = os.environ.get("NORMCORE_COMMIT")
    if given:
        return given
    command = ["git", "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return answer.stdout.strip() or "unknown"
