"""Results as pictures, by the kind of results. Those of the command `chain` have none."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .accuracy_report import largest_error
from .cuda_report import bytes_of, bytes_per_second, rows_of
from .documents import Document
from .markdown import threads, unique
from .scaling_report import curves, nanoseconds_per_value
from .speed_report import peers_of, ratio
from .sync_model import ALGORITHMS, CONTENDERS, collectives_of, microseconds, sent
from .sync_report import network_of

FASTER, SLOWER, NEUTRAL = "#2a7ab9", "#d1462f", "#6b6b6b"
COLUMNS = 4
# The axis of errors: exact results have no logarithm, and from 1 on no digit is right.
SHORTEST_BAR, LONGEST_BAR = 1e-9, 1e2
PANEL = (3.4, 2.6)  # inches
LINE_STYLES = ("-", "--", ":", "-.")  # of the numbers of threads, and of algorithms
RANKS = tuple(1 << k for k in range(1, 13))  # of the cost model
DPI = 110


def _grid(rows: int, columns: int, title: str) -> tuple[Figure, Any]:
    """Panels of one size, and a row of text above."""
    width, height = PANEL
    figure = Figure(figsize=(width * columns, 0.4 + height * rows), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _panels(
    cases: list[Document], title: str, draw: Callable[[Axes, list[Document]], None]
) -> Figure:
    """A panel for each operation, a bar for each shape and layout."""
    operations = unique(c["operation"] for c in cases)
    columns = min(COLUMNS, len(operations))
    rows = -(-len(operations) // columns)
    bars = max(sum(c["operation"] == operation for c in cases) for operation in operations)
    size = (2.5 + 3.5 * columns, 0.6 + rows * (0.9 + 0.22 * bars))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(operations) :]:
        axes.remove()
    for operation, axes in zip(operations, grid.flat):
        chosen = [c for c in cases if c["operation"] == operation]
        draw(axes, chosen)
        axes.set_title(operation, fontsize=10)
        labels = [f"{c['shape']} {c['layout'].replace('channels_', '')}" for c in chosen]
        axes.set_yticks(range(len(chosen)), labels, fontsize=7)
        axes.invert_yaxis()
        axes.tick_params(axis="x", labelsize=7, which="both")
    return figure


def _speed(axes: Axes, cases: list[Document], peer: str) -> None:
    for y, case in enumerate(cases):
        r = ratio(case, peer)
        if r is not None:
            axes.barh(y, r - 1, left=1, color=FASTER if r >= 1 else SLOWER)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5), max(high, 2.0))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"times faster than {peer}", fontsize=8)


def _copy(axes: Axes, cases: list[Document]) -> None:
    for y, case in enumerate(cases):
        if case["fraction_of_copy_speed"] is not None:
            axes.barh(y, 100 * case["fraction_of_copy_speed"], color=NEUTRAL)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("% of the speed of a copy", fontsize=8)


def _where(document: Document) -> str:
    return f"{document['machine']['processor']}, {threads(document)} thread(s)"


def speed(document: Document) -> dict[str, Figure]:
    figures = {}
    for dtype in unique(c["dtype"] for c in document["cases"]):
        chosen: list[dict[str, Any]] = [c for c in document["cases"] if c["dtype"] == dtype]
        for peer in peers_of(document):
            figures[f"{dtype}_over_{peer}"] = _panels(
                [c for c in chosen if ratio(c, peer) is not None] or chosen,
                f"normcore over {peer}, {dtype}; {_where(document)}",
                partial(_speed, peer=peer),
            )
        title = f"normcore and a copy, {dtype}; {_where(document)}"
        figures[f"{dtype}_copy"] = _panels(chosen, title, _copy)
    return figures


def _errors(axes: Axes, cases: list[Document], contenders: list[str]) -> None:
    """A group of bars for each mean/std; what is not finite fills the panel, hatched."""
    ratios = unique(c["mean_over_std"] for c in cases)
    width = 0.8 / len(contenders)
    for i, name in enumerate(contenders):
        for j, mean_over_std in enumerate(ratios):
            found = largest_error([c for c in cases if c["mean_over_std"] == mean_over_std], name)
            if found is None:
                continue
            finite = math.isfinite(found[0])
            axes.bar(
                j + (i - (len(contenders) - 1) / 2) * width,
                min(max(found[0], SHORTEST_BAR), LONGEST_BAR),
                width,
                label=name if j == 0 else None,
                color=f"C{i}",
                alpha=1.0 if finite else 0.4,
                hatch=None if finite else "///",
            )
    axes.set_yscale("log")
    axes.set_ylim(SHORTEST_BAR, LONGEST_BAR)
    axes.set_xticks(range(len(ratios)), [f"{r:g}" for r in ratios], fontsize=7)
    axes.set_xlabel("mean/std", fontsize=8)


def accuracy(document: Document) -> dict[str, Figure]:
    """Of inputs with a standard deviation of 1; the report's tables have all."""
    contenders = document["contenders"]
    cases = [c for c in document["cases"] if c["magnitude"] == 1.0]
    rows, columns = (unique(c[key] for c in cases) for key in ("norm", "dtype"))
    title = f"largest relative error, standard deviation 1; {_where(document)}"
    figure, grid = _grid(len(rows), len(columns), title)
    for norm, line in zip(rows, grid):
        for dtype, axes in zip(columns, line):
            chosen = [c for c in cases if (c["norm"], c["dtype"]) == (norm, dtype)]
            _errors(axes, chosen, contenders)
            axes.set_title(f"{norm}, {dtype}", fontsize=10)
    grid[0][0].legend(fontsize=7)
    return {"errors": figure}


def _curves(axes: Axes, cases: list[Document], numbers_of_threads: list[int]) -> None:
    """Both axes logarithmic."""
    for name, color in (("normcore", FASTER), ("copy", NEUTRAL)):
        for n, style in zip(numbers_of_threads, itertools.cycle(LINE_STYLES)):
            found = [(c["values"], nanoseconds_per_value(c, name, n)) for c in cases]
            points = [(values, ns) for values, ns in found if ns is not None]
            if points:
                label = f"{name}, {n} thread(s)"
                axes.loglog(*zip(*points), style, color=color, marker=".", label=label)
    axes.set_xlabel("values", fontsize=8)
    axes.set_ylabel("ns per value", fontsize=8)
    axes.tick_params(labelsize=7, which="both")


def scaling(document: Document) -> dict[str, Figure]:
    figures = {}
    for dtype in unique(c["dtype"] for c in document["cases"]):
        found = {key: chosen for key, chosen in curves(document).items() if key[0] == dtype}
        rows = unique(operation for _, operation, _, _ in found)
        columns = unique((family, layout) for _, _, family, layout in found)
        figure, grid = _grid(len(rows), len(columns), f"{dtype}; {_where(document)}")
        for operation, line in zip(rows, grid):
            for (family, layout), axes in zip(columns, line):
                _curves(axes, found[dtype, operation, family, layout], document["threads"])
                axes.set_title(f"{operation}, {family}, {layout}", fontsize=9)
        grid[0][0].legend(fontsize=7)
        figures[dtype] = figure
    return figures


def _of_ranks(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("ranks", fontsize=8)
    axes.set_ylabel(ylabel, fontsize=8)
    axes.tick_params(labelsize=7, which="both")


def sync(document: Document) -> dict[str, Figure]:
    """A row for each size: what was measured, what ranks send, and the cost model."""
    sizes = unique(c["size"] for c in document["cases"])
    networks = document["networks"]
    figure, grid = _grid(len(sizes), 2 + len(networks), f"training steps; {_where(document)}")
    colors = dict(zip(CONTENDERS, (FASTER, SLOWER)))
    for size, line in zip(sizes, grid):
        cases = [c for c in document["cases"] if c["size"] == size]
        channels = cases[0]["channels"]
        for name, color in (*colors.items(), ("local", NEUTRAL)):
            points = [(c["ranks"], c["microseconds"][name]) for c in cases]
            line[0].plot(*zip(*points), marker=".", color=color, label=name)
        _of_ranks(line[0], f"{size} per rank", "measured us")
        for name, color in colors.items():
            collectives = collectives_of(name, channels)
            line[1].plot(RANKS, [sent(collectives, p) for p in RANKS], color=color, label=name)
            for axes, entry in zip(line[2:], networks):
                network = network_of(entry)
                for algorithm, style in zip(ALGORITHMS, LINE_STYLES):
                    us = [microseconds(collectives, algorithm, p, network) for p in RANKS]
                    axes.plot(RANKS, us, style, color=color, label=f"{name}, {algorithm}")
        _of_ranks(line[1], f"{channels} channels", "bytes sent by a rank")
        for axes, entry in zip(line[2:], networks):
            _of_ranks(axes, f"{channels} channels, {entry['name']}", "modelled us")
    for axes in grid[0][:3]:
        axes.legend(fontsize=7)
    return {"ranks": figure}


def _roofline(axes: Axes, row: list[dict[str, Document]]) -> None:
    """A point for each case and candidate: bytes that cannot be avoided, and those per second."""
    for name, color in (("copy", NEUTRAL), ("torch", SLOWER), ("normcore", FASTER)):
        chosen = sorted((r[name] for r in row if name in r), key=bytes_of)
        points = [(bytes_of(r), bytes_per_second(r) / 1e9) for r in chosen]
        if points:
            axes.loglog(*zip(*points), ".", color=color, label=name)
    axes.set_xlabel("bytes read and written once", fontsize=8)
    axes.set_ylabel("GB/s", fontsize=8)
    axes.tick_params(labelsize=7, which="both")


def cuda(document: Document) -> dict[str, Figure]:
    """Bandwidth over size: what a copy of the same tensors reaches is the roof."""
    rows = rows_of(document)
    operations = unique(operation for *_, operation in rows)
    columns = min(COLUMNS, len(operations))
    title = f"{document['facts']['device'] or 'rehearsal'}, cold L2"
    figure, grid = _grid(-(-len(operations) // columns), columns, title)
    for axes in grid.flat[len(operations) :]:
        axes.remove()
    for operation, axes in zip(operations, grid.flat):
        _roofline(axes, [row for key, row in rows.items() if key[-1] == operation])
        axes.set_title(operation, fontsize=10)
    grid[0][0].legend(fontsize=7)
    return {"roofline": figure}


FIGURES: dict[str, Callable[[Document], dict[str, Figure]]] = {
    "speed": speed,
    "accuracy": accuracy,
    "scaling": scaling,
    "sync": sync,
    "cuda": cuda,
}


def draw(document: Document, folder: Path, stem: str) -> list[str]:
    """Writes the pictures of one file of results and returns their names."""
    figures = FIGURES[document["kind"]](document) if document["kind"] in FIGURES else {}
    names = [f"{stem}_{name}.png" for name in figures]
    for name, figure in zip(names, figures.values()):
        figure.savefig(folder / name, dpi=DPI)
    return names
