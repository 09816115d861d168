"""Norms with random operands, made on the CPU and run there or on a device, and shapes for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import reference
import torch
from compare import call
from devices import place
from shape_list import Shape
from torch import Tensor

import normcore
import normcore.functional as NF

NORMS = ["batch_norm", "batch_norm eval", "group_norm"]
# Of normcore/kernels/cuda_plan.h, with something to reduce.
PATHS = ["pack", "block", "cluster", "team", "split", "run"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def image(name: str, size: tuple[int, ...], groups: int, layout: str = "contiguous") -> Shape:
    return Shape(name, size, (1,), groups, layout, ())


# Small, and yet every way through the kernels: slices of a few vectors, of a block's registers, of
# several blocks; planes and rows; sizes that divide into vectors and sizes that do not.
SMALL = [
    image("few_vectors", (8, 64, 7, 7), 32),
    image("one_block", (3, 32, 28, 28), 8),
    image("several_blocks", (2, 4, 150, 151), 2),
    image("odd", (3, 65, 9, 11), 5),
    image("few_rows", (8, 64, 4, 4), 32, "channels_last"),
    image("rows", (3, 32, 28, 28), 8, "channels_last"),
    image("many_rows", (2, 24, 66, 67), 4, "channels_last"),
    image("odd_rows", (3, 65, 9, 11), 5, "channels_last"),
    Shape("features", (300, 136), (-1,), 8, "contiguous", ()),
    Shape("features_of_few_groups", (300, 4096), (-1,), 2, "contiguous", ()),
    Shape("features_of_many_groups", (70, 8320), (-1,), 65, "contiguous", ()),
    image("volume", (2, 16, 5, 12, 13), 4),
    image("volume_rows", (2, 16, 5, 12, 13), 4, "channels_last_3d"),
]
# Enough blocks to fill a device.
LARGE = [
    image("resnet", (16, 64, 56, 56), 32),
    image("diffusion", (2, 320, 64, 64), 32),
    image("one_large_sample", (1, 32, 512, 512), 4),
    image("resnet_rows", (16, 64, 56, 56), 32, "channels_last"),
    image("one_large_sample_rows", (1, 32, 512, 512), 4, "channels_last"),
    Shape("mlp", (4096, 256), (-1,), 32, "contiguous", ()),
]


def name_of(shape: Shape) -> str:
    return shape.name


@dataclass
class Workload:
    """One norm with its operands: `norm` is one of NORMS."""

    norm: str
    shape: Shape
    x: Tensor
    dy: Tensor
    operands: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def random(
        norm: str,
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        parameters: torch.dtype = torch.float32,
        statistics: torch.dtype = torch.float32,
        out: torch.dtype | None = None,
        residual: bool = False,
        masked: bool = False,
        per_sample: bool = False,
        **options: Any,
    ) -> Workload:
        """New operands on the default device; `options` are further arguments of the function."""
        affine = (shape.size[0], *shape.features) if per_sample else shape.features

        def normal(size: Any, dtype: torch.dtype) -> Tensor:
            return torch.randn(size).to(dtype)

        operands = {
            "weight": (torch.rand(affine) + 0.5).to(parameters),
            "bias": normal(affine, parameters),
            "axis": shape.axis,
            **options,
        }
        if residual:
            operands["residual"] = shape.lay_out(normal(shape.size, dtype))
        if masked:
            operands["mask"] = torch.rand(shape.size) < 0.8
        if norm == "group_norm":
            operands["num_groups"] = shape.groups
        else:
            operands["running_mean"] = normal(shape.features, statistics)
            operands["running_var"] = (torch.rand(shape.features) + 0.5).to(statistics)
            operands["training"] = norm == "batch_norm"
        if out is not None:
            operands["dtype"] = out
        x = shape.lay_out((torch.randn(shape.size) + 0.5).to(dtype))
        return Workload(norm, shape, x, torch.randn_like(x).to(out or dtype), operands)

    def to(self, device: torch.device | str) -> Workload:
        """A copy on a device, running statistics included; strides stay."""
        with torch.device(device):
            x, dy, operands = place((self.x, self.dy, self.operands))
        operands = {k: v.clone() if isinstance(v, Tensor) else v for k, v in operands.items()}
        return Workload(self.norm, self.shape, x, dy, operands)

    def in_float64(self) -> Workload:
        def widen(t: Any) -> Any:
            return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t

        operands = {k: widen(v) for k, v in self.operands.items() if k != "dtype"}
        return Workload(self.norm, self.shape, widen(self.x), widen(self.dy), operands)

    @property
    def function(self) -> Callable[..., Tensor]:
        return NF.group_norm if self.norm == "group_norm" else NF.batch_norm

    def takes(self, path: str) -> bool:
        """Whether a forward or backward pass runs on the path that is set."""
        groups = {"num_groups": self.shape.groups} if self.norm == "group_norm" else {}
        plans = [
            normcore.explain(
                self.x,
                self.norm.split(" ")[0],
                self.operands["axis"],
                mask=self.operands.get("mask"),
                backward=backward,
                device="cuda",
                **groups,
            )
            for backward in (False, True)
        ]
        return any(f": {path} path, " in plan for plan in plans)

    def forward(self) -> Tensor:
        return self.function(self.x, **self.operands)

    def run(self) -> dict[str, Tensor]:
        """Output, gradients, and the running statistics after a training call."""
        y, grads = call(self.function, self.x, self.dy, **self.operands)
        results = {"y": y.detach(), **grads}
        if self.norm == "batch_norm":
            results |= {n: self.operands[f"running_{n}"].detach() for n in ("mean", "var")}
        return results

    def run_double(self) -> dict[str, Tensor]:
        """Gradients of what the backward pass gives, towards its operands."""
        names = [n for n in ("weight", "bias", "residual") if n in self.operands]
        leaves = {"dy": self.dy, "x": self.x} | {n: self.operands[n] for n in names}
        leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
        operands = self.operands | {n: leaves[n] for n in names}
        y = self.function(leaves["x"], **operands)
        inputs = [t for name, t in leaves.items() if name != "dy"]
        first = torch.autograd.grad(y, inputs, leaves["dy"], create_graph=True)
        cotangents = [t.detach().flip(-1) + 0.25 for t in inputs]
        second = torch.autograd.grad(first, leaves.values(), cotangents, allow_unused=True)
        return {n: t for n, t in zip(leaves, second, strict=True) if t is not None}

    def expected(self) -> reference.Expected:
        """The same in float64, with plain torch operators."""
        function = reference.group_norm if self.norm == "group_norm" else reference.batch_norm
        operands = {k: v for k, v in self.operands.items() if k != "dtype"}
        return function(self.x, dy=self.dy, **operands)


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor], what: str = "") -> None:
    assert got.keys() == want.keys()
    for name in got:
        assert torch.equal(got[name], want[name]), f"{name} differs {what}"
