"""Tests of what only a device can show. Each run has new random inputs; its seed is printed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch

import normcore

SEED = int(os.environ.get("NORMCORE_TEST_SEED", random.randrange(2**31)))


def pytest_report_header() -> str:
    return f"NORMCORE_TEST_SEED={SEED} repeats the random inputs of tests/gpu"


@pytest.fixture
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Norms take this path where it can run them."""
    normcore._C.set_cuda_path(request.param)
    yield request.param
    normcore._C.set_cuda_path("")


@pytest.fixture(autouse=True)
def seed() -> None:
    print(f"NORMCORE_TEST_SEED={SEED}")  # shown with a failure
    torch.manual_seed(SEED)
