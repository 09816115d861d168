"""The shapes of tests/shapes as tensors.

shapes.json holds tensors: size, feature axes, memory layout. shapes.txt holds the extents that the
kernels see, each of which is a tensor with the channels second and one with the channels last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    name: str
    size: tuple[int, ...]
    axis: tuple[int, ...]
    groups: int
    layout: str
    tags: tuple[str, ...]

    @property
    def features(self) -> list[int]:
        """Shape of scale and bias."""
        return [self.size[a] for a in sorted(a % len(self.size) for a in self.axis)]

    def lay_out(self, x: Tensor) -> Tensor:
        """The values of `x` in this memory layout."""
        if self.layout == "contiguous":
            return x.contiguous()
        if self.layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if self.layout == "channels_last_3d":
            return x.contiguous(memory_format=torch.channels_last_3d)
        if self.layout == "strided":
            wide = x.new_empty([*x.shape[:-1], 2 * x.shape[-1]])
            wide[..., ::2] = x
            return wide[..., ::2]
        if self.layout == "permuted":
            order = list(range(x.dim()))[::-1]
            return x.permute(order).contiguous().permute(order)
        if self.layout == "expanded":
            return x[..., :1].expand(x.shape)
        raise ValueError(f"unknown layout {self.layout}")

    def randn(self, dtype: torch.dtype = torch.float64, mean: float = 0.5) -> Tensor:
        return self.lay_out((torch.randn(self.size, dtype=torch.float64) + mean).to(dtype))


FOLDER = Path(__file__).parents[1] / "shapes"


def extents() -> list[Shape]:
    found = []
    for line in (FOLDER / "shapes.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, *numbers = line.split()
            n, c, s, groups = map(int, numbers)
            found.append(Shape(f"{name}_ncs", (n, c, s), (1,), groups, "contiguous", ()))
            found.append(Shape(f"{name}_nsc", (n, s, c), (2,), groups, "contiguous", ()))
    return found


def shapes(tag: str = "test") -> list[Shape]:
    rows = json.loads((FOLDER / "shapes.json").read_text())
    found = [
        Shape(**{k: tuple(v) if isinstance(v, list) else v for k, v in r.items()}) for r in rows
    ]
    return [shape for shape in found if tag in shape.tags]


def shape_named(name: str) -> Shape:
    return next(shape for shape in shapes() if shape.name == name)


def masks(x: Tensor, axis: Sequence[int]) -> Iterator[Tensor | None]:
    """None, one value for all channels, and one per element in another layout than x."""
    yield None
    yield torch.rand([1 if a in axis else n for a, n in enumerate(x.shape)]) < 0.8
    yield torch.rand(x.shape[::-1]).permute(*range(x.dim() - 1, -1, -1)) < 0.8
