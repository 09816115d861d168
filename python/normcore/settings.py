"""Settings of the library, for the whole process.

``NORMCORE_DEBUG_SYNC=1`` in the environment, read when the library is imported, makes the ranks of
a norm compare what they are about to do, in training and in evaluation: where they disagree, each
of them raises a ValueError that lists all.
"""

from __future__ import annotations

import os

from . import _C

DEBUG_SYNC = os.environ.get("NORMCORE_DEBUG_SYNC", "0") not in ("", "0")
_C.set_debug_sync(DEBUG_SYNC)


def set_batch_invariant(enabled: bool) -> None:
    """Whether results on CUDA devices are independent of the number of samples, bit for bit.

    By default the CUDA kernels may look at the number of samples to fill the device. With
    ``enabled`` they look at one sample only: group norm, and batch norm with running statistics,
    give a sample the same bits in every batch, which may cost speed for few samples. On the CPU
    that is so anyway, and results are the same from run to run either way.
    """
    _C.set_batch_invariant(enabled)


def batch_invariant() -> bool:
    """Whether :func:`set_batch_invariant` is enabled."""
    return _C.batch_invariant()
