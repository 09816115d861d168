"""What the tests of normcore.nn share: the classes, their options, and pairs with torch's."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normcore.nn as NN

on_every_device = pytest.mark.usefixtures("device")

SIZES: dict[str, list[tuple[int, ...]]] = {
    "BatchNorm1d": [(4, 6), (4, 6, 5)],
    "BatchNorm2d": [(4, 6, 5, 3)],
    "BatchNorm3d": [(2, 6, 3, 4, 2)],
    "InstanceNorm1d": [(4, 6, 5), (6, 5)],
    "InstanceNorm2d": [(4, 6, 5, 3), (6, 5, 3)],
    "InstanceNorm3d": [(2, 6, 3, 4, 2), (6, 3, 4, 2)],
    "GroupNorm": [(4, 6), (4, 6, 5), (4, 6, 5, 3), (2, 6, 3, 4, 2)],
}
# What is not the default in torch's batch norm is the default in its instance norm.
STATISTICS = [
    {}, {"eps": 1e-2}, {"momentum": 0.7}, {"momentum": None}, {"affine": False}, {"affine": True},
    {"track_running_stats": True}, {"affine": True, "track_running_stats": True},
    {"affine": False, "track_running_stats": False},
    {"momentum": None, "track_running_stats": True},
]  # fmt: skip
GROUPS = [{}, {"eps": 1e-2}, {"affine": False}]
HAS_BIAS = "bias" in inspect.signature(nn.GroupNorm).parameters  # as of torch 2.14
WITHOUT_BIAS = [{"affine": True, "bias": False}] if HAS_BIAS else []


def options_of(kind: str) -> list[dict[str, Any]]:
    return [*(GROUPS if kind == "GroupNorm" else STATISTICS), *WITHOUT_BIAS]


TRACKED = {"track_running_stats": True, "momentum": None}
CASES = [
    (kind, size, options) for kind in SIZES for size in SIZES[kind] for options in options_of(kind)
]
ONE_OF_EACH = [
    *((kind, SIZES[kind][-1], options) for kind in SIZES for options in ({}, {"affine": True})),
    *((kind, SIZES[kind][0], TRACKED) for kind in SIZES if kind != "GroupNorm"),
]
each_case = pytest.mark.parametrize(("kind", "size", "options"), CASES, ids=str)
each_kind = pytest.mark.parametrize(("kind", "size", "options"), ONE_OF_EACH, ids=str)
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Inputs are tiny, and threads of torch's kernels wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def channels(kind: str) -> tuple[int, ...]:
    return (3, 6) if kind == "GroupNorm" else (6,)


def randomize(module: nn.Module) -> nn.Module:
    """Values that no mistake leaves as they are."""
    for t in [*module.parameters(), *module.buffers()]:
        if t.is_floating_point():
            t.data.copy_(torch.rand_like(t) + 0.5)
    return module


def pair(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """Our module and torch's, with the same state."""
    ours = getattr(NN, kind)(*channels(kind), dtype=dtype, **options)
    theirs = getattr(nn, kind)(*channels(kind), dtype=dtype, **options)
    ours.load_state_dict(randomize(theirs).state_dict())
    return ours, theirs


def step(module: Callable[..., Tensor], x: Tensor, **extras: Any) -> dict[str, Tensor]:
    """Output and gradients of one call, and the state after it."""
    x = x.detach().requires_grad_()
    y = module(x, **extras)
    assert isinstance(module, nn.Module)
    leaves = {name: p for name, p in module.named_parameters() if p.requires_grad}
    cotangent = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    grads = torch.autograd.grad(y, [x, *leaves.values()], cotangent)
    found = {f"gradient of {name}": g for name, g in zip(["input", *leaves], grads)}
    return {"output": y.detach(), **found, **copy.deepcopy(module.state_dict())}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert list(got) == list(want)
    for name, t in got.items():
        torch.testing.assert_close(
            t, want[name], rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )
