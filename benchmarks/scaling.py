"""The command `scaling`: time per value from small to large inputs, for several threads."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from . import pages
from .cases import BYTES, MIN_VALUES, STREAMS, VALUES_STEP, Case, Shape, is_backward, text_of
from .documents import write
from .machine import available_bytes, facts
from .peers import contenders
from .scaling_report import scaling_report
from .timing import Contender, best_times

PLANES = (64, 56, 56)  # channels, height and width of a sample: a stage of ResNet-50
PLANES_GROUPS = 32
SLICES = 2  # of one sample: each holds half of all values

# Tensors of the size of x that are there at once, besides those that the operation cannot avoid:
# dy; for a backward pass y, which the graph holds, and what the copy writes to.
MORE_FORWARD, MORE_BACKWARD = 1, 2
# Making x, in float32 first, leaves holes in the heap that later tensors do not fit.
HOLES_BYTES = 2 * BYTES["float32"]  # per value
MEMORY_SHARE = 0.8  # of the available memory: glibc may leave more holes, and others need some too


def shapes(max_values: int) -> Iterator[Shape]:
    """Many samples of one size; then one sample whose slices grow."""
    steps = (MIN_VALUES * VALUES_STEP**k for k in itertools.count())
    values = list(itertools.takewhile(lambda n: n <= max_values, steps))
    for n in values:
        samples = max(1, round(n / math.prod(PLANES)))
        yield Shape("samples", (samples, *PLANES), PLANES_GROUPS)
    for n in values:
        yield Shape("slices", (1, SLICES, n // SLICES), SLICES)


def needed_bytes(case: Case) -> int:
    more = MORE_BACKWARD if is_backward(case.operation) else MORE_FORWARD
    tensors = STREAMS[case.operation] + more
    return (tensors * BYTES[case.dtype] + HOLES_BYTES) * case.values


def label(case: Case) -> str:
    return f"{case.operation} {text_of(case.shape.size)} {case.layout} {case.dtype}"


def too_large(case: Case, available: int | None) -> str | None:
    """Why the available memory does not hold the case, if it does not."""
    if available is None or needed_bytes(case) <= MEMORY_SHARE * available:
        return None
    return (
        f"needs {needed_bytes(case) / 1e9:.3g} GB, more than {MEMORY_SHARE:.0%} of the "
        f"{available / 1e9:.3g} GB of available memory"
    )


class OnThreads:
    """A contender that runs on a number of threads of its own."""

    def __init__(self, contender: Contender, threads: int) -> None:
        self._contender = contender
        self._threads = threads

    def measure(self) -> float:
        torch.set_num_threads(self._threads)
        return self._contender.measure()


def measure(case: Case, threads: Sequence[int], repeats: int) -> dict[str, Any]:
    torch.set_num_threads(min(threads))  # where load on the machine lengthens a call the least
    found = contenders(case, (), "cpu")
    times = best_times(
        {
            (name, n): OnThreads(contender, n)
            for name, contender in found.ready.items()
            for n in threads
        },
        repeats,
    )
    unavailable, names = found.unavailable, list(found.ready)
    del found
    pages.release()
    first, *others = threads
    return {
        "operation": case.operation,
        "family": case.shape.name,
        "size": text_of(case.shape.size),
        "groups": case.shape.groups,
        "layout": case.layout,
        "dtype": case.dtype,
        "values": case.values,
        # JSON has text keys only.
        "microseconds": {name: {str(n): times[name, n] for n in threads} for name in names},
        "speedup": {
            name: {str(n): times[name, first] / times[name, n] for n in others} for name in names
        },
        "unavailable": unavailable,
    }


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the report, and writes the results."""
    todo = [
        Case(operation, shape, layout, dtype)
        for dtype, operation, layout, shape in itertools.product(
            arguments.dtypes, arguments.ops, arguments.layouts, shapes(arguments.max_values)
        )
    ]
    available = available_bytes()
    reasons = {case: reason for case in todo if (reason := too_large(case, available))}
    document: dict[str, Any] = {"kind": "scaling", "format": 1} | facts("cpu")
    console = Console(stderr=True)
    document |= {
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "pages": arguments.pages,
        "malloc": pages.settings(),
        "left_out": {label(case): reason for case, reason in reasons.items()},
        "cases": [],
    }
    for case in track([c for c in todo if c not in reasons], "measuring", console=console):
        document["cases"].append(measure(case, arguments.threads, arguments.repeats))
        write(document, arguments.output)
    print(scaling_report(document))
    return 0
