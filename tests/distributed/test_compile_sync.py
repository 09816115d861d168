"""Norms over ranks in compiled programs: one graph, one collective in each pass."""

from __future__ import annotations

import pytest
from ranks import Ranks
from sync_graphs import (
    NORMS,
    check_compiled,
    check_compiled_autograd,
    check_data_parallel,
    check_export,
    check_graphs,
    check_many_sizes,
)


@pytest.mark.parametrize("norm", NORMS)
def test_graphs(two: Ranks, norm: str) -> None:
    two.run(check_graphs, norm)


@pytest.mark.parametrize("norm", NORMS)
def test_steps(two: Ranks, norm: str) -> None:
    two.run(check_compiled, norm, "aot_eager", (2, 2))


@pytest.mark.parametrize("sizes", [(1, 4), (0, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("norm", ["SyncBatchNorm", "GroupNorm"])
def test_uneven_and_empty_ranks(two: Ranks, norm: str, sizes: tuple[int, int]) -> None:
    two.run(check_compiled, norm, "aot_eager", sizes)


@pytest.mark.parametrize("sizes", [(1, 4), (0, 3)], ids=str)
def test_inductor(two: Ranks, sizes: tuple[int, int]) -> None:
    two.run(check_compiled, "SyncBatchNorm", "inductor", sizes)


def test_many_sizes(two: Ranks) -> None:
    two.run(check_many_sizes)


def test_data_parallel(two: Ranks) -> None:
    two.run(check_data_parallel)


def test_compiled_autograd(two: Ranks) -> None:
    two.run(check_compiled_autograd)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("norm", ["SyncBatchNorm", "BatchNorm"])
def test_export_of_evaluation(two: Ranks, norm: str, strict: bool) -> None:
    two.run(check_export, norm, strict)
