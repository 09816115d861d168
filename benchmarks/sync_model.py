"""What collectives send and how long they take by the alpha-beta model. Knows nothing of torch.

A message of n bytes takes alpha + n / speed. With p ranks, and n bytes from each of them:

                  messages one after another   bytes in them
all_reduce
  ring            2 (p - 1)                    2 (p - 1) / p n
  tree            2 ceil(log2 p)               2 ceil(log2 p) n   up and down, not pipelined
  doubling        ceil(log2 p)                 ceil(log2 p) n     recursive doubling
all_gather
  ring, tree      p - 1                        (p - 1) n          a ring both times, as in NCCL
  doubling        ceil(log2 p)                 (p - 1) n          recursive doubling

Source: Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations in
MPICH, 2005. Not in it: what a collective costs before its first message, arithmetic, and waiting
for ranks that come late.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .cases import Shape

ALGORITHMS = ("ring", "tree", "doubling")
CONTENDERS = ("normcore", "torch")
MODELLED_RANKS = (8, 16, 64, 256, 1024, 4096)

# Per rank: a stage of ResNet-50 early and late, and rows whose channels weigh more than the values.
SYNC_SHAPES = (
    Shape("early", (8, 64, 28, 28), 32),
    Shape("late", (8, 512, 7, 7), 32),
    Shape("rows", (16, 2048), 32),
)

Collective = dict[str, Any]  # "collective", "dtype", and "bytes" of one rank


@dataclass(frozen=True)
class Network:
    name: str
    alpha: float  # microseconds of a message without content
    speed: float  # GB/s

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


# Assumptions, to be replaced by values of the network at hand (--networks). NCCL's own model takes
# 0.5 to 3.4 us for a step of a ring over NVLink and 2.7 to 9.6 us over a network, by its protocol.
NETWORKS = (Network("NVLink", 2.0, 100.0), Network("InfiniBand", 5.0, 25.0))


def cost(collective: str, algorithm: str, ranks: int, size: float) -> tuple[int, float]:
    """Messages one after another, and the bytes in them; `size` is what one rank brings."""
    others, levels = ranks - 1, math.ceil(math.log2(ranks))
    costs = {
        ("all_reduce", "ring"): (2 * others, 2 * others / ranks * size),
        ("all_reduce", "tree"): (2 * levels, 2 * levels * size),
        ("all_reduce", "doubling"): (levels, levels * size),
        ("all_gather", "ring"): (others, others * size),
        ("all_gather", "tree"): (others, others * size),
        ("all_gather", "doubling"): (levels, others * size),
    }
    return costs[collective, algorithm]


def sent(collectives: Iterable[Collective], ranks: int) -> float:
    """Bytes that a rank sends on a ring. No algorithm gets by with less from every rank."""
    return sum(cost(c["collective"], "ring", ranks, c["bytes"])[1] for c in collectives)


def microseconds(
    collectives: Iterable[Collective], algorithm: str, ranks: int, network: Network
) -> float:
    costs = [cost(c["collective"], algorithm, ranks, c["bytes"]) for c in collectives]
    return sum(m * network.alpha + size / (1e3 * network.speed) for m, size in costs)


def collectives_of(contender: str, channels: int) -> list[Collective]:
    """Of a training step of a batch norm, as the command `sync` has counted them on a few ranks."""
    sizes = {
        "normcore": [
            ("all_reduce", "float64", 64 * channels),
            ("all_reduce", "float64", 16 * channels),
        ],
        "torch": [
            ("all_gather", "float32", 8 * channels + 4),
            ("all_reduce", "float32", 8 * channels),
        ],
    }
    return [dict(zip(("collective", "dtype", "bytes"), size)) for size in sizes[contender]]


def fit(name: str, samples: Sequence[tuple[int, float, float]]) -> tuple[Network, float]:
    """The network nearest to samples of messages, bytes and microseconds, on rings.

    Also the largest factor between a sample and the model. Relative errors count, so that small
    messages weigh as much as large ones.
    """
    rows = [(messages / us, size / us) for messages, size, us in samples]
    mm, mb, bb = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    m, b = (sum(r[i] for r in rows) for i in (0, 1))
    determinant = mm * bb - mb * mb
    alpha, beta = (m * bb - b * mb) / determinant, (b * mm - m * mb) / determinant
    if alpha <= 0.0:
        alpha, beta = 0.0, b / bb
    elif beta <= 0.0:
        alpha, beta = m / mm, 0.0
    factors = [alpha * x + beta * y for x, y in rows]
    network = Network(name, alpha, 1e-3 / beta if beta else math.inf)
    return network, max(max(f, 1 / f) for f in factors)
