"""How far a result may be from its float64 reference.

    |got - want| <= u(result) * |want| + (8 + log2(length)) * 2 u(compute) * magnitude

* u(d) is the unit roundoff of a dtype, half its epsilon. The first term is the one rounding when a
  result is stored; where that is all (constants, copies), pass ``magnitude=0``.
* The second term is the arithmetic, done in float64 if anything is float64 and else in float32.
  ``magnitude`` bounds the absolute terms that are added up to an element (reference.py gives it
  for every result), ``length`` is the number of values in the longest sum, and log2(length) the
  depth of a summation tree. The 8 are the handful of roundings of one element: difference, product
  with rstd and scale, sums with bias and residual, activation.

NaN and infinity must be in the same places.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def compute_dtype(*operands: Tensor | torch.dtype | None) -> torch.dtype:
    """The dtype a norm of these operands is computed in."""
    dtypes = [o.dtype if isinstance(o, Tensor) else o for o in operands]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def allowance(
    want: Tensor,
    result: torch.dtype,
    compute: torch.dtype,
    length: int = 1,
    magnitude: Tensor | float | None = None,
) -> Tensor:
    """The right side of the inequality above; `magnitude` defaults to the largest |want|."""
    size = want.abs()
    if magnitude is None:
        magnitude = size.nan_to_num(0.0, 0.0, 0.0).max() if size.numel() else 0.0
    rounding = torch.finfo(result).eps / 2
    smallest = torch.finfo(result).tiny * rounding
    steps = 8 + math.log2(max(length, 1))
    return smallest + rounding * size + steps * torch.finfo(compute).eps * magnitude


def assert_close(
    got: Tensor,
    want: Tensor,
    *,
    compute: torch.dtype | None = None,
    length: int = 1,
    magnitude: Tensor | float | None = None,
    name: str = "result",
) -> None:
    """Raises AssertionError with the worst element unless `got` is within the allowance."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    want = want.detach().to(torch.float64)
    allowed = allowance(want, got.dtype, compute or compute_dtype(got), length, magnitude)
    got = got.detach().to(torch.float64)
    special = ~want.isfinite() | ~got.isfinite()
    same = torch.where(special, (got == want) | (got.isnan() & want.isnan()), True)
    assert bool(same.all()), (
        f"{name}: {int((~same).sum())} of {same.numel()} values differ in NaN or infinity"
    )
    excess = torch.where(special, 0.0, (got - want).abs() / allowed)
    if excess.numel() and excess.max() > 1:
        worst = int(excess.argmax())
        raise AssertionError(
            f"{name}: {got.flatten()[worst].item():.9g} instead of "
            f"{want.flatten()[worst].item():.9g}, off by {excess.max().item():.3g} times the "
            f"allowed {allowed.expand(want.shape).flatten()[worst].item():.3g}; "
            f"{int((excess > 1).sum())} of {want.numel()} values are too far off"
        )
