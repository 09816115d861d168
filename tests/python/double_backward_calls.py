"""Calls of the double backward operators, for their tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import reference
import torch
from torch import Tensor

ops = torch.ops.normcore

OPERANDS = ("input", "weight", "bias", "residual")
NAN, INF = float("nan"), float("inf")
CLOSE: Any = {"rtol": 1e-10, "atol": 1e-10, "equal_nan": True}


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@dataclasses.dataclass
class Call:
    """Batch norm with the statistics of the batch unless `running` or `num_groups` is given."""

    tensors: dict[str, Tensor | None]  # operands, and the gradients that come in
    axis: Sequence[int] = (1,)
    num_groups: int | None = None
    reduction_axes: Sequence[int] | None = None
    activation: str | None = None
    mask: Tensor | None = None
    running: tuple[Tensor, Tensor] | None = None

    def with_tensors(self, **changes: Tensor | None) -> Call:
        return dataclasses.replace(self, tensors=self.tensors | changes)

    def __call__(
        self, output_mask: Sequence[bool] = (True,) * 5, *, by_formula: bool = False
    ) -> list[Tensor | None]:
        """Gradients of grad_output, input, weight, bias and residual."""
        operands = [*(self.tensors[name] for name in OPERANDS), self.mask]
        rules: dict[str, Any] = {"axis": self.axis, "eps": 1e-5, "activation": self.activation}
        if self.num_groups is not None:
            rules |= {"num_groups": self.num_groups, "reduction_axes": self.reduction_axes}
            _, mean, rstd = ops._group_norm(*operands, **rules, dtype=None)
            op = ops._group_norm_double_backward
        else:
            op = ops._batch_norm_double_backward
            if self.running is not None:
                mean, var = self.running
                _, rstd = ops._batch_norm_eval(*operands[:4], mean, var, **rules, dtype=None)
            else:
                state = dict.fromkeys(("running_mean", "running_var", "num_batches_tracked"))
                rest: Any = {"momentum": 0.1, "unbiased": True, "dtype": None, **state}
                _, mean, rstd, _ = ops._batch_norm_train(*operands, **rules, **rest)
            rules["batch_statistics"] = self.running is None
        tensors = dict(self.tensors)
        if by_formula:  # what gives a third derivative
            assert tensors["grad_output"] is not None
            tensors["grad_output"] = tensors["grad_output"].detach().requires_grad_()
        saved = {"mask": self.mask, "mean": mean, "rstd": rstd}
        results = op(**tensors, **saved, **rules, output_mask=list(output_mask))
        return [None if t is None else t.detach() for t in results]

    def check(self) -> list[Tensor | None]:
        """Runs the kernel, which has to agree with the formula."""
        results, formula = self(), self(by_formula=True)
        for name, got, want in zip(("grad_output", *OPERANDS), results, formula, strict=True):
            limits = dict(CLOSE)
            if want is not None and want.numel():  # sums of a slice may be far smaller than terms
                limits["atol"] *= want.nan_to_num().abs().max().clamp_min(1).item()
            torch.testing.assert_close(got, want, msg=lambda m, n=name: f"{n}: {m}", **limits)
        return results


def make_call(
    x: Tensor,
    *,
    operands: Sequence[str] = OPERANDS,
    per_sample: bool = False,
    running: bool = False,
    **options: Any,
) -> Call:
    """Random tensors for an input; contiguous, whatever the layout of `x`."""
    features = [x.shape[a] for a in reference.axes_of(options.get("axis", 1), x.dim())]
    shape = [x.shape[0], *features] if per_sample else features

    def random(size: Sequence[int]) -> Tensor:
        return double(*size).to(x.dtype)

    made = {
        "input": x,
        "weight": random(shape).abs() + 0.5,
        "bias": random(shape),
        "residual": random(x.shape),
    }
    tensors: dict[str, Tensor | None] = {"grad_output": random(x.shape)}
    for name, t in made.items():
        is_given = name == "input" or name in operands
        tensors[name] = t if is_given else None
        tensors[f"grad_grad_{name}"] = random(t.shape) if is_given else None
    if running:
        options["running"] = random(features), random(features).square() + 0.5
    return Call(tensors, **options)


# Options of make_call for an input with 4 channels on axis 1.
KINDS: dict[str, dict[str, Any]] = {
    "train": {},
    "eval": {"running": True},
    "group": {"num_groups": 2},
    "per sample": {"num_groups": 2, "per_sample": True},
    "some axes": {"num_groups": 2, "reduction_axes": [0, 1]},
    "whole batch": {"num_groups": 2, "reduction_axes": [0, 1, 2, 3]},
}


def image(layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    return double(3, 4, 5, 2).contiguous(memory_format=layout)
