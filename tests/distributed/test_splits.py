"""Norms over two ranks for drawn splits of the batch, sizes and masks."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from sync_calls import MASKS, Call, check

sizes = st.tuples(st.integers(0, 5), st.integers(0, 5))
masks = st.sampled_from([None, *MASKS])
dtypes = st.sampled_from([torch.float64, torch.float32])
weightings = st.sampled_from(["count", "rank"])


@settings(max_examples=25)
@given(
    sizes=sizes,
    rest=st.tuples(st.integers(2, 9), st.integers(1, 5), st.integers(1, 5)),
    mask=masks,
    dtype=dtypes,
    weighting=weightings,
    memory=st.sampled_from(["contiguous", "channels_last", "different"]),
)
def test_batch_norm(
    two: Ranks,
    sizes: tuple[int, int],
    rest: tuple[int, int, int],
    mask: str | None,
    dtype: torch.dtype,
    weighting: str,
    memory: str,
) -> None:
    options: dict[str, Any] = {"sync_weighting": weighting, "unbiased": weighting == "count"}
    call = Call((0, *rest), sizes, dtype=dtype, mask=mask, memory=memory, options=options)
    two.run(check, call)


@settings(max_examples=25)
@given(
    sizes=sizes,
    samples=st.integers(1, 4),
    groups=st.integers(1, 4),
    size=st.integers(2, 4),
    rows=st.integers(1, 5),
    mask=masks,
    dtype=dtypes,
    weighting=weightings,
)
def test_group_norm(
    two: Ranks,
    sizes: tuple[int, int],
    samples: int,
    groups: int,
    size: int,
    rows: int,
    mask: str | None,
    dtype: torch.dtype,
    weighting: str,
) -> None:
    call = Call(
        (samples, groups * size, 0, rows),
        sizes,
        split=2,
        num_groups=groups,
        dtype=dtype,
        mask=mask,
        options={"sync_weighting": weighting},
    )
    two.run(check, call)
