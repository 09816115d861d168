"""Speed of normcore on a CUDA device beside its peers, as fractions of the device's copy speed.

    python benchmarks/gpu.py --seconds 120 --output build/gpu.json

Peers in the same run: torch eager (and cuDNN through it), torch.compile, the Triton kernels of
triton_norms.py, and a copy of the tensor. Every candidate is recorded as a CUDA graph; the graphs
of a case take turns, and each takes its best time between two events:

* cold: after a write to more memory than the L2 cache holds;
* warm: the mean of several replays in a row.

"% copy" is the time of the copy, scaled to the bytes that an operation cannot avoid (forward: read
x, write y; backward: read x and dy, write dx; double backward: read three tensors, write two; with
a residual one more forward, and its gradient backward), over the time of the candidate; 100 % is as
fast as a copy. Cases are run in the order of their importance until the time is over; torch.compile
is left out of the later ones if its compilation would take their time. What was left out is listed.

With --paths the forward and backward passes of normcore take those paths too, where they can run so
(normcore/kernels/cuda_plan.h), as candidates "normcore split" and so on.

Without a device the exit code is 77. --rehearse takes small tensors on the CPU instead, to see that
everything runs; TRITON_INTERPRET=1 adds the Triton kernels. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from cases import device_streams
from common import commit
from gpu_cases import Case, attempt, candidates, cases, difference, operands_of, shrink, wanted
from rich.console import Console
from rich.table import Table

import normcore

NO_DEVICE = 77
WARM_REPLAYS = 5


@dataclass
class Result:
    shape: str
    size: tuple[int, ...]
    layout: str
    dtype: str
    operation: str
    candidate: str
    cold_us: float
    cold_median_us: float
    warm_us: float
    percent_of_copy_cold: float  # at the bytes that cannot be avoided
    percent_of_copy_warm: float
    difference: float | None  # from float32 torch, |y - want| / |want|
    runs: int


@dataclass
class Report:
    facts: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Stopwatch:
    """Times the candidates of a case on a device; `prepare` makes a candidate replayable.

    All of a case is made and run on one stream: autograd runs a backward pass on the stream of its
    forward pass, and a graph records one stream, which the default stream cannot be.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        l2_bytes = torch.cuda.get_device_properties().L2_cache_size
        self._scratch = torch.empty(max(4 * l2_bytes, 1 << 28), dtype=torch.int8, device="cuda")

    def stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def prepare(self, run: Callable[[], object]) -> Callable[[], object]:
        for _ in range(3):
            run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            outputs = run()
        return lambda: (graph.replay(), outputs)

    def round(self, runs: list[Callable[[], object]]) -> list[tuple[float, float]]:
        """Cold and warm time of each, in microseconds."""
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(4)] for _ in runs]
        for run, (begin, end, warm_begin, warm_end) in zip(runs, marks, strict=True):
            self._scratch.zero_()
            begin.record()
            run()
            end.record()
            run()
            warm_begin.record()
            for _ in range(WARM_REPLAYS):
                run()
            warm_end.record()
        torch.cuda.synchronize()
        return [
            (1e3 * a.elapsed_time(b), 1e3 * c.elapsed_time(d) / WARM_REPLAYS)
            for a, b, c, d in marks
        ]


class RehearsalStopwatch:
    """The same on the CPU, without a cache to flush."""

    def stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def prepare(self, run: Callable[[], object]) -> Callable[[], object]:
        run()
        return run

    def round(self, runs: list[Callable[[], object]]) -> list[tuple[float, float]]:
        times = []
        for run in runs:
            start = time.perf_counter()
            run()
            times.append((1e6 * (time.perf_counter() - start),) * 2)
        return times


def measure(
    case: Case,
    watch: Any,
    device: str,
    seconds: float,
    peers: set[str],
    paths: list[str],
    report: Report,
) -> None:
    shape = case.shape
    o = operands_of(case, device)
    target = torch.empty_like(o.x)
    operations = candidates(case, o, peers, paths, report.failures)
    exact = wanted(case, o) if o.x.numel() <= 1 << 30 else {}
    for operation, by_name in operations.items():
        prepared: dict[str, Callable[[], object]] = {}
        differences: dict[str, float | None] = {}
        for name, run in by_name.items():
            with attempt(f"{case.name}, {name}, {operation}", report.failures):
                first = run()[0]
                reference = exact.get(operation)
                differences[name] = None if reference is None else difference(first, reference)
                del first
                prepared[name] = watch.prepare(run)
        prepared["copy"] = watch.prepare(lambda: (target.copy_(o.x),))
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in prepared}
        end = time.perf_counter() + seconds / len(operations)
        for rounds in itertools.count():
            if rounds >= 5 and time.perf_counter() > end:
                break
            for name, pair in zip(prepared, watch.round(list(prepared.values())), strict=True):
                times[name].append(pair)
        bytes_over_copy = device_streams(operation) / 2
        best = {n: [min(column) for column in zip(*t, strict=True)] for n, t in times.items()}
        for name, pairs in times.items():
            cold, warm = best[name]
            scale = 100.0 * (1.0 if name == "copy" else bytes_over_copy)
            report.results.append(
                Result(
                    shape.name,
                    shape.size,
                    case.layout,
                    str(case.dtype).removeprefix("torch."),
                    operation,
                    name,
                    cold,
                    statistics.median(pair[0] for pair in pairs),
                    warm,
                    scale * best["copy"][0] / cold,
                    scale * best["copy"][1] / warm,
                    differences.get(name),
                    len(pairs),
                )
            )


def copy_speed(watch: Stopwatch) -> float:
    """Bytes read and written per second by a large copy, in GB/s."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    run = watch.prepare(lambda: (target.copy_(source),))
    best = min(watch.round([run])[0][0] for _ in range(10))
    return 2 * source.numel() / best / 1e3


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return (answer.stdout.splitlines() or ["unknown"])[0].strip()


def facts(has_device: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "normcore": normcore.build_info(),
        "commit": commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver(),
        "device": None,
    }
    if has_device:
        properties = torch.cuda.get_device_properties()
        found |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cudnn": torch.backends.cudnn.version(),
        }
    if importlib.util.find_spec("triton"):
        import triton

        found["triton"] = triton.__version__
    return found


def rows_of(results: list[Result]) -> Iterator[tuple[list[str], dict[str, Result]]]:
    rows: dict[tuple[str, ...], dict[str, Result]] = {}
    for r in results:
        rows.setdefault((r.shape, r.layout, r.dtype, r.operation), {})[r.candidate] = r
    for key, row in rows.items():
        yield list(key), row


def double_backward_ratios(results: list[Result]) -> dict[str, list[float]]:
    """Times over those of the candidate's own backward pass, cold, by candidate."""
    ratios: dict[str, list[float]] = {}
    by_case: dict[tuple[str, ...], float] = {
        (r.shape, r.layout, r.dtype, r.operation, r.candidate): r.cold_us for r in results
    }
    for (*case, operation, name), us in by_case.items():
        backward = by_case.get((*case, operation.replace(" double", ""), name))
        if operation.endswith(" double backward") and backward is not None:
            ratios.setdefault(name, []).append(us / backward)
    return ratios


def show(report: Report, console: Console) -> None:
    """A row per operation: cold time, % of copy speed, and how many times faster than the peers."""
    table = Table(title="normcore, cold L2 (times faster than each peer; below 1 is slower)")
    for column in ("shape", "layout", "dtype", "operation", "us", "% copy", "warm %"):
        table.add_column(column)
    for column in ("eager", "compile", "triton"):
        table.add_column(f"/ {column}")
    ratios: dict[str, list[float]] = {"eager": [], "compile": [], "triton": []}
    by_path: dict[str, list[float]] = {}
    for key, row in rows_of(report.results):
        ours = row.get("normcore")
        if ours is None:
            continue
        for name, result in row.items():
            if name.startswith("normcore "):
                by_path.setdefault(name, []).append(result.cold_us / ours.cold_us)
        triton = [r.cold_us for name, r in row.items() if name.startswith("triton")]
        peers = {
            "eager": row["torch"].cold_us if "torch" in row else None,
            "compile": row["compile"].cold_us if "compile" in row else None,
            "triton": min(triton, default=None),
        }
        cells = []
        for name, theirs in peers.items():
            if theirs is not None:
                ratios[name].append(theirs / ours.cold_us)
            cells.append("" if theirs is None else f"{theirs / ours.cold_us:.2f}")
        table.add_row(
            *key,
            f"{ours.cold_us:.1f}",
            f"{ours.percent_of_copy_cold:.0f}",
            f"{ours.percent_of_copy_warm:.0f}",
            *cells,
        )
    console.print(table)
    for name, values in ratios.items():
        if values:
            console.print(
                f"against {name}: geometric mean {statistics.geometric_mean(values):.2f}, worst "
                f"{min(values):.2f}, best {max(values):.2f} over {len(values)} cases"
            )
    for name, values in by_path.items():
        console.print(
            f"{name} over normcore as planned: geometric mean "
            f"{statistics.geometric_mean(values):.2f}, between {min(values):.2f} and "
            f"{max(values):.2f} over {len(values)} cases"
        )
    for name, values in double_backward_ratios(report.results).items():
        console.print(
            f"double backward over backward, {name}: geometric mean "
            f"{statistics.geometric_mean(values):.2f}, worst {max(values):.2f} over "
            f"{len(values)} cases"
        )
    for title, lines in (("left out", report.left_out), ("failed", report.failures)):
        if lines:
            console.print(f"{title}: {len(lines)}")
            for line in lines:
                console.print(f"  {line}")


def sweep(report: Report, arguments: argparse.Namespace) -> None:
    """Every case in the order of importance, until the time is over."""
    rehearse = arguments.rehearse
    watch: Any = RehearsalStopwatch() if rehearse else Stopwatch()
    peers = set(arguments.peers.split(","))
    paths = [path for path in arguments.paths.split(",") if path]
    # A backward pass is run many times.
    torch._functorch.config.donated_buffer = False
    if not importlib.util.find_spec("triton") or (
        rehearse and "TRITON_INTERPRET" not in os.environ
    ):
        peers.discard("triton")
    if not rehearse:
        with watch.stream():
            report.facts["copy_gb_per_s"] = copy_speed(watch)
    start = time.perf_counter()
    end = start + arguments.seconds
    todo = [c for c in cases() if re.search(arguments.only, c.name)]
    slowest_plain, slowest_compile = 0.0, 0.0
    for index, case in enumerate(todo):
        now = time.perf_counter()
        if now + slowest_plain > end:
            report.left_out += [c.name for c in todo[index:]]
            break
        # torch.compile may take what the cases after this one do not need without it.
        spare = end - now - slowest_compile - (len(todo) - index) * 0.5 * slowest_plain
        with_compile = "compile" in peers and spare > 0
        if "compile" in peers and not with_compile:
            report.left_out.append(f"{case.name}: torch.compile")
        chosen = peers if with_compile else peers - {"compile"}
        share = min(arguments.case_seconds, (end - now) / (len(todo) - index))
        device = "cpu" if rehearse else "cuda"
        with attempt(f"{case.name}, all", report.failures), watch.stream():
            measure(case, watch, device, share, chosen, paths, report)
        took = time.perf_counter() - now
        print(f"{index + 1}/{len(todo)} {case.name}: {took:.1f} s", file=sys.stderr, flush=True)
        if with_compile:
            slowest_compile = max(slowest_compile, took)
        if not with_compile or slowest_plain == 0.0:
            slowest_plain = max(slowest_plain, min(took, 2 * arguments.case_seconds))
        torch.compiler.reset()
        gc.collect()
        if not rehearse:
            torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="for the whole sweep")
    parser.add_argument("--case-seconds", type=float, default=0.6, help="of timing, at most")
    parser.add_argument("--only", default="", help="regular expression: part of a case's name")
    parser.add_argument("--peers", default="compile,triton", help="beside torch eager")
    parser.add_argument("--paths", default="", help="of normcore: split, cluster, team")
    parser.add_argument("--rehearse", action="store_true", help="small tensors on the CPU")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    console = Console(width=150)
    has_device = torch.cuda.is_available() and normcore.build_info()["cuda"]
    report = Report(facts(has_device))
    if not has_device and not arguments.rehearse:
        console.print("no CUDA device, or a build without CUDA kernels: nothing was measured")
    else:
        if arguments.rehearse:
            shrink()
        sweep(report, arguments)
        show(report, console)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        document = asdict(report)
        document |= {"kind": "cuda", "rehearsal": arguments.rehearse}
        arguments.output.write_text(json.dumps(document, indent=1, default=str))
    if not has_device and not arguments.rehearse:
        return NO_DEVICE
    ours = [f for f in report.failures if ", normcore" in f or ", all: " in f]
    wrong = [
        r
        for r in report.results
        if r.difference is not None and not r.difference < 0.02 and math.isfinite(r.cold_us)
    ]
    for r in wrong:
        console.print(f"wrong: {r.candidate}, {r.shape}, {r.operation}: off by {r.difference}")
    return 1 if ours or any(r.candidate == "normcore" for r in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
