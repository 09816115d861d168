"""Batch and group normalization for PyTorch: C++ operators with the semantics of treex and Flax.

``normcore.BatchNorm`` and ``normcore.GroupNorm`` are the modules, ``normcore.nn`` holds those of
torch.nn, ``normcore.functional`` the functions and ``torch.ops.normcore`` the operators below them.
``normcore.distributed`` names the devices that share statistics.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ._version import __version__
from ._version import torch_version as _built_for


def _require_torch_version(built_for: str, found: str) -> None:
    """Raises ImportError unless torch has the minor version that the native library needs."""
    if found.split(".")[:2] != built_for.split("."):
        raise ImportError(
            f"normcore {__version__} was built for torch {built_for}, but torch {found} is "
            f'installed. Either install that torch (pip install "torch=={built_for}.*") or build '
            "normcore against this one (pip install --no-build-isolation . in its source folder)."
        )


_require_torch_version(_built_for, torch.__version__)

from . import _C, distributed, functional, nn  # noqa: E402  (the native library needs the right torch)
from .convert import convert_sync_batchnorm, revert  # noqa: E402
from .functional import explain  # noqa: E402
from .modules import BatchNorm, GroupNorm, freeze, unfreeze  # noqa: E402
from .override import override_aten  # noqa: E402
from .settings import batch_invariant, set_batch_invariant  # noqa: E402

#: Folder for CMAKE_PREFIX_PATH of C++ projects that use this installation.
cmake_prefix_path = str(Path(__file__).parent)

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "__version__",
    "batch_invariant",
    "build_info",
    "cmake_prefix_path",
    "convert_sync_batchnorm",
    "distributed",
    "explain",
    "freeze",
    "functional",
    "nn",
    "override_aten",
    "revert",
    "set_batch_invariant",
    "unfreeze",
]

build_info = _C.build_info
