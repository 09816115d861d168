"""The command `chain`: convolution, norm with ReLU, convolution.

Outputs that are streamed past the caches make a norm faster and are not there for the next layer.
Beside the chain the norm is timed alone: the difference, `rest`, is what its neighbours take.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as torch_functional
from rich.console import Console
from rich.progress import track
from torch import Tensor

import normcore
import normcore.functional as norm_functional

from . import pages
from .cases import text_of
from .chain_report import chain_report
from .common import Norm, Operands, lay_out, make_operands
from .documents import write
from .machine import facts
from .peers import Contenders
from .timing import Call, best_times

KERNEL = 3
SAMPLE = (16, 112, 112)  # few channels: more would hide the norm behind the convolutions
GROUPS = 8
ALONE = " alone"  # ends the name of a contender that is a norm without its neighbours


@dataclass(frozen=True)
class Chain:
    norm: str
    mode: str  # inference, or the forward and backward pass of training
    size: tuple[int, ...]
    layout: str
    dtype: str

    @property
    def trains(self) -> bool:
        return self.mode == "training"


@cache
def stores(chain: Chain, backward: bool = False) -> str:
    """How normcore writes its output, as normcore.explain says: streaming or cached."""
    dtype = getattr(torch, chain.dtype)
    plan = normcore.explain(
        lay_out(torch.empty(chain.size, dtype=dtype, device="meta"), chain.layout),
        chain.norm,
        num_groups=math.gcd(chain.size[1], GROUPS),
        activation="relu",
        training=chain.trains,
        backward=backward,
        device="cpu",
    )
    found = re.search(r"(\w+) stores", plan)
    return found[1] if found else "unknown"


def sizes_around_threshold(norm: str, mode: str, layout: str, dtype: str) -> Iterator[Chain]:
    """The first power of two of samples whose output is streamed, half of it, and twice."""
    chains = (Chain(norm, mode, (1 << k, *SAMPLE), layout, dtype) for k in itertools.count())
    samples = next(chain.size[0] for chain in chains if stores(chain) == "streaming")
    for n in (samples // 2, samples, 2 * samples):
        yield Chain(norm, mode, (n, *SAMPLE), layout, dtype)


def norms(chain: Chain, o: Operands) -> dict[str, Norm]:
    """Norm and ReLU, in place in torch."""
    if chain.norm == "group_norm":
        return {
            "normcore": lambda x: norm_functional.group_norm(
                x, o.groups, o.weight, o.bias, activation="relu"
            ),
            "torch": lambda x: torch_functional.group_norm(x, o.groups, o.weight, o.bias).relu_(),
        }
    ours, theirs = ((torch.zeros_like(o.bias), torch.ones_like(o.bias)) for _ in range(2))
    return {
        "normcore": lambda x: norm_functional.batch_norm(
            x, *ours, o.weight, o.bias, chain.trains, activation="relu"
        ),
        "torch": lambda x: torch_functional.batch_norm(
            x, *theirs, o.weight, o.bias, chain.trains
        ).relu_(),
    }


def step_of(chain: Chain, layers: Norm, leaves: tuple[Tensor, ...], o: Operands) -> Call:
    """A call of the layers; in training with the backward pass."""

    def inference() -> Tensor:
        with torch.no_grad():
            return layers(o.x)

    def training() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layers(leaves[0]), leaves, o.grad)

    return Call(training if chain.trains else inference, lambda: None)


def contenders(chain: Chain) -> Contenders:
    channels = chain.size[1]
    dtype = getattr(torch, chain.dtype)
    o = make_operands(chain.size, math.gcd(channels, GROUPS), chain.layout, dtype)
    fan_in = channels * KERNEL**2
    kernel_size = (channels, channels, KERNEL, KERNEL)
    before, after = (
        lay_out(torch.randn(kernel_size) / math.sqrt(fan_in), chain.layout).to(dtype)
        for _ in range(2)
    )
    kernels = tuple(k.requires_grad_() for k in (before, after))
    parameters = (o.x.detach().requires_grad_(), o.weight, o.bias)
    convolution: Callable[..., Tensor] = partial(torch_functional.conv2d, padding=KERNEL // 2)
    found = Contenders()
    for name, norm in norms(chain, o).items():

        def layers(x: Tensor, norm: Norm = norm) -> Tensor:
            return convolution(norm(convolution(x, before)), after)

        found.add(name, partial(step_of, chain, layers, parameters + kernels, o))
        found.add(name + ALONE, partial(step_of, chain, norm, parameters, o))
    return found


def measure(chain: Chain, repeats: int) -> dict[str, Any]:
    found = contenders(chain)
    times = best_times(found.ready, repeats)
    passes = {"forward": False} | ({"backward": True} if chain.trains else {})
    return {
        "norm": chain.norm,
        "mode": chain.mode,
        "size": text_of(chain.size),
        "layout": chain.layout,
        "dtype": chain.dtype,
        "stores": {name: stores(chain, backward) for name, backward in passes.items()},
        "microseconds": {n: us for n, us in times.items() if not n.endswith(ALONE)},
        "norm_microseconds": {
            n.removesuffix(ALONE): us for n, us in times.items() if n.endswith(ALONE)
        },
        "unavailable": found.unavailable,
    }


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the report, and writes the results."""
    torch.set_num_threads(arguments.threads)
    todo: list[Chain] = []
    for place in itertools.product(
        arguments.norms, arguments.modes, arguments.layouts, arguments.dtypes
    ):
        norm, mode, *storage = place
        if arguments.sizes:
            todo += [Chain(norm, mode, shape.size, *storage) for shape in arguments.sizes]
        else:
            todo += sizes_around_threshold(*place)
    document: dict[str, Any] = {"kind": "chain", "format": 1} | facts("cpu")
    console = Console(stderr=True)
    document |= {
        "repeats": arguments.repeats,
        "pages": arguments.pages,
        "malloc": pages.settings(),
        "cases": [],
    }
    for chain in track(todo, "measuring", console=console):
        document["cases"].append(measure(chain, arguments.repeats))
        write(document, arguments.output)
    print(chain_report(document))
    return 0
