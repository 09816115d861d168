"""Results of the command `run` as Markdown.

A ratio is the time of a peer over that of normcore: above 1 normcore is faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from .cases import CACHE_STATES, TINY
from .documents import Document
from .markdown import description, image_links, microseconds, table, unavailable, unique


def ratio(case: Document, peer: str) -> float | None:
    times = case["microseconds"]
    if peer not in times or "normcore" not in times:
        return None
    return float(times[peer] / times["normcore"])


def peers_of(document: Document) -> list[str]:
    """Peers that were timed at least once."""
    return [p for p in document["peers"] if any(p in c["microseconds"] for c in document["cases"])]


def percent(case: Document) -> str:
    fraction = case["fraction_of_copy_speed"]
    return "" if fraction is None else f"{100 * fraction:.0f}"


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


def warm_and_cold(document: Document) -> str:
    """For each dtype the percentage of the copy's speed of warm and of cold cases."""
    rows = []
    for dtype in unique(c["dtype"] for c in document["cases"]):
        row = [dtype]
        for state in CACHE_STATES:
            found = [
                100 * c["fraction_of_copy_speed"]
                for c in document["cases"]
                if c["dtype"] == dtype
                and c["shape"] != TINY.name
                and c.get("cache") == state
                and c["fraction_of_copy_speed"] is not None
            ]
            row += [f"{statistics.geometric_mean(found):.0f}" if found else "", str(len(found))]
        rows.append(row)
    header = ["dtype"]
    header += [cell for state in CACHE_STATES for cell in (f"{state}, % of copy speed", "cases")]
    return table(header, rows, 1)


def bound(case: Document) -> str:
    """The largest of the estimates and its share of the measured time, such as "memory 82 %"."""
    ours = case["microseconds"].get("normcore")
    known = {name: us for name, us in case.get("bounds", {}).items() if us is not None}
    if ours is None or not known:
        return ""
    name = max(known, key=lambda n: known[n])
    return f"{name} {100 * known[name] / ours:.0f} %"


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
    header += ["cache", "bound"]
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
            row += [c.get("cache") or "", bound(c)]
            for peer in peers:
                r = ratio(c, peer)
                row += [microseconds(times.get(peer)), "" if r is None else f"{r:.2f}"]
            rows.append(row)
        yield table(header, rows, 2)


def speed_report(document: Document, title: str = "Speed", pictures: Sequence[str] = ()) -> str:
    parts = [
        f"# {title}",
        description(document),
        "A ratio is the time of a peer over that of normcore: above 1 normcore is faster.",
        summary(document),
        "Geometric mean of % of copy speed where the copied bytes fit the last-level cache (warm) "
        f"and where they do not (cold), without the shape `{TINY.name}`, where calls dominate:",
        warm_and_cold(document),
        *image_links(pictures),
        "## Slower and faster",
        *verdicts(document),
        "## Every case",
        "The bound is the largest of three estimates, in % of the time of normcore: `calls`, "
        "`memory` and `arithmetic` (benchmarks/README.md).",
        *case_tables(document),
        "## Not measured",
        unavailable(document, label),
    ]
    return "\n\n".join(parts) + "\n"
