"""The command `second`: a double backward pass beside the backward pass, here and in torch.

The backward pass gives gradients of x, weight and bias; the double backward pass is that of
common.double_backward_of().
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from . import pages
from .cases import Shape, text_of
from .common import (
    Norm,
    Operands,
    backward_of,
    batch_norms,
    double_backward_of,
    group_norms,
    make_operands,
)
from .documents import Document, write
from .machine import facts
from .markdown import description, microseconds, table
from .timing import Call, best_times


def pair(norm: str, o: Operands) -> dict[str, Norm]:
    """The norm of normcore and of torch."""
    activation = norm.removeprefix("group_norm").removeprefix("_") or None
    found = batch_norms(o, training=True) if norm == "batch_norm" else group_norms(o, activation)
    return dict(zip(("normcore", "torch"), found, strict=True))


def passes(norm: Norm, o: Operands) -> dict[str, Call]:
    kinds = {"backward": backward_of, "double": double_backward_of}
    return {name: Call(kind(norm, o), lambda: None) for name, kind in kinds.items()}


def measure(norm: str, shape: Shape, layout: str, dtype: str, repeats: int) -> dict[str, Any]:
    o = make_operands(shape.size, shape.groups, layout, getattr(torch, dtype))
    calls = {
        (name, kind): call
        for name, function in pair(norm, o).items()
        for kind, call in passes(function, o).items()
    }
    times = best_times(calls, repeats)
    return {
        "norm": norm,
        "size": text_of(shape.size),
        "layout": layout,
        "dtype": dtype,
        "microseconds": {f"{name} {kind}": us for (name, kind), us in times.items()},
    }


def rows(cases: list[Document]) -> Iterator[list[str]]:
    for case in cases:
        us = case["microseconds"]
        ratios = [us[f"{name} double"] / us[f"{name} backward"] for name in ("normcore", "torch")]
        gain = us["torch double"] / us["normcore double"]
        yield [
            *(case[key] for key in ("norm", "size", "layout", "dtype")),
            *map(microseconds, us.values()),
            *(f"{value:.2f}" for value in (*ratios, gain)),
        ]


def second_report(document: Document) -> str:
    header = ["norm", "size", "layout", "dtype"]
    header += [f"{name}, us" for name in document["cases"][0]["microseconds"]]
    header += ["double/backward", "torch's", "torch/normcore"]
    return "\n\n".join(
        ["# Second derivatives", description(document), table(header, rows(document["cases"]), 4)]
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the report, and writes the results."""
    torch.set_num_threads(arguments.threads)
    document: Document = {"kind": "second", "format": 1} | facts("cpu")
    document |= {
        "repeats": arguments.repeats,
        "pages": arguments.pages,
        "malloc": pages.settings(),
        "cases": [],
    }
    todo = list(
        itertools.product(arguments.norms, arguments.shapes, arguments.layouts, arguments.dtypes)
    )
    for norm, shape, layout, dtype in track(todo, "measuring", console=Console(stderr=True)):
        if len(shape.size) > 2 or layout == "contiguous":
            document["cases"].append(measure(norm, shape, layout, dtype, arguments.repeats))
    write(document, arguments.output)
    print(second_report(document))
    return 0
