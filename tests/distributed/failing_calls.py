"""Calls that fail: by their arguments, on every rank before it waits for others, and by what the
other ranks do or do not do."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_groups import assert_equal_bits, group_of
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import normcore
import normcore.functional as NF
from normcore.distributed import use_mesh


def state() -> list[Tensor]:
    return [torch.zeros(6), torch.ones(6), torch.tensor(0)]


def batch_norm(held: list[Tensor] | None = None, x: Tensor | None = None, **options: Any) -> Tensor:
    mean, var, count = held or state()
    options = {"group": "world", "training": True, **options}
    x = torch.randn(4, 6, 3) if x is None else x
    return NF.batch_norm(x, mean, var, num_batches_tracked=count, **options)


def group_norm(held: list[Tensor], **options: Any) -> Tensor:
    return NF.group_norm(torch.randn(4, 6, 3), 2, **{"group": "world", **options})


def module(held: list[Tensor], kind: Any = normcore.BatchNorm, **options: Any) -> Tensor:
    own = {"num_groups": 2} if kind is normcore.GroupNorm else {}
    norm = kind(num_features=6, axis=1, **own, **options)
    if kind is normcore.BatchNorm:
        norm.mean, norm.var = held[:2]
    y: Tensor = norm(torch.randn(4, 6, 3))
    return y


def on_mesh(held: list[Tensor], axis_name: str, **options: Any) -> Tensor:
    with use_mesh(init_device_mesh("cpu", (2,), mesh_dim_names=("data",))):
        return module(held, axis_name=axis_name, **options)


def only_first() -> Any:
    """The group of rank 0; of the other what new_group() gives to those outside."""
    return dist.new_group([0])


def name_of_a_group_of_others() -> str:
    names = [""]
    if dist.get_rank() == 0:
        names = [group_of("alone", "name")]
    else:
        group_of("alone")
    dist.broadcast_object_list(names, 0)
    return names[0]


TIMEOUT = 5  # seconds that a collective waits for a rank that does not come

Mistake = tuple[Callable[[list[Tensor]], Any], type[Exception], str]

# By name: the call, the error and its text, on every rank.
MISTAKES: dict[str, Mistake] = {
    "unknown name": (
        lambda held: batch_norm(held, group="no such group"),
        ValueError,
        "^batch_norm: expected group to be the name of a process group, got 'no such group'",
    ),
    "unknown name of group_norm": (
        lambda held: group_norm(held, group="no such group"),
        ValueError,
        "^group_norm: expected group to be the name of a process group, got 'no such group'",
    ),
    "no group": (
        lambda held: batch_norm(held, group=3.5),
        TypeError,
        "^batch_norm: expected group to be a process group",
    ),
    "mesh of two dimensions": (
        lambda held: batch_norm(
            held, group=init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
        ),
        ValueError,
        "^batch_norm: expected group to be a DeviceMesh of one dimension, got 2",
    ),
    "sync_weighting": (
        lambda held: batch_norm(held, sync_weighting="size"),
        ValueError,
        "^batch_norm: expected sync_weighting to be 'count' or 'rank', got 'size'",
    ),
    "sync_weighting of group_norm": (
        lambda held: group_norm(held, sync_weighting="size"),
        ValueError,
        "^group_norm: expected sync_weighting to be 'count' or 'rank', got 'size'",
    ),
    "sync_weighting of a module": (
        lambda held: normcore.GroupNorm(num_groups=2, axis_name="world", sync_weighting="size"),
        ValueError,
        "^GroupNorm: expected sync_weighting to be .*count.* or .*rank.*, got .*size",
    ),
    "unbiased by rank": (
        lambda held: batch_norm(held, sync_weighting="rank"),
        ValueError,
        "^batch_norm: expected unbiased False with sync_weighting 'rank', got True",
    ),
    "no mesh": (
        lambda held: module(held, axis_name="data"),
        ValueError,
        "^BatchNorm: expected axis_name to be 'world' or .*, got 'data' and no mesh",
    ),
    "no mesh for group_norm": (
        lambda held: module(held, normcore.GroupNorm, axis_name="data"),
        ValueError,
        "^GroupNorm: expected axis_name to be 'world' or .*, got 'data' and no mesh",
    ),
    "unknown axis": (
        lambda held: on_mesh(held, "model"),
        ValueError,
        "^BatchNorm: expected axis_name to be .*data.*, got 'model'",
    ),
    "groups that leave out a rank": (
        lambda held: on_mesh(held, "data", axis_index_groups=[[0]]),
        ValueError,
        "^BatchNorm: expected axis_index_groups to be a partition of",
    ),
    "groups with a rank twice": (
        lambda held: on_mesh(held, "world", axis_index_groups=[[0, 1], [1]]),
        ValueError,
        "^BatchNorm: expected axis_index_groups to be a partition of",
    ),
    "groups with another rank": (
        lambda held: on_mesh(held, "world", axis_index_groups=[[0, 2], [1]]),
        ValueError,
        "^BatchNorm: expected axis_index_groups to be a partition of",
    ),
    "weight": (
        lambda held: batch_norm(held, weight=torch.ones(5)),
        ValueError,
        "^batch_norm: expected weight",
    ),
    "mask": (
        lambda held: batch_norm(held, mask=torch.ones(4, 5, 3)),
        ValueError,
        "^batch_norm: expected mask",
    ),
    "momentum": (
        lambda held: NF.batch_norm(
            torch.randn(4, 6), *held[:2], training=True, momentum=None, group="world"
        ),
        ValueError,
        "^batch_norm: expected num_batches_tracked with momentum None",
    ),
    "vmap": (
        lambda held: torch.vmap(lambda x: batch_norm(held, x))(torch.randn(2, 4, 6, 3)),
        NotImplementedError,
        "^batch_norm: ",
    ),
    "vmap of group_norm": (
        lambda held: torch.vmap(lambda x: NF.group_norm(x, 2, group="world"))(
            torch.randn(2, 4, 6, 3)
        ),
        NotImplementedError,
        "^group_norm: ",
    ),
    "requires_grad": (
        lambda held: batch_norm([held[0].requires_grad_(), *held[1:]]),
        ValueError,
        "^batch_norm: expected running_mean",
    ),
}


def check_mistake(name: str) -> None:
    """The error on this rank, which has changed nothing; then the ranks understand each other."""
    call, error, text = MISTAKES[name]
    held = state()
    with pytest.raises(error, match=text):
        call(held)
    for t, before in zip(held, state(), strict=True):
        assert_equal_bits(t, before)
    check_call()


def check_call() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 3)
    rank = dist.get_rank()
    y = batch_norm(x=x[2 * rank :][:2])
    want = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(y, want[2 * rank :][:2])


def check_rank_outside(form: str) -> None:
    """The rank inside is alone."""
    group: Any = only_first() if form == "object" else name_of_a_group_of_others()
    x = torch.randn(4, 6, 3)
    if dist.get_rank() == 0:
        torch.testing.assert_close(
            batch_norm(x=x, group=group), batch_norm(x=x, group=None), rtol=0, atol=0
        )
    else:
        with pytest.raises(ValueError, match=r"^batch_norm: expected group to be .* process group"):
            batch_norm(x=x, group=group)
    check_call()


# ---- what others do ----


@cache
def impatient() -> Any:
    """A group of all ranks that does not wait long, and is connected on all of them."""
    dist.barrier()
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    dist.barrier(group)  # new_group() may return on one rank while another still connects
    return group


def call(name: str, x: Tensor) -> Tensor:
    group = impatient()
    if name == "group_norm":
        return NF.group_norm(x, 2, group=group)
    if name == "SyncBatchNorm":
        y: Tensor = normcore.nn.SyncBatchNorm(6, process_group=group)(x)
        return y
    return NF.batch_norm(x, None, None, training=True, group=group)


def leave_before_the_call(name: str) -> None:
    impatient()
    if dist.get_rank() == 1:
        os._exit(0)
    call(name, torch.randn(4, 6, 3))


def leave_before_the_backward_pass(name: str) -> None:
    y = call(name, torch.randn(4, 6, 3, requires_grad=True))
    if dist.get_rank() == 1:
        os._exit(0)
    y.sum().backward()


def do_not_call(name: str) -> None:
    impatient()
    if dist.get_rank() == 0:
        call(name, torch.randn(4, 6, 3))


def call_in_two_modes() -> None:
    norm = normcore.nn.SyncBatchNorm(6, process_group=impatient())
    norm.train(dist.get_rank() == 0)(torch.randn(4, 6, 3))


def call_with_different_features() -> None:
    call("batch_norm", torch.randn(4, 6 + dist.get_rank()))


def call_with_different_samples() -> None:
    call("group_norm", torch.randn(4 + dist.get_rank(), 6, 3))


# ---- with NORMCORE_DEBUG_SYNC ----


def check_report(name: str) -> None:
    """Every rank learns what each of them did, and the ranks go on."""
    rank = dist.get_rank()
    calls: dict[str, tuple[Callable[[], Any], str]] = {
        "modes": (
            lambda: batch_norm(training=rank == 0),
            "rank 0: batch_norm in training.*; rank 1: batch_norm in evaluation",
        ),
        "features": (
            lambda: NF.batch_norm(
                torch.randn(4, 6 + rank), None, None, training=True, group="world"
            ),
            "rank 0: .* 6 statistics.*; rank 1: .* 7 statistics",
        ),
        "gradients": (
            lambda: batch_norm(x=torch.randn(4, 6, requires_grad=rank == 0)),
            "rank 0: .* with a gradient of the input; rank 1: .* without a gradient",
        ),
        "samples": (
            lambda: NF.group_norm(torch.randn(4 + rank, 6), 2, group="world"),
            "rank 0: .* 8 statistics.*; rank 1: .* 10 statistics",
        ),
        "norms": (
            lambda: batch_norm() if rank == 0 else group_norm([]),
            "rank 0: batch_norm .*; rank 1: group_norm ",
        ),
        "weighting": (
            lambda: batch_norm(unbiased=False, sync_weighting="count" if rank == 0 else "rank"),
            "rank 0: .*'count'.*; rank 1: .*'rank'",
        ),
    }
    call, text = calls[name]
    with pytest.raises(ValueError, match=text):
        call()
    check_call()
    x = torch.randn(4, 6, requires_grad=True)
    batch_norm(x=x, training=False).sum().backward()
