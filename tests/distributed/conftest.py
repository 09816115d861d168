"""Worlds of gloo processes, each started when a test wants it and kept for all that follow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from ranks import Ranks


def _world(size: int) -> Iterator[Ranks]:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    ranks = Ranks(size)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    yield from _world(2)


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    yield from _world(4)


@pytest.fixture(scope="session")
def eight() -> Iterator[Ranks]:
    yield from _world(8)
