"""The command `run`: microseconds of every case, as JSON."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import normcore

from . import onednn, pages
from .bounds import Bounds
from .cases import CACHE_STATES, Case, cases, text_of
from .documents import write
from .machine import cache_bytes, facts
from .peers import contenders, normcore_alone
from .speed_report import speed_report
from .timing import best_times


def cache_state(case: Case, device: str) -> str | None:
    """Whether the minimal traffic fits the last-level cache: warm or cold; None if not known."""
    last_level = cache_bytes() if device == "cpu" else None
    if last_level is None:
        return None
    warm, cold = CACHE_STATES
    return warm if case.bytes <= last_level else cold


def measure(case: Case, arguments: argparse.Namespace, bounds: Bounds | None) -> dict[str, Any]:
    found = contenders(case, arguments.peers, arguments.device)
    references = bounds.missing(case) if bounds else []
    for other in references:
        found.add(str(other), partial(normcore_alone, other, arguments.device))
    try:
        times = best_times(found.ready, arguments.repeats)
    finally:
        found.close()
        torch.compiler.reset()
    copy, ours = times.pop("copy", None), times.get("normcore")
    if bounds:
        bounds.learn({case: ours} | {other: times.pop(str(other), None) for other in references})
    return {
        "operation": case.operation,
        "shape": case.shape.name,
        "size": text_of(case.shape.size),
        "groups": case.shape.groups,
        "layout": case.layout,
        "dtype": case.dtype,
        "microseconds": times,
        "unavailable": found.unavailable,
        "bytes": case.bytes,
        "copy_microseconds": copy,
        "fraction_of_copy_speed": copy / ours if copy and ours else None,
        "cache": cache_state(case, arguments.device),
        "bounds": bounds.of(case, copy) if bounds else {},
    }


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the report, and writes the results."""
    if arguments.device == "cuda" and not (
        torch.cuda.is_available() and normcore.build_info()["cuda"]
    ):
        print("error: no CUDA device, or a build of normcore without CUDA kernels")
        return 1
    torch.set_num_threads(arguments.threads)
    document: dict[str, Any] = {"kind": "speed", "format": 1} | facts(arguments.device)
    document |= {
        "repeats": arguments.repeats,
        "pages": arguments.pages,
        "malloc": pages.settings(),
        "peers": list(arguments.peers),
    }
    if "onednn" in arguments.peers:
        try:
            document["versions"]["onednn"] = onednn.version()
        except onednn.UnavailableError as error:
            document["versions"]["onednn"] = f"unavailable: {error}"
    todo = list(cases(arguments.ops, arguments.shapes, arguments.layouts, arguments.dtypes))
    console = Console(stderr=True)
    # What fits a cache is known of the CPU only.
    bounds = Bounds(arguments.threads) if arguments.device == "cpu" else None
    document["cases"] = []
    for case in track(todo, "measuring", console=console):
        document["cases"].append(measure(case, arguments, bounds))
        write(document, arguments.output)
    print(speed_report(document))
    return 0
