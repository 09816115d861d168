"""Models under DistributedDataParallel and FSDP, against one process with the whole batch.

Every rank has the whole model, whose norms are torch's, and trains it on the whole batch; then a
copy with ``normcore.nn.SyncBatchNorm`` in a data parallel wrapper on its part of the batch.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_groups import assert_the_same_everywhere
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import normcore

CLOSE: Any = {"rtol": 1e-10, "atol": 1e-10}


class Network(nn.Module):
    """Norms in a chain and in parallel branches, and parameters that may be without use."""

    checkpointed = False  # torch's norms would count a batch twice

    def __init__(self, *, unused: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 6, 3, padding=1)
        )
        self.norm = nn.BatchNorm2d(6, momentum=None)
        self.shortcut = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, affine=False))
        self.head = nn.Linear(6, 2)
        self.spare = nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2)) if unused else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return self.head((self.norm(y) + self.shortcut(x)).relu().mean((2, 3)))


class Perceptron(nn.Sequential):
    """The same for 2-D inputs."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4)
        )


def make_model(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "rows":
        return Perceptron().double()
    model = Network(unused=kind == "unused").double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    if kind == "some in evaluation":
        model.stem[1].eval()
        model.shortcut.eval()
    if kind == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    return model


def synced(kind: str, model: nn.Module, group: Any = None) -> nn.Module:
    """A copy that combines statistics."""
    model = normcore.convert_sync_batchnorm(copy.deepcopy(model), group)
    model.checkpointed = kind == "checkpoint"
    return model


def make_batch(kind: str, samples: int) -> Tensor:
    if kind == "rows":
        return torch.randn(samples, 5, dtype=torch.float64)
    x = torch.randn(samples, 3, 5, 4, dtype=torch.float64)
    return x.to(memory_format=torch.channels_last) if kind == "channels_last" else x


def part(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def train(
    model: Any, batches: list[Tensor], accumulate: bool, optimizer: torch.optim.Optimizer
) -> None:
    """Steps of one batch each; `accumulate`: of two."""
    optimizer.zero_grad()
    for i, x in enumerate(batches):
        waits = accumulate and i % 2 == 0
        with model.no_sync() if waits and hasattr(model, "no_sync") else nullcontext():
            model(x).square().mean().backward()
        if not waits:
            optimizer.step()
            optimizer.zero_grad()


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def assert_close(name: str, got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, msg=lambda text: f"{name}: {text}", **CLOSE)


def assert_same_state(got: nn.Module, want: nn.Module) -> None:
    theirs = want.state_dict()
    ours = {name.removeprefix("module."): t for name, t in got.state_dict().items()}
    assert list(ours) == list(theirs)
    for name, t in ours.items():
        assert_close(name, full(t), theirs[name])
        assert_the_same_everywhere(full(t), name=name)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def check_ddp(kind: str, options: dict[str, Any], accumulate: bool = False) -> None:
    """The model after some steps; a gradient that is wrong makes another one."""
    whole = make_model(kind)
    model = synced(kind, whole)
    batches = [make_batch(kind, 6 * dist.get_world_size()) for _ in range(4)]
    parallel = DistributedDataParallel(model, **options)
    train(whole, batches, accumulate, sgd(whole))
    train(parallel, [part(x) for x in batches], accumulate, sgd(parallel))
    assert_same_state(parallel, whole)
    x = make_batch(kind, 4)
    torch.testing.assert_close(parallel.eval()(x), whole.eval()(x), **CLOSE)


def check_uneven_batches() -> None:
    """Losses are means over all samples if each rank weighs its own by their number."""
    whole = make_model("plain")
    parallel = DistributedDataParallel(synced("plain", whole))
    ranks, rank = dist.get_world_size(), dist.get_rank()
    sizes = [5, *[1 + r for r in range(ranks - 1)]]
    x = make_batch("plain", sum(sizes))
    mine = x.split(sizes)[rank]
    whole(x).square().mean().backward()
    (parallel(mine).square().mean() * (len(mine) * ranks / len(x))).backward()
    for (name, got), want in zip(
        parallel.module.named_parameters(), whole.parameters(), strict=True
    ):
        assert_close(name, got.grad, want.grad)


def check_join() -> None:
    """The first rank has fewer batches than the others: all learn of it before they wait for it."""
    model = synced("plain", make_model("plain"))
    parallel = DistributedDataParallel(model)
    batches = [make_batch("plain", 2) for _ in range(2 if dist.get_rank() == 0 else 4)]
    with (
        pytest.raises(RuntimeError, match=r"exhausted (all )?inputs"),
        parallel.join(throw_on_early_termination=True),
    ):
        train(parallel, batches, False, sgd(parallel))
    assert_the_same_everywhere(model.norm.running_mean)


def check_groups_of_data_parallel_ranks() -> None:
    """Gradients are means over all ranks, statistics those of pairs of them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    model = make_model("rows")
    in_pairs = synced("rows", model, mesh.get_group("inner"))
    parallel = DistributedDataParallel(in_pairs, broadcast_buffers=False)
    x = make_batch("rows", 16)
    parallel(part(x)).square().mean().backward()
    halves = [copy.deepcopy(model) for _ in range(2)]
    for half, batch in zip(halves, x.chunk(2)):
        half(batch).square().mean().backward()
    for ours, *theirs in zip(parallel.parameters(), *(half.parameters() for half in halves)):
        want = sum(p.grad for p in theirs) / 2
        torch.testing.assert_close(ours.grad, want, **CLOSE)
    own = halves[dist.get_rank() // 2]
    torch.testing.assert_close(in_pairs[1].running_var, own[1].running_var, **CLOSE)


def check_fsdp(kind: str, per_layer: bool) -> None:
    whole = make_model(kind)
    model = synced(kind, whole)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if per_layer:
        for layer in list(model.children()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batches = [make_batch(kind, 4 * dist.get_world_size()) for _ in range(3)]
    train(whole, batches, False, sgd(whole))
    train(model, [part(x) for x in batches], False, sgd(model))
    assert_same_state(model, whole)
