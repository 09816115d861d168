"""Results of the command `accuracy` as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from .documents import Document
from .markdown import description, image_links, table, unique


def largest_error(
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


def accuracy_report(
    document: Document, title: str = "Accuracy", pictures: Sequence[str] = ()
) -> str:
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
            found = [largest_error(chosen, name, output) for name in names]
            where = found[0][1] if found and found[0] else None
            place = (
                f"{where['size']} {where['layout']}, mean/std {where['mean_over_std']:g}, "
                f"std {where['magnitude']:g}"
                if where
                else ""
            )
            by_output.append([*key, output, place, *map(cell, found)])
    for (dtype, norm, mean_over_std), chosen in ratios.items():
        found = [largest_error(chosen, name) for name in names]
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
        *image_links(pictures),
        "## Left out",
        table(("contender", "reason"), missing, 2) if missing else "No contender.",
        "\n".join(f"- {line}" for line in document["left_out"]) or "No case.",
    ]
    return "\n\n".join(parts) + "\n"
