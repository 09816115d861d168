"""Facts about the machine and the software, for the files that hold results."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

import normcore

from .common import commit

# What decides which kernels run.
X86 = ["avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_bf16"]
ARM = ["asimd", "asimdhp", "bf16", "sve", "sve2"]
SYSTEM = Path("/sys/devices/system/cpu")


def _cpuinfo(*keys: str) -> str:
    """The value of the first of these keys in /proc/cpuinfo, empty without one."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _caches() -> dict[str, str]:
    """Size of each cache of the first core, such as {"L1 Data": "48K"}."""
    found = {}
    for folder in sorted(SYSTEM.glob("cpu0/cache/index*")):
        level, kind, size = ((folder / f).read_text().strip() for f in ("level", "type", "size"))
        found[f"L{level}" if kind == "Unified" else f"L{level} {kind}"] = size
    return found


def cache_bytes(level: int | None = None) -> int | None:
    """Of the first core's data cache of a level, by default of the last; None if not known."""
    sizes = {
        int(name[1]): int(size.removesuffix("K")) << 10
        for name, size in _caches().items()
        if "Instruction" not in name
    }
    return sizes.get(level or max(sizes)) if sizes else None


def available_bytes() -> int | None:
    """Of memory that new processes can have; None if not known."""
    path = Path("/proc/meminfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return int(value.split()[0]) << 10
    return None


def machine(device: str) -> dict[str, Any]:
    """The processor, and the GPU if `device` is "cuda"."""
    flags = set(_cpuinfo("flags", "Features").split())
    return {
        "processor": _cpuinfo("model name", "Model") or platform.processor() or platform.machine(),
        "instructions": [name for name in X86 + ARM if name in flags],
        "cores": len(os.sched_getaffinity(0)),
        "caches": _caches(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def facts(device: str) -> dict[str, Any]:
    """What every file of results says about where it comes from."""
    return {
        "machine": machine(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "normcore": normcore.build_info(),
        },
        "commit": commit(),
        "device": device,
        "threads": torch.get_num_threads(),
    }
