"""What goes between the ranks in a call and in its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rank_groups import group_of
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional_collectives
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import normcore
import normcore.functional as NF

ONE = ["all_reduce float64"]
CHANNELS = 4


class Collectives(TorchDispatchMode):
    """Records the collectives that Python or C++ starts, each with the dtype of its tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, name = func._schema.name.split("::")
        if "c10d" in library and not name.startswith(("wait_tensor", "_")):
            tensor = next(t for t in tree_leaves(args) if isinstance(t, Tensor))
            self.found.append(f"{name.rstrip('_')} {tensor.dtype}".replace("torch.", ""))
        return func(*args, **(kwargs or {}))


def _batch_norm(x: Tensor, w: Tensor, r: Tensor, **options: Any) -> Tensor:
    options = {"training": True, "group": "world", **options}
    mean, var = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    return NF.batch_norm(x, mean, var, w, residual=r, **options)


def _group_norm(x: Tensor, w: Tensor, r: Tensor, **options: Any) -> Tensor:
    return NF.group_norm(x, 2, w, residual=r, group="world", **options)


def _module(module: nn.Module, x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    name = "scale" if hasattr(module, "scale") else "weight"
    y: Tensor = functional_call(module, {name: w}, (x,), {"residual": r})
    return y


# Norms as functions of input, weight and residual, by name: what the tests can send to a rank.
SYNCED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "batch_norm": _batch_norm,
    "batch_norm with a mask": lambda x, w, r: _batch_norm(x, w, r, mask=x.detach() > -1),
    "batch_norm in bfloat16": lambda x, w, r: _batch_norm(
        x.bfloat16(), w, r.bfloat16(), dtype=torch.float32
    ),
    "batch_norm by rank": lambda x, w, r: _batch_norm(
        x, w, r, sync_weighting="rank", unbiased=False
    ),
    "group_norm": _group_norm,
    "group_norm over the batch": lambda x, w, r: _group_norm(x, w, r, reduction_axes=(0, 1, 2)),
    "SyncBatchNorm": lambda *t: _module(normcore.nn.SyncBatchNorm(CHANNELS), *t),
    "BatchNorm": lambda *t: _module(
        normcore.BatchNorm(num_features=CHANNELS, axis=1, axis_name="world"), *t
    ),
    "GroupNorm": lambda *t: _module(
        normcore.GroupNorm(num_features=CHANNELS, num_groups=2, axis=1, axis_name="world"), *t
    ),
}
LOCAL: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "evaluation": lambda x, w, r: _batch_norm(x, w, r, training=False),
    "evaluation by rank": lambda x, w, r: _batch_norm(
        x, w, r, training=False, sync_weighting="rank"
    ),
    "a group of one rank": lambda x, w, r: _batch_norm(x, w, r, group=group_of("alone")),
    "group_norm of one rank": lambda x, w, r: NF.group_norm(
        x, 2, w, residual=r, group=group_of("alone")
    ),
    "no group": lambda x, w, r: _batch_norm(x, w, r, group=None),
    "SyncBatchNorm in evaluation": lambda *t: _module(
        normcore.nn.SyncBatchNorm(CHANNELS).eval(), *t
    ),
    "BatchNorm in evaluation": lambda *t: _module(
        normcore.BatchNorm(num_features=CHANNELS, axis=1, axis_name="world").eval(), *t
    ),
    "frozen BatchNorm": lambda *t: _module(
        normcore.BatchNorm(num_features=CHANNELS, axis=1, axis_name="world").freeze(affine=False),
        *t,
    ),
    "axis groups of one rank": lambda *t: _module(
        normcore.BatchNorm(
            num_features=CHANNELS, axis=1, axis_name="world", axis_index_groups=[[0], [1]]
        ),
        *t,
    ),
}


def check_counts(
    kind: str,
    required: tuple[str, ...],
    wanted: tuple[str, ...],
    samples: int,
    forward: list[str],
    backward: list[str],
) -> None:
    """The collectives of a call and of its gradients of the `wanted` operands.

    `required`: those that require gradients.
    """
    norm = (SYNCED | LOCAL)[kind]
    operands = {
        "x": torch.randn(samples, CHANNELS, 5),
        "w": torch.randn(CHANNELS),
        "r": torch.randn(samples, CHANNELS, 5),
    }
    for name in required:
        operands[name].requires_grad_()
    group_of("alone")  # whose making communicates
    with Collectives() as first:
        y = norm(*operands.values())
    assert first.found == forward
    if wanted:
        with Collectives() as second:
            torch.autograd.grad(y, [operands[name] for name in wanted], torch.ones_like(y))
        assert second.found == backward


def check_no_grad(kind: str) -> None:
    operands = [torch.randn(2, CHANNELS, 5), torch.randn(CHANNELS), torch.randn(2, CHANNELS, 5)]
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, Collectives() as made:
            (SYNCED | LOCAL)[kind](*operands)
        assert made.found == ONE


def check_other_collectives() -> None:
    """That the recorder sees what it has to: of every kind, and in a backward pass."""
    group = group_of("world")
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    x.register_hook(lambda grad: functional_collectives.all_reduce(grad, "sum", group) * 1)
    with Collectives() as made:
        dist.all_reduce(x.detach().float())
        dist.all_gather([torch.ones(3), torch.ones(3)], torch.ones(3))
        x.square().sum().backward()
    assert made.found == ["allreduce float32", "allgather float32", "all_reduce float64"]
