"""Forward-mode derivatives: alone, over reverse mode, under it, and under vmap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from derivatives import ACTIVATIONS, MODES, leaf, norm
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import normcore  # noqa: F401  (loads the operators)

pytestmark = pytest.mark.usefixtures("device")
ops = torch.ops.normcore


def check_every_order(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    assert gradcheck(
        function,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_operand(mode: str, activation: str | None) -> None:
    x = leaf(2, 4, 2)
    # keeps ReLU away from its kink
    residual = (20 * torch.randn(2, 4, 2, dtype=torch.float64).sign()).requires_grad_()
    check_every_order(norm(mode, activation=activation), (x, leaf(4), leaf(4), residual))


@pytest.mark.parametrize("mode", MODES)
def test_without_parameters(mode: str) -> None:
    check_every_order(norm(mode), (leaf(2, 4, 3),))


@pytest.mark.parametrize("mode", ["train", "group"])
@pytest.mark.parametrize("shape", [(2, 1, 3), (2, 4, 3)], ids=["rows", "values"])
def test_masks(mode: str, shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.7
    mask[0, :, 0] = True
    mask[1, :, 1] = True
    check_every_order(norm(mode, mask=mask, activation="silu"), (leaf(2, 4, 3), leaf(4), leaf(4)))


def test_parameters_per_sample() -> None:
    check_every_order(norm("group", activation="gelu"), (leaf(2, 4, 3), leaf(2, 4), leaf(2, 4)))


@pytest.mark.parametrize("mode", MODES)
def test_operands_with_and_without_a_tangent(mode: str) -> None:
    function = norm(mode, activation="silu")
    operands = [torch.randn(2, 4, 3), torch.randn(4), torch.randn(4), torch.randn(2, 4, 3)]
    operands = [t.double() for t in operands]
    tangents = [torch.randn_like(t) for t in operands]
    expected = torch.zeros(2, 4, 3, dtype=torch.float64)
    for i, (operand, tangent) in enumerate(zip(operands, tangents, strict=True)):

        def of_one(t: Tensor, i: int = i) -> Tensor:
            return function(*operands[:i], t, *operands[i + 1 :])

        y, y_tangent = torch.func.jvp(of_one, (operand,), (tangent,))
        assert torch.equal(y, function(*operands))
        expected += y_tangent
    _, all_tangents = torch.func.jvp(function, tuple(operands), tuple(tangents))
    torch.testing.assert_close(all_tangents, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tangent_has_the_dtype_of_the_output(mode: str, dtype: torch.dtype) -> None:
    x, tangent = torch.randn(2, 4, 3, dtype=dtype), torch.randn(2, 4, 3, dtype=dtype)
    w, b = torch.randn(4), torch.randn(4)
    function = norm(mode, dtype=None if dtype == torch.float16 else torch.float32)
    got, got_tangent = torch.func.jvp(lambda x: function(x, w, b), (x,), (tangent,))
    assert got_tangent.dtype == got.dtype == (dtype if dtype == torch.float16 else torch.float32)
    want = torch.func.jvp(
        lambda x: function(x, w.double(), b.double()), (x.double(),), (tangent.double(),)
    )[1]
    limit = 4 * torch.finfo(got.dtype).eps * (1 + want.abs().max())
    assert (got_tangent.double() - want).abs().max() < limit


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_and_large_mean(layout: torch.memory_format) -> None:
    x = (torch.randn(3, 8, 5, 4) + 1e4).to(memory_format=layout)
    tangent = torch.randn_like(x)
    for mode, function in {
        "batch": lambda x: ops.batch_norm(x, None, None, training=True),
        "group": lambda x: ops.group_norm(x, 4),
    }.items():
        y, got = torch.func.jvp(function, (x,), (tangent,))
        _, want = torch.func.jvp(function, (x.double(),), (tangent.double(),))
        assert y.is_contiguous(memory_format=layout)
        assert (got.double() - want).abs().max() < 2e-5, mode


def test_masked_out_values_reach_no_other_tangent() -> None:
    mask = torch.ones(2, 4, 3, dtype=torch.bool)
    mask[0, :, 1] = False
    x, tangent = torch.randn(2, 4, 3).double(), torch.randn(2, 4, 3).double()
    poisoned, poisoned_tangent = x.clone(), tangent.clone()
    poisoned[0, :, 1] = torch.tensor([float("nan"), float("inf"), 1e300, -1.0])
    poisoned_tangent[0, :, 1] = float("nan")
    for mode in ("train", "group"):
        function = norm(mode, mask=mask, activation="silu")
        _, want = torch.func.jvp(function, (x,), (tangent,))
        _, got = torch.func.jvp(function, (poisoned,), (poisoned_tangent,))
        torch.testing.assert_close(got[mask], want[mask])


def test_a_slice_without_valid_values_gives_nan() -> None:
    mask = torch.ones(2, 4, 3, dtype=torch.bool)
    mask[0] = False
    x = torch.randn(2, 4, 3)
    _, tangent = torch.func.jvp(norm("group", mask=mask), (x,), (torch.ones_like(x),))
    assert tangent[0].isnan().all()
    assert tangent[1].isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_hessians(mode: str) -> None:
    w, b = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    function = norm(mode, activation="gelu")
    x = torch.randn(2, 4, 2, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return function(x, w, b).pow(3).sum()

    hessian_of = torch.autograd.functional.hessian
    want = hessian_of(loss, x)
    for hessian in (
        partial(hessian_of, loss, vectorize=True),
        torch.func.hessian(loss),
        torch.func.jacrev(torch.func.jacrev(loss)),
        torch.func.jacrev(torch.func.jacfwd(loss)),
        torch.func.jacfwd(torch.func.jacfwd(loss)),
    ):
        torch.testing.assert_close(hessian(x), want, rtol=1e-9, atol=1e-10)


def test_running_statistics_are_updated_once() -> None:
    x, tangent = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    plain, dual = torch.zeros(4), torch.zeros(4)
    var, count = torch.ones(4), torch.tensor(0)
    ops.batch_norm(x, plain, var.clone(), training=True)
    torch.func.jvp(
        lambda x: ops.batch_norm(x, dual, var, training=True, num_batches_tracked=count),
        (x,),
        (tangent,),
    )
    assert torch.equal(dual, plain)
    assert count == 1


def test_tangents_of_statistics_are_refused() -> None:
    x, mean, var = torch.randn(3, 4), torch.zeros(4), torch.ones(4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(mean, torch.ones(4))
        for training in (True, False):
            with pytest.raises(ValueError, match="running_mean and running_var without a tangent"):
                ops.batch_norm(x, dual, var, training=training)


@pytest.mark.parametrize("mode", MODES)
def test_compiled(mode: str) -> None:
    torch.compiler.reset()
    function = norm(mode, activation="silu")
    x, tangent = torch.randn(2, 4, 3), torch.randn(2, 4, 3)

    def jvp(x: Tensor, tangent: Tensor) -> Any:
        return torch.func.jvp(function, (x,), (tangent,))

    got = torch.compile(jvp, backend="aot_eager", fullgraph=True)(x, tangent)
    torch.testing.assert_close(got, jvp(x, tangent))
