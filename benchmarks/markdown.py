"""What the reports of all kinds of results share: tables, numbers, and where results come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .documents import Document


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int) -> str:
    """The first columns are aligned to the left, the rest, numbers, to the right."""
    rule = ["---" if i < text_columns else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def image_links(pictures: Iterable[str]) -> list[str]:
    return [f"![{Path(name).stem}]({name})" for name in pictures]


def threads(document: Document) -> str:
    """Their number, or the numbers that were measured."""
    found = document["threads"]
    return ", ".join(map(str, found)) if isinstance(found, list) else str(found)


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
        f"device: {document['device']}, threads: {threads(document)}"
        + (f", freed memory: {document['pages']}" if "pages" in document else ""),
    ]
    return "\n".join(f"- {line}" for line in lines if line)


def microseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def unavailable(document: Document, label: Callable[[Document], str]) -> str:
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
