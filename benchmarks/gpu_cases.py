"""What benchmarks/gpu.py measures: shapes and norms in the order of their importance, and for each
of them the calls of normcore and of its peers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import (
    Norm,
    Operands,
    add_relu_batch_norms,
    backward_of,
    batch_norms,
    double_backward_of,
    group_norms,
    make_operands,
    with_residual,
)
from torch import Tensor

import normcore

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ALL = ("batch_norm", "group_norm", "group_norm + silu")
BLOCK = "batch_norm + add + relu"  # the end of a block of ResNet; what is added has a gradient


@dataclass(frozen=True)
class Shape:
    name: str
    size: tuple[int, ...]
    groups: int
    norms: tuple[str, ...] = ALL
    dtypes: tuple[torch.dtype, ...] = (BF16, F16, F32)
    layouts: tuple[str, ...] = ("contiguous", "channels_last")


GROUP, BATCH = ALL[1:], ALL[:1]
VOLUME = ("contiguous", "channels_last_3d")
SHAPES = [
    Shape("resnet 56", (32, 256, 56, 56), 32, (*ALL, BLOCK)),
    Shape("resnet 28", (32, 512, 28, 28), 32, (*ALL, BLOCK)),
    Shape("resnet 7", (32, 2048, 7, 7), 32, (*ALL, BLOCK)),
    Shape("SD UNet", (2, 320, 64, 64), 32, GROUP),
    Shape("VAE", (1, 128, 256, 256), 32, GROUP),
    Shape("large BN", (4, 128, 1024, 1024), 32, BATCH, (F16,)),
    Shape("video VAE", (1, 256, 17, 256, 256), 32, ("group_norm + silu",), (BF16, F16), VOLUME),
    Shape("3-D UNet", (2, 64, 32, 32, 32), 32, layouts=VOLUME),
    Shape("MLP", (4096, 256), 32, layouts=("contiguous",)),
    Shape("wide MLP", (4096, 4096), 2, GROUP, layouts=("contiguous",)),
]


@dataclass(frozen=True)
class Case:
    shape: Shape
    norm: str
    layout: str
    dtype: torch.dtype

    @property
    def is_batch_norm(self) -> bool:
        return self.norm.startswith("batch_norm")

    @property
    def forward(self) -> str:
        """The operation of the forward pass."""
        return self.norm.replace("batch_norm", "batch_norm train")

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.shape.name}, {self.norm}, {self.layout}, {dtype}"


def cases() -> list[Case]:
    """The most important first: bfloat16 and the shapes named with a dtype, then the rest."""
    every = [
        Case(shape, norm, layout, dtype)
        for shape in SHAPES
        for layout in shape.layouts
        for norm in shape.norms
        for dtype in shape.dtypes
    ]

    def rank(case: Case) -> tuple[bool, int, int, int]:
        named = case.dtype == case.shape.dtypes[0]
        named |= (case.shape.name, case.norm, case.dtype) == ("resnet 56", "batch_norm", F16)
        return (
            not named,
            0 if named else (BF16, F16, F32).index(case.dtype),
            case.shape.layouts.index(case.layout),
            case.shape.norms.index(case.norm),
        )

    return sorted(every, key=rank)


@contextmanager
def attempt(what: str, failures: list[str]) -> Iterator[None]:
    """Notes an error and goes on: a peer may lack a case, and the others are still of use."""
    try:
        yield
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        failures.append(f"{what}: {type(error).__name__}: {text[0][:200]}")


@torch.no_grad()
def forward_of(norm: Norm, x: Tensor) -> tuple[Tensor]:
    return (norm(x),)


def operands_of(case: Case, device: str) -> Operands:
    # torch's group norm on a device wants scale and bias in the dtype of x.
    parameters = torch.float32 if case.is_batch_norm else case.dtype
    size, groups = case.shape.size, case.shape.groups
    o = make_operands(size, groups, case.layout, case.dtype, device, parameters)
    return with_residual(o) if case.norm == BLOCK else o


def norms_of(case: Case, o: Operands) -> tuple[Norm, Norm]:
    if case.norm == BLOCK:
        return add_relu_batch_norms(o)
    if case.norm == "batch_norm":
        return batch_norms(o, True)
    return group_norms(o, "silu" if case.norm.endswith("silu") else None)


def on_path(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
    def on_path() -> Any:
        normcore._C.set_cuda_path(name)
        try:
            return run()
        finally:
            normcore._C.set_cuda_path("")

    return on_path


def path_candidates(
    case: Case, o: Operands, paths: list[str]
) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """Forward and backward passes of normcore on paths that can run them, by name."""
    axes = {"axis": 1} if case.is_batch_norm else {"axis": 1, "num_groups": o.groups}
    op = case.norm.split(" ")[0]
    forward: dict[str, Callable[[], Any]] = {}
    backward: dict[str, Callable[[], Any]] = {}
    for path in paths:
        for is_backward, found in ((False, forward), (True, backward)):
            explain = partial(normcore.explain, o.x, op, backward=is_backward, **axes)
            if f" {path} path, " not in on_path(path, partial(explain, device="cuda"))():
                continue
            norm = norms_of(case, o)[0]
            run = backward_of(norm, o) if is_backward else partial(forward_of, norm, o.x)
            found[f"normcore {path}"] = on_path(path, run)
    return forward, backward


def triton_candidates(
    case: Case, o: Operands
) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """Forward and backward passes of the Triton kernels, by name; there are none of blocks."""
    if case.norm == BLOCK:
        return {}, {}
    import triton_norms

    groups = None if case.norm == "batch_norm" else o.groups
    running = (torch.zeros_like(o.bias), torch.ones_like(o.bias)) if groups is None else None
    norm = triton_norms.Norm(
        triton_norms.Geometry.of(o.x, groups),
        o.weight.detach(),
        o.bias.detach(),
        silu=case.norm.endswith("silu"),
        running=running,
    )
    _, mean, rstd = norm.forward_split(o.x)
    forward = {f"triton {way}": lambda f=f: f(o.x) for way, f in norm.forwards().items()}
    backward = {
        f"triton {way}": lambda f=f: f(o.x, o.grad, mean, rstd)
        for way, f in norm.backwards().items()
    }
    return forward, backward


def candidates(
    case: Case, o: Operands, peers: set[str], paths: list[str], failures: list[str]
) -> dict[str, dict[str, Callable[[], Any]]]:
    """Of each operation, by name. The first result of each is what the operation is about."""
    # Norms of their own for each use: a call must not change the statistics that a backward saved.
    forward: dict[str, Callable[[], Any]] = {
        name: partial(forward_of, norm, o.x)
        for name, norm in zip(("normcore", "torch"), norms_of(case, o), strict=True)
    }
    backward: dict[str, Callable[[], Any]] = {}
    for name, norm in zip(("normcore", "torch"), norms_of(case, o), strict=True):
        with attempt(f"{case.name}, {name}", failures):
            backward[name] = backward_of(norm, o)
    with attempt(f"{case.name}, normcore on paths", failures):
        more_forward, more_backward = path_candidates(case, o, paths)
        forward |= more_forward
        backward |= more_backward
    if "compile" in peers:
        with attempt(f"{case.name}, compile", failures):
            # One compilation serves both passes: the forward pass is that of a training step.
            compiled = torch.compile(norms_of(case, o)[1], dynamic=False, fullgraph=True)
            leaf = o.x.detach().requires_grad_()
            backward["compile"] = backward_of(compiled, o)
            forward["compile"] = lambda: (compiled(leaf).detach(),)
    if "triton" in peers:
        with attempt(f"{case.name}, triton", failures):
            more_forward, more_backward = triton_candidates(case, o)
            forward |= more_forward
            backward |= more_backward
    found = {case.forward: forward, f"{case.norm} backward": backward}
    if case.norm == BLOCK:
        return found
    double: dict[str, Callable[[], Any]] = {}
    for name, norm in zip(("normcore", "torch"), norms_of(case, o), strict=True):
        with attempt(f"{case.name}, {name}", failures):
            double[name] = double_backward_of(norm, o)
    found[f"{case.norm} double backward"] = double
    if case.norm == "batch_norm":
        evaluations = zip(("normcore", "torch"), batch_norms(o, False), strict=True)
        found["batch_norm eval"] = {
            name: partial(forward_of, norm, o.x) for name, norm in evaluations
        }
    return found


def difference(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().float(), want.float()
    return ((got - want).norm() / want.norm()).item()


def wanted(case: Case, o: Operands) -> dict[str, Tensor]:
    """Results of torch in float32 for the same operands."""
    weight, bias = (p.detach().float().requires_grad_() for p in (o.weight, o.bias))
    residual = None if o.residual is None else o.residual.detach().float().requires_grad_()
    wide = Operands(o.x.float(), weight, bias, o.grad.float(), o.groups, residual)
    _, theirs = norms_of(case, wide)
    with torch.no_grad():
        y = theirs(wide.x)
    return {
        case.forward: y,
        f"{case.norm} backward": backward_of(theirs, wide)()[0],
    }


def shrink() -> None:
    """Makes the shapes small, for a rehearsal."""

    def smaller(shape: Shape) -> Shape:
        spatial = tuple(min(n, 4) for n in shape.size[2:])
        size = (min(shape.size[0], 2), min(shape.size[1], 32), *spatial)
        # Of a group of one value the gradient is 0, and a relative error says nothing.
        groups = min(shape.groups, size[1] // 8)
        return Shape(shape.name, size, groups, shape.norms, shape.dtypes[:1], shape.layouts)

    SHAPES[:] = map(smaller, SHAPES)
