"""What recorded graphs are made of: shared by the tests of compilers and of exporters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import normcore


def calls(graph: torch.fx.GraphModule) -> list[str]:
    """The operators of a graph, without those that only look at sizes and tuples."""
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [name for name in names if "getitem" not in name and "sym_size" not in name]


def of_normcore(names: Iterable[str]) -> list[str]:
    return [name for name in names if "normcore" in name]


class Network(nn.Module):
    """A convolution, both norms with their epilogues, and a residual around the second."""

    def __init__(self, *, training: bool = False, norms: str = "both") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.batch = normcore.BatchNorm(num_features=8, axis=1, activation="relu")
        self.group = normcore.GroupNorm(num_features=8, num_groups=2, axis=1, activation="silu")
        self.norms = norms
        for t in (self.batch.mean, self.batch.scale, self.group.scale, self.group.bias):
            nn.init.normal_(t)
        nn.init.uniform_(self.batch.var, 0.5, 2.0)
        self.train(training)

    def forward(self, x: Tensor) -> Tensor:
        x = self.batch(self.conv(x))
        return x if self.norms == "batch" else self.group(x, residual=x)


def reference(network: Network) -> nn.Module:
    """The evaluation of a Network with batch norm only, in torch's own modules."""
    norm = nn.BatchNorm2d(8).eval()
    norm.load_state_dict(
        {
            "weight": network.batch.scale,
            "bias": network.batch.bias,
            "running_mean": network.batch.mean,
            "running_var": network.batch.var,
            "num_batches_tracked": torch.tensor(0),
        }
    )
    return nn.Sequential(network.conv, norm, nn.ReLU())


def _spread(*shape: int) -> Tensor:
    return torch.linspace(0.5, 2.0, math.prod(shape)).reshape(shape)


# Options of calls with an input of 2x8x6x6 values.
EVALUATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "activation": {"activation": "gelu_tanh"},
    "float32 output": {"dtype": torch.float32, "activation": "gelu"},
    "last axis": {"axis": -1, "activation": "relu"},
    "first axis": {"axis": 0},
    "two axes": {"axis": [1, 3], "activation": "silu"},
}
GROUP_NORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "activation": {"activation": "gelu_tanh"},
    "float32 output": {"dtype": torch.float32, "activation": "gelu"},
    "mask": {"mask": torch.arange(8 * 36).reshape(8, 6, 6) % 3 != 0},
    "last axis": {"axis": -1},
    "two axes": {"axis": [1, 2], "activation": "relu"},
    "reduction axes": {"reduction_axes": [1], "activation": "silu"},
    "whole batch": {"reduction_axes": [0, 1, 2, 3]},
    "per sample": {"weight": _spread(2, 8), "bias": -_spread(2, 8)},
}


def evaluate(x: Tensor, options: dict[str, Any]) -> Tensor:
    """Batch norm with running statistics, parameters and a residual."""
    axis = options.get("axis", 1)
    axes = sorted(a % x.dim() for a in ([axis] if isinstance(axis, int) else axis))
    shape = [x.shape[a] for a in axes]
    mean, var, w = _spread(*shape) - 1, _spread(*shape), -_spread(*shape)
    return normcore.functional.batch_norm(x, mean, var, w, mean, residual=x, **options)


def group(x: Tensor, options: dict[str, Any]) -> Tensor:
    return normcore.functional.group_norm(x, 2, residual=x, **options)
