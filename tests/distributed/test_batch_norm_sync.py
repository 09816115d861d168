"""Batch norm with statistics of all ranks: values, gradients and running statistics.

Compared with the float64 reference of the whole batch, within the bound of tolerance.py: one
rounding of a result, and some roundings of the terms that are added up to it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_groups import FORMS
from ranks import Ranks
from reference import ACTIVATIONS
from sync_calls import (
    MASKS,
    Call,
    check,
    check_alone,
    check_far,
    check_hidden,
    check_order,
    check_special_value,
)

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
IMAGE = (0, 5, 4, 3)
LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous": {"shape": IMAGE},
    "channels_last": {"shape": IMAGE, "memory": "channels_last"},
    "transposed": {"shape": IMAGE, "memory": "transposed"},
    "sliced": {"shape": IMAGE, "memory": "sliced"},
    "another on each rank": {"shape": IMAGE, "memory": "different"},
    "rows": {"shape": (0, 17)},
    "sequences": {"shape": (0, 6, 11)},
    "volumes": {"shape": (0, 3, 2, 4, 3)},
    "last axis": {"shape": (0, 4, 3, 6), "options": {"axis": -1}},
    "first axis": {"shape": (5, 0, 7), "split": 1, "options": {"axis": 0}},
    "two axes": {"shape": (0, 4, 3, 6), "options": {"axis": (1, 3)}},
    "parts of images": {"shape": (3, 5, 0, 4), "split": 2},
    "many values": {"shape": (0, 3, 40, 40)},
    "many channels": {"shape": (0, 300)},
}
SPLITS = [(3, 3), (1, 5), (4, 0), (0, 2), (1, 1), (1, 0), (0, 0)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(two: Ranks, layout: str, dtype: torch.dtype) -> None:
    two.run(check, Call(sizes=(3, 2), dtype=dtype, **LAYOUTS[layout]))


@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_uneven_and_empty_ranks(two: Ranks, sizes: tuple[int, ...], mask: str | None) -> None:
    two.run(check, Call(IMAGE, sizes, mask=mask))


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_one_value_per_sample(two: Ranks, sizes: tuple[int, ...]) -> None:
    """(1, 1): one value per channel on each rank; (1, 0): one on all."""
    two.run(check, Call((0, 6), sizes, dtype=torch.float32))


@pytest.mark.parametrize("sizes", [(2, 2, 2, 2), (5, 1, 0, 3), (0, 0, 4, 0), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_four_ranks(four: Ranks, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    four.run(check, Call(IMAGE, sizes, dtype=dtype, mask="elements"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_eight_ranks(eight: Ranks, dtype: torch.dtype) -> None:
    eight.run(check, Call(IMAGE, (3, 0, 1, 4, 2, 1, 0, 5), dtype=dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["neighbours", "strided"])
def test_groups_of_ranks(four: Ranks, layout: str, form: str) -> None:
    four.run(check, Call(IMAGE, (1, 3), layout=layout, form=form))


@pytest.mark.parametrize("form", [*FORMS, "world"])
def test_forms_of_the_group_of_all(two: Ranks, form: str) -> None:
    two.run(check, Call(IMAGE, (1, 3), form=form))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_epilogue(two: Ranks, memory: str, activation: str | None, dtype: torch.dtype) -> None:
    names = ("weight", "bias", "residual")
    options = {"activation": activation}
    two.run(check, Call(IMAGE, (2, 3), dtype=dtype, memory=memory, names=names, options=options))


@pytest.mark.parametrize("names", [(), ("weight",), ("bias",), ("residual",)], ids=str)
def test_absent_operands(two: Ranks, names: tuple[str, ...]) -> None:
    two.run(check, Call(IMAGE, (2, 3), names=names, options={"activation": "silu"}))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_masks(two: Ranks, dtype: torch.dtype, memory: str, mask: str) -> None:
    options = {"activation": "gelu"}
    two.run(check, Call(IMAGE, (4, 3), dtype=dtype, memory=memory, mask=mask, options=options))


@pytest.mark.parametrize("num_groups", [None, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("mask", ["samples", "elements", "one rank"])
def test_what_a_mask_hides(two: Ranks, mask: str, value: float, num_groups: int | None) -> None:
    shape, split = (IMAGE, 0) if num_groups is None else ((2, 5, 0), 2)
    call = Call(shape, (2, 3), split, num_groups=num_groups, dtype=torch.float32, mask=mask)
    two.run(check_hidden, call, value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values(two: Ranks, value: float) -> None:
    two.run(check_special_value, Call((0, 3, 5), (2, 3), dtype=torch.float32), value)


@pytest.mark.parametrize(
    "options",
    [
        {"unbiased": False},
        {"momentum": 0.7},
        {"momentum": None},
        {"momentum": 0.0},
        {"eps": 0.5},
        {"dtype": torch.float32},
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options(two: Ranks, dtype: torch.dtype, options: dict[str, Any]) -> None:
    two.run(check, Call(IMAGE, (2, 3), dtype=dtype, options=options))


@pytest.mark.parametrize("param_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_dtypes(two: Ranks, dtype: torch.dtype, param_dtype: torch.dtype) -> None:
    two.run(check, Call(IMAGE, (2, 3), dtype=dtype, param_dtype=param_dtype))


@pytest.mark.parametrize("state_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes_of_running_statistics(
    two: Ranks, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    two.run(check, Call(IMAGE, (2, 3), dtype=dtype, state_dtype=state_dtype, mask="elements"))


@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_ranks_of_equal_weight(two: Ranks, sizes: tuple[int, ...], mask: str | None) -> None:
    """A channel that one rank has no value of is NaN on all, and keeps its running statistics."""
    options = {"sync_weighting": "rank", "unbiased": False}
    two.run(check, Call(IMAGE, sizes, mask=mask, options=options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_four_ranks_of_equal_weight(four: Ranks, dtype: torch.dtype) -> None:
    options = {"sync_weighting": "rank", "unbiased": False, "activation": "silu"}
    four.run(check, Call(IMAGE, (4, 1, 3, 2), dtype=dtype, mask="elements", options=options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("values", ["far", "apart", "scaled"])
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_means_far_from_zero_or_apart(
    four: Ranks, memory: str, values: str, dtype: torch.dtype
) -> None:
    four.run(check, Call(IMAGE, (4, 1, 3, 4), dtype=dtype, memory=memory, values=values))


@pytest.mark.parametrize("values", ["far", "apart"])
@pytest.mark.parametrize("num_groups", [None, 2])
def test_float32_is_within_1e_6_of_float64(two: Ranks, num_groups: int | None, values: str) -> None:
    call = Call((5, 6, 0, 7), (9, 4), 2, num_groups=num_groups, values=values, dtype=torch.float32)
    two.run(check_far, call)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("values", ["normal", "far", "apart", "scaled", "wide"])
def test_the_order_of_ranks_changes_no_bit(four: Ranks, values: str, dtype: torch.dtype) -> None:
    four.run(check_order, Call(IMAGE, (4, 1, 0, 3), dtype=dtype, values=values))


@pytest.mark.parametrize("num_groups", [None, 2])
@pytest.mark.parametrize("weighting", ["count", "rank"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_group_of_one_rank(
    two: Ranks, dtype: torch.dtype, weighting: str, num_groups: int | None
) -> None:
    options: dict[str, Any] = {"sync_weighting": weighting, "activation": "silu"}
    if num_groups is None:
        options["unbiased"] = weighting == "count"
    call = Call(
        (0, 6, 4), (3,), dtype=dtype, mask="elements", num_groups=num_groups, options=options
    )
    two.run(check_alone, call)
