"""Group norm with statistics of all ranks: a slice (n, g) is that of every rank together.

The ranks have the same samples and channels, and different parts of the axes that are reduced.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_groups import FORMS
from ranks import Ranks
from reference import ACTIVATIONS
from sync_calls import MASKS, Call, check

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SEQUENCE: dict[str, Any] = {"shape": (3, 6, 0), "split": 2, "num_groups": 3}
IMAGE: dict[str, Any] = {"shape": (2, 6, 4, 0), "split": 3, "num_groups": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "sequence": SEQUENCE,
    "image": IMAGE,
    "channels_last": IMAGE | {"memory": "channels_last"},
    "transposed": IMAGE | {"memory": "transposed"},
    "another on each rank": IMAGE | {"memory": "different"},
    "last axis": {"shape": (2, 0, 8), "split": 1, "num_groups": 4, "options": {"axis": -1}},
    "one group": SEQUENCE | {"num_groups": 1},
    "a group per channel": SEQUENCE | {"num_groups": 6},
    "whole batch": {
        "shape": (0, 6, 5),
        "num_groups": 2,
        "options": {"reduction_axes": (0, 1, 2)},
    },
    "some axes": {
        "shape": (2, 3, 0, 8),
        "split": 2,
        "num_groups": 4,
        "options": {"axis": -1, "reduction_axes": (-2, -1)},
    },
    "two feature axes": {
        "shape": (2, 3, 0, 4),
        "split": 2,
        "num_groups": 2,
        "options": {"axis": (1, 3)},
    },
}
SPLITS = [(3, 3), (1, 5), (4, 0), (1, 1), (1, 0), (0, 0)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(two: Ranks, layout: str, dtype: torch.dtype) -> None:
    two.run(check, Call(sizes=(3, 2), dtype=dtype, **LAYOUTS[layout]))


@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("weighting", ["count", "rank"])
def test_uneven_and_empty_ranks(
    two: Ranks, weighting: str, sizes: tuple[int, ...], mask: str | None
) -> None:
    two.run(check, Call(sizes=sizes, mask=mask, **SEQUENCE, options={"sync_weighting": weighting}))


def test_no_samples(two: Ranks) -> None:
    two.run(check, Call((0, 6, 0), (1, 3), split=2, num_groups=3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_four_ranks(four: Ranks, dtype: torch.dtype) -> None:
    four.run(check, Call(sizes=(5, 1, 0, 2), dtype=dtype, **IMAGE))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["neighbours", "strided"])
def test_groups_of_ranks(four: Ranks, layout: str, form: str) -> None:
    four.run(check, Call(sizes=(1, 3), layout=layout, form=form, **IMAGE))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_epilogue(two: Ranks, dtype: torch.dtype, activation: str | None) -> None:
    names = ("weight", "bias", "residual")
    options = {"activation": activation}
    two.run(check, Call(sizes=(2, 3), dtype=dtype, names=names, options=options, **IMAGE))


@pytest.mark.parametrize("names", [(), ("weight",), ("bias",), ("residual",)], ids=str)
def test_absent_operands(two: Ranks, names: tuple[str, ...]) -> None:
    two.run(check, Call(sizes=(2, 3), names=names, options={"activation": "silu"}, **IMAGE))


@pytest.mark.parametrize("names", [("weight",), ("weight", "bias")], ids=str)
def test_parameters_of_each_sample(two: Ranks, names: tuple[str, ...]) -> None:
    two.run(check, Call(sizes=(2, 3), names=names, per_sample=True, **IMAGE))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("values", ["far", "apart", "scaled"])
def test_means_far_from_zero_or_apart(four: Ranks, values: str, dtype: torch.dtype) -> None:
    four.run(check, Call(sizes=(4, 1, 3, 4), dtype=dtype, values=values, **IMAGE))
