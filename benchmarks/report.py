"""The command `report`: results as Markdown, and as pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence

from .accuracy_report import accuracy_report
from .chain_report import chain_report
from .cuda_report import cuda_report
from .documents import Document
from .scaling_report import scaling_report
from .speed_report import speed_report
from .sync_report import sync_report

# By the kind of results: from the document, a title and the names of its pictures.
REPORTS: Mapping[str, Callable[[Document, str, Sequence[str]], str]] = {
    "speed": speed_report,
    "accuracy": accuracy_report,
    "scaling": scaling_report,
    "chain": chain_report,
    "sync": sync_report,
    "cuda": cuda_report,
}


def run(arguments: argparse.Namespace) -> int:
    """Prints a report of each file; with --output, writes report.md and the pictures."""
    reports = []
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
    for path in arguments.files:
        document = json.loads(path.read_text())
        kind = document.get("kind")
        if kind not in REPORTS:
            print(f"error: {path} holds no results: run, accuracy, scaling, chain and sync do")
            return 1
        names: list[str] = []
        if arguments.output:
            from . import pictures

            names = pictures.draw(document, arguments.output, path.stem)
        reports.append(REPORTS[kind](document, f"{kind.capitalize()}: {path.stem}", names))
    text = "\n".join(reports)
    print(text)
    if arguments.output:
        (arguments.output / "report.md").write_text(text)
    return 0
