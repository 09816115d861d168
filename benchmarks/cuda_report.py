"""Results of gpu.py as Markdown: every case, those that are slower than a peer first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from .cases import device_streams
from .documents import Document
from .markdown import image_links, microseconds, table

# Of the tensors that an operation cannot avoid to read or write.
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
PEERS = ("eager", "compile", "triton")
Key = tuple[str, str, str, str]


def rows_of(document: Document) -> dict[Key, dict[str, Document]]:
    """By shape, layout, dtype and operation: the result of every candidate."""
    rows: dict[Key, dict[str, Document]] = {}
    for r in document["results"]:
        key = (r["shape"], r["layout"], r["dtype"], r["operation"])
        rows.setdefault(key, {})[r["candidate"]] = r
    return {key: row for key, row in rows.items() if "normcore" in row}


def bytes_of(result: Document) -> int:
    return math.prod(result["size"]) * BYTES[result["dtype"]] * device_streams(result["operation"])


def bytes_per_second(result: Document) -> float:
    """Of the bytes that cannot be avoided; a copy moves two tensors, whatever its operation."""
    moved = bytes_of(result)
    if result["candidate"] == "copy":
        moved = moved * 2 // device_streams(result["operation"])
    return float(moved / (1e-6 * result["cold_us"]))


def peer_times(row: dict[str, Document]) -> dict[str, float]:
    """Of each peer at its best."""
    found: dict[str, float] = {}
    for name, result in row.items():
        peer = "eager" if name == "torch" else name.split(" ")[0]
        if peer in PEERS:
            found[peer] = min(found.get(peer, math.inf), result["cold_us"])
    return found


def gain(row: dict[str, Document]) -> float:
    """How many times faster than the best peer; infinite without one."""
    return float(min(peer_times(row).values(), default=math.inf) / row["normcore"]["cold_us"])


def paths_of(document: Document) -> list[str]:
    names = {r["candidate"]: None for r in document["results"]}
    return [name for name in names if name.startswith("normcore ")]


def case_rows(document: Document) -> Iterator[list[str]]:
    rows = rows_of(document)
    for key in sorted(rows, key=lambda k: gain(rows[k])):
        row = rows[key]
        ours, times = row["normcore"], peer_times(row)
        paths = [row[name]["cold_us"] if name in row else None for name in paths_of(document)]
        yield [
            *key,
            microseconds(ours["cold_us"]),
            *map(microseconds, paths),
            microseconds(row["copy"]["cold_us"]),
            f"{ours['percent_of_copy_cold']:.0f}",
            *(f"{times[p] / ours['cold_us']:.2f}" if p in times else "" for p in PEERS),
        ]


def summary_rows(document: Document) -> Iterator[list[str]]:
    """Of each peer, and of the best where there are several."""
    rows = list(rows_of(document).values())
    ratios = {
        p: [peer_times(r)[p] / r["normcore"]["cold_us"] for r in rows if p in peer_times(r)]
        for p in PEERS
    }
    ratios["best of them"] = [gain(row) for row in rows if peer_times(row)]
    for name, found in ratios.items():
        if found:
            slower = sum(r < 1 for r in found)
            mean, worst, best = statistics.geometric_mean(found), min(found), max(found)
            numbers = (f"{value:.2f}" for value in (mean, worst, best))
            yield [name, str(len(found)), str(slower), *numbers]


def description(document: Document) -> str:
    facts = document["facts"]
    build = facts["normcore"]
    lines = [
        f"device: {facts['device'] or 'none'}, driver {facts['driver']}",
        f"normcore {build['version']} ({facts['commit']}), torch {facts['torch']}"
        + (f", cuDNN {facts['cudnn']}" if "cudnn" in facts else "")
        + (f", Triton {facts['triton']}" if "triton" in facts else ""),
    ]
    if "copy_gb_per_s" in facts:
        lines.append(f"copy of 1 GiB: {facts['copy_gb_per_s']:.0f} GB/s")
    if document["rehearsal"]:
        lines.append("a rehearsal on the CPU: the times mean nothing")
    return "\n".join(f"- {line}" for line in lines)


def cuda_report(document: Document, title: str = "Cuda", pictures: Sequence[str] = ()) -> str:
    header = ["shape", "layout", "dtype", "operation", "us"]
    header += [f"{name}, us" for name in paths_of(document)]
    header += ["copy, us", "% of copy speed", *(f"{peer}/normcore" for peer in PEERS)]
    missing = [f"left out: {line}" for line in document["left_out"]]
    missing += [f"failed: {line}" for line in document["failures"]]
    parts = [
        f"# {title}",
        description(document),
        "Replays of CUDA graphs with a cold L2 cache, the best of many. The speed of a copy is "
        "that of the case's tensor, scaled to the bytes that the operation cannot avoid. Peers are "
        "at their best.",
        *image_links(pictures),
        "## Times faster than peers",
        table(
            ("peer", "cases", "slower than it", "geometric mean", "worst", "best"),
            summary_rows(document),
            1,
        ),
        "## Cases, the slowest beside the best peer first",
        table(header, case_rows(document), 4),
        "## Not measured",
        "\n".join(f"- {line}" for line in missing) or "Nothing.",
    ]
    return "\n\n".join(parts) + "\n"
