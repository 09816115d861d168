"""Options of the modules: types, numbers of features, and what freezing reaches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import normcore


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        (
            normcore.BatchNorm,
            {"epsilon": "a"},
            "BatchNorm: expected epsilon to be a number, got 'a'",
        ),
        (normcore.GroupNorm, {"epsilon": None}, "expected epsilon to be a number, got None"),
        (normcore.BatchNorm, {"momentum": None}, "expected momentum to be a number, got None"),
        (normcore.BatchNorm, {"axis_name": 3}, "expected axis_name to be a str or None, got 3"),
        (normcore.GroupNorm, {"num_groups": 8.0}, "expected num_groups to be an int, got 8.0"),
        (normcore.GroupNorm, {"num_groups": "8"}, "expected num_groups to be an int, got '8'"),
        (normcore.GroupNorm, {"group_size": 2.5}, "expected group_size to be an int, got 2.5"),
        (normcore.GroupNorm, {"reduction_axes": (1.0,)}, "expected reduction_axes to be an int or"),
    ],
)
def test_types_of_options(kind: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        kind(**options)


@pytest.mark.parametrize("epsilon", [1, 0, np.float32(0.5), np.int64(2)])
def test_numbers_of_any_type_can_be_scripted(epsilon: Any) -> None:
    x = torch.randn(6, 5)
    batch = normcore.BatchNorm(num_features=5, epsilon=epsilon, momentum=np.float64(0.5))
    group = normcore.GroupNorm(
        num_features=5, num_groups=np.int64(5), epsilon=epsilon, reduction_axes=np.array([0, 1])
    )
    for norm in (batch, group):
        scripted = torch.jit.script(norm)
        assert torch.equal(scripted(x), norm(x))


@pytest.mark.parametrize("kind", [normcore.BatchNorm, normcore.GroupNorm])
def test_every_feature_axis_has_its_size(kind: Any) -> None:
    options = {} if kind is normcore.BatchNorm else {"num_groups": 1}
    norm = kind(num_features=(2, 3), axis=(1, -1), **options)
    assert norm(torch.randn(4, 2, 3)).shape == (4, 2, 3)
    for call in (norm, norm.init, torch.jit.script(norm)):
        with pytest.raises(Exception, match=r"shape \[2, 3\] on axis \[1, -1\], got \[3, 2\]"):
            call(torch.randn(4, 3, 2))


@pytest.mark.parametrize("kind", [normcore.BatchNorm, normcore.GroupNorm])
def test_no_features_are_an_error_for_lazy_modules(kind: Any) -> None:
    norm = kind()
    with pytest.raises(ValueError, match="expected num_features to be positive, got 0"):
        norm(torch.randn(3, 0))
    assert not norm.initialized


def test_freezing_reaches_parametrized_parameters() -> None:
    norm = normcore.BatchNorm(num_features=3)
    nn.utils.parametrize.register_parametrization(norm, "scale", nn.Identity())
    assert norm.scale.requires_grad
    normcore.freeze(norm)
    assert not norm.scale.requires_grad
    assert not norm.bias.requires_grad
    normcore.unfreeze(norm)
    assert norm.scale.requires_grad
    assert norm.bias.requires_grad


def test_a_scripted_model_cannot_be_frozen() -> None:
    scripted = torch.jit.script(nn.Sequential(normcore.BatchNorm(num_features=3)))
    with pytest.raises(TypeError, match="freeze: expected model to be a module in Python"):
        normcore.freeze(scripted)
