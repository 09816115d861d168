"""Derivatives of the operators: every order, every transform, and nothing silently dropped."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from derivatives import ACTIVATIONS, grad_by_formula, leaf
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import normcore  # noqa: F401  (loads the operators)

pytestmark = pytest.mark.usefixtures("device")
ops = torch.ops.normcore

# Ways to a first derivative.
WAYS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "kernel": torch.autograd.grad,
    "with a graph": functools.partial(torch.autograd.grad, create_graph=True),
    "formula": functools.partial(grad_by_formula, retain_graph=True),
}


def away_from_kink(x: Tensor) -> Tensor:
    """A residual for x that keeps every pre-activation of these small norms away from 0."""
    return (20 * torch.randn_like(x).sign()).requires_grad_()


def check_both_orders(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(3, 4, 2, 3, dtype=torch.float64),
    "channels_last": lambda: torch.randn(3, 2, 3, 4, dtype=torch.float64).permute(0, 3, 1, 2),
    "mixed": lambda: torch.randn(2, 3, 4, 3, dtype=torch.float64).permute(3, 2, 0, 1),
    "sliced": lambda: torch.randn(3, 4, 4, 3, dtype=torch.float64)[:, :, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["train", "eval", "group"])
def test_layouts(mode: str, layout: str) -> None:
    x = LAYOUTS[layout]().requires_grad_()
    w, b = leaf(4), leaf(4)
    mean, var = torch.randn(4), torch.rand(4) + 0.5

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if mode == "group":
            return ops.group_norm(x, 2, w, b)
        return ops.batch_norm(x, mean.clone(), var.clone(), w, b, mode == "train")

    check_both_orders(function, (x, w, b))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", ["train", "eval", "group"])
def test_epilogues(mode: str, layout: str, with_residual: bool, activation: str | None) -> None:
    if activation == "relu" and not with_residual:
        pytest.skip("nothing keeps the pre-activation away from the kink")
    x, w, b = LAYOUTS[layout]().requires_grad_(), leaf(4), leaf(4)
    residual = away_from_kink(x) if activation == "relu" else leaf(*x.shape)
    mask = torch.rand(3, 1, 2, 3) < 0.7
    mask[..., 0] = True
    mean, var = torch.randn(4), torch.rand(4) + 0.5

    def function(x: Tensor, w: Tensor, b: Tensor, *residual: Tensor) -> Tensor:
        epilogue = {"activation": activation, "residual": residual[0] if residual else None}
        if mode == "group":
            return ops.group_norm(x, 2, w, b, mask=mask, **epilogue)
        return ops.batch_norm(
            x, mean.clone(), var.clone(), w, b, mode == "train", mask=mask, **epilogue
        )

    check_both_orders(function, (x, w, b, *([residual] if with_residual else [])))


@pytest.mark.parametrize("mask_shape", [(3, 1, 2, 2), (3, 4, 2, 2), (4, 1, 1)])
@pytest.mark.parametrize("mode", ["train", "group"])
def test_masks(mode: str, mask_shape: tuple[int, ...]) -> None:
    x, w, b = leaf(3, 4, 2, 2), leaf(4), leaf(4)
    mask = torch.rand(mask_shape) < 0.7
    mask[0] = True
    mask[..., 0] = True
    if mode == "train":
        check_both_orders(
            lambda *t: ops.batch_norm(t[0], None, None, *t[1:], True, mask=mask), (x, w, b)
        )
    else:
        check_both_orders(lambda *t: ops.group_norm(t[0], 2, *t[1:], mask=mask), (x, w, b))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_group_norm_with_parameters_per_sample(activation: str | None) -> None:
    inputs = leaf(3, 4, 2), leaf(3, 4), leaf(3, 4), leaf(3, 4, 2)
    check_both_orders(
        lambda x, w, b, r: ops.group_norm(x, 2, w, b, activation=activation, residual=r), inputs
    )


@pytest.mark.parametrize(
    ("axis", "reduction_axes"), [([1], [0, 1]), ([-1], [1, 3]), ([1, 3], None), ([0], None)]
)
def test_group_norm_axes(axis: list[int], reduction_axes: list[int] | None) -> None:
    x = leaf(2, 4, 3, 4)
    shape = [x.shape[a] for a in sorted(a % 4 for a in axis)]
    options = {"axis": axis, "reduction_axes": reduction_axes}
    check_both_orders(
        lambda x, w, b: ops.group_norm(x, 2, w, b, **options), (x, leaf(*shape), leaf(*shape))
    )


@pytest.mark.parametrize("axis", [[0], [2, 0], [-1, 1], []])
def test_batch_norm_axes(axis: list[int]) -> None:
    x = leaf(2, 3, 4)
    shape = [x.shape[a] for a in sorted(a % 3 for a in axis)]
    check_both_orders(
        lambda x, w, b: ops.batch_norm(x, None, None, w, b, True, axis=axis),
        (x, leaf(*shape), leaf(*shape)),
    )


@pytest.mark.parametrize("absent", ["weight", "bias", "both"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_absent_parameters(absent: str, activation: str | None) -> None:
    x, p = leaf(3, 4, 2), leaf(4)
    arguments = {"weight": (None, p), "bias": (p, None), "both": (None, None)}[absent]
    inputs = [t for t in (x, *arguments) if t is not None]

    def function(x: Tensor, *p: Tensor) -> Tensor:
        given = iter(p)
        w, b = (next(given) if a is not None else None for a in arguments)
        y = ops.batch_norm(x, None, None, w, b, True, activation=activation)
        return y + ops.group_norm(x, 2, w, b, activation=activation)

    check_both_orders(function, inputs)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("activation", [None, "silu"])
def test_backward_computes_what_is_asked_for(
    wanted: tuple[bool, ...], activation: str | None
) -> None:
    x, r, dy = (torch.randn(3, 4, 5) for _ in range(3))
    w, b = torch.randn(4), torch.randn(4)
    _, mean, rstd = ops._group_norm(x, w, b, r, None, 2, [1], None, 1e-5, activation, None)
    args = dy, x, w, b, r, None, mean, rstd, 2, [1], None, 1e-5, activation
    everything = ops._group_norm_backward(*args, [True] * 4)
    got = ops._group_norm_backward(*args, list(wanted))
    for gradient, expected, want in zip(got, everything, wanted, strict=True):
        if want:
            assert torch.equal(gradient, expected)
        else:
            assert gradient is None


def test_gradients_have_the_dtype_of_their_operand() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.bfloat16, requires_grad=True)
    w = torch.rand(4, dtype=torch.float32, requires_grad=True)
    b = torch.rand(4, dtype=torch.float16, requires_grad=True)
    r = torch.rand(3, 4, 5, dtype=torch.float32, requires_grad=True)
    for activation in (None, "gelu"):
        y = ops.group_norm(x, 2, w, b, activation=activation, residual=r, dtype=torch.float32)
        z = ops.group_norm(x, 2, w, b, activation=activation, residual=r)
        for way in (WAYS["formula"], WAYS["kernel"]):
            for out in (y, z):
                grads = way(out, (x, w, b, r), torch.randn(3, 4, 5, dtype=out.dtype))
                assert [g.dtype for g in grads] == [t.dtype for t in (x, w, b, r)]


@pytest.mark.parametrize("mode", ["train", "eval", "group"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_formula_agrees_with_the_kernel(mode: str, activation: str | None) -> None:
    x, w, b, r = leaf(3, 6, 5), leaf(6), leaf(6), leaf(3, 6, 5)
    mask = torch.rand(3, 6, 5) < 0.8
    mask[0] = True
    mean, var = torch.randn(6), torch.rand(6) + 0.5
    options = {"mask": mask, "activation": activation, "residual": r}
    if mode == "group":
        y = ops.group_norm(x, 3, w, b, **options)
    else:
        y = ops.batch_norm(x, mean, var, w, b, mode == "train", **options)
    dy = torch.randn_like(y)
    fused = torch.autograd.grad(y, (x, w, b, r), dy, retain_graph=True)
    formula = grad_by_formula(y, (x, w, b, r), dy, retain_graph=True)
    recorded = torch.autograd.grad(y, (x, w, b, r), dy, create_graph=True)
    for f, g, h in zip(fused, formula, recorded, strict=True):
        assert not f.requires_grad
        torch.testing.assert_close(f, g, rtol=1e-11, atol=1e-12)
        assert torch.equal(f, h)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["train", "group"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_masked_out_values_poison_no_gradient(mode: str, activation: str | None, way: str) -> None:
    clean = torch.randn(3, 4, 6, dtype=torch.float64)
    residual = torch.randn_like(clean)
    mask = torch.ones(3, 1, 6, dtype=torch.bool)
    mask[1, :, 2:4] = False
    dy = torch.randn_like(clean) * mask
    w, b = leaf(4), leaf(4)

    def grads(x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        x, r = x.requires_grad_(), r.requires_grad_()
        options = {"mask": mask, "activation": activation, "residual": r}
        if mode == "train":
            y = ops.batch_norm(x, None, None, w, b, True, **options)
        else:
            y = ops.group_norm(x, 2, w, b, **options)
        return WAYS[way](y, (x, w, b, r), dy)

    poisoned, added = clean.clone(), residual.clone()
    poisoned[1, :, 2], poisoned[1, :, 3] = float("nan"), float("inf")
    added[1, :, 2:4] = float("nan")
    for got, want in zip(grads(poisoned, added), grads(clean, residual), strict=True):
        where = mask if got.dim() == 3 else torch.ones((), dtype=torch.bool)
        assert torch.equal(torch.where(where, got, 0), torch.where(where, want, 0))
        assert got.isfinite().all()


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("per_value", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nan_gradient_at_a_masked_out_value_is_not_lost(
    dtype: torch.dtype, per_value: bool, activation: str | None
) -> None:
    x = torch.randn(3, 4, 40, dtype=dtype, requires_grad=True)
    bias = torch.zeros(4, dtype=dtype, requires_grad=True)
    mask = torch.ones(3, 4 if per_value else 1, 40, dtype=torch.bool)
    mask[1, :, 3] = False
    dy = torch.ones(3, 4, 40, dtype=dtype)
    dy[1, 2, 3] = float("nan")
    y = ops.batch_norm(x, None, None, None, bias, True, mask=mask, activation=activation)
    dx, db = torch.autograd.grad(y, (x, bias), dy)
    assert dx[1, 2, 3].isnan()
    assert torch.equal(db.isnan(), torch.tensor([False, False, True, False], device=db.device))


def test_second_derivative_at_a_masked_out_value_with_zero_gradient() -> None:
    x = leaf(2, 4, 3)
    mask = torch.ones(2, 1, 3, dtype=torch.bool)
    mask[0, :, 1] = False
    dy = torch.randn(2, 4, 3, dtype=torch.float64)
    dy[0, :, 1] = 0

    def gradient(x: Tensor, dy: Tensor) -> Tensor:
        y = ops.group_norm(x, 2, mask=mask, activation="silu")
        return torch.autograd.grad(y, x, dy, create_graph=True)[0]

    assert gradcheck(gradient, (x, dy.requires_grad_()))


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_empty_input(shape: tuple[int, ...]) -> None:
    channels = shape[1]
    x = torch.empty(shape, requires_grad=True)
    w = torch.rand(channels, requires_grad=True)
    b = torch.rand(channels, dtype=torch.bfloat16, requires_grad=True)
    mean, var, count = torch.zeros(channels), torch.ones(channels), torch.tensor(5)
    y = ops.batch_norm(x, mean, var, w, b, True, num_batches_tracked=count)
    z = ops.group_norm(x, 2, w, b, activation="relu")
    assert y.shape == z.shape == x.shape
    for way in WAYS.values():
        for out in (y, z):
            gx, gw, gb = way(out, (x, w, b), torch.empty_like(out), retain_graph=True)
            assert gx.shape == x.shape
            assert (gw.dtype, gb.dtype) == (w.dtype, b.dtype)
            assert torch.equal(gw, torch.zeros(channels))
            assert torch.equal(gb.float(), torch.zeros(channels))
    assert torch.equal(mean, torch.zeros(channels))
    assert torch.equal(var, torch.ones(channels))
    assert count.item() == 5
    assert mean._version == var._version == count._version == 0


# State


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_version_counters(context: Callable[[], Any]) -> None:
    x = torch.randn(3, 4, 5, requires_grad=True)
    buffers = torch.zeros(2, 4)
    mean, var, count = buffers[0], torch.ones(4), torch.tensor(0)
    with context():
        ops.batch_norm(x, mean, var, training=True, num_batches_tracked=count)
    assert (mean._version, buffers._version, var._version, count._version) == (1, 1, 1, 1)
    with context():
        ops.batch_norm(x, mean, var, training=False, num_batches_tracked=count)
    assert (mean._version, var._version, count._version) == (1, 1, 1)


def test_inference_tensors() -> None:
    with torch.inference_mode():
        mean, var = torch.zeros(4), torch.ones(4)
        x = torch.randn(3, 4)
        ops.batch_norm(x, mean, var, training=True)
    assert mean.is_inference()
    before = mean.clone()
    ops.batch_norm(torch.randn(3, 4), mean, var, training=True)
    assert not torch.equal(mean, before)


def test_running_mean_changed_before_backward_raises() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    mean, var = torch.zeros(4), torch.ones(4)
    y = ops.batch_norm(x, mean, var)
    ops.batch_norm(x, mean, var, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_changes_that_do_not_matter_to_the_backward_pass_are_allowed() -> None:
    x, w, b = torch.randn(3, 4, requires_grad=True), torch.rand(4), torch.rand(4)
    r = torch.randn(3, 4)
    mean, var = torch.zeros(4), torch.ones(4)
    w.requires_grad_()
    b.requires_grad_()
    y = ops.batch_norm(x, mean, var, w, b, residual=r)
    train = ops.batch_norm(x, mean.clone(), var.clone(), w, b, True, residual=r)
    with torch.no_grad():
        var.add_(1)  # rstd is saved
        b.add_(1)  # without an activation the gradient of the bias does not depend on it
        r.add_(1)
    gx, _, gb = torch.autograd.grad(y.sum() + train.sum(), (x, w, b))
    torch.testing.assert_close(gx, (w / (1 + 1e-5) ** 0.5).expand(3, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(gb, torch.full((4,), 6.0))


def test_bias_of_an_activation_is_watched() -> None:
    x, b = torch.randn(3, 4, requires_grad=True), torch.rand(4, requires_grad=True)
    y = ops.group_norm(x, 2, None, b, activation="silu")
    with torch.no_grad():
        b.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice_raises() -> None:
    y = ops.group_norm(torch.randn(3, 4, requires_grad=True), 2)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_gradients_with_respect_to_some_inputs() -> None:
    x, w, b, r = leaf(3, 4, 2), leaf(4), leaf(4), leaf(3, 4, 2)
    y = ops.group_norm(x, 2, w, b, residual=r, activation="gelu")
    dy = torch.randn_like(y)
    everything = torch.autograd.grad(y, (x, w, b, r), dy, retain_graph=True)
    for t, expected in zip((x, w, b, r), everything, strict=True):
        assert torch.equal(torch.autograd.grad(y, t, dy, retain_graph=True)[0], expected)
    frozen = ops.group_norm(x.detach(), 2, w.detach(), b, residual=r.detach())
    frozen.backward(dy)
    torch.testing.assert_close(b.grad, dy.sum((0, 2)), rtol=1e-14, atol=1e-14)


def test_saved_tensor_hooks() -> None:
    x, w = leaf(3, 4, 2), leaf(4)
    want = torch.autograd.grad(ops.group_norm(x, 2, w).pow(2).sum(), (x, w))
    packed: list[torch.Size] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.shape)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ops.group_norm(x, 2, w)
    assert sorted(packed) == sorted([x.shape, w.shape, (3, 2), (3, 2)])
    for got, expected in zip(torch.autograd.grad(y.pow(2).sum(), (x, w)), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    x, w = leaf(3, 4, 2), leaf(4)

    def function(x: Tensor, w: Tensor) -> Tensor:
        y = ops.batch_norm(x, None, None, w, training=True, activation="gelu")
        return ops.group_norm(y, 2, w).pow(3)

    y = checkpoint(function, x, w, use_reentrant=use_reentrant)
    assert isinstance(y, Tensor)
    y.sum().backward()
    for t, expected in zip((x, w), torch.autograd.grad(function(x, w).sum(), (x, w)), strict=True):
        assert torch.equal(t.grad, expected)


def selective(function: Callable[..., Any], x: Tensor) -> Any:
    """Keeps what batch norm gives, computes the rest again."""
    kept = [ops._batch_norm_train.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    return checkpoint(function, x, use_reentrant=False, context_fn=contexts)


CHECKPOINTS: dict[str, Callable[..., Any]] = {
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "non-reentrant": functools.partial(checkpoint, use_reentrant=False),
    "selective": selective,
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("momentum", [0.9, None])
def test_checkpoint_counts_a_batch_once(kind: str, momentum: float | None) -> None:
    values, w = torch.randn(3, 4, 2, dtype=torch.float64), leaf(4)

    def run(wrap: Callable[..., Any]) -> list[Any]:
        x = values.clone().requires_grad_()
        mean, var, count = torch.zeros(4), torch.ones(4), torch.tensor(3)

        def function(x: Tensor) -> Tensor:
            y = ops.batch_norm(x, mean, var, w, None, True, momentum, num_batches_tracked=count)
            return ops.group_norm(y, 2, activation="silu").pow(3)

        wrap(function, x).sum().backward()
        return [x.grad, mean, var, count]

    for got, want in zip(run(CHECKPOINTS[kind]), run(lambda f, x: f(x)), strict=True):
        assert torch.equal(got, want)


# Transforms


def loss(x: Tensor, w: Tensor) -> Tensor:
    y = ops.batch_norm(x, None, None, w, training=True, activation="gelu")
    z = ops.batch_norm(y, torch.zeros(4), torch.ones(4), w)
    return ops.group_norm(z, 2, w, activation="silu").pow(3).sum()


def test_func_grad_and_nested_grad() -> None:
    x, w = leaf(3, 4, 2), leaf(4)
    got = torch.func.grad(loss, argnums=(0, 1))(x, w)
    want = torch.autograd.grad(loss(x, w), (x, w), create_graph=True)
    for g, e in zip(got, want, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-12)

    def penalty(x: Tensor) -> Tensor:
        return torch.func.grad(loss)(x, w).pow(2).sum()

    torch.testing.assert_close(
        torch.func.grad(penalty)(x),
        torch.autograd.grad(want[0].pow(2).sum(), x)[0],
        rtol=1e-10,
        atol=1e-11,
    )


def test_third_derivative() -> None:
    w = leaf(4)

    def curvature(x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(loss(x, w), x, create_graph=True)
        (h,) = torch.autograd.grad(g.pow(2).sum(), x, create_graph=True)
        return h

    assert gradcheck(curvature, (leaf(2, 4, 2),), fast_mode=True)


def test_func_grad_updates_running_statistics_once() -> None:
    x = leaf(3, 4, 2)
    plain, transformed = torch.zeros(4), torch.zeros(4)
    var, count = torch.ones(4), torch.tensor(0)

    def function(x: Tensor, mean: Tensor) -> Tensor:
        y = ops.batch_norm(x, mean, var, training=True, num_batches_tracked=count)
        return y.pow(3).sum()

    torch.func.grad(function)(x, transformed)
    assert count.item() == 1
    assert transformed._version == 1
    function(x, plain)
    assert torch.equal(plain, transformed)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("op", ["batch_norm", "group_norm"])
def test_a_slice_without_valid_values_passes_on_no_nan(
    op: str, channels_last: bool, way: str, activation: str | None
) -> None:
    """An empty sample (or channel): its outputs are NaN, and nobody has looked at them."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 2)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    weight, bias = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    mask = torch.ones(x.shape, dtype=torch.bool)
    if op == "group_norm":
        mask[1] = False
        y = torch.ops.normcore.group_norm(x, 2, weight, bias, mask=mask, activation=activation)
    else:
        mask[:, 1] = False
        y = torch.ops.normcore.batch_norm(
            x, None, None, weight, bias, True, mask=mask, activation=activation
        )
    assert torch.equal(y.isnan(), ~mask)
    loss = torch.where(mask, y, 0.0).pow(3).sum()
    (dy,) = torch.autograd.grad(loss, y, retain_graph=True)
    for grad in WAYS[way](y, (x, weight, bias), dy):
        assert grad.isfinite().all()
        assert grad.abs().max() > 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("op", ["batch_norm", "group_norm"])
def test_formula_keeps_large_means(op: str, mean: float, masked: bool) -> None:
    """In float32 it is as exact as the kernel on values far from zero."""
    torch.manual_seed(0)
    x = (torch.randn(4, 6, 50) + mean).requires_grad_()
    mask = torch.rand(4, 1, 50) < 0.8 if masked else None
    grad = torch.randn(4, 6, 50)

    def grad_input(x: Tensor, way: str) -> Tensor:
        if op == "group_norm":
            y = torch.ops.normcore.group_norm(x, 2, mask=mask)
        else:
            y = torch.ops.normcore.batch_norm(x, None, None, training=True, mask=mask)
        return WAYS[way](y, (x,), grad.to(y.dtype))[0]

    expected = grad_input(x.detach().double().requires_grad_(), "kernel")
    for way in ("kernel", "formula"):
        actual = grad_input(x, way).double()
        torch.testing.assert_close(actual, expected, rtol=0, atol=4e-6)
