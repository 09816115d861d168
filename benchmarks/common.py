"""What the benchmarks share: operands, the norms of both libraries, and facts about the source."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

import normcore

ROOT = Path(__file__).resolve().parents[1]
MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Operands:
    x: Tensor
    weight: Tensor
    bias: Tensor
    grad: Tensor
    axis: int
    groups: int


def make_operands(
    size: Sequence[int],
    axis: int,
    groups: int,
    layout: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Operands:
    """Random operands; scale and bias are float32 and want gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def random(function: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        return function(shape, generator=generator, device=device)

    x = random(torch.randn, size).to(dtype).contiguous(memory_format=MEMORY_FORMATS[layout])
    weight, bias = random(torch.rand, [x.shape[axis]]) + 0.5, random(torch.randn, [x.shape[axis]])
    return Operands(
        x, weight.requires_grad_(), bias.requires_grad_(), torch.randn_like(x), axis, groups
    )


def batch_norms(o: Operands, training: bool) -> tuple[Norm, Norm]:
    """The batch norm of normcore and of torch."""
    # Running statistics of their own: a later call must not change what a backward has saved.
    their_mean, their_var = torch.zeros_like(o.bias), torch.ones_like(o.bias)
    our_mean, our_var = torch.zeros_like(o.bias), torch.ones_like(o.bias)
    move = o.axis not in (1, 1 - o.x.dim())

    def torch_norm(x: Tensor) -> Tensor:
        moved = x.reshape(-1, x.shape[-1]) if move else x  # torch has only axis 1
        y = torch_functional.batch_norm(moved, their_mean, their_var, o.weight, o.bias, training)
        return y.reshape(x.shape) if move else y

    def our_norm(x: Tensor) -> Tensor:
        return normcore.functional.batch_norm(
            x, our_mean, our_var, o.weight, o.bias, training, axis=o.axis
        )

    return our_norm, torch_norm


def group_norms(o: Operands, silu: bool) -> tuple[Norm, Norm]:
    """The group norm of normcore and of torch, the latter with the channels on axis 1."""
    move = o.axis not in (1, 1 - o.x.dim())

    def torch_norm(x: Tensor) -> Tensor:
        moved = x.movedim(-1, 1) if move else x
        y = torch_functional.group_norm(moved, o.groups, o.weight, o.bias)
        return torch_functional.silu(y) if silu else y

    def our_norm(x: Tensor) -> Tensor:
        return normcore.functional.group_norm(
            x, o.groups, o.weight, o.bias, axis=o.axis, activation="silu" if silu else None
        )

    return our_norm, torch_norm


def backward_of(norm: Norm, o: Operands) -> Callable[[], tuple[Tensor, ...]]:
    """The backward pass of one call, for all three gradients."""
    x = o.x.detach().requires_grad_()
    y = norm(x)
    grad = o.grad if y.shape == o.grad.shape else o.grad.movedim(-1, 1)
    leaves = (x, o.weight, o.bias)
    return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)


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


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
