"""What the operators do for inputs of tensor subclasses; the native library calls these functions.

``torch.distributed.tensor`` takes a second to import, so what is written for it (``_dtensor``)
waits for somebody else to import it.
"""

from __future__ import annotations

import sys

from torch import Tensor


def _has_dtensors() -> bool:
    return "torch.distributed.tensor" in sys.modules


def is_dtensor(op: str, input: Tensor, others: dict[str, Tensor]) -> bool:
    """Whether `input` is a DTensor: then the rules are known, and `others` are checked."""
    if not _has_dtensors():
        return False
    from . import _dtensor

    return _dtensor.is_dtensor(op, input, others)


def is_spread(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    axis: list[int],
) -> bool:
    """Whether no device can take the statistics of a batch norm in training by itself."""
    if not _has_dtensors():
        return False
    from . import _dtensor

    return _dtensor.is_spread(input, running_mean, running_var, num_batches_tracked, axis)


def gathered(sum: Tensor) -> Tensor:
    """A sum that is not added up over the devices yet, on all of them; anything else as it is."""
    if not _has_dtensors():
        return sum
    from . import _dtensor

    return _dtensor.gathered(sum)
