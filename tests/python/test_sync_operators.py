"""The operators of norms over several ranks. One process adds up the sums: a single device will do.

That they are composed with collectives: tests/distributed.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ops = torch.ops.normcore
F64 = torch.float64
Slices = tuple[int, list[int]]  # num_groups (0: batch norm) and axis


def synchronized(
    parts: list[Tensor],
    grads: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    slices: Slices,
    activation: str | None,
    masks: list[Tensor] | None = None,
    running: tuple[Tensor, Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Outputs and gradients of every rank, and the sums of those of weight and bias."""
    groups, axis = slices
    no_mask = [None] * len(parts)
    moments = [
        ops._sync_moments(x, mask, groups, axis, None, False)
        for x, mask in zip(parts, masks or no_mask, strict=True)
    ]
    total = torch.stack(moments).sum(0)
    ys, sums, of_weight, of_bias, saved = [], [], [], [], []
    for rank, (x, dy) in enumerate(zip(parts, grads, strict=True)):
        mask = masks[rank] if masks else None
        updated = running if running is not None and rank == 0 else (None, None)
        mean, var, share = ops._sync_statistics(
            moments[rank], total, *updated, None, 0.1, True, False
        )
        norm = (groups, axis, None, 1e-5, activation)
        y, rstd = ops._sync_apply(x, weight, bias, None, mean, var, *norm, None)
        args = (dy, x, weight, bias, None, mask, mean, rstd)
        own, dw, db = ops._sync_gradient_sums(*args, *norm, [True] * 3)
        ys.append(y)
        sums.append(own)
        of_weight.append(dw.to(F64))
        of_bias.append(db.to(F64))
        saved.append((args, share, norm))
    total = torch.stack(sums).sum(0)
    dxs = [
        ops._sync_gradient(*args, total, share, *norm, [True, False])[0]
        for args, share, norm in saved
    ]
    return ys, dxs, torch.stack(of_weight).sum(0), torch.stack(of_bias).sum(0)


def expected(
    x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, groups: int, activation: str | None
) -> list[Tensor]:
    leaves = [t.to(F64).requires_grad_() for t in (x, weight, bias)]
    if groups == 0:
        y = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True)
    else:
        y = F.group_norm(leaves[0], groups, leaves[1], leaves[2])
    y = F.silu(y) if activation == "silu" else y
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(F64))]


TOLERANCE = {F64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("layout", ["planes", "rows", "pairs"])
def test_ranks_together_are_one(
    dtype: torch.dtype,
    activation: str | None,
    groups: int,
    layout: str,
    device: torch.device,
) -> None:
    """Uneven parts and an empty one, along the batch or, for group norm, along an axis of space."""
    torch.manual_seed(5)
    shape = (7, 6, 9) if layout == "pairs" else (7, 6, 9, 5)
    format = torch.channels_last if layout == "rows" else torch.contiguous_format
    x, dy = (torch.randn(shape).to(device, dtype, memory_format=format) for _ in range(2))
    weight, bias = torch.rand(6, device=device, dtype=dtype) + 0.5, torch.randn(6).to(x)
    along = 0 if groups == 0 else 2
    parts, grads = (
        [p.contiguous(memory_format=format) for p in t.split([4, 0, t.shape[along] - 4], along)]
        for t in (x, dy)
    )
    ys, dxs, dw, db = synchronized(parts, grads, weight, bias, (groups, [1]), activation)
    want = expected(x, dy, weight, bias, groups, activation)
    got = torch.cat(ys, along), torch.cat(dxs, along), dw, db
    for name, actual, wanted in zip(("y", "dx", "dw", "db"), got, want, strict=True):
        error = (actual.to(F64) - wanted).abs().max() / wanted.abs().max()
        assert error <= TOLERANCE[dtype], f"{name}: {error}"
    for y, part in zip(ys, parts, strict=True):
        assert y.stride() == part.stride() or part.numel() == 0


def test_mask_and_running_statistics(device: torch.device) -> None:
    torch.manual_seed(6)
    x, dy = (torch.randn(8, 5, 6, dtype=F64).to(device) for _ in range(2))
    mask = torch.rand(8, 1, 6).to(device) > 0.4
    mask[:2] = False  # of the first rank nothing counts
    ones, zeros = torch.ones(5, dtype=F64).to(device), torch.zeros(5, dtype=F64).to(device)
    mean, var = zeros.clone(), ones.clone()
    masks = list(mask.split([2, 6]))
    ys, dxs, _, _ = synchronized(
        list(x.split([2, 6])),
        list(dy.split([2, 6])),
        ones,
        zeros,
        (0, [1]),
        None,
        masks,
        (mean, var),
    )
    whole = x.clone().requires_grad_()
    want_mean, want_var = zeros.clone(), ones.clone()
    want = ops.batch_norm(whole, want_mean, want_var, ones, zeros, True, mask=mask)
    want.backward(dy)
    torch.testing.assert_close(torch.cat(ys), want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(dxs), whole.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean, want_mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(var, want_var, rtol=1e-13, atol=1e-13)


def test_order_of_ranks_changes_no_bit(device: torch.device) -> None:
    torch.manual_seed(7)
    scale = 10.0 ** torch.arange(-3, 5).view(8, 1, 1, 1)
    x = (torch.randn(8, 3, 4, 5) * scale + 100 * scale).to(device)
    moments = [ops._sync_moments(part, None, 0, [1], None, False) for part in x.split(1)]
    total = torch.stack(moments).sum(0)
    for _ in range(20):
        other = torch.zeros_like(total)
        for rank in torch.randperm(8).tolist():
            other += moments[rank]
        assert torch.equal(other, total)


def test_large_means_cost_no_digits(device: torch.device) -> None:
    torch.manual_seed(8)
    x = (torch.randn(6, 4, 50, dtype=F64) + 1e6).to(torch.float32).to(device)
    dy = torch.randn(6, 4, 50).to(device)
    ones, zeros = torch.ones(4).to(device), torch.zeros(4).to(device)
    parts, grads = list(x.split([1, 5])), list(dy.split([1, 5]))
    ys, dxs, _, _ = synchronized(parts, grads, ones, zeros, (0, [1]), None)
    y, dx, _, _ = expected(x, dy, ones, zeros, 0, None)
    for actual, wanted in ((torch.cat(ys), y), (torch.cat(dxs), dx)):
        assert (actual.to(F64) - wanted).norm() <= 1e-6 * wanted.norm()


def test_errors(device: torch.device) -> None:
    x = torch.randn(4, 3, 5, device=device)
    moments = ops._sync_moments(x, None, 0, [1], None, False)
    two, three = torch.zeros(2, device=device), torch.zeros(3, device=device)

    def statistics(total: Tensor, running: Tensor | None, momentum: float | None = 0.1) -> None:
        other = None if running is None else running.clone()
        ops._sync_statistics(moments, total, running, other, None, momentum, True, False)

    with pytest.raises(ValueError, match=r"expected total to have shape \[3, 8\]"):
        statistics(moments[:2], None)
    with pytest.raises(ValueError, match="expected running_mean to have 3 elements"):
        statistics(moments, two)
    with pytest.raises(ValueError, match="expected num_batches_tracked with momentum None"):
        statistics(moments, three, None)
    with pytest.raises(TypeError, match="expected mean to have dtype float64"):
        ops._sync_apply(x, None, None, None, three, three, 0, [1], None, 1e-5, None, None)
    with pytest.raises(ValueError, match="expected num_groups to divide"):
        ops._sync_moments(x, None, 2, [1], None, False)
