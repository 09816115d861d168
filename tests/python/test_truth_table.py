"""Which statistics a BatchNorm uses and updates: every row of the table, in Python and TorchScript.

batch = (not use_running_average) if given else (training and not frozen and initialized)
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import normcore

ARGUMENTS = [None, True, False]
ROWS = list(itertools.product(ARGUMENTS, [True, False], [True, False]))


def uses_batch(argument: bool | None, training: bool, frozen: bool) -> bool:
    return (not argument) if argument is not None else (training and not frozen)


def make(training: bool, frozen: bool) -> normcore.BatchNorm:
    norm = normcore.BatchNorm(num_features=3, momentum=0.75)
    with torch.no_grad():
        norm.mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
        norm.var.copy_(torch.tensor([4.0, 0.25, 1.0]))
    return norm.train(training).freeze(frozen, affine=False)


def expected(norm: normcore.BatchNorm, x: Tensor, batch: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output and running statistics after a call of `norm`."""
    if not batch:
        return (x - norm.mean) * (norm.var + 1e-5).rsqrt(), norm.mean.clone(), norm.var.clone()
    mean, var = x.mean((0, 1)), x.var((0, 1), unbiased=False)
    y = (x - mean) * (var + 1e-5).rsqrt()
    return y, 0.75 * norm.mean + 0.25 * mean, 0.75 * norm.var + 0.25 * var


@pytest.mark.parametrize("scripted", [False, True], ids=["python", "script"])
@pytest.mark.parametrize(("argument", "training", "frozen"), ROWS)
def test_row(argument: bool | None, training: bool, frozen: bool, scripted: bool) -> None:
    norm = make(training, frozen)
    x = torch.randn(5, 4, 3)
    y, mean, var = expected(norm, x, uses_batch(argument, training, frozen))
    before = norm.mean.clone()
    module = torch.jit.script(norm) if scripted else norm
    torch.testing.assert_close(module(x, argument), y)
    torch.testing.assert_close(module.mean, mean)
    torch.testing.assert_close(module.var, var)
    if not uses_batch(argument, training, frozen):
        assert torch.equal(module.mean, before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_init_updates_nothing(training: bool, frozen: bool) -> None:
    norm = normcore.BatchNorm().train(training).freeze(frozen)
    assert not norm.initialized
    assert norm.init(torch.randn(5, 4, 3)) is norm
    assert norm.initialized
    assert torch.equal(norm.mean, torch.zeros(3))
    assert torch.equal(norm.var, torch.ones(3))


@pytest.mark.parametrize(("argument", "training", "frozen"), ROWS)
def test_first_call_without_init_is_a_normal_call(
    argument: bool | None, training: bool, frozen: bool
) -> None:
    x = torch.randn(5, 4, 3)
    lazy = normcore.BatchNorm().train(training).freeze(frozen)
    explicit = normcore.BatchNorm(num_features=3).train(training).freeze(frozen)
    assert torch.equal(lazy(x, argument), explicit(x, argument))
    assert torch.equal(lazy.mean, explicit.mean)
    assert torch.equal(lazy.var, explicit.var)


@pytest.mark.parametrize("first", ["train", "eval", "freeze", "unfreeze"])
@pytest.mark.parametrize("second", ["train", "eval", "freeze", "unfreeze"])
def test_flags_are_independent(first: str, second: str) -> None:
    norm = normcore.BatchNorm(num_features=3)
    for flag in (first, second):
        assert getattr(norm, flag)() is norm
    modes = [flag for flag in (first, second) if flag in ("train", "eval")]
    freezes = [flag for flag in (first, second) if flag in ("freeze", "unfreeze")]
    assert norm.training == (not modes or modes[-1] == "train")
    assert norm.frozen == (bool(freezes) and freezes[-1] == "freeze")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_group_norm_has_no_mode(training: bool, frozen: bool) -> None:
    x = torch.randn(5, 4, 6)
    norm = normcore.GroupNorm(num_groups=2)
    want = norm(x)
    assert torch.equal(norm.train(training).freeze(frozen)(x), want)
