"""What every rank of test_dtensor.py checks: norms of DTensors against the same on one device."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.checkpoint import checkpoint

import normcore

ops = torch.ops.normcore
RANKS = 4
MESHES: dict[int, tuple[int, ...]] = {1: (4,), 2: (2, 2)}
R, S = Replicate(), Shard
CLOSE: Any = {"rtol": 2e-5, "atol": 2e-5}


def mesh_of(placements: Sequence[Placement]) -> DeviceMesh:
    return init_device_mesh("cpu", MESHES[len(placements)])


def spread(t: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A leaf; Partial: shares of its values."""
    if any(isinstance(p, Partial) for p in placements):
        result = DTensor.from_local(t / mesh.size(), mesh, placements)
    else:
        result = distribute_tensor(t.detach().clone(), mesh, placements)
    return result.detach().requires_grad_(t.requires_grad)


def full(t: Tensor | None) -> Tensor | None:
    return t.full_tensor() if isinstance(t, DTensor) else t


def assert_same(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(full(a), e, equal_nan=True, **CLOSE)


def operands(shape: Sequence[int], axis: int = 1) -> dict[str, Tensor]:
    channels = shape[axis]
    element_mask = torch.rand(*shape) < 0.7
    element_mask[:, 1] = False  # a channel without a value
    return {
        "input": (3 * torch.randn(*shape) + 2).requires_grad_(),
        "weight": torch.randn(channels).requires_grad_(),
        "bias": torch.randn(channels).requires_grad_(),
        "residual": torch.randn(*shape).requires_grad_(),
        "mask": torch.rand(shape[0], 1, *shape[2:]) < 0.7,
        "element_mask": element_mask,
    }


class BatchNorm:
    """A call of the operator in training, and what it leaves behind."""

    def __init__(self, given: dict[str, Tensor], stats: list[Tensor], **options: Any) -> None:
        self.given, self.stats, self.options = given, stats, options

    def __call__(self) -> Tensor:
        given = self.given
        mean, var, count = self.stats
        return ops.batch_norm(
            given["input"],
            mean,
            var,
            given["weight"],
            given["bias"],
            self.options.get("training", True),
            self.options.get("momentum", 0.3),
            mask=given.get("mask", given.get("element_mask")),
            activation=self.options.get("activation"),
            residual=given.get("residual"),
            num_batches_tracked=count,
            axis=self.options.get("axis", 1),
        )


def statistics(channels: int) -> list[Tensor]:
    return [torch.randn(channels), torch.rand(channels) + 0.5, torch.tensor(2)]


def gradients(y: Tensor, given: dict[str, Tensor], cotangent: Tensor) -> list[Tensor | None]:
    leaves = [t for t in given.values() if t.requires_grad]
    return list(torch.autograd.grad(y, leaves, cotangent))


def check_batch_norm(
    shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    stat_placements: tuple[Placement, ...],
    options: dict[str, Any],
    names: tuple[str, ...],
) -> None:
    mesh = mesh_of(placements)
    given = {name: t for name, t in operands(shape).items() if name in names}
    stats = statistics(shape[1])
    cotangent = torch.randn(*shape)
    if "element_mask" in given:  # no gradient comes from what is NaN
        cotangent[:, 1] = 0
    everywhere = [R] * len(placements)
    split = {
        name: spread(t, mesh, placements if name == "input" else everywhere)
        for name, t in given.items()
    }
    split_stats = [
        spread(stats[0], mesh, stat_placements),
        spread(stats[1], mesh, stat_placements),
        spread(stats[2], mesh, everywhere),
    ]
    y = BatchNorm(split, split_stats, **options)()
    expected = BatchNorm(given, stats, **options)()
    assert_same([y, *split_stats], [expected, *stats])
    assert [t.placements for t in split_stats[:2]] == [tuple(stat_placements)] * 2
    assert_same(
        gradients(y, split, spread(cotangent, mesh, placements_of(y))),
        gradients(expected, given, cotangent),
    )


def placements_of(t: Tensor) -> tuple[Placement, ...]:
    assert isinstance(t, DTensor)
    return t.placements


BASIC = ("input", "weight", "bias")
ALL = (*BASIC, "residual", "mask")
MASKED = (*BASIC, "element_mask")


def check_communication(training: bool) -> None:
    mesh = mesh_of([S(0)])
    given = operands((8, 6, 5))
    split = {name: spread(given[name], mesh, [S(0)] if name == "input" else [R]) for name in BASIC}
    stats = [spread(t, mesh, [R]) for t in statistics(6)]
    with CommDebugMode() as communication:
        y = BatchNorm(split, stats, training=training)()
    assert placements_of(y) == (S(0),)
    counts = {op.__name__: n for op, n in communication.get_comm_counts().items()}
    assert set(counts) <= ({"all_reduce"} if training else set()), counts
    assert bool(counts) == training


def group_norm(given: dict[str, Tensor], **options: Any) -> Tensor:
    given = dict(given)
    if "element_mask" in given:
        given["mask"] = given.pop("element_mask")
    return ops.group_norm(
        given.pop("input"), options.pop("num_groups", 4), given.pop("weight"), given.pop("bias"),
        **given, **options
    )  # fmt: skip


def check_group_norm(
    placements: tuple[Placement, ...],
    stays: bool,
    options: dict[str, Any],
    names: tuple[str, ...],
    per_sample: bool,
) -> None:
    mesh = mesh_of(placements)
    given = {name: t for name, t in operands((8, 12, 4, 3)).items() if name in names}
    if per_sample:
        for name in ("weight", "bias"):
            given[name] = torch.randn(8, 12).requires_grad_()
    split = {
        name: spread(t, mesh, placements if name == "input" else [R] * len(placements))
        for name, t in given.items()
    }
    with CommDebugMode() as communication:
        y = group_norm(split, **options)
    expected = group_norm(given, **options)
    assert_same([y], [expected])
    if stays:
        assert placements_of(y) == placements
        assert communication.get_total_counts() == 0
    cotangent = torch.randn_like(expected)
    assert_same(
        gradients(y, split, spread(cotangent, mesh, placements_of(y))),
        gradients(expected, given, cotangent),
    )


def check_two_calls() -> None:
    """What is no tensor decides about placements as well: DTensor remembers those of every call."""
    mesh = mesh_of([S(0)])
    x = torch.randn(8, 8, 4)
    split = spread(x, mesh, [S(0)])
    for axis in (1, 0, 2):
        for groups in (2, 4):
            y = ops.group_norm(split, groups, axis=axis)
            assert_same([y], [ops.group_norm(x, groups, axis=axis)])
        assert_same(
            [ops.batch_norm(split, None, None, training=True, axis=axis)],
            [ops.batch_norm(x, None, None, training=True, axis=axis)],
        )


def check_second_derivative(norm: str, placement: Placement) -> None:
    mesh = mesh_of([placement])
    given = {name: t for name, t in operands((8, 4, 6)).items() if name in BASIC}
    split = {
        name: spread(t, mesh, [placement] if name == "input" else [R]) for name, t in given.items()
    }

    def penalty_gradients(given: dict[str, Tensor]) -> list[Tensor | None]:
        x, weight, bias = given.values()
        if norm == "batch":
            y = ops.batch_norm(x, None, None, weight, bias, True, activation="silu")
        else:
            y = ops.group_norm(x, 2, weight, bias, activation="silu")
        (grad,) = torch.autograd.grad((y * y).sum(), [x], create_graph=True)
        return list(torch.autograd.grad((grad * grad).sum(), [x, weight, bias]))

    assert_same(penalty_gradients(split), penalty_gradients(given))


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 8),
        normcore.BatchNorm(num_features=8, dtype=None),
        nn.Linear(8, 8),
        normcore.nn.BatchNorm1d(8),
        nn.Linear(8, 8),
        normcore.GroupNorm(num_features=8, num_groups=2, dtype=None),
    )


def train(model: nn.Module, x: Tensor, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(x)
        (y * y).mean().backward()
        optimizer.step()


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    theirs = expected.state_dict()
    for name, t in actual.state_dict().items():
        torch.testing.assert_close(full(t), theirs[name], msg=lambda m: f"{name}: {m}", **CLOSE)  # noqa: B023


def check_data_parallel() -> None:
    mesh = mesh_of([S(0)])
    expected, x = model(), torch.randn(12, 6)
    parallel = distribute_module(deepcopy(expected), mesh)
    train(expected, x)
    train(parallel, spread(x, mesh, [S(0)]))
    assert_same_state(parallel, expected)
    expected.eval(), parallel.eval()
    with torch.inference_mode():
        assert_same([parallel(spread(x, mesh, [S(0)]))], [expected(x)])


def check_checkpoint(placement: Placement) -> None:
    mesh = mesh_of([placement])
    norm = distribute_module(normcore.BatchNorm(num_features=6), mesh)
    x = spread(torch.randn(8, 6).requires_grad_(), mesh, [placement])
    checkpoint(norm, x, use_reentrant=False).sum().backward()
    expected = normcore.BatchNorm(num_features=6)
    expected(full(x))
    assert_same_state(norm, expected)


def check_compiled() -> None:
    mesh = mesh_of([S(0)])
    expected, x = model(), torch.randn(12, 6)
    parallel = distribute_module(deepcopy(expected), mesh)
    split = spread(x, mesh, [S(0)])
    train(expected, x)
    train(torch.compile(parallel, backend="aot_eager", fullgraph=True), split)
    assert_same_state(parallel, expected)


def check_fully_sharded(dtype: torch.dtype | None) -> None:
    """Every rank has its part of the batch, and statistics of that part."""
    mesh = init_device_mesh("cpu", (RANKS,))
    expected, x = model(), torch.randn(RANKS * 6, 6)
    sharded = deepcopy(expected)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in sharded:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(sharded, mesh=mesh, mp_policy=policy)
    mine = x.chunk(RANKS)[dist.get_rank()]
    y = sharded(mine)
    (y.float() ** 2).mean().backward()
    assert y.dtype == (dtype or torch.float32)

    if dtype is not None:  # parameters as FSDP hands them on, buffers as they are
        for parameter in expected.parameters():
            parameter.data = parameter.data.to(dtype)
        mine = mine.to(dtype)
    z = expected(mine)
    (z.float() ** 2).mean().backward()
    torch.testing.assert_close(y, z)
    for ours, theirs in zip(sharded.parameters(), expected.parameters(), strict=True):
        total = theirs.grad.float()
        dist.all_reduce(total)
        torch.testing.assert_close(full(ours.grad), total / RANKS, rtol=1e-2, atol=1e-3)
        assert isinstance(ours, DTensor)
    for ours, theirs in zip(sharded.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.dtype in (torch.float32, torch.int64)
