"""SyncBatchNorm in data parallel training: the model of one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
from parallel_models import (
    check_ddp,
    check_fsdp,
    check_groups_of_data_parallel_ranks,
    check_join,
    check_uneven_batches,
)
from ranks import Ranks

KINDS = ["plain", "channels_last", "rows", "checkpoint", "some in evaluation"]


@pytest.mark.parametrize("kind", KINDS)
def test_models(two: Ranks, kind: str) -> None:
    two.run(check_ddp, kind, {})


@pytest.mark.parametrize(
    "options",
    [
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"broadcast_buffers": False},
        {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.0001},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["plain", "checkpoint"])
def test_options(two: Ranks, kind: str, options: dict[str, Any]) -> None:
    two.run(check_ddp, kind, options)


@pytest.mark.parametrize("option", ["static_graph", "find_unused_parameters"])
def test_parameters_without_use(two: Ranks, option: str) -> None:
    two.run(check_ddp, "unused", {option: True})


@pytest.mark.parametrize("kind", ["plain", "checkpoint"])
def test_gradients_of_several_batches(two: Ranks, kind: str) -> None:
    two.run(check_ddp, kind, {}, True)


@pytest.mark.parametrize("kind", ["plain", "rows"])
def test_four_ranks(four: Ranks, kind: str) -> None:
    four.run(check_ddp, kind, {})


def test_uneven_batches(four: Ranks) -> None:
    four.run(check_uneven_batches)


def test_join_that_throws(two: Ranks) -> None:
    """Without throw_on_early_termination the others would wait for the statistics of a rank that
    has no more batches; torch.nn.SyncBatchNorm does not support that either."""
    two.run(check_join)


def test_groups_of_ranks(four: Ranks) -> None:
    four.run(check_groups_of_data_parallel_ranks)


@pytest.mark.parametrize("per_layer", [True, False])
@pytest.mark.parametrize("kind", ["plain", "rows", "checkpoint"])
def test_fully_sharded(two: Ranks, kind: str, per_layer: bool) -> None:
    two.run(check_fsdp, kind, per_layer)
