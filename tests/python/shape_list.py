"""The shapes of tests/shapes/shapes.json as tensors in the memory layout that they name."""

from __future__ import annotations

import json
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


def shapes(tag: str = "test") -> list[Shape]:
    path = Path(__file__).parents[1] / "shapes" / "shapes.json"
    rows = json.loads(path.read_text())
    found = [
        Shape(**{k: tuple(v) if isinstance(v, list) else v for k, v in r.items()}) for r in rows
    ]
    return [shape for shape in found if tag in shape.tags]


def shape_named(name: str) -> Shape:
    return next(shape for shape in shapes() if shape.name == name)
