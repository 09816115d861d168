"""state_dict, loading into explicit and lazy modules, copies and pickles."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import normcore

X = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1))


def trained(**options: Any) -> normcore.BatchNorm:
    norm = normcore.BatchNorm(scale_init=nn.init.normal_, bias_init=nn.init.normal_, **options)
    norm(X)
    return norm


@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_keys(use_scale: bool, use_bias: bool) -> None:
    affine = ["scale"] * use_scale + ["bias"] * use_bias
    options = {"use_scale": use_scale, "use_bias": use_bias, "num_features": 5}
    assert list(normcore.BatchNorm(**options).state_dict()) == [*affine, "mean", "var"]
    assert list(normcore.GroupNorm(num_groups=1, **options).state_dict()) == affine


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("features", [5, None])
def test_load(features: int | None, assign: bool) -> None:
    source = trained()
    norm = normcore.BatchNorm(num_features=features)
    result = norm.load_state_dict(source.state_dict(), assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert norm.initialized
    assert norm.num_features == 5
    assert isinstance(norm.scale, nn.Parameter)
    assert torch.equal(norm.eval()(X), source.eval()(X))


def test_load_into_a_lazy_model() -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            normcore.BatchNorm(),
            nn.Linear(5, 8),
            normcore.GroupNorm(group_size=2),
            normcore.BatchNorm(axis=(1, 2)),
        )

    source, target = build(), build()
    source(X)
    target.load_state_dict(source.state_dict())
    assert target[3].num_features == (6, 8)
    assert torch.equal(target.eval()(X), source.eval()(X))


def test_load_keeps_requires_grad_and_the_dtypes_of_the_module() -> None:
    norm = normcore.BatchNorm(param_dtype=torch.bfloat16).freeze()
    norm.load_state_dict(trained().double().state_dict())
    assert norm.scale is not None
    assert norm.scale.dtype == torch.bfloat16
    assert not norm.scale.requires_grad
    assert norm.mean.dtype == torch.float32
    assert norm.unfreeze().scale.requires_grad


@pytest.mark.parametrize("features", [5, None])
def test_strict_loading(features: int | None) -> None:
    state = trained().state_dict()
    del state["bias"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*bias.*Unexpected key.*extra") as ours:
        normcore.BatchNorm(num_features=features).load_state_dict(state)
    norm = normcore.BatchNorm(num_features=features)
    result = norm.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["bias"], ["extra"])
    assert norm.bias is not None
    assert torch.equal(norm.bias, torch.zeros(5))
    assert 'Missing key(s) in state_dict: "bias"' in str(ours.value)


def test_nothing_to_load_from() -> None:
    norm = normcore.BatchNorm()
    with pytest.raises(RuntimeError, match=r'Missing key.*"scale", "bias", "mean", "var"'):
        norm.load_state_dict({})
    norm.load_state_dict({}, strict=False)
    assert not norm.initialized


def test_wrong_shapes() -> None:
    state = trained().state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for scale"):
        normcore.BatchNorm(num_features=4).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for bias"):
        normcore.BatchNorm().load_state_dict({**state, "bias": torch.zeros(3)})
    with pytest.raises(RuntimeError, match=r"expected num_features to hold one size for each axis"):
        normcore.BatchNorm(axis=(0, 1)).load_state_dict(state)
    affine = {name: state[name] for name in ("scale", "bias")}
    with pytest.raises(RuntimeError, match="expected num_groups to divide the number of channels"):
        nn.Sequential(normcore.GroupNorm(num_groups=2)).load_state_dict(
            {f"0.{name}": t for name, t in affine.items()}
        )


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("wrong", ["scale", "var"])
def test_inconsistent_shapes_leave_a_module_lazy(wrong: str, assign: bool) -> None:
    state = trained().state_dict()
    lazy_state = normcore.BatchNorm().state_dict()
    for tensor in (torch.zeros(3), torch.zeros(5, 1), lazy_state[wrong]):
        norm = normcore.BatchNorm()
        with pytest.raises(RuntimeError, match=r"size mismatch for .*: expected the shape of"):
            norm.load_state_dict({**state, wrong: tensor}, assign=assign)
        assert not norm.initialized
        assert norm.num_features is None
        assert all(is_lazy(t) for t in [*norm.parameters(), *norm.buffers()])
        assert norm(torch.randn(2, 7)).shape == (2, 7)


def test_a_failed_initializer_leaves_a_module_lazy() -> None:
    norm = normcore.BatchNorm(scale_init=nn.init.xavier_uniform_)
    with pytest.raises(RuntimeError, match="fewer than 2 dimensions"):
        norm.load_state_dict(trained().state_dict())
    assert not norm.initialized


def test_state_of_a_lazy_module() -> None:
    state = normcore.BatchNorm().state_dict()
    assert list(state) == ["scale", "bias", "mean", "var"]
    norm = normcore.BatchNorm()
    norm.load_state_dict(state)
    assert not norm.initialized
    assert norm(X).shape == X.shape
    with pytest.raises(RuntimeError, match="uninitialized"):
        norm.load_state_dict(state)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: normcore.BatchNorm(axis=1, momentum=0.5, param_dtype=torch.bfloat16),
        lambda: normcore.BatchNorm(momentum=torch.tensor(0.5), use_bias=False),
        lambda: normcore.GroupNorm(group_size=1, activation="silu"),
        lambda: normcore.GroupNorm(num_groups=1, use_bias=False, use_scale=False),
    ],
    ids=["batch", "batch_tensor_momentum", "group", "group_no_affine"],
)
def test_copies(build: Any, how: str, lazy: bool) -> None:
    norm = build()
    if not lazy:
        norm(X)
    norm.freeze()
    if how == "deepcopy":
        other = copy.deepcopy(norm)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(norm))
    else:
        buffer = io.BytesIO()
        torch.save(norm, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert repr(other) == repr(norm)
    assert other.initialized != lazy
    for module in (norm, other):
        module.unfreeze()
        assert all(p.requires_grad for p in module.parameters())
    assert torch.equal(other(X), norm(X))
    left, right = norm.state_dict(), other.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[k], right[k]) for k in left)
    assert all(left[k].dtype == right[k].dtype for k in left)
    assert all(left[k].data_ptr() != right[k].data_ptr() for k in left)
