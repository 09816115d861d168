"""Memory of a device that holds NaN before a call gets it."""

from __future__ import annotations

import os

import torch

# torch's allocator takes tensors up to 1 MiB from pieces of 2 MiB, others from pieces of 20 MiB and
# more. It prefers what living tensors have left of a piece, so that has to be filled too.
SIZES = [1 << 20] * 32 + [2 << 20] * 64 + [1 << 30]


def poison_freed_memory() -> None:
    """Fills what torch's allocator hands out next with 0xff bytes: NaN in every float dtype.

    Everything that is free is given back, then blocks for small and for large tensors are filled
    and freed; an allocation takes from those before it asks the driver.
    """
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1":
        return  # every tensor has memory of its own: sanitizers look at it
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for size in SIZES]
    del blocks


def hands_out_poison(elements: int) -> bool:
    """Whether a new tensor of that size is NaN throughout; it is freed again."""
    return bool(torch.empty(elements, device="cuda").isnan().all())
