"""The devices that tests run on. Fixture `device` (conftest.py) makes each the default in turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import normcore


def without_cuda() -> str | None:
    """Why nothing can run on a CUDA device here; None if it can."""
    if not normcore.build_info()["cuda"]:
        return "normcore was built without CUDA kernels"
    return None if torch.cuda.is_available() else "no CUDA device"


needs_cuda = pytest.mark.skipif(without_cuda() is not None, reason=str(without_cuda()))


def place(tree: Any) -> Any:
    """`tree` with its tensors, made before there was a default device, on the default device.

    Strides stay, tensors that are one stay one, and those that share memory share it there; those
    on the meta device stay on it.
    """
    device = torch.get_default_device()
    copies: dict[int, Tensor] = {}
    memories: dict[tuple[int, torch.dtype], Tensor] = {}

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type in ("meta", device.type):
            return value
        if id(value) not in copies:
            storage = value.untyped_storage()
            key = storage.data_ptr(), value.dtype
            if key not in memories:
                elements = storage.nbytes() // value.element_size()
                whole = value.detach().as_strided((elements,), (1,), 0)
                memories[key] = whole.to(device)
            moved = memories[key].as_strided(value.shape, value.stride(), value.storage_offset())
            copies[id(value)] = moved.requires_grad_(value.requires_grad)
        return copies[id(value)]

    return tree_map(move, tree)
