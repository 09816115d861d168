"""Norms of DTensors, and of modules under FSDP2, against the same on one device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dtensor_checks as checks
import pytest
import torch
import torch.distributed as dist
from dtensor_checks import ALL, BASIC, MASKED, RANKS
from ranks import Ranks
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)

R, S = Replicate(), Shard


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    group = Ranks(RANKS)
    yield group
    group.close()


@pytest.mark.parametrize(
    "names", [BASIC, ALL, MASKED], ids=["plain", "residual and mask", "element mask"]
)
@pytest.mark.parametrize(
    ("placements", "stat_placements"),
    [
        ((R,), (R,)),
        ((S(0),), (R,)),
        ((S(1),), (S(0),)),
        ((S(1),), (R,)),
        ((R,), (S(0),)),
        ((S(2),), (R,)),
        ((Partial(),), (R,)),
        ((S(0), R), (R, R)),
        ((S(0), S(1)), (R, S(0))),
        ((R, S(1)), (R, S(0))),
        ((S(0), S(2)), (R, R)),
    ],
    ids=str,
)
def test_batch_norm_in_training(
    ranks: Ranks,
    placements: tuple[Placement, ...],
    stat_placements: tuple[Placement, ...],
    names: tuple[str, ...],
) -> None:
    options = {"activation": "silu"}
    ranks.run(checks.check_batch_norm, (8, 12, 4, 3), placements, stat_placements, options, names)


@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"activation": "relu"}, {"training": False}], ids=str
)
@pytest.mark.parametrize("placement", [R, S(0), S(1), S(3)], ids=str)
def test_batch_norm_options(ranks: Ranks, placement: Placement, options: dict[str, Any]) -> None:
    stats = S(0) if placement == S(1) else R
    ranks.run(checks.check_batch_norm, (8, 12, 3, 4), (placement,), (stats,), options, ALL)


@pytest.mark.parametrize("shape", [(6, 5, 3), (3, 8, 2), (8, 3), (7, 7, 2)], ids=str)
@pytest.mark.parametrize("placement", [S(0), S(1)], ids=str)
def test_batch_norm_of_uneven_shards(
    ranks: Ranks, placement: Placement, shape: tuple[int, ...]
) -> None:
    stats = S(0) if placement == S(1) else R
    ranks.run(checks.check_batch_norm, shape, (placement,), (stats,), {}, BASIC)


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("shape", [(8, 8, 5), (0, 8, 5), (8, 8, 0)], ids=str)
@pytest.mark.parametrize(
    ("placement", "stat_placements", "dtype"),
    [
        (R, (R, R), torch.float32),
        (S(0), (R, R), torch.float32),
        (S(0), (R, R), torch.bfloat16),
        (S(1), (S(0), R), torch.float32),
        (S(1), (R, S(0)), torch.float64),
        (R, (R, S(0)), torch.float32),
        (R, (S(0), R), torch.float32),
    ],
    ids=str,
)
def test_running_statistics(
    ranks: Ranks,
    placement: Placement,
    stat_placements: tuple[Placement, Placement],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    functional: bool,
) -> None:
    ranks.run(checks.check_statistics, placement, stat_placements, dtype, shape, functional)


@pytest.mark.parametrize("names", [BASIC, ALL], ids=["plain", "residual and mask"])
@pytest.mark.parametrize("training", [True, False])
def test_batch_shards_stay_where_they_are(
    ranks: Ranks, training: bool, names: tuple[str, ...]
) -> None:
    ranks.run(checks.check_communication, training, names)


@pytest.mark.parametrize("placement", [R, S(0), S(1)], ids=str)
def test_errors(ranks: Ranks, placement: Placement) -> None:
    ranks.run(checks.check_errors, placement)


@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_functional", "group_norm"])
def test_the_first_call(name: str) -> None:
    group = Ranks(2)
    try:
        group.run(checks.check_first_call, name)
    finally:
        group.close()


@pytest.mark.parametrize(
    "names", [BASIC, ALL, MASKED], ids=["plain", "residual and mask", "element mask"]
)
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per sample"])
@pytest.mark.parametrize(
    ("placements", "stays"),
    [
        ((R,), True),
        ((S(0),), True),
        ((S(1),), False),
        ((S(2),), False),
        ((Partial(),), False),
        ((S(0), R), True),
        ((S(0), S(0)), True),
        ((S(0), S(1)), False),
    ],
    ids=str,
)
def test_group_norm(
    ranks: Ranks,
    placements: tuple[Placement, ...],
    stays: bool,
    names: tuple[str, ...],
    per_sample: bool,
) -> None:
    ranks.run(checks.check_group_norm, placements, stays, {"activation": "gelu"}, names, per_sample)


@pytest.mark.parametrize(
    "options",
    [{"reduction_axes": [1, 2]}, {"reduction_axes": [0, 1, 2, 3]}, {"num_groups": 12}],
    ids=str,
)
@pytest.mark.parametrize("placement", [S(0), S(3)], ids=str)
def test_group_norm_options(ranks: Ranks, placement: Placement, options: dict[str, Any]) -> None:
    ranks.run(checks.check_group_norm, (placement,), False, options, BASIC, False)


def test_calls_that_differ_in_arguments(ranks: Ranks) -> None:
    ranks.run(checks.check_two_calls)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("placement", [R, S(0), S(1)], ids=str)
def test_second_derivative(ranks: Ranks, norm: str, placement: Placement) -> None:
    ranks.run(checks.check_second_derivative, norm, placement)


def test_data_parallel_modules(ranks: Ranks) -> None:
    ranks.run(checks.check_data_parallel)


@pytest.mark.parametrize("placement", [R, S(0)], ids=str)
def test_a_checkpoint_counts_once(ranks: Ranks, placement: Placement) -> None:
    ranks.run(checks.check_checkpoint, placement)


def test_compiled_modules(ranks: Ranks) -> None:
    ranks.run(checks.check_compiled)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_fully_sharded_modules(ranks: Ranks, dtype: torch.dtype | None) -> None:
    ranks.run(checks.check_fully_sharded, dtype)
