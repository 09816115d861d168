"""Batch and group norm in float64 with plain torch operators, independent of normcore.

Autograd gives the gradients. ``magnitude`` bounds the absolute terms that are added up to each
value of a result, for the allowance of tolerance.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}


@dataclass
class Expected:
    """Results by name: y, mean, var (running, after the call), x, weight, bias, residual (grads)"""

    length: int  # number of values behind a statistic or a gradient of a parameter
    value: dict[str, Tensor] = field(default_factory=dict)
    magnitude: dict[str, Tensor] = field(default_factory=dict)


def axes_of(axis: int | Sequence[int], rank: int) -> list[int]:
    return sorted(a % rank for a in ([axis] if isinstance(axis, int) else axis))


Mask = Tensor | Sequence[Tensor] | None


def moments(x: Tensor, mask: Mask, axes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of values over `axes`, kept with size 1.

    Several masks: mean and second moment are means over the masks of those of the values of each,
    and the number is 0 where one of them has no value.
    """
    zero = torch.zeros_like(x)

    def total(t: Tensor) -> Tensor:
        return t.sum(tuple(axes), keepdim=True) if axes else t

    def valid_of(mask: Tensor) -> Tensor:
        return (mask != 0).to(x.dtype).expand(x.shape)

    if isinstance(mask, Sequence):
        valid = [valid_of(m) for m in mask]
        count = [total(v) for v in valid]
        share = sum(v / n for v, n in zip(valid, count, strict=True)) / len(valid)
        mean = total(torch.where(share != 0, x, zero) * share)
        var = total(torch.where(share != 0, x - mean, zero).square() * share)
        alive = torch.stack(count).all(0)
        nan = torch.where(alive, 0.0, math.nan)  # of tensors without an element too
        return mean + nan, var + nan, torch.where(alive, sum(count), 0.0)
    valid = torch.ones_like(x) if mask is None else valid_of(mask)
    count = total(valid)
    mean = total(torch.where(valid != 0, x, zero)) / count
    var = total(torch.where(valid != 0, x - mean, zero).square()) / count
    return mean, var, count


def _finish(
    leaves: dict[str, Tensor],
    normalized: Tensor,
    mean: Tensor,
    rstd: Tensor,
    expand: Callable[[Tensor], Tensor],
    activation: str | None,
    dy: Tensor | None,
    length: int,
    x_dtype: torch.dtype,
) -> Expected:
    """Affine map, epilogue, gradients and magnitudes, which all norms have in common."""
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    scale = expand(leaves["weight"]) if "weight" in leaves else one
    shift = expand(leaves["bias"]) if "bias" in leaves else zero
    residual = leaves.get("residual", zero)
    z = normalized * scale + shift + residual
    y = ACTIVATIONS[activation](z)
    result = Expected(length, {"y": y.detach()})
    with torch.no_grad():
        # A mean is off by roundings of values as large as the standard deviation, and in float64
        # by its own rounding.
        of_mean = 1 + (mean.abs() * rstd if x_dtype == torch.float64 else zero)
        size = (normalized.abs() + of_mean) * scale.abs() + shift.abs() + residual.abs()
        result.magnitude["y"] = size
    if dy is None:
        return result
    result.value |= dict(zip(leaves, torch.autograd.grad(y, leaves.values(), dy.to(torch.float64))))
    with torch.no_grad():
        g = dy.to(torch.float64).abs() * (1.0 if activation is None else 1.0 + size)
        h = g * scale.abs()
        largest = h.nan_to_num(0.0).max() if h.numel() else zero
        # The means of |h| and |h * normalized| over a slice are at most max |h|.
        result.magnitude["x"] = rstd * (h + largest * (1 + normalized.abs()) * of_mean)
        result.magnitude["residual"] = g
    for name, terms in (("weight", g * (normalized.detach().abs() + of_mean)), ("bias", g)):
        if name in leaves:  # the gradient of an expansion is the matching sum
            parameter = torch.zeros_like(leaves[name]).requires_grad_()
            total = (expand(parameter) * terms).sum()
            (result.magnitude[name],) = torch.autograd.grad(total, parameter)
    return result


def _leaves(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {
        name: t.detach().to(torch.float64, copy=True).requires_grad_()
        for name, t in tensors.items()
        if t is not None
    }


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int | Sequence[int] = 1,
    mask: Mask = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    unbiased: bool = True,
    dy: Tensor | None = None,
) -> Expected:
    features = axes_of(axis, x.dim())
    others = [a for a in range(x.dim()) if a not in features]
    broadcast = [size if a in features else 1 for a, size in enumerate(x.shape)]
    leaves = _leaves(x=x, weight=weight, bias=bias, residual=residual)
    running = {
        name: t.detach().to(torch.float64).reshape(broadcast)
        for name, t in (("mean", running_mean), ("var", running_var))
        if t is not None
    }
    if training:
        mean, var, count = moments(leaves["x"], mask, others)
        if running:
            new_var = var * (count / (count - 1)).where(count > 1, 1.0) if unbiased else var
            for name, new in (("mean", mean), ("var", new_var)):
                moved = (1 - momentum) * running[name] + momentum * new.detach()
                running[name] = torch.where(count > 0, moved, running[name])
    else:
        mean, var = running["mean"], running["var"]
    rstd = (var + eps).rsqrt()
    length = math.prod(x.shape[a] for a in others)
    result = _finish(
        leaves,
        (leaves["x"] - mean) * rstd,
        mean.detach(),
        rstd.detach(),
        lambda t: t.reshape(broadcast).expand(x.shape),
        activation,
        dy,
        length,
        x.dtype,
    )
    shape = [x.shape[a] for a in features]
    result.value |= {name: t.reshape(shape) for name, t in running.items()}
    return result


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    axis: int | Sequence[int] = 1,
    reduction_axes: Sequence[int] | None = None,
    mask: Mask = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    dy: Tensor | None = None,
) -> Expected:
    features = axes_of(axis, x.dim())
    reduced = range(1, x.dim()) if reduction_axes is None else axes_of(reduction_axes, x.dim())
    others = [a for a in range(x.dim()) if a not in features]
    order = others + features
    groups = [num_groups, math.prod(x.shape[a] for a in features) // num_groups]
    split = [x.shape[a] for a in others] + groups

    def fold(t: Tensor) -> Tensor:  # other axes, group, member
        return t.permute(order).reshape(split)

    def unfold(t: Tensor) -> Tensor:
        back = [order.index(a) for a in range(x.dim())]
        return t.expand(split).reshape([x.shape[a] for a in order]).permute(back)

    def expand(t: Tensor) -> Tensor:
        per_sample = t.dim() == 2 and len(features) == 1
        lead = [x.shape[0]] + [1] * (len(others) - 1) if per_sample else [1] * len(others)
        return unfold(t.reshape(lead + groups))

    leaves = _leaves(x=x, weight=weight, bias=bias, residual=residual)
    axes = [i for i, a in enumerate(others) if a in reduced] + [len(others) + 1]
    if isinstance(mask, Tensor):
        folded_mask: Mask = fold(mask.broadcast_to(x.shape))
    else:
        folded_mask = mask and [fold(m.broadcast_to(x.shape)) for m in mask]
    folded = fold(leaves["x"])
    mean, var, _ = moments(folded, folded_mask, axes)
    rstd = (var + eps).rsqrt()
    length = max(
        math.prod(split[a] for a in axes),
        math.prod(x.shape[a] for a in others),
    )
    return _finish(
        leaves,
        unfold((folded - mean) * rstd),
        unfold(mean.detach()),
        unfold(rstd.detach()),
        expand,
        activation,
        dy,
        length,
        x.dtype,
    )
