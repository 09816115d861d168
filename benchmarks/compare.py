"""Speed of normcore beside torch eager on this machine, as ratios taken in one run.

    python benchmarks/compare.py --threads 1 --output build/compare.json

Every case of tests/shapes/shapes.json with the tag "bench" is run as batch norm (training forward,
backward, eval) and group norm (forward, backward, with a fused SiLU), in float32 and bfloat16
(float32 parameters). The two libraries alternate and each takes its best time, so that other load
on the machine hits both; `clone` is the time of `x.clone()`, a bound by memory traffic. Freed
memory is kept by the process unless --fresh-pages is given, which shows the cost of mapping new
pages for every output. Nothing is asserted: figures differ from machine to machine.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import (
    ROOT,
    Operands,
    backward_of,
    batch_norms,
    commit,
    geometric_mean,
    group_norms,
    make_operands,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table

import normcore

SHAPES = ROOT / "tests" / "shapes" / "shapes.json"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


@dataclass(frozen=True)
class Result:
    shape: str
    operation: str
    dtype: str
    threads: int
    normcore_ms: float
    torch_ms: float
    clone_ms: float

    @property
    def ratio(self) -> float:
        """How many times faster than torch."""
        return self.torch_ms / self.normcore_ms


def keep_freed_memory() -> None:
    """Lets malloc reuse large blocks, so that outputs do not start on unmapped pages."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def best_times(candidates: list[Callable[[], object]], seconds: float) -> list[float]:
    """Best time of each in ms; the candidates alternate."""
    for run in candidates:
        run()
    best = [math.inf] * len(candidates)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        for i, run in enumerate(candidates):
            start = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - start)
        rounds += 1
    return [1e3 * t for t in best]


def operations(o: Operands) -> dict[str, list[Callable[[], object]]]:
    cases: dict[str, list[Callable[[], object]]] = {}
    pairs = {
        "batch_norm eval": batch_norms(o, False),
        "batch_norm train": batch_norms(o, True),
        "group_norm": group_norms(o, False),
        "group_norm + silu": group_norms(o, True),
    }
    for name, norms in pairs.items():
        cases[name] = [torch.no_grad()(lambda f=f: f(o.x)) for f in norms]
    backward = {"batch_norm": batch_norms(o, True), "group_norm": group_norms(o, False)}
    for name, norms in backward.items():
        cases[name + " backward"] = [backward_of(f, o) for f in norms]
    return cases


def measure(shape: dict, dtype: torch.dtype, threads: int, seconds: float) -> list[Result]:
    o = make_operands(shape["size"], shape["axis"][0], shape["groups"], shape["layout"], dtype)
    results = []
    for name, (ours, theirs) in operations(o).items():
        times = best_times([ours, theirs, o.x.clone], seconds)
        results.append(
            Result(shape["name"], name, str(dtype).removeprefix("torch."), threads, *times)
        )
    return results


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def show(results: list[Result]) -> None:
    console = Console(width=120)
    table = Table(title="times faster than torch eager (ms of normcore, % of a clone's speed)")
    for column in ("shape", "dtype", *dict.fromkeys(r.operation for r in results)):
        table.add_column(column)
    rows: dict[tuple[str, str], list[Result]] = {}
    for r in results:
        rows.setdefault((r.shape, r.dtype), []).append(r)
    for (shape, dtype), row in rows.items():
        cells = [
            f"{r.ratio:.2f} ({r.normcore_ms:.3g}, {100 * r.clone_ms / r.normcore_ms:.0f}%)"
            for r in row
        ]
        table.add_row(shape, dtype, *cells)
    console.print(table)
    for dtype in dict.fromkeys(r.dtype for r in results):
        ratios = [r.ratio for r in results if r.dtype == dtype]
        console.print(
            f"{dtype}: geometric mean {geometric_mean(ratios):.2f}, worst {min(ratios):.2f}, "
            f"best {max(ratios):.2f} over {len(ratios)} cases"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.3, help="per case")
    parser.add_argument("--only", default="", help="part of a shape's name")
    parser.add_argument("--fresh-pages", action="store_true", help="do not keep freed memory")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.fresh_pages:
        keep_freed_memory()
    shapes = [
        s
        for s in json.loads(SHAPES.read_text())
        if "bench" in s["tags"] and arguments.only in s["name"]
    ]
    cases = [(s, d) for s in shapes for d in (torch.float32, torch.bfloat16)]
    results: list[Result] = []
    for shape, dtype in track(cases, "measuring", console=Console(file=sys.stderr)):
        results += measure(shape, dtype, arguments.threads, arguments.seconds)
    show(results)
    if arguments.output:
        facts = {
            "normcore": normcore._C.build_info(),
            "commit": commit(),
            "torch": torch.__version__,
            "processor": processor(),
            "instruction set": torch.backends.cpu.get_cpu_capability(),
            "fresh_pages": arguments.fresh_pages,
        }
        document = {"facts": facts, "results": [asdict(r) for r in results]}
        arguments.output.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
