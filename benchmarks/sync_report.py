"""Results of the command `sync` as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .documents import Document
from .markdown import description, image_links, microseconds, table, unique
from .sync_model import (
    ALGORITHMS,
    CONTENDERS,
    MODELLED_RANKS,
    Network,
    collectives_of,
    sent,
)
from .sync_model import microseconds as modelled


def step_rows(document: Document) -> Iterator[list[str]]:
    for case in document["cases"]:
        us = case["microseconds"]
        alone = ours, theirs = [us.get(f"{name} collectives") for name in CONTENDERS]
        yield [
            case["size"],
            str(case["ranks"]),
            *(microseconds(us[name]) for name in (*CONTENDERS, "local")),
            f"{us['torch'] / us['normcore']:.2f}",
            *map(microseconds, alone),
            f"{theirs / ours:.2f}" if ours and theirs else "",
        ]


def counted_rows(document: Document) -> Iterator[list[str]]:
    for case in document["cases"]:
        for name in (*CONTENDERS, "local"):
            for part, collectives in case["collectives"][name].items():
                texts = [f"{c['collective']} of {c['bytes']} bytes" for c in collectives]
                yield [
                    case["size"],
                    str(case["ranks"]),
                    name,
                    part,
                    ", ".join(texts) or "none",
                    f"{sent(collectives, case['ranks']):.0f}",
                ]


def network_of(entry: Document) -> Network:
    return Network(entry["name"], entry["alpha"], entry["speed"])


def network_text(entry: Document) -> str:
    text = f"{entry['name']}: alpha {entry['alpha']:.3g} us, {entry['speed']:.3g} GB/s"
    factor = entry.get("within a factor of")
    if factor is None:
        return f"{text} (assumed)"
    return f"{text} (fitted to the messages measured here, all within a factor of {factor:.1f})"


def model_rows(document: Document, entry: Document) -> Iterator[list[str]]:
    for channels in unique(case["channels"] for case in document["cases"]):
        for ranks in MODELLED_RANKS:
            us = {
                (name, algorithm): modelled(
                    collectives_of(name, channels), algorithm, ranks, network_of(entry)
                )
                for algorithm in ALGORITHMS
                for name in CONTENDERS
            }
            best = [min(us[name, a] for a in ALGORITHMS) for name in CONTENDERS]
            yield [
                str(channels),
                str(ranks),
                *(f"{sent(collectives_of(name, channels), ranks):.0f}" for name in CONTENDERS),
                *(microseconds(value) for value in us.values()),
                f"{best[1] / best[0]:.2f}",
            ]


def model(document: Document) -> Iterator[str]:
    header = ["channels", "ranks", *(f"{name}, bytes" for name in CONTENDERS)]
    header += [f"{name}, {algorithm}, us" for algorithm in ALGORITHMS for name in CONTENDERS]
    header += ["torch/normcore, each at its best"]
    for entry in document["networks"]:
        yield f"### {network_text(entry)}"
        yield table(header, model_rows(document, entry), 0)


def sync_report(document: Document, title: str = "Sync", pictures: Sequence[str] = ()) -> str:
    steps = ["size per rank", "ranks", "normcore, us", "torch's algorithm, us", "local, us"]
    steps += ["torch/normcore", "normcore's collectives alone, us", "torch's, us", "torch's/ours"]
    counts = ["size per rank", "ranks", "contender", "pass", "collectives", "bytes sent by a rank"]
    parts = [
        f"# {title}",
        description(document),
        "A step is a call and its backward pass. `torch` is the algorithm of "
        "torch.nn.SyncBatchNorm on CPU tensors (`sync_peer.py`), `local` normcore's norm of each "
        "rank's own batch. Ranks beyond the number of cores wait for one.",
        *image_links(pictures),
        "## Measured",
        table(steps, step_rows(document), 1),
        "## Counted",
        "Bytes are those of one rank's tensor. On a ring of p ranks a rank sends 2 (p - 1) / p "
        "times as many in an all_reduce and p - 1 times as many in an all_gather.",
        table(counts, counted_rows(document), 5),
        "## Modelled",
        "A message of n bytes takes alpha + n / speed. ring: all collectives on rings; tree: an "
        "all_reduce up and down a tree; doubling: recursive doubling for all (`sync_model.py`). "
        "Bytes are what a rank sends in a step on rings.",
        *model(document),
    ]
    return "\n\n".join(parts) + "\n"
