"""More than 2^31 elements through the whole of the operators. The input repeats a short one, so
output and gradient repeat as well and are compared with those of the short one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import normcore.functional as NF

PERIOD, REPETITIONS = 1024, 2**20 + 1
NEEDED_GIB = 12  # input, output or gradient, and something to spare


def available_gib() -> float:
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    kib = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kib[0] / 2**20 if kib else 0.0


def run(norm: str, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """First and last period of the output, and of the gradient if x is the output's gradient."""
    weight, bias = torch.tensor([1.5, -0.5]), torch.tensor([0.25, 1.0])
    grad = x.detach()
    x.requires_grad_()
    if norm == "batch":
        y = NF.batch_norm(x, None, None, weight, bias, True, axis=axis)
    else:
        y = NF.group_norm(x, 2, weight, bias, axis=axis)
    node = y.grad_fn
    assert node is not None

    def ends(t: Tensor) -> Tensor:
        along = 3 - axis  # of the shape (1, channels, values) or (1, values, channels)
        return torch.stack([t.narrow(along, 0, PERIOD), t.narrow(along, -PERIOD, PERIOD)])

    with torch.no_grad():
        y_ends = ends(y)
        del y
        return y_ends, ends(node(grad)[0])


@pytest.mark.skipif(available_gib() < NEEDED_GIB, reason=f"needs {NEEDED_GIB} GiB of memory")
@pytest.mark.parametrize(("norm", "axis"), [("batch", 2), ("group", 1)])
def test_more_than_two_to_the_31_elements(norm: str, axis: int) -> None:
    short = torch.randn(1, 2, PERIOD) if axis == 1 else torch.randn(1, PERIOD, 2)
    short = short.bfloat16()
    times = [1, 1, REPETITIONS] if axis == 1 else [1, REPETITIONS, 1]
    long = short.repeat(times)
    assert long.numel() > 2**31
    for got, want in zip(run(norm, long, axis), run(norm, short, axis), strict=True):
        torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-5)
        assert torch.equal(got[0], got[1])
