"""Results as pictures: a panel for each operation, a bar for each shape and layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .report import Document, peers_of, ratio, unique

FASTER, SLOWER, NEUTRAL = "#2a7ab9", "#d1462f", "#6b6b6b"
COLUMNS = 4


def _panels(
    cases: list[Document], title: str, draw: Callable[[Axes, list[Document]], None]
) -> Figure:
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


def draw(document: Document, folder: Path, stem: str) -> list[str]:
    """Writes the pictures of one file of results and returns their names."""
    names: list[str] = []

    def save(figure: Figure, name: str) -> None:
        figure.savefig(folder / name, dpi=110)
        names.append(name)

    where = f"{document['machine']['processor']}, {document['threads']} thread(s)"
    for dtype in unique(c["dtype"] for c in document["cases"]):
        chosen: list[dict[str, Any]] = [c for c in document["cases"] if c["dtype"] == dtype]
        for peer in peers_of(document):
            figure = _panels(
                [c for c in chosen if ratio(c, peer) is not None] or chosen,
                f"normcore over {peer}, {dtype}; {where}",
                lambda axes, cases, peer=peer: _speed(axes, cases, peer),  # type: ignore[misc]
            )
            save(figure, f"{stem}_{dtype}_over_{peer}.png")
        figure = _panels(chosen, f"normcore and a copy, {dtype}; {where}", _copy)
        save(figure, f"{stem}_{dtype}_copy.png")
    return names
