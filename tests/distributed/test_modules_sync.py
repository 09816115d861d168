"""SyncBatchNorm, conversion of models, and BatchNorm and GroupNorm with an ``axis_name``."""

from __future__ import annotations

from typing import Any

import pytest
import sync_module_checks as checks
from ranks import Ranks


@pytest.mark.parametrize("layout", ["world", "neighbours", "strided", "alone"])
def test_sums_of_the_tests(four: Ranks, layout: str) -> None:
    four.run(checks.check_total, layout)


# ---- SyncBatchNorm ----


@pytest.mark.parametrize("sizes", [(3, 3), (1, 4), (0, 4)], ids=str)
@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 5), (0, 6, 4, 3), (0, 6, 2, 3, 2)], ids=str)
def test_sync_batch_norm(two: Ranks, shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    two.run(checks.check_sync_batch_norm, shape, sizes, {})


@pytest.mark.parametrize(
    "options",
    [
        {"eps": 1e-2},
        {"momentum": 0.7},
        {"momentum": None},
        {"affine": False},
        {"track_running_stats": False},
    ],
    ids=str,
)
def test_options(two: Ranks, options: dict[str, Any]) -> None:
    two.run(checks.check_sync_batch_norm, (0, 6, 4, 3), (2, 3), options)


@pytest.mark.parametrize("layout", ["neighbours", "strided"])
def test_groups_of_ranks(four: Ranks, layout: str) -> None:
    four.run(checks.check_sync_batch_norm, (0, 6, 5), (1, 3), {}, layout)


def test_extras(two: Ranks) -> None:
    two.run(checks.check_extras)


def test_one_value_per_rank(two: Ranks) -> None:
    two.run(checks.check_one_value_per_rank)


def test_empty_everywhere(two: Ranks) -> None:
    two.run(checks.check_empty_everywhere)


def test_checkpoint(two: Ranks) -> None:
    two.run(checks.check_checkpoint)


def test_copies(two: Ranks) -> None:
    two.run(checks.check_copies)


def test_autocast(two: Ranks) -> None:
    two.run(checks.check_autocast)


def test_dtensor(two: Ranks) -> None:
    two.run(checks.check_dtensor)


# ---- conversion ----


@pytest.mark.parametrize("sizes", [(3, 3), (2, 4)], ids=str)
def test_conversion(two: Ranks, sizes: tuple[int, int]) -> None:
    two.run(checks.check_conversion, "world", sizes)


@pytest.mark.parametrize("layout", ["neighbours", "strided"])
def test_conversion_for_groups_of_ranks(four: Ranks, layout: str) -> None:
    four.run(checks.check_conversion, layout, (2, 4))


# ---- axes of meshes ----

PAIRS = {"neighbours": [[0, 1], [2, 3]], "strided": [[0, 2], [1, 3]]}


@pytest.mark.parametrize("kind", ["BatchNorm", "GroupNorm"])
@pytest.mark.parametrize("sizes", [(2, 2), (3, 1)], ids=str)
@pytest.mark.parametrize(("axis_name", "layout"), [("data", "strided"), ("model", "neighbours")])
def test_axes_of_a_mesh(
    four: Ranks, axis_name: str, layout: str, sizes: tuple[int, int], kind: str
) -> None:
    four.run(checks.check_axis, kind, (2, 2), axis_name, None, PAIRS[layout], sizes)


@pytest.mark.parametrize("kind", ["BatchNorm", "GroupNorm"])
@pytest.mark.parametrize("axis_name", ["world", "data"])
@pytest.mark.parametrize("layout", PAIRS)
def test_groups_of_an_axis(four: Ranks, layout: str, axis_name: str, kind: str) -> None:
    groups = PAIRS[layout]
    four.run(checks.check_axis, kind, (4,), axis_name, groups, groups, (3, 1))


@pytest.mark.parametrize("kind", ["BatchNorm", "GroupNorm"])
@pytest.mark.parametrize("axis_name", ["world", "data"])
def test_all_ranks(four: Ranks, axis_name: str, kind: str) -> None:
    four.run(checks.check_axis, kind, (4,), axis_name, None, [[0, 1, 2, 3]], (3, 0, 1, 2))


def test_groups_of_an_axis_of_two(eight: Ranks) -> None:
    """Indices are those within the axis."""
    ranks = [[0, 2], [1, 3], [4, 6], [5, 7]]
    eight.run(checks.check_axis, "BatchNorm", (2, 4), "model", [[0, 2], [1, 3]], ranks, (1, 3))


def test_meshes(four: Ranks) -> None:
    four.run(checks.check_meshes)


def test_lazy_modules(two: Ranks) -> None:
    two.run(checks.check_lazy)
