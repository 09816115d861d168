"""Scripting, saving and loading of the modules in every mode; tracing, freezing and training."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normcore

X = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1))
Build = Callable[[], Any]

MODULES: dict[str, Build] = {
    "batch": lambda: normcore.BatchNorm(num_features=5),
    "batch_lazy": lambda: normcore.BatchNorm(),
    "batch_options": lambda: normcore.BatchNorm(
        axis=1, momentum=0.5, epsilon=1e-3, dtype=None, use_bias=False, activation="silu"
    ),
    "batch_no_affine": lambda: normcore.BatchNorm(dtype=None, use_bias=False, use_scale=False),
    "batch_axes": lambda: normcore.BatchNorm(axis=(1, 2), scale_init=nn.init.normal_),
    "batch_bfloat16": lambda: normcore.BatchNorm(dtype=torch.bfloat16, param_dtype=torch.bfloat16),
    "batch_tensor_momentum": lambda: normcore.BatchNorm(momentum=torch.tensor(0.5)),
    "batch_axis_name": lambda: normcore.BatchNorm(axis_name="world").eval(),
    "group": lambda: normcore.GroupNorm(num_groups=5),
    "group_size": lambda: normcore.GroupNorm(group_size=2, axis=1, activation="gelu", dtype=None),
    "group_no_affine": lambda: normcore.GroupNorm(num_groups=1, use_bias=False, use_scale=False),
    "group_axes": lambda: normcore.GroupNorm(num_groups=6, axis=(1, 2)),
    "group_reduction_axes": lambda: normcore.GroupNorm(group_size=1, reduction_axes=(0, 1, 2)),
}


def saved_and_loaded(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("mode", ["train", "eval", "freeze"])
@pytest.mark.parametrize("name", MODULES)
def test_script_save_and_load(name: str, mode: str) -> None:
    module = MODULES[name]().init(X)
    if not (name == "batch_axis_name" and mode == "train"):
        getattr(module, mode)()
    loaded = saved_and_loaded(torch.jit.script(copy.deepcopy(module)))
    for _ in range(2):  # the second call sees the statistics of the first
        assert torch.equal(loaded(X), module(X))
    assert same_state(loaded, module)
    assert list(module.state_dict()) == list(loaded.state_dict())


@pytest.mark.parametrize("name", ["batch", "group"])
def test_arguments_of_forward(name: str) -> None:
    module = MODULES[name]().init(X)
    scripted = torch.jit.script(copy.deepcopy(module))
    mask, residual = torch.rand(4, 6, 1) < 0.7, torch.randn_like(X)
    want = module(X, mask=mask, residual=residual)
    assert torch.equal(scripted(X, mask=mask, residual=residual), want)
    if name == "batch":
        assert torch.equal(scripted(X, True), module(X, True))
        assert torch.equal(scripted(X, use_running_average=False), module(X, False))


@pytest.mark.parametrize("x", [X.int(), X.double(), X.half(), X[:0]], ids=lambda x: str(x.dtype))
@pytest.mark.parametrize("name", MODULES)
def test_other_inputs(name: str, x: Tensor) -> None:
    module = MODULES[name]().init(X)
    module.eval()
    scripted = torch.jit.script(module)
    y = scripted(x)
    assert y.dtype == module(x).dtype
    assert torch.equal(y, module(x))


def test_mode_of_a_loaded_module_can_be_changed() -> None:
    module = normcore.BatchNorm(num_features=5)
    loaded = saved_and_loaded(torch.jit.script(copy.deepcopy(module)))
    assert torch.equal(loaded.eval()(X), module.eval()(X))
    assert torch.equal(loaded.train()(X), module.train()(X))
    assert same_state(loaded, module)


def test_training_in_torchscript() -> None:
    net = nn.Sequential(nn.Linear(5, 8), normcore.BatchNorm(num_features=8, activation="relu"))
    scripted = torch.jit.script(copy.deepcopy(net))
    for model in (net, scripted):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
    assert same_state(net, scripted)


def test_freeze_and_trace() -> None:
    net = nn.Sequential(
        nn.Conv1d(6, 4, 1), normcore.BatchNorm(axis=1), normcore.GroupNorm(num_groups=2, axis=1)
    )
    net(X)
    net.eval()
    want = net(X)
    frozen = torch.jit.freeze(torch.jit.script(net))
    torch.testing.assert_close(frozen(X), want)
    torch.testing.assert_close(torch.jit.optimize_for_inference(frozen)(X), want)
    torch.testing.assert_close(torch.jit.trace(net, X)(X), want)


@pytest.mark.parametrize("name", ["batch_lazy", "group"])
def test_features_must_be_known(name: str) -> None:
    with pytest.raises(RuntimeError, match="uninitialized parameters"):
        torch.jit.script(MODULES[name]())


def test_axis_name_does_not_train_in_torchscript() -> None:
    scripted = torch.jit.script(normcore.BatchNorm(num_features=5, axis_name="world"))
    with pytest.raises(torch.jit.Error, match="axis_name needs Python"):
        scripted(X)


def test_operators_in_a_scripted_function() -> None:
    @torch.jit.script
    def normalize(x: Tensor) -> Tensor:
        y = torch.ops.normcore.group_norm(x, 2, axis=1, activation="silu")
        return torch.ops.normcore.batch_norm(y, None, None, training=True, axis=[1, 2])

    want = normcore.functional.group_norm(X, 2, activation="silu")
    want = normcore.functional.batch_norm(want, None, None, training=True, axis=(1, 2))
    assert torch.equal(normalize(X), want)
