"""The results of Flax linen and treex in tests/golden, every case at its stated tolerance.

Those of several ranks are in tests/distributed/test_flax_sync.py.

Also the acceptance cases and worked numbers that were computed by hand from the formulas.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from golden import Case, cases
from torch import Tensor

import normcore

pytestmark = pytest.mark.usefixtures("device")
CASES = cases()


def of_kind(kind: str) -> Any:
    chosen = [case for case in CASES if case.kind == kind]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


def test_the_collection_is_complete() -> None:
    assert Counter(case.kind for case in CASES) == {
        "single": 87, "steps": 3, "init": 3, "calls": 1, "sync": 7,
    }  # fmt: skip
    assert len([case for case in CASES if case.kind != "sync"]) == 94


@of_kind("single")
def test_single_call(case: Case) -> None:
    module = case.build(case.arrays["x"])
    if case.is_treex:
        module.train(case.entry.get("training", True))
        module.freeze(case.entry.get("frozen", False), affine=False)
    case.call_and_check(module, case.arrays)


@of_kind("steps")
def test_consecutive_calls(case: Case) -> None:
    module = case.build(case.arrays["x"][0])
    for index in range(case.steps):
        case.call_and_check(module, case.step(index))


@of_kind("init")
def test_init(case: Case) -> None:
    module = case.build(case.arrays["x"])
    if case.is_batch_norm:
        module.reset_parameters()
        with torch.no_grad():
            module.scale.copy_(case.arrays["scale"])
            module.bias.copy_(case.arrays["bias"])
        # The call inside treex's init takes the initial statistics unless it is told otherwise.
        override = case.call["use_running_average"]
        y = module(case.arrays["x"], use_running_average=override is not False)
        case.check("new_mean", module.mean, case.arrays)
        case.check("new_var", module.var, case.arrays)
    else:
        y = module(case.arrays["x"])
    case.check("y", y, case.arrays)


@of_kind("calls")
def test_lifecycle(case: Case) -> None:
    module = case.build(case.arrays["x"][0])
    module.mean.zero_()
    module.var.fill_(1.0)
    for index, call in enumerate(case.calls):
        for flag in call["before"].replace(",", " ").split():
            if flag == "freeze":
                module.freeze(affine=False)
            elif flag != "init":
                getattr(module, flag)()
        # The call made inside treex's init normalizes with the initial running statistics.
        override = True if call["before"] == "init" else call["use_running_average"]
        y = module(case.arrays["x"][index], override)
        row = case.step(index)
        case.check("y", y, row)
        case.check("new_mean", module.mean, row)
        case.check("new_var", module.var, row)


def close(got: Tensor, want: Any, tolerance: float = 1e-12) -> None:
    want = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.detach().double(), want, rtol=tolerance, atol=tolerance)


def batch_norm(**options: Any) -> normcore.BatchNorm:
    return normcore.BatchNorm(dtype=None, param_dtype=torch.float64, **options)


def group_norm(**options: Any) -> normcore.GroupNorm:
    return normcore.GroupNorm(dtype=None, param_dtype=torch.float64, **options)


def numbers() -> Tensor:
    return torch.arange(12, dtype=torch.float64).reshape(2, 3, 2)


def test_worked_batch_norm() -> None:
    norm = batch_norm(momentum=0.9).init(numbers()).double()
    y = norm(numbers())
    close(y[0, 0, 0], -1.4638494820588708)
    close(y[1, 2, 1], 1.4638494820588708)
    close(norm.mean, [0.5, 0.6])
    close(norm.var, [0.9 + 0.1 * 35 / 3] * 2)


@pytest.mark.parametrize(
    ("axis", "mean", "var"),
    [
        (-1, [5, 6], [35 / 3] * 2),
        (1, [3.5, 5.5, 7.5], [9.25] * 3),
        ((1, 2), [[3, 4], [5, 6], [7, 8]], [[9.0] * 2] * 3),
        ((2, 1), [[3, 4], [5, 6], [7, 8]], [[9.0] * 2] * 3),
    ],
)
def test_worked_statistics(axis: Any, mean: Any, var: Any) -> None:
    norm = batch_norm(momentum=0.0, axis=axis).init(numbers()).double()
    norm(numbers())
    close(norm.mean, mean)
    close(norm.var, var)


def test_worked_masked_batch_norm() -> None:
    norm = batch_norm(momentum=0.9).init(numbers()).double()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])[..., None]
    y = norm(numbers(), mask=mask)
    close(y[0, 0, 0], -1.0690441085967410)
    close(y[1, 2, 0], 2.9398712986410382)
    close(norm.mean, [0.8 / 3, 1.1 / 3])
    close(norm.var, [0.9 + 0.1 * 56 / 9] * 2)


def test_worked_gradient() -> None:
    norm = batch_norm().init(numbers()).double()
    norm.load_state_dict(
        {"scale": torch.tensor([2, 0.5]), "bias": torch.tensor([1.0, -1.0])}, strict=False
    )
    x = numbers().requires_grad_()
    loss = (torch.arange(12).reshape(2, 3, 2) * norm(x) ** 2).sum()
    loss.backward()
    assert norm.scale is not None
    assert norm.bias is not None
    assert x.grad is not None
    close(loss, 256.4815676751388)
    close(norm.scale.grad, [160.98768264059373, -4.987816354764775], 1e-11)
    close(norm.bias.grad, [141.97557099529678, -51.506107251175806])
    close(
        x.grad.flatten()[:4],
        [9.142829593368612, 0.5714282343211979, -1.828581688882167, -0.11428552471373976],
        1e-11,
    )


def test_worked_group_norm() -> None:
    x = torch.arange(16, dtype=torch.float64).reshape(2, 2, 4)
    y = group_norm(num_groups=2, epsilon=1e-6)(x)
    close(y[0, 0], [-1.2126779825136753, -0.7276067895082052] * 2)
    y = group_norm(num_groups=1, epsilon=1e-6)(x)
    close(y[0], (x[0] - 3.5) / (5.25 + 1e-6) ** 0.5)


def test_rank_1_input() -> None:
    norm = batch_norm(momentum=0.0).double().init(torch.zeros(2))
    norm.load_state_dict({"bias": torch.tensor([0.5, 0.25])}, strict=False)
    x = torch.tensor([3.0, -1.0], dtype=torch.float64)
    assert torch.equal(norm(x), torch.tensor([0.5, 0.25], dtype=torch.float64))
    assert torch.equal(norm.mean, x)
    assert torch.equal(norm.var, torch.zeros(2, dtype=torch.float64))


# The cases below restate flax's own tests (tests/linen/linen_test.py, NormalizationTest).


@pytest.mark.parametrize("masked", [False, True])
def test_flax_batch_norm(masked: bool) -> None:
    x = torch.randn(4, 3, 2)
    mask = torch.rand(4, 3, 1) < 0.6 if masked else torch.ones(4, 3, 1, dtype=torch.bool)
    norm = normcore.BatchNorm(momentum=0.9, dtype=None)
    y = norm(torch.where(mask, x, float("nan")), mask=mask)
    valid = mask.expand_as(x)
    for c in range(2):
        column, source = y[..., c][valid[..., c]], x[..., c][valid[..., c]]
        torch.testing.assert_close(column.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
        torch.testing.assert_close(column.var(unbiased=False), torch.tensor(1.0), atol=0, rtol=1e-4)
        torch.testing.assert_close(norm.mean[c], 0.1 * source.mean(), atol=1e-4, rtol=0)
        var = 0.9 + 0.1 * source.var(unbiased=False)
        torch.testing.assert_close(norm.var[c], var, atol=0, rtol=1e-4)
    assert y[~valid].isnan().all()


def test_flax_batch_norm_twice_with_a_name_that_does_not_exist_yet() -> None:
    norm = normcore.BatchNorm(axis_name="batch", dtype=None)
    x = torch.randn(2, 4)
    norm.init(x).init(x)
    torch.testing.assert_close(norm(x), norm(norm(x)), rtol=0.005, atol=1e-5)


@pytest.mark.parametrize(
    ("reduction_axes", "reduced"),
    [(None, (1, 2, 3, 5)), ((0, 1, 3, 4), (0, 1, 3, 5))],
)
def test_flax_group_norm(reduction_axes: Any, reduced: tuple[int, ...]) -> None:
    x = torch.randn(2, 5, 4, 4, 32)
    norm = normcore.GroupNorm(
        num_groups=2, use_bias=False, use_scale=False, reduction_axes=reduction_axes, dtype=None
    )
    y = norm(x)
    folded = x.reshape(2, 5, 4, 4, 2, 16)
    mean = folded.mean(reduced, keepdim=True)
    var = folded.var(reduced, unbiased=False, keepdim=True)
    want = ((folded - mean) * (var + 1e-5).rsqrt()).reshape(x.shape)
    torch.testing.assert_close(y, want, atol=1e-4, rtol=0)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)


def test_flax_group_norm_batched() -> None:
    norm = normcore.GroupNorm(num_groups=2, reduction_axes=(-3, -2, -1), dtype=None)
    x = torch.randn(3, 4, 32)
    stacked = norm(torch.stack([x] * 5))
    for y in stacked:
        torch.testing.assert_close(y, norm(x), atol=1e-4, rtol=0)


def test_flax_group_norm_raises() -> None:
    x = torch.ones(2, 5, 4, 4, 32)
    with pytest.raises(ValueError, match=r"num_groups to divide the number of channels \(32\)"):
        normcore.GroupNorm(num_groups=3)(x)
    with pytest.raises(ValueError, match="expected reduction_axes to contain the feature axes"):
        normcore.GroupNorm(num_groups=2, reduction_axes=(0, 1, 2, 3))(x)


def test_flax_group_norm_mask() -> None:
    x = torch.randn(13, 3, 5, 77)
    mask = torch.rand(x.shape) < 0.5
    norm = normcore.GroupNorm(num_groups=7, use_bias=False, use_scale=False)
    y = norm(torch.where(mask, x, float("nan")), mask=mask)
    groups = y.reshape(13, 15, 7, 11).movedim(2, 1).reshape(13 * 7, -1)
    valid = mask.reshape(13, 15, 7, 11).movedim(2, 1).reshape(13 * 7, -1)
    for values, keep in zip(groups, valid):
        torch.testing.assert_close(values[keep].mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
        var = values[keep].var(unbiased=False)
        torch.testing.assert_close(var, torch.tensor(1.0), atol=1e-4, rtol=0)


def test_flax_normalization_equivalence() -> None:
    x = torch.randn(2, 3, 4, 5)
    scale, bias = torch.rand(5), torch.randn(5)
    state = {"scale": scale, "bias": bias}

    def run(**options: Any) -> Tensor:
        norm = normcore.GroupNorm(num_features=5, epsilon=1e-6, **options)
        norm.load_state_dict(state)
        return norm(x)

    layer = torch.nn.functional.layer_norm(x, (3, 4, 5), eps=1e-6) * scale + bias
    torch.testing.assert_close(run(num_groups=1), layer, atol=2e-6, rtol=0)
    channels_first = x.movedim(-1, 1)
    instance = torch.nn.functional.instance_norm(channels_first, None, None, scale, bias, eps=1e-6)
    torch.testing.assert_close(run(group_size=1), instance.movedim(1, -1), atol=2e-6, rtol=0)


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_flax_large_offsets(offset: float) -> None:
    x = torch.randn(8, 9, 32) + offset
    exact = x.double()
    y = normcore.GroupNorm(num_groups=1)(x)
    centred = exact - exact.mean((1, 2), keepdim=True)
    want = centred * (centred.square().mean((1, 2), keepdim=True) + 1e-5).rsqrt()
    assert (y - want).abs().max() < 1e-6 * want.abs().max()
    y = normcore.BatchNorm()(x)
    centred = exact - exact.mean((0, 1))
    want = centred * (centred.square().mean((0, 1)) + 1e-5).rsqrt()
    assert (y - want).abs().max() < 1e-6 * want.abs().max()


def test_samples_of_both_batch_axes_are_one_batch() -> None:
    x = torch.randn(5, 4, 4)
    norm = normcore.BatchNorm(dtype=None)
    torch.testing.assert_close(norm(x).reshape(20, 4), norm(x.reshape(20, 4)), atol=1e-5, rtol=0)
