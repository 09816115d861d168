"""The command `accuracy`: errors of the results and gradients of a training step against float64.

The relative error of a tensor is |got - want| / |want| with Euclidean norms. Inputs are normal,
with standard deviation `magnitude` and `mean_over_std` times as large a mean; what a dtype rounds
to a constant, or to zero or infinity, is left out. float64 starts from the rounded input.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._dynamo.config
import torch.nn.functional as torch_functional
from rich.console import Console
from rich.progress import track
from torch import Tensor

import normcore

from .accuracy_report import accuracy_report
from .cases import DTYPES, LAYOUTS, text_of
from .common import lay_out
from .documents import write
from .machine import facts

EPSILON = 1e-5
MEAN_OVER_STD = (0.0, 1e2, 1e4, 1e6)
MAGNITUDES = (1e-20, 1.0, 1e15, 1e18)


@dataclass(frozen=True)
class Case:
    norm: str
    size: tuple[int, ...]
    groups: int  # of group norm
    layout: str
    dtype: str
    mean_over_std: float
    magnitude: float

    def why_not(self) -> str | None:
        """Why this input says nothing in its dtype."""
        limits = torch.finfo(getattr(torch, self.dtype))
        if self.magnitude < limits.tiny or self.magnitude * (self.mean_over_std + 8) > limits.max:
            return "out of the range of the dtype"
        if self.mean_over_std * limits.eps > 1:
            return "the dtype rounds nearly all values to the mean"
        return None


# (norm, size, groups), with 6272, 4 Mi, 3136 and 4 Mi values in a slice.
SIZES = (
    ("batch_norm", (8, 64, 28, 28), 1),
    ("batch_norm", (4, 2, 1024, 1024), 1),
    ("group_norm", (4, 64, 28, 28), 16),
    ("group_norm", (2, 4, 1024, 1024), 1),
)
QUICK_SIZES = (("batch_norm", (4, 8, 7, 7), 1), ("group_norm", (4, 8, 7, 7), 2))


def cases(quick: bool) -> list[Case]:
    sizes = QUICK_SIZES if quick else SIZES
    dtypes = ("float32", "bfloat16") if quick else DTYPES
    ratios = (0.0, 1e4) if quick else MEAN_OVER_STD
    magnitudes = (1.0,) if quick else MAGNITUDES
    every = itertools.product(dtypes, sizes, LAYOUTS, magnitudes, ratios)
    return [Case(*size, layout, dtype, m, s) for dtype, size, layout, s, m in every]


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    dy: Tensor
    scale: Tensor  # float32, like bias
    bias: Tensor


def inputs_of(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    dtype = getattr(torch, case.dtype)
    x = (randn(case.size) + case.mean_over_std) * case.magnitude
    channels = case.size[1]
    return Inputs(
        lay_out(x.to(dtype), case.layout),
        lay_out(randn(case.size).to(dtype), case.layout),
        (torch.rand(channels, generator=generator) + 0.5),
        randn(channels).float(),
    )


def reference(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The definition in float64, with contiguous tensors, mean and variance in two passes."""
    n, channels = case.size[:2]
    groups = case.groups if case.norm == "group_norm" else channels
    split = (n, groups, channels // groups, -1)
    slices = (2, 3) if case.norm == "group_norm" else (0, 2, 3)
    x, dy = (t.double().contiguous().reshape(split) for t in (inputs.x, inputs.dy))
    scale, bias = (t.double().reshape(1, groups, -1, 1) for t in (inputs.scale, inputs.bias))
    centered = x - x.mean(slices, keepdim=True)
    centered -= centered.mean(slices, keepdim=True)  # what the first mean was rounded by
    var = centered.square().mean(slices, keepdim=True)
    rstd = (var + EPSILON).rsqrt()
    normalized = centered * rstd
    g = dy * scale
    mean_g = g.mean(slices, keepdim=True)
    mean_g_normalized = (g * normalized).mean(slices, keepdim=True)
    results = {
        "y": (normalized * scale + bias).reshape(case.size),
        "dx": (rstd * (g - mean_g - normalized * mean_g_normalized)).reshape(case.size),
        "dscale": (dy * normalized).sum((0, 3)).flatten(),
        "dbias": dy.sum((0, 3)).flatten(),
    }
    if case.norm == "batch_norm":
        count = x.numel() // channels
        results["running var"] = var.flatten() * count / (count - 1)
    return results


Contender = Callable[[Case, Inputs], dict[str, Tensor]]
Step = Callable[..., Tensor]


def results_of(batch_norm: Step, group_norm: Step, case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Of functions with the positional arguments of torch.nn.functional."""
    leaves = [t.detach().requires_grad_() for t in (inputs.x, inputs.scale, inputs.bias)]
    x, scale, bias = leaves
    mean, var = torch.zeros_like(inputs.bias), torch.ones_like(inputs.bias)
    if case.norm == "batch_norm":
        # With momentum 1 the running variance is that of the batch.
        y = batch_norm(x, mean, var, scale, bias, True, 1.0, EPSILON)
    else:
        y = group_norm(x, case.groups, scale, bias, EPSILON)
    gradients = torch.autograd.grad(y, leaves, inputs.dy)
    results = {"y": y.detach(), **dict(zip(("dx", "dscale", "dbias"), gradients))}
    return results | ({"running var": var} if case.norm == "batch_norm" else {})


def flax_results(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Of Flax linen, which has the channels last and a biased running variance."""
    import jax
    import jax.numpy as jnp
    from flax import linen

    def to_jax(t: Tensor) -> Any:
        last = t.movedim(1, -1) if t.dim() > 1 else t
        dtype = str(t.dtype).removeprefix("torch.")
        return jnp.asarray(last.float().contiguous().numpy()).astype(dtype)

    def to_torch(array: Any) -> Tensor:
        t = torch.tensor(jax.device_get(array.astype("float32")))
        return t.movedim(-1, 1) if t.dim() > 1 else t

    x, dy, scale, bias = map(to_jax, (inputs.x, inputs.dy, inputs.scale, inputs.bias))
    if case.norm == "batch_norm":
        norm: Any = linen.BatchNorm(False, momentum=0.0, epsilon=EPSILON, dtype=case.dtype)
    else:
        norm = linen.GroupNorm(case.groups, epsilon=EPSILON, dtype=case.dtype)
    statistics = {"mean": jnp.zeros_like(bias), "var": jnp.ones_like(bias)}

    def step(x: Any, scale: Any, bias: Any) -> Any:
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": statistics}
        return norm.apply(variables, x, mutable=["batch_stats"])

    y, gradients_of, state = jax.vjp(step, x, scale, bias, has_aux=True)
    results = dict(zip(("y", "dx", "dscale", "dbias"), map(to_torch, (y, *gradients_of(dy)))))
    if case.norm == "batch_norm":
        count = inputs.x.numel() // case.size[1]
        results["running var"] = to_torch(state["batch_stats"]["var"]) * (count / (count - 1))
    return results


def contenders(peers: list[str]) -> tuple[dict[str, Contender], dict[str, str]]:
    """By name; and why one that was asked for is not there."""
    ours, theirs = normcore.functional, torch_functional

    def batch_norm(*operands: Any) -> Tensor:
        return theirs.batch_norm(*operands)

    def group_norm(*operands: Any) -> Tensor:
        return theirs.group_norm(*operands)

    torch._dynamo.config.recompile_limit = 64  # a function is compiled for every size and dtype
    compiled = partial(torch.compile, dynamic=False, fullgraph=True)
    every: dict[str, Contender] = {
        "torch": partial(results_of, theirs.batch_norm, theirs.group_norm),
        "compile": partial(results_of, compiled(batch_norm), compiled(group_norm)),
        "flax": flax_results,
    }
    found: dict[str, Contender] = {
        "normcore": partial(results_of, ours.batch_norm, ours.group_norm)
    }
    found |= {name: every[name] for name in peers}
    if "flax" in found and not importlib.util.find_spec("flax"):
        del found["flax"]
        return found, {"flax": "not installed"}
    return found, {}


def error(got: Tensor, want: Tensor) -> float:
    """Relative, in the Euclidean norm; infinite if there is a NaN."""
    difference, size = (got.double() - want).norm().item(), want.norm().item()
    if difference == 0:
        return 0.0
    return difference / size if size > 0 and math.isfinite(difference) else math.inf


def measure(case: Case, by_name: dict[str, Contender]) -> dict[str, Any]:
    inputs = inputs_of(case)
    want = reference(case, inputs)
    errors: dict[str, dict[str, float | str]] = {}
    failures: dict[str, str] = {}
    for name, results in by_name.items():
        try:
            got = results(case, inputs)
        except Exception as problem:
            failures[name] = f"{type(problem).__name__}: {str(problem).strip()[:200]}"
            continue
        found = {output: error(got[output], want[output]) for output in want}
        # JSON has no infinity.
        errors[name] = {o: e if math.isfinite(e) else str(e) for o, e in found.items()}
    return {
        "norm": case.norm,
        "size": text_of(case.size),
        "groups": case.groups if case.norm == "group_norm" else None,
        "layout": case.layout,
        "dtype": case.dtype,
        "mean_over_std": case.mean_over_std,
        "magnitude": case.magnitude,
        "errors": errors,
        "failures": failures,
    }


def left_out(every: list[Case]) -> Iterator[str]:
    for case in every:
        reason = case.why_not()
        if reason:
            yield (
                f"{case.dtype}, mean/std {case.mean_over_std:g}, std {case.magnitude:g}: {reason}"
            )


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the report, and writes the results."""
    torch.set_num_threads(arguments.threads)
    by_name, missing = contenders(["torch"] if arguments.quick else list(arguments.peers))
    every = cases(arguments.quick)
    todo = [case for case in every if case.why_not() is None]
    console = Console(stderr=True)
    document: dict[str, Any] = {"kind": "accuracy", "format": 1} | facts("cpu")
    document |= {
        "contenders": list(by_name),
        "unavailable": missing,
        "left_out": list(dict.fromkeys(left_out(every))),
        "cases": [measure(case, by_name) for case in track(todo, "measuring", console=console)],
    }
    write(document, arguments.output)
    print(accuracy_report(document))
    return 0
