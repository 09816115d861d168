"""Tests of what only a device can show. Each run has new random inputs; its seed is printed."""

from __future__ import annotations

import os
import random

import pytest
import torch

SEED = int(os.environ.get("NORMCORE_TEST_SEED", random.randrange(2**31)))


def pytest_report_header() -> str:
    return f"NORMCORE_TEST_SEED={SEED} repeats the random inputs of tests/gpu"


@pytest.fixture(autouse=True)
def seed() -> None:
    print(f"NORMCORE_TEST_SEED={SEED}")  # shown with a failure
    torch.manual_seed(SEED)
