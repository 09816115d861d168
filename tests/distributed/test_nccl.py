"""Norms over NCCL: needs two devices."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from nccl_checks import check_step
from ranks import Ranks

import normcore


def has_two_devices() -> bool:
    return (
        bool(normcore.build_info()["cuda"])
        and dist.is_nccl_available()
        and torch.cuda.device_count() >= 2
    )


@pytest.mark.skipif(not has_two_devices(), reason="needs two CUDA devices and NCCL")
def test_step(two: Ranks) -> None:
    two.run(check_step)
