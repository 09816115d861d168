"""The command `run`: microseconds of every case, as JSON."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import normcore

from . import onednn, pages
from .cases import Case, cases, text_of
from .machine import facts
from .peers import contenders
from .report import speed_report
from .timing import best_times


def measure(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    found = contenders(case, arguments.peers, arguments.device)
    try:
        times = best_times(found.ready, arguments.repeats)
    finally:
        found.close()
        torch.compiler.reset()
    copy, ours = times.pop("copy", None), times.get("normcore")
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
    document["cases"] = [
        measure(case, arguments) for case in track(todo, "measuring", console=console)
    ]
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(speed_report(document))
    return 0
