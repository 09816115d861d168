"""Derivatives across ranks in float64: of second order, in forward mode, as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ranks import Ranks
from sync_calls import Call
from sync_derivatives import (
    NESTED,
    check_differences,
    check_double_backward,
    check_forward_mode,
    check_gradients_as_functions,
    check_hessian_times_vector,
    check_nested,
    check_rank_without_gradient,
    check_vmap,
)

ROWS: dict[str, Any] = {"shape": (0, 4, 5), "sizes": (3, 3)}
PARTS: dict[str, Any] = {"shape": (2, 4, 0), "sizes": (3, 4), "split": 2, "num_groups": 2}
BY_RANK = {"sync_weighting": "rank", "unbiased": False}
CALLS = {
    "batch norm": Call(**ROWS),
    "uneven ranks": Call(**ROWS | {"sizes": (1, 4)}),
    "an empty rank": Call(**ROWS | {"sizes": (0, 4)}),
    "one value per rank": Call((0, 4), (1, 1)),
    "ranks of equal weight": Call(**ROWS, options=BY_RANK),
    "mask": Call(**ROWS, mask="elements"),
    "a masked rank": Call(**ROWS, mask="one rank"),
    "no parameters": Call(**ROWS, names=()),
    "epilogue": Call(
        **ROWS, names=("weight", "bias", "residual"), options={"activation": "gelu_tanh"}
    ),
    "last axis": Call((3, 0, 4), (2, 3), split=1, options={"axis": -1, "activation": "silu"}),
    "group norm": Call(**PARTS),
    "group norm, an empty rank": Call(**PARTS | {"sizes": (0, 4)}),
    "group norm, epilogue": Call(
        **PARTS,
        names=("weight", "bias", "residual"),
        mask="elements",
        options={"activation": "silu"},
    ),
    "group norm over the batch": Call(
        (0, 4, 3), (2, 3), num_groups=2, options={"reduction_axes": (0, 1, 2)}
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "check",
    [
        check_gradients_as_functions,
        check_double_backward,
        check_forward_mode,
        check_hessian_times_vector,
        check_differences,
    ],
)
def test_two_ranks(two: Ranks, check: Callable[[Call], None], name: str) -> None:
    two.run(check, CALLS[name])


@pytest.mark.parametrize("transforms", NESTED)
@pytest.mark.parametrize("name", ["batch norm", "an empty rank", "group norm"])
def test_nested_transforms(two: Ranks, name: str, transforms: str) -> None:
    two.run(check_nested, CALLS[name], transforms)


@pytest.mark.parametrize("name", ["batch norm", "group norm"])
def test_vmap(two: Ranks, name: str) -> None:
    two.run(check_vmap, CALLS[name])


@pytest.mark.parametrize("sizes", [(3, 3), (1, 4), (0, 2)], ids=str)
def test_a_rank_without_gradient(two: Ranks, sizes: tuple[int, int]) -> None:
    two.run(check_rank_without_gradient, Call((0, 4, 5), sizes))


@pytest.mark.parametrize("layout", ["neighbours", "strided"])
@pytest.mark.parametrize("check", [check_double_backward, check_forward_mode])
def test_groups_of_four_ranks(four: Ranks, check: Callable[[Call], None], layout: str) -> None:
    four.run(check, Call((0, 4, 5), (1, 4), layout=layout, options={"activation": "silu"}))
