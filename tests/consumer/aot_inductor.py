"""Packages of AOTInductor for aot_inductor.cpp, and what they have to give.

    python aot_inductor.py FOLDER    writes NAME.pt2 and NAME.pt (x and y) for two models

``decomposed`` holds nothing but aten operations, ``operator`` the group norm of normcore.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import normcore


class Decomposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.batch_norm = normcore.BatchNorm(num_features=8, axis=1, activation="relu")
        self.group_norm = normcore.GroupNorm(num_features=8, num_groups=2, axis=1)
        nn.init.normal_(self.batch_norm.mean)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.group_norm(self.batch_norm(self.conv(x)))
        return y


class Operator(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.normcore.group_norm(x, 3, activation="silu")
        return y


class Data(nn.Module):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.register_buffer("x", x)
        self.register_buffer("y", y)

    def forward(self) -> Tensor:
        return self.y


def write(folder: Path) -> None:
    torch.manual_seed(0)
    for name, model in {"decomposed": Decomposed().eval(), "operator": Operator()}.items():
        x = torch.randn(2, 3, 8, 8)
        program = torch.export.export(model, (x,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / f"{name}.pt2"))
        torch.jit.script(Data(x, model(x).detach())).save(folder / f"{name}.pt")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
