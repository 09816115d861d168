"""Process groups of the ranks of a test, and the forms in which a norm takes them.

What runs on the ranks: every function is called by all of them, in the same order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

FORMS = ["object", "name", "mesh"]


@cache
def partition(layout: str) -> list[list[int]]:
    """The ranks of every group: of all ranks, of halves, of one rank each."""
    ranks = list(range(dist.get_world_size()))
    half = len(ranks) // 2
    return {
        "world": [ranks],
        "neighbours": [ranks[:half], ranks[half:]],
        "strided": [ranks[::2], ranks[1::2]],
        "alone": [[rank] for rank in ranks],
    }[layout]


def index_of_group(layout: str) -> int:
    rank = dist.get_rank()
    return next(i for i, ranks in enumerate(partition(layout)) if rank in ranks)


def members(layout: str) -> list[int]:
    """The ranks of this rank's group."""
    return partition(layout)[index_of_group(layout)]


@cache
def _object(layout: str) -> Any:
    if layout == "world":
        return dist.group.WORLD
    groups = [dist.new_group(ranks) for ranks in partition(layout)]
    return groups[index_of_group(layout)]


@cache
def _mesh(layout: str) -> DeviceMesh:
    return DeviceMesh.from_group(_object(layout), "cpu", mesh_dim_names=("ranks",))


def group_of(layout: str, form: str = "object") -> Any:
    """This rank's group; "world" is a form of the group of all ranks."""
    if form == "world":
        return "world"
    if form == "mesh":
        return _mesh(layout)
    return _object(layout).group_name if form == "name" else _object(layout)


def gather(t: Tensor, layout: str = "world") -> list[Tensor]:
    """The tensors of all ranks of this rank's group, which have one shape."""
    found = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in members(layout)]
    dist.all_gather(found, t.detach().contiguous(), group=group_of(layout))
    return found


def total(t: Tensor, layout: str = "world") -> Tensor:
    """The sum of the tensors of all ranks of this rank's group."""
    return torch.stack(gather(t, layout)).sum(0)


def assert_equal_bits(got: Tensor, want: Tensor, name: str = "result") -> None:
    bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (got, want)]
    assert torch.equal(*bits), f"{name}: {got} instead of {want}"


def assert_the_same_everywhere(t: Tensor, layout: str = "world", name: str = "result") -> None:
    """Bit by bit, on all ranks of this rank's group."""
    for other in gather(t, layout):
        assert_equal_bits(other, t, name)
