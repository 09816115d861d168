"""Settings of the library, for the whole process."""

from __future__ import annotations

from . import _C


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
