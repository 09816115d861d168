"""instance_norm beside torch's, and what torch's does not have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import normcore.functional as NF

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def statistics(channels: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(channels), torch.rand(channels) + 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("use_input_stats", [True, False])
@pytest.mark.parametrize("has_running", [True, False])
def test_replaces_that_of_torch(
    layout: torch.memory_format, use_input_stats: bool, has_running: bool
) -> None:
    if not use_input_stats and not has_running:
        return
    x = torch.randn(3, 6, 5, 4).to(memory_format=layout)
    running, w, b = statistics(), torch.randn(6), torch.randn(6)
    results = []
    for function in (NF.instance_norm, F.instance_norm):
        t = x.clone().requires_grad_()
        weight, bias = w.clone().requires_grad_(), b.clone().requires_grad_()
        own = [s.clone() for s in running] if has_running else [None, None]
        y = function(t, *own, weight, bias, use_input_stats, 0.3, 1e-3)
        y.pow(3).sum().backward()
        results.append([y, t.grad, weight.grad, bias.grad, *own])
    for got, want in zip(*results, strict=True):
        if want is None:
            assert got is None
        else:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert results[0][0].is_contiguous(memory_format=layout)


def test_other_axes_masks_and_epilogues() -> None:
    x, residual = torch.randn(3, 5, 4, 6).double(), torch.randn(3, 5, 4, 6).double()
    mask = torch.rand(3, 5, 4, 6) < 0.7
    mask[:, 0] = True
    options: Any = {"mask": mask, "activation": "silu", "residual": residual}
    got = NF.instance_norm(x, axis=-1, **options)
    for n in range(3):
        own = {"mask": mask[n : n + 1], "activation": "silu", "residual": residual[n : n + 1]}
        want = NF.batch_norm(x[n : n + 1], None, None, training=True, axis=-1, **own)
        torch.testing.assert_close(got[n : n + 1], want)
    with_two = NF.instance_norm(x, axis=[1, 3])
    torch.testing.assert_close(
        with_two, (x - x.mean(2, True)) / (x.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    )
    mean, var = torch.zeros(6), torch.ones(6)
    torch.testing.assert_close(NF.instance_norm(x, mean, var, axis=-1, **options), got)
    assert mean.abs().sum() > 0


def test_gradients() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, w: Tensor) -> Tensor:
        return NF.instance_norm(x, torch.zeros(3), torch.ones(3), w, activation="gelu")

    assert gradcheck(function, (x, w), check_forward_ad=True)


def test_a_checkpoint_counts_once() -> None:
    x = torch.randn(3, 6, 5, requires_grad=True)
    (mean, var), plain = statistics(), []
    plain = [mean.clone(), var.clone()]
    checkpoint(lambda x: NF.instance_norm(x, mean, var), x, use_reentrant=False).sum().backward()
    NF.instance_norm(x, *plain)
    assert torch.equal(mean, plain[0])
    assert torch.equal(var, plain[1])


def test_an_empty_batch_changes_nothing() -> None:
    (mean, var), before = statistics(), []
    before = [mean.clone(), var.clone()]
    assert NF.instance_norm(torch.randn(0, 6, 4), mean, var).shape == (0, 6, 4)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


@pytest.mark.parametrize("running", [True, False])
def test_errors(running: bool) -> None:
    own: Any = statistics() if running else (None, None)
    x = torch.randn(3, 6, 5)
    with pytest.raises(ValueError, match="expected axis without the batch axis 0"):
        NF.instance_norm(torch.randn(6, 3), *own, axis=0)
    with pytest.raises(IndexError, match="for an input of rank 3, got 3"):
        NF.instance_norm(x, *own, axis=3)
    with pytest.raises(ValueError, match=r"expected weight to have shape \[6\], got \[5\]"):
        NF.instance_norm(x, *own, torch.ones(5))
    with pytest.raises(ValueError, match="got only running_mean"):
        NF.instance_norm(x, torch.zeros(6))
    with pytest.raises(ValueError, match="expected running_mean and running_var"):
        NF.instance_norm(x, use_input_stats=False)
