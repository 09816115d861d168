"""The command `report`: results as Markdown, and as pictures.

A ratio is the time of a peer over that of normcore: above 1 normcore is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Document = dict[str, Any]


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int) -> str:
    """The first columns are aligned to the left, the rest, numbers, to the right."""
    rule = ["---" if i < text_columns else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def ratio(case: Document, peer: str) -> float | None:
    times = case["microseconds"]
    if peer not in times or "normcore" not in times:
        return None
    return float(times[peer] / times["normcore"])


def peers_of(document: Document) -> list[str]:
    """Peers that were timed at least once."""
    return [p for p in document["peers"] if any(p in c["microseconds"] for c in document["cases"])]


def description(document: Document) -> str:
    machine, versions = document["machine"], document["versions"]
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    build = versions["normcore"]
    lines = [
        f"processor: {machine['processor']}, {machine['cores'] or '?'} cores"
        + (f"; {caches}" if caches else ""),
        f"instructions: {', '.join(machine['instructions'])}",
        f"GPU: {machine['gpu']}" if machine["gpu"] else "",
        f"normcore {build['version']} ({document['commit']}, {build['simd_target']}, "
        f"{build['cxx_compiler']}), torch {versions['torch']}, Python {versions['python']}"
        + (f", oneDNN {versions['onednn']}" if "onednn" in versions else ""),
        f"device: {document['device']}, threads: {document['threads']}"
        + (f", freed memory: {document['pages']}" if "pages" in document else ""),
    ]
    return "\n".join(f"- {line}" for line in lines if line)


def percent(case: Document) -> str:
    fraction = case["fraction_of_copy_speed"]
    return "" if fraction is None else f"{100 * fraction:.0f}"


def microseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def summary(document: Document) -> str:
    """A line for each peer and dtype."""
    rows = []
    for peer in peers_of(document):
        dtypes = unique(c["dtype"] for c in document["cases"])
        for names in [[d] for d in dtypes] + ([dtypes] if len(dtypes) > 1 else []):
            found = [ratio(c, peer) for c in document["cases"] if c["dtype"] in names]
            ratios = [r for r in found if r is not None]
            if ratios:
                values = (statistics.geometric_mean(ratios), min(ratios), max(ratios))
                counts = (sum(r < 1 for r in ratios), len(ratios))
                cells = [f"{v:.2f}" for v in values] + [str(n) for n in counts]
                rows.append([peer, names[0] if len(names) == 1 else "all", *cells])
    header = ("peer", "dtype", "geometric mean", "worst", "best", "slower than the peer", "cases")
    return table(header, rows, 2)


def label(case: Document) -> str:
    return f"{case['operation']} {case['shape']} {case['layout']} {case['dtype']}"


def verdicts(document: Document) -> Iterator[str]:
    """For each peer the cases that are slower, then those that are faster, the worst first."""
    for peer in peers_of(document):
        found = [(r, c) for c in document["cases"] if (r := ratio(c, peer)) is not None]
        found.sort(key=lambda pair: pair[0])
        kinds: list[tuple[str, Callable[[float], bool]]] = [
            ("slower than", lambda r: r < 1),
            ("as fast as or faster than", lambda r: r >= 1),
        ]
        for word, belongs in kinds:
            chosen = [(r, c) for r, c in found if belongs(r)]
            yield f"### {word} {peer}: {len(chosen)} of {len(found)}"
            rows = [
                [label(c), f"{r:.2f}"] + [microseconds(c["microseconds"][n]) for n in names]
                for names in (("normcore", peer),)
                for r, c in chosen
            ]
            if rows:
                yield table(("case", "ratio", "normcore, us", f"{peer}, us"), rows, 1)


def case_tables(document: Document) -> Iterator[str]:
    """For each dtype, operation and layout a table of the shapes."""
    peers = peers_of(document)
    header = ["shape", "size", "normcore, us", "copy, us", "% of copy speed"]
    header += [cell for peer in peers for cell in (f"{peer}, us", "ratio")]
    groups: dict[tuple[str, str, str], list[Document]] = {}
    for case in document["cases"]:
        key = (case["dtype"], case["operation"], case["layout"])
        groups.setdefault(key, []).append(case)
    for key, chosen in groups.items():
        yield "### " + ", ".join(key)
        rows = []
        for c in chosen:
            times = c["microseconds"]
            row = [c["shape"], c["size"], microseconds(times.get("normcore"))]
            row += [microseconds(c["copy_microseconds"]), percent(c)]
            for peer in peers:
                r = ratio(c, peer)
                row += [microseconds(times.get(peer)), "" if r is None else f"{r:.2f}"]
            rows.append(row)
        yield table(header, rows, 2)


def unavailable(document: Document) -> str:
    """What was not measured: how many cases of which contender, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for case in document["cases"]:
        for name, reason in case["unavailable"].items():
            found.setdefault((name, reason), []).append(label(case))
    rows = [
        [name, reason.replace("|", "\\|"), labels[0], str(len(labels))]
        for (name, reason), labels in found.items()
    ]
    return table(("contender", "reason", "first case", "cases"), rows, 3) if rows else "Nothing."


def speed_report(document: Document, title: str = "Speed", pictures: Sequence[str] = ()) -> str:
    parts = [
        f"# {title}",
        description(document),
        "A ratio is the time of a peer over that of normcore: above 1 normcore is faster.",
        summary(document),
        *(f"![{Path(name).stem}]({name})" for name in pictures),
        "## Slower and faster",
        *verdicts(document),
        "## Every case",
        *case_tables(document),
        "## Not measured",
        unavailable(document),
    ]
    return "\n\n".join(parts) + "\n"


def _largest(
    cases: Sequence[Document], contender: str, output: str | None = None
) -> tuple[float, Document] | None:
    """The largest error of a contender, and its case."""
    found = [
        (float(error), case)
        for case in cases
        for name, error in case["errors"].get(contender, {}).items()
        if output in (None, name)
    ]
    return max(found, key=lambda pair: pair[0]) if found else None


def accuracy_report(document: Document, title: str = "Accuracy") -> str:
    names = document["contenders"]
    groups: dict[tuple[str, str], list[Document]] = {}
    ratios: dict[tuple[str, str, float], list[Document]] = {}
    for c in document["cases"]:
        groups.setdefault((c["dtype"], c["norm"]), []).append(c)
        ratios.setdefault((c["dtype"], c["norm"], c["mean_over_std"]), []).append(c)

    def cell(found: tuple[float, Document] | None) -> str:
        return "" if found is None else f"{found[0]:.1e}"

    by_output, by_ratio = [], []
    for key, chosen in groups.items():
        for output in unique(o for c in chosen for e in c["errors"].values() for o in e):
            found = [_largest(chosen, name, output) for name in names]
            where = found[0][1] if found and found[0] else None
            place = (
                f"{where['size']} {where['layout']}, mean/std {where['mean_over_std']:g}, "
                f"std {where['magnitude']:g}"
                if where
                else ""
            )
            by_output.append([*key, output, place, *map(cell, found)])
    for (dtype, norm, mean_over_std), chosen in ratios.items():
        found = [_largest(chosen, name) for name in names]
        by_ratio.append([dtype, norm, f"{mean_over_std:g}", *map(cell, found)])
    missing = [[n, reason] for n, reason in document["unavailable"].items()]
    missing += unique(
        (n, f"{reason} ({c['dtype']} {c['norm']} {c['size']} {c['layout']})")
        for c in document["cases"]
        for n, reason in c["failures"].items()
    )
    parts = [
        f"# {title}",
        description(document),
        "Relative error |got - want| / |want| (Euclidean norms of whole tensors) against float64, "
        f"the largest of {len(document['cases'])} cases. For half precision float64 starts from "
        "the rounded input.",
        table(("dtype", "norm", "output", "worst case of normcore", *names), by_output, 4),
        "By mean over standard deviation of the input, the largest of all outputs:",
        table(("dtype", "norm", "mean/std", *names), by_ratio, 3),
        "## Left out",
        table(("contender", "reason"), missing, 2) if missing else "No contender.",
        "\n".join(f"- {line}" for line in document["left_out"]) or "No case.",
    ]
    return "\n\n".join(parts) + "\n"


def run(arguments: argparse.Namespace) -> int:
    """Prints a report of each file; with --output, writes report.md and the pictures."""
    reports = []
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
    for path in arguments.files:
        document = json.loads(path.read_text())
        if document.get("kind") == "accuracy":
            reports.append(accuracy_report(document, f"Accuracy: {path.stem}"))
        elif document.get("kind") == "speed":
            pictures: list[str] = []
            if arguments.output:
                from . import pictures as drawing

                pictures = drawing.draw(document, arguments.output, path.stem)
            reports.append(speed_report(document, f"Speed: {path.stem}", pictures))
        else:
            print(f"error: {path} is no file of results: `run` and `accuracy` write them")
            return 1
    text = "\n".join(reports)
    print(text)
    if arguments.output:
        (arguments.output / "report.md").write_text(text)
    return 0
