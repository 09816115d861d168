"""The command `sync`: a batch norm over ranks, which are processes of this machine.

A step is a call and its backward pass, for the gradients of x, weight and bias. One rank alone
talks to nobody.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import normcore

from . import pages
from .cases import Shape, text_of
from .common import make_operands
from .documents import write
from .machine import facts
from .sync_model import CONTENDERS, Collective, collectives_of, cost, fit
from .sync_peer import TorchSyncBatchNorm
from .sync_ranks import OnRanks, on_ranks
from .sync_report import sync_report
from .timing import best_times

Step = Callable[..., tuple[Tensor, ...]]
# Of the messages whose times give alpha and beta; every fourth power of two.
MESSAGE_BYTES = tuple(1 << k for k in range(6, 23, 4))


class Collectives(TorchDispatchMode):
    """Records the collectives that Python or C++ starts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, name = func._schema.name.split("::")
        if "c10d" in library and not name.startswith("wait_tensor"):
            name = name.rstrip("_").replace("allreduce", "all_reduce")
            tensor = next(t for t in tree_leaves(args) if isinstance(t, Tensor))
            self.found.append(
                {
                    "collective": name.replace("allgather", "all_gather"),
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "bytes": tensor.numel() * tensor.element_size(),
                }
            )
        return func(*args, **(kwargs or {}))


def record(run: Callable[[], Any]) -> tuple[Any, list[Collective]]:
    with Collectives() as mode:
        result = run()
    return result, mode.found


def count(norm: nn.Module, x: Tensor, dy: Tensor) -> dict[str, list[Collective]]:
    """The collectives of each pass."""
    y, forward = record(lambda: norm(x))
    _, backward = record(lambda: y.backward(dy))
    y = norm(x.detach())
    _, of_parameters = record(lambda: y.backward(dy))
    return {"forward": forward, "backward": backward, "backward without grad_x": of_parameters}


def step(norm: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    y = norm(x)
    return (y, *torch.autograd.grad(y, (x, *norm.parameters()), dy))


def communicate(collectives: list[Collective]) -> Callable[[], None]:
    """A function that runs these collectives and nothing else."""
    calls: list[Callable[[], Any]] = []
    for c in collectives:
        dtype = getattr(torch, c["dtype"])
        own = torch.zeros(c["bytes"] // dtype.itemsize, dtype=dtype)
        if c["collective"] == "all_reduce":
            calls.append(partial(dist.all_reduce, own))
        else:
            found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            calls.append(partial(dist.all_gather, found, own))

    def run() -> None:
        for call in calls:
            call()

    return run


def measure(size: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """On every rank; `size` is that of its own part."""
    ranks, channels = dist.get_world_size(), size[1]
    o = make_operands(size, 1, "contiguous", torch.float32)
    x, dy = (o.x + dist.get_rank()).requires_grad_(), o.grad
    local = (normcore.nn.BatchNorm1d, normcore.nn.BatchNorm2d, normcore.nn.BatchNorm3d)
    norms: dict[str, nn.Module] = {
        "normcore": normcore.nn.SyncBatchNorm(channels),
        "torch": TorchSyncBatchNorm(channels),
        "local": local[max(len(size) - 3, 0)](channels),
    }
    for ours, theirs in zip(step(norms["normcore"], x, dy), step(norms["torch"], x, dy)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    counted = {name: count(norm, x, dy) for name, norm in norms.items()}
    contenders = {name: OnRanks(partial(step, norm, x, dy)) for name, norm in norms.items()}
    for name in CONTENDERS:
        collectives = counted[name]["forward"] + counted[name]["backward"]
        # What the model takes.
        assert collectives == (collectives_of(name, channels) if ranks > 1 else [])
        if collectives:
            contenders[f"{name} collectives"] = OnRanks(communicate(collectives))
    return {
        "size": text_of(size),
        "channels": channels,
        "ranks": ranks,
        "microseconds": best_times(contenders, repeats),
        "collectives": counted,
    }


def measure_messages(repeats: int) -> list[dict[str, Any]]:
    """On every rank: collectives of several sizes alone."""
    contenders = {}
    for collective in ("all_reduce", "all_gather"):
        for size in MESSAGE_BYTES:
            one = {"collective": collective, "dtype": "float32", "bytes": size}
            contenders[collective, size] = OnRanks(communicate([one]))
    return [
        {"collective": collective, "bytes": size, "ranks": dist.get_world_size(), "us": us}
        for (collective, size), us in best_times(contenders, repeats).items()
    ]


def fitted(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The all_reduce and all_gather of gloo are taken for rings."""
    samples = [(*cost(m["collective"], "ring", m["ranks"], m["bytes"]), m["us"]) for m in messages]
    network, factor = fit("gloo here", samples)
    return network.as_json() | {"within a factor of": factor}


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the report, and writes the results."""
    document: dict[str, Any] = {"kind": "sync", "format": 1} | facts("cpu")
    document |= {
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "pages": arguments.pages,
        "malloc": pages.settings(),
        "networks": [network.as_json() for network in arguments.networks],
        "messages": [],
        "cases": [],
    }
    todo: list[tuple[int, Shape | None]] = [(p, None) for p in arguments.ranks if p > 1]
    todo += [(ranks, shape) for ranks in arguments.ranks for shape in arguments.shapes]
    for ranks, shape in track(todo, "measuring", console=Console(stderr=True)):
        start = partial(on_ranks, ranks, arguments.threads)
        if shape is None:
            document["messages"] += start(measure_messages, arguments.repeats)
        else:
            document["cases"].append(start(measure, shape.size, arguments.repeats))
    if document["messages"]:
        document["networks"].append(fitted(document["messages"]))
    write(document, arguments.output)
    print(sync_report(document))
    return 0
