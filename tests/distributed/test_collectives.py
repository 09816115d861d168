"""How often the ranks meet: once in a call, once in its backward pass, never without need."""

from __future__ import annotations

import pytest
from collectives import (
    LOCAL,
    ONE,
    SYNCED,
    check_counts,
    check_no_grad,
    check_other_collectives,
)
from ranks import Ranks


def test_the_recorder(two: Ranks) -> None:
    two.run(check_other_collectives)


@pytest.mark.parametrize("samples", [3, 0])
@pytest.mark.parametrize("wanted", [("x",), ("x", "w", "r")], ids=str)
@pytest.mark.parametrize("kind", SYNCED)
def test_one_in_each_pass(two: Ranks, kind: str, wanted: tuple[str, ...], samples: int) -> None:
    two.run(check_counts, kind, wanted, wanted, samples, ONE, ONE)


@pytest.mark.parametrize("wanted", [("w",), ("r",), ("w", "r")], ids=str)
@pytest.mark.parametrize("input_too", [False, True], ids=["no gradient", "not asked for"])
@pytest.mark.parametrize("kind", SYNCED)
def test_none_in_a_backward_pass_without_the_input(
    two: Ranks, kind: str, input_too: bool, wanted: tuple[str, ...]
) -> None:
    required = ("x", *wanted) if input_too else wanted
    two.run(check_counts, kind, required, wanted, 3, ONE, [])


@pytest.mark.parametrize("kind", SYNCED)
def test_one_without_gradients(two: Ranks, kind: str) -> None:
    two.run(check_no_grad, kind)


@pytest.mark.parametrize("wanted", [(), ("x", "w", "r")], ids=str)
@pytest.mark.parametrize("kind", LOCAL)
def test_none_where_each_rank_has_its_own(two: Ranks, kind: str, wanted: tuple[str, ...]) -> None:
    two.run(check_counts, kind, wanted, wanted, 3, [], [])
