"""Results of the command `scaling` as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .documents import Document
from .markdown import description, image_links, table, unavailable

Key = tuple[str, str, str, str]


def nanoseconds_per_value(case: Document, name: str, threads: int) -> float | None:
    times = case["microseconds"].get(name)
    return 1e3 * float(times[str(threads)]) / float(case["values"]) if times else None


def curves(document: Document) -> dict[Key, list[Document]]:
    """Cases that differ in size only, by dtype, operation, family and layout."""
    found: dict[Key, list[Document]] = {}
    for case in document["cases"]:
        key = (case["dtype"], case["operation"], case["family"], case["layout"])
        found.setdefault(key, []).append(case)
    return found


def tables(document: Document) -> Iterator[str]:
    first, *others = document["threads"]
    names = ("normcore", "copy")
    header = ["values", "size"]
    header += [f"{name}, {n} thread(s)" for n in document["threads"] for name in names]
    header += [f"{name}, speedup {n}/{first}" for n in others for name in names]
    for key, chosen in curves(document).items():
        yield "### " + ", ".join(key)
        rows = []
        for case in chosen:
            row = [f"{case['values']:.2g}", case["size"]]
            for n in document["threads"]:
                times = [nanoseconds_per_value(case, name, n) for name in names]
                row += ["" if ns is None else f"{ns:.3g}" for ns in times]
            for n in others:
                gains = [case["speedup"].get(name, {}).get(str(n)) for name in names]
                row += ["" if gain is None else f"{gain:.2f}" for gain in gains]
            rows.append(row)
        yield table(header, rows, 2)


def label(case: Document) -> str:
    return f"{case['operation']} {case['size']} {case['layout']} {case['dtype']}"


def scaling_report(document: Document, title: str = "Scaling", pictures: Sequence[str] = ()) -> str:
    parts = [
        f"# {title}",
        description(document),
        "Nanoseconds per value, and how many times faster more threads are. `samples`: more and "
        "more samples of one size; `slices`: one sample whose slices grow.",
        *image_links(pictures),
        *tables(document),
        "## Not measured",
        unavailable(document, label),
        "\n".join(f"- {case}: {reason}" for case, reason in document["left_out"].items()),
    ]
    return "\n\n".join(parts) + "\n"
