"""What every rank of test_dtensor.py checks: norms of DTensors against the same on one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import pytest
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import normcore

ops = torch.ops.normcore
RANKS = 4
R, S = Replicate(), Shard
CLOSE: Any = {"rtol": 2e-5, "atol": 2e-5}


def mesh_of(placements: Sequence[Placement]) -> DeviceMesh:
    size = dist.get_world_size()
    return init_device_mesh("cpu", (size,) if len(placements) == 1 else (2, size // 2))


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


def statistics(channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    mean, var = torch.randn(channels), torch.rand(channels) + 0.5
    return [mean.to(dtype), var.to(dtype), torch.tensor(2)]


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


def check_statistics(
    placement: Placement,
    stat_placements: tuple[Placement, Placement],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    functional: bool,
) -> None:
    mesh = mesh_of([placement])
    x, stats = torch.randn(*shape), statistics(shape[1], dtype)
    split = [spread(t, mesh, [p]) for t, p in zip(stats, (*stat_placements, R), strict=True)]

    def call(x: Tensor, mean: Tensor, var: Tensor, count: Tensor) -> list[Tensor]:
        if functional:
            return list(ops.batch_norm_functional(x, mean, var, num_batches_tracked=count))
        y = ops.batch_norm(x, mean, var, training=True, num_batches_tracked=count)
        return [y, mean, var, count]

    actual, expected = call(spread(x, mesh, [placement]), *split), call(x, *stats)
    for a, e in zip(actual, expected, strict=True):
        tolerance = CLOSE if e.dtype == torch.float32 else {}
        torch.testing.assert_close(full(a), e, **tolerance)
    assert [placements_of(t) for t in actual[1:3]] == [(p,) for p in stat_placements]


def count_of(communication: CommDebugMode) -> dict[str, int]:
    return {op.__name__: n for op, n in communication.get_comm_counts().items()}


class LargestCollective(TorchDispatchMode):
    """Records how many values the largest tensor has that goes to another rank."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace and isinstance(args[0], Tensor):
            self.values = max(self.values, args[0].numel())
        return func(*args, **(kwargs or {}))


def check_communication(training: bool, names: tuple[str, ...]) -> None:
    """Only sums of channels travel, in both passes, and only in training."""
    shape = (8, 6, 5)
    mesh = mesh_of([S(0)])
    given = operands(shape)
    split = {name: spread(given[name], mesh, [S(0)] if name == "input" else [R]) for name in names}
    stats = [spread(t, mesh, [R]) for t in statistics(6)]
    cotangent = spread(torch.randn(*shape), mesh, [S(0)])
    with CommDebugMode() as forward, LargestCollective() as largest:
        y = BatchNorm(split, stats, training=training)()
    assert placements_of(y) == (S(0),)
    with CommDebugMode() as backward, largest:
        gradients(y, {"input": split["input"]}, cotangent)
    most = 3 + ("mask" in names) if training else 0  # of the mask: its sum
    for communication in (forward, backward):
        assert set(count_of(communication)) <= {"all_reduce"}, count_of(communication)
        assert communication.get_total_counts() <= most, count_of(communication)
    assert largest.values == (6 if training else 0)


def state_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.to_local().clone() for t in tensors if isinstance(t, DTensor)]


def check_errors(placement: Placement) -> None:
    """They are those of plain tensors, and change nothing."""
    mesh = mesh_of([placement])
    x = torch.randn(8, 8, 4)
    split = spread(x, mesh, [placement])
    wrong: dict[str, dict[str, Any]] = {
        "weight": {"weight": torch.ones(3)},
        "mask": {"mask": torch.ones(8, 8, 3) > 0},
        "residual": {"residual": torch.ones(8, 8, 3)},
        "activation": {"activation": "tanh"},
        "axis": {"axis": 5},
        "eps": {"eps": -1.0},
    }
    stats = [spread(t, mesh, [R]) for t in statistics(8)]
    before = state_of(stats)
    for name, options in wrong.items():
        on_mesh = {
            n: spread(v, mesh, [R]) if isinstance(v, Tensor) else v for n, v in options.items()
        }

        def norms(x: Tensor, options: dict[str, Any], stats: list[Any]) -> Iterator[Any]:
            mean, var, count = stats
            more = {"training": True, "num_batches_tracked": count, **options}
            yield lambda: ops.batch_norm(x, mean, var, **more)
            yield lambda: ops.group_norm(x, 2, **options)

        for ours, plain in zip(
            norms(split, on_mesh, stats), norms(x, options, statistics(8)), strict=True
        ):
            with pytest.raises(Exception) as expected:  # noqa: PT011  (compared with another)
                plain()
            with pytest.raises(expected.type) as found:
                ours()
            assert str(found.value) == str(expected.value), name
    for name in ("weight", "mask", "residual"):
        plain_tensor = torch.ones(8) if name == "weight" else torch.ones(8, 8, 4)
        for norm in (
            lambda o: ops.batch_norm(split, None, None, training=True, **o),
            lambda o: ops.group_norm(split, 2, **o),
        ):
            with pytest.raises(TypeError, match=f"_norm: expected {name} to be a DTensor like"):
                norm({name: plain_tensor})
    partial = DTensor.from_local(torch.tensor(0), mesh, [Partial()])
    with pytest.raises(TypeError, match=r"num_batches_tracked .* without Partial"):
        ops.batch_norm(split, *stats[:2], training=True, num_batches_tracked=partial)
    assert all(map(torch.equal, state_of(stats), before))


def check_first_call(name: str) -> None:
    """Every public operator may be the first that meets a DTensor, in inference mode too."""
    x = torch.randn(8, 6, 5)
    with torch.inference_mode():
        mesh = mesh_of([S(0)])
        split = spread(x, mesh, [S(0)])
        stats = [spread(t, mesh, [R]) for t in (torch.zeros(6), torch.ones(6))]
        if name == "group_norm":
            y, expected = ops.group_norm(split, 2), ops.group_norm(x, 2)
        elif name == "batch_norm":
            y = ops.batch_norm(split, *stats, training=True)
            expected = ops.batch_norm(x, None, None, training=True)
        else:
            y = ops.batch_norm_functional(split, *stats)[0]
            expected = ops.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(full(y), expected, **CLOSE)


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
        tolerance: Any = CLOSE if dtype is None else {"rtol": 1e-2, "atol": 1e-3}
        torch.testing.assert_close(full(ours.grad), total / RANKS, **tolerance)
        assert isinstance(ours, DTensor)
    for ours, theirs in zip(sharded.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.dtype in (torch.float32, torch.int64)
