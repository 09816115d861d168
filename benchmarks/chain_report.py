"""Results of the command `chain` as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .documents import Document
from .markdown import description, image_links, microseconds, table, unavailable, unique

NAMES = ("normcore", "torch")


def rest(case: Document, name: str) -> float | None:
    """Of the chain's time, what is not the norm's when it runs alone."""
    chain, norm = (case[key].get(name) for key in ("microseconds", "norm_microseconds"))
    return None if chain is None or norm is None else float(chain - norm)


def stores(case: Document) -> str:
    """One word if all passes write alike."""
    by_pass = case["stores"]
    words = unique(by_pass.values())
    return words[0] if len(words) == 1 else ", ".join(f"{p} {w}" for p, w in by_pass.items())


def row(case: Document) -> list[str]:
    rests = [rest(case, name) for name in NAMES]
    times = [case[key].get(n) for key in ("microseconds", "norm_microseconds") for n in NAMES]
    ours, theirs = rests
    quotient = f"{ours / theirs:.3f}" if ours is not None and theirs else ""
    return [case["size"], stores(case), *map(microseconds, times + rests), quotient]


def tables(document: Document) -> Iterator[str]:
    header = ["size", "stores"]
    header += [f"{what}{name}, us" for what in ("", "norm alone, ", "rest, ") for name in NAMES]
    header.append("rest, normcore/torch")
    groups: dict[tuple[str, str, str, str], list[Document]] = {}
    for case in document["cases"]:
        key = (case["dtype"], case["norm"], case["mode"], case["layout"])
        groups.setdefault(key, []).append(case)
    for key, chosen in groups.items():
        yield "### " + ", ".join(key)
        yield table(header, map(row, chosen), 2)


def label(case: Document) -> str:
    return " ".join(case[key] for key in ("norm", "mode", "size", "layout", "dtype"))


def chain_report(document: Document, title: str = "Chain", pictures: Sequence[str] = ()) -> str:
    parts = [
        f"# {title}",
        description(document),
        "Convolution 3x3, norm and ReLU, convolution 3x3. `stores` is how normcore writes the "
        "norm's output. `rest` is the time of the chain less that of the norm alone: where "
        "streaming stores make it longer than torch's, the next layer pays for them.",
        *image_links(pictures),
        *tables(document),
        "## Not measured",
        unavailable(document, label),
    ]
    return "\n\n".join(parts) + "\n"
