"""What malloc does with freed memory while speed is measured.

glibc gives large blocks back to the kernel, so that every output starts on pages which have to be
mapped and cleared. That costs as much as a fast operation itself, and is the same for all. A
process that runs a network can keep its memory, and most do so by means of another malloc.
"""

from __future__ import annotations

import ctypes
import os
import sys

KEEP = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),  # bytes: all blocks from the heap
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),  # bytes: a heap that never shrinks
    "MALLOC_TOP_PAD_": str(1 << 26),  # bytes: a heap that grows in large steps
}
REGIMES = ("kept", "fresh")


def enter(regime: str) -> None:
    """Starts this process again with (kept) or without (fresh) the settings above, if need be.

    glibc reads them once, when a process starts.
    """
    others = {name: value for name, value in os.environ.items() if name not in KEEP}
    wanted = others | KEEP if regime == "kept" else others
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


def release() -> None:
    """Gives freed memory back to the kernel: the holes that a case leaves may fit no other."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def settings() -> dict[str, str]:
    """What the environment says about malloc; another malloc would be preloaded."""
    others = ("GLIBC_TUNABLES", "LD_PRELOAD")
    names = [n for n in os.environ if n.startswith("MALLOC_") or n in others]
    return {name: os.environ[name] for name in sorted(names)}
