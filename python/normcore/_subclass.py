"""What the operators do for inputs of tensor subclasses; the native library calls these functions.

``torch.distributed.tensor`` takes a second to import, so what is written for it (``_dtensor``)
waits for somebody else to import it.
"""

from __future__ import annotations

import sys

from torch import Tensor


def prepare(input: Tensor) -> None:
    """Makes the rules known that a subclass looks up when it sees an operator."""
    if "torch.distributed.tensor" in sys.modules:
        from . import _dtensor  # noqa: F401  (importing it is what counts)


def is_spread(input: Tensor, running_mean: Tensor | None, axis: list[int]) -> bool:
    """Whether no device can take the statistics of a batch norm in training by itself."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from . import _dtensor

    return _dtensor.is_spread(input, running_mean, axis)
