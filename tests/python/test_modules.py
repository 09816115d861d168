"""Construction, features, dtypes, freezing and composition of normcore.BatchNorm and GroupNorm."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch._dynamo.testing
import torch.distributed
from tolerance import assert_close
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import normcore

on_every_device = pytest.mark.usefixtures("device")

HALVES = [torch.bfloat16, torch.float16]
FLOATS = [torch.float64, torch.float32, *HALVES]
COMMON = {
    "num_features": None, "axis": -1, "epsilon": 1e-5, "dtype": torch.float32,
    "param_dtype": torch.float32, "use_bias": True, "use_scale": True, "bias_init": None,
    "scale_init": None, "axis_name": None, "axis_index_groups": None, "sync_weighting": "count",
    "activation": None, "device": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        (normcore.BatchNorm, {"momentum": 0.99}),
        (normcore.GroupNorm, {"num_groups": 32, "group_size": None, "reduction_axes": None}),
    ],
)
def test_constructor(kind: type[nn.Module], own: dict[str, Any]) -> None:
    parameters = inspect.signature(kind).parameters.values()
    assert {p.name: p.default for p in parameters} == COMMON | own
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters)


# ---- features ----


@on_every_device
@pytest.mark.parametrize(
    ("axis", "features"),
    [(-1, 5), (1, 3), (0, 2), (2, 4), ((1, -1), (3, 5)), ((3, 1), (3, 5)), ((-1, 0, 1), (2, 3, 5))],
    ids=str,
)
@pytest.mark.parametrize("lazy", [True, False])
def test_features(axis: Any, features: Any, lazy: bool) -> None:
    x = torch.randn(2, 3, 4, 5)
    shape = (features,) if isinstance(features, int) else features
    given = None if lazy else features
    batch = normcore.BatchNorm(num_features=given, axis=axis, scale_init=nn.init.normal_)
    group = normcore.GroupNorm(num_features=given, axis=axis, num_groups=1)
    for norm in (batch, group):
        assert norm.initialized != lazy
        assert norm(x).shape == x.shape
        assert norm.initialized
        assert norm.num_features == features
        assert norm.scale.shape == norm.bias.shape == shape
        assert isinstance(norm.scale, nn.Parameter)
    assert batch.mean.shape == batch.var.shape == shape
    arguments = (torch.zeros(shape), torch.ones(shape), batch.scale, batch.bias)
    want = reference.batch_norm(x, *arguments, axis=axis)
    assert_close(batch(x), want.value["y"], length=want.length, magnitude=want.magnitude["y"])


@pytest.mark.parametrize(
    "norm",
    [
        normcore.BatchNorm(),
        normcore.BatchNorm(use_bias=False, use_scale=False),
        normcore.GroupNorm(num_groups=1),
        normcore.GroupNorm(num_groups=1, use_bias=False, use_scale=False),
        normcore.GroupNorm(group_size=4, use_scale=False),
    ],
    ids=repr,
)
def test_another_number_of_features_is_an_error(norm: Any) -> None:
    norm(torch.randn(3, 2, 4))
    for features in (1, 8):
        text = rf"{type(norm).__name__}: expected 4 features on axis \[-1\], got {features}$"
        for call in (norm, norm.init):
            with pytest.raises(ValueError, match=text):
                call(torch.randn(3, 2, features))
        with pytest.raises(torch.jit.Error, match=f"expected 4 features .*, got {features}"):
            torch.jit.script(norm)(torch.randn(3, 2, features))
    assert norm(torch.randn(3, 2, 4)).shape == (3, 2, 4)


@pytest.mark.parametrize("kind", [normcore.BatchNorm, normcore.GroupNorm])
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"axis": 3}, IndexError, r"expected axis in \[-3, 2\] for an input of rank 3, got 3"),
        ({"axis": (0, -4)}, IndexError, r"got -4"),
        ({"axis": (1, -2)}, ValueError, r"expected axis without duplicates, got \[1, -2\]"),
    ],
)
def test_wrong_axes_leave_a_module_lazy(
    kind: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    norm = kind(**options)
    for call in (norm, norm.init):
        with pytest.raises(error, match=text):
            call(torch.randn(32, 32, 32))
        assert not norm.initialized


@pytest.mark.parametrize("kind", [normcore.BatchNorm, normcore.GroupNorm])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sync_weighting": "mean"}, "expected sync_weighting to be 'count' or 'rank', got 'mean'"),
        ({"axis_index_groups": [[0, 1]]}, "expected axis_name to be given with axis_index_groups"),
        (
            {"axis_name": "world", "axis_index_groups": [[0, 0]]},
            r"a partition .*, got \[\[0, 0\]\]",
        ),
        ({"axis_name": "world", "axis_index_groups": [[1, 2]]}, "expected .* to be a partition"),
        ({"axis_name": "world", "axis_index_groups": [[0], []]}, "expected .* to be a partition"),
        ({"axis": ()}, "expected at least one axis"),
        ({"num_features": (4, 5)}, r"one size for each axis of \[-1\], got \(4, 5\)"),
        ({"num_features": -1}, "expected num_features to be positive, got -1"),
        ({"num_features": 4, "axis": (1, 2)}, "got 4"),
        ({"num_features": 0}, "expected num_features to be positive, got 0"),
        ({"axis": (1, 1)}, r"expected axis without duplicates, got \[1, 1\]"),
        ({"activation": "tanh"}, "to be None, relu, silu, gelu or gelu_tanh, got tanh"),
        ({"epsilon": -1e-5}, "expected epsilon to be finite and >= 0, got -1e-05"),
        ({"epsilon": float("nan")}, "expected epsilon to be finite and >= 0, got nan"),
        ({"epsilon": float("inf")}, "expected epsilon to be finite and >= 0, got inf"),
        ({"dtype": torch.int32}, "expected dtype to be None or floating point, got torch.int32"),
        ({"dtype": torch.complex64}, "expected dtype to be None or floating point"),
        ({"param_dtype": torch.int8}, "expected param_dtype to be floating point, got torch.int8"),
        ({"param_dtype": None}, "expected param_dtype to be floating point, got None"),
    ],
)
def test_wrong_options(kind: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        kind(**{"num_features": None, **options})


@pytest.mark.parametrize("kind", [normcore.BatchNorm, normcore.GroupNorm])
@pytest.mark.parametrize("name", ["axis", "num_features"])
@pytest.mark.parametrize("value", [1.0, "1", (1, 2.0), ("1",)])
def test_axes_and_features_are_integers(kind: Any, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} to be an int or a sequence of ints, got "):
        kind(**{name: value})


def test_integers_of_numpy() -> None:
    for axis in (np.int64(1), np.array([1]), [np.int32(1)]):
        norm = normcore.BatchNorm(axis=axis, num_features=np.int64(4))
        assert (norm.axis, norm.num_features) == ([1], 4)
        assert all(type(n) is int for n in (*norm.axis, norm.num_features))
        assert torch.jit.script(norm)(torch.randn(3, 4, 2)).shape == (3, 4, 2)


def test_init_checks_the_axes_of_an_initialized_module() -> None:
    norm = normcore.BatchNorm(num_features=4, axis=2)
    with pytest.raises(IndexError, match=r"expected axis in \[-2, 1\] for an input of rank 2"):
        norm.init(torch.randn(4, 4))
    with pytest.raises(IndexError, match="axis"):
        norm(torch.randn(4, 4))


@on_every_device
@pytest.mark.parametrize(
    ("options", "channels"),
    [
        ({}, 32),
        ({"num_groups": 4}, 8),
        ({"num_groups": None, "group_size": 2}, 8),
        ({"group_size": 8}, 8),
        ({"group_size": 1}, 5),
    ],
    ids=str,
)
def test_number_of_groups(options: dict[str, Any], channels: int) -> None:
    x = torch.randn(3, 4, channels)
    groups = channels // options["group_size"] if "group_size" in options else None
    groups = groups or options.get("num_groups", 32)
    want = reference.group_norm(x, groups, axis=-1)
    for features in (None, channels):
        y = normcore.GroupNorm(num_features=features, **options)(x)
        assert_close(y, want.value["y"], length=want.length, magnitude=want.magnitude["y"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_groups": 32, "group_size": 8}, "got num_groups=32 and group_size=8"),
        ({"num_groups": 4, "group_size": 2}, "expected either num_groups or group_size"),
        ({"num_groups": None}, "got num_groups=None and group_size=None"),
        ({"num_groups": 0}, "expected num_groups to be positive, got 0"),
        ({"num_groups": -1}, "expected num_groups to be positive, got -1"),
        ({"group_size": 0}, "expected group_size to be positive, got 0"),
        ({"num_features": 16}, r"divide the number of channels \(16\), got 32"),
        ({"num_features": 32, "num_groups": 3}, r"expected num_groups to divide .*\(32\), got 3"),
        ({"num_features": 10, "group_size": 4}, r"expected group_size to divide .*\(10\), got 4"),
    ],
    ids=str,
)
def test_wrong_groups(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        normcore.GroupNorm(**options)


@pytest.mark.parametrize("options", [{}, {"group_size": 5}], ids=str)
def test_indivisible_channels_leave_a_module_lazy(options: dict[str, int]) -> None:
    norm = normcore.GroupNorm(**options)
    with pytest.raises(ValueError, match=r"to divide the number of channels \(16\)"):
        norm(torch.randn(2, 16))
    assert not norm.initialized


# ---- dtypes ----


@on_every_device
@pytest.mark.parametrize("use", ["both", "scale", "bias", "none"])
@pytest.mark.parametrize("param_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("x_dtype", [*FLOATS, torch.int32, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, None, torch.float64, torch.bfloat16], ids=str)
def test_result_dtype(
    dtype: torch.dtype | None, x_dtype: torch.dtype, param_dtype: torch.dtype, use: str
) -> None:
    options = {"use_scale": use in ("both", "scale"), "use_bias": use in ("both", "bias")}
    x = torch.randint(0, 9, (4, 3, 6)).to(x_dtype)
    norms = (
        normcore.BatchNorm(dtype=dtype, param_dtype=param_dtype, **options),
        normcore.GroupNorm(dtype=dtype, param_dtype=param_dtype, num_groups=2, **options),
    )
    want = dtype
    if want is None and use == "none":
        want = x_dtype if x_dtype.is_floating_point else torch.float32
    elif want is None:
        want = torch.promote_types(x_dtype, param_dtype)
    for norm in norms:
        y = norm(x)
        assert y.dtype == want
        assert all(p.dtype == param_dtype for p in norm.parameters())
        assert all(b.dtype == torch.float32 for b in norm.buffers())
    exact = reference.batch_norm(x.double(), axis=-1).value["y"]
    assert_close(norms[0](x), exact, compute=torch.float32, length=12, magnitude=10.0)


def test_complex_input_is_refused() -> None:
    for norm in (normcore.BatchNorm(), normcore.GroupNorm(num_groups=1)):
        with pytest.raises(TypeError, match="expected input to have dtype"):
            norm(torch.randn(4, 3, dtype=torch.complex64))


@on_every_device
@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_conversion_of_a_module(dtype: torch.dtype, lazy: bool) -> None:
    x = torch.randn(8, 3, dtype=torch.float64)
    norm = normcore.BatchNorm(momentum=0.0, dtype=None)
    if not lazy:
        norm(x)
    before = None if lazy else norm.mean.clone()
    method = {torch.bfloat16: norm.bfloat16, torch.float16: norm.half}.get(dtype)
    norm.to(dtype) if method is None else method()
    statistics = torch.promote_types(dtype, torch.float32)
    if before is not None:
        assert torch.equal(norm.mean, before.to(statistics))
    y = norm(x.to(dtype))
    assert norm.scale is not None
    assert norm.scale.dtype == y.dtype == dtype
    assert norm.mean.dtype == norm.var.dtype == statistics
    # Statistics of a float64 module are computed in float64.
    exact = x.to(dtype).double().mean(0)
    assert_close(norm.mean, exact, compute=statistics, length=8, magnitude=3.0)


@on_every_device
def test_conversions_after_one_another() -> None:
    norm = normcore.BatchNorm(num_features=3)
    norm.mean.copy_(torch.tensor([1 / 3, 1e-6, 1e6]))
    before = norm.mean.clone()
    norm.half().bfloat16().to(torch.float16)
    assert torch.equal(norm.mean, before)
    norm.double()
    assert torch.equal(norm.mean, before.double())
    norm(torch.randn(4, 3))
    assert norm.mean.dtype == torch.float64
    assert norm.float().mean.dtype == torch.float32


@on_every_device
def test_a_call_keeps_the_dtype_of_the_statistics() -> None:
    norm = normcore.BatchNorm(num_features=3, dtype=None)
    for dtype in FLOATS:
        norm(torch.randn(4, 3).to(dtype))
        assert norm.mean.dtype == norm.var.dtype == torch.float32


# ---- initializers, device ----


@on_every_device
@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("kind", [normcore.BatchNorm, normcore.GroupNorm])
def test_initializers(kind: Any, lazy: bool) -> None:
    def fill(t: Tensor) -> None:
        t.fill_(7.0)

    features = None if lazy else 32
    norm = kind(num_features=features, bias_init=nn.init.ones_, scale_init=fill)
    norm.init(torch.randn(2, 32))
    assert (norm.bias == 1).all()
    assert (norm.scale == 7).all()
    assert norm.scale.is_leaf
    assert norm.scale.requires_grad
    norm.scale.data.zero_()
    norm.reset_parameters()
    assert (norm.scale == 7).all()


@pytest.mark.parametrize("kind", [normcore.BatchNorm, normcore.GroupNorm])
def test_device(kind: Any) -> None:
    assert kind(num_features=32, device="meta").scale.device.type == "meta"
    assert kind(device="meta").init(torch.randn(2, 32)).scale.device.type == "meta"
    x = torch.randn(2, 32, device="meta")
    assert kind(device="meta")(x).device.type == "meta"
    norm = kind(num_features=32, device="meta").to_empty(device="cpu")
    norm.reset_parameters()
    assert torch.equal(norm(torch.ones(2, 32)), torch.zeros(2, 32))


@on_every_device
def test_an_optimizer_made_before_the_first_call_trains_the_parameters() -> None:
    norm = normcore.BatchNorm()
    optimizer = torch.optim.SGD(norm.parameters(), lr=1.0)
    norm(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(norm.bias, torch.full((3,), -4.0))


# ---- momentum ----


@on_every_device
def test_momentum_may_change_at_any_time() -> None:
    x = torch.randn(16, 3)
    norm = normcore.BatchNorm(num_features=3)
    mean = torch.zeros(3)
    decay = torch.tensor(0.5)
    for momentum in (0.99, 0.5, 1, 0, decay):
        norm.momentum = momentum
        norm(x)
        mean = float(momentum) * mean + (1 - float(momentum)) * x.mean(0)
        torch.testing.assert_close(norm.mean, mean)
    decay.fill_(1.0)
    norm(x + 1)
    torch.testing.assert_close(norm.mean, mean)


def test_momentum_is_a_scalar() -> None:
    with pytest.raises(ValueError, match=r"0-dim tensor, got a tensor of shape \[1\]"):
        normcore.BatchNorm(momentum=torch.ones(1))


@on_every_device
def test_running_variance_is_biased() -> None:
    norm = normcore.BatchNorm(momentum=0.0)
    norm(torch.tensor([[0.0], [2.0]]))
    assert norm.var == 1.0


# ---- freezing ----


@pytest.mark.parametrize("lazy", [True, False])
def test_freeze_and_unfreeze_restore_requires_grad(lazy: bool) -> None:
    norm = normcore.BatchNorm(num_features=None if lazy else 3)
    assert norm.scale is not None
    assert norm.bias is not None
    norm.scale.requires_grad = False
    norm.freeze()
    assert norm.frozen
    norm.freeze().train()
    norm.init(torch.randn(4, 3))
    assert not norm.scale.requires_grad
    assert not norm.bias.requires_grad
    norm.unfreeze()
    assert not norm.frozen
    assert not norm.scale.requires_grad
    assert norm.bias.requires_grad


@on_every_device
def test_freeze_without_affine() -> None:
    norm = normcore.BatchNorm(num_features=3).freeze(affine=False)
    x = torch.randn(4, 3)
    norm(x).sum().backward()
    assert norm.bias is not None
    assert torch.equal(norm.bias.grad, torch.full((3,), 4.0))
    assert torch.equal(norm.mean, torch.zeros(3))
    norm.freeze()
    assert not norm.bias.requires_grad
    norm.freeze(affine=False)
    assert norm.bias.requires_grad
    assert norm.freeze(False) is norm
    assert not norm.frozen


def test_unfreeze_after_parameters_vanished() -> None:
    norm = normcore.BatchNorm(num_features=3).freeze()
    norm.bias = None
    nn.utils.parametrize.register_parametrization(norm, "scale", nn.Identity())
    norm.unfreeze()
    assert not norm.frozen
    assert norm(torch.randn(4, 3)).shape == (4, 3)


@on_every_device
def test_freeze_a_model() -> None:
    model = nn.Sequential(
        nn.Linear(3, 8), normcore.BatchNorm(), nn.Sequential(normcore.GroupNorm(num_groups=2))
    )
    x = torch.randn(4, 3)
    model(x)
    mean = model[1].mean.clone()
    assert normcore.freeze(model) is model
    model.train()
    model(x)
    assert torch.equal(model[1].mean, mean)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["0.weight", "0.bias"]
    assert normcore.freeze(model, affine=False)[1].scale.requires_grad
    assert normcore.unfreeze(model) is model
    assert all(p.requires_grad for p in model.parameters())
    model(x)
    assert not torch.equal(model[1].mean, mean)


# ---- calls ----


@on_every_device
@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu", "gelu_tanh"])
def test_activation_and_residual(activation: str | None) -> None:
    x, residual = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    act = reference.ACTIVATIONS[activation]
    for plain, fused in (
        (normcore.BatchNorm(), normcore.BatchNorm(activation=activation)),
        (normcore.GroupNorm(num_groups=2), normcore.GroupNorm(num_groups=2, activation=activation)),
    ):
        torch.testing.assert_close(fused(x), act(plain(x)))
        torch.testing.assert_close(fused(x, residual=residual), act(plain(x) + residual))


def lazy(norm: Any) -> bool:
    state = [*norm.parameters(), *norm.buffers()]
    return not norm.initialized and norm.num_features is None and all(map(is_lazy, state))


def unknown_activation(norm: Any) -> None:
    norm.activation = "tanh"


@pytest.mark.parametrize("kind", [normcore.BatchNorm, normcore.GroupNorm])
@pytest.mark.parametrize(
    ("arguments", "change"),
    [
        ({"mask": torch.ones(7, 7)}, None),
        ({"residual": torch.ones(4)}, None),
        ({"x": torch.zeros(4, 32, dtype=torch.complex64)}, None),
        ({}, unknown_activation),
    ],
    ids=["mask", "residual", "complex", "activation"],
)
def test_a_failed_first_call_leaves_a_module_lazy(kind: Any, arguments: Any, change: Any) -> None:
    norm = kind()
    norm.scale.requires_grad = False
    parameters = list(norm.parameters())
    if change is not None:
        change(norm)
    with pytest.raises((ValueError, TypeError), match="expected"):
        norm(**{"x": torch.randn(4, 32), **arguments})
    assert lazy(norm)
    norm.activation = None
    assert lazy(copy.deepcopy(norm))
    assert norm(torch.randn(4, 64)).shape == (4, 64)
    assert norm.num_features == 64
    assert all(a is b for a, b in zip(norm.parameters(), parameters))
    assert torch.equal(norm.scale, torch.ones(64))
    assert not norm.scale.requires_grad
    assert norm.bias.requires_grad


@pytest.mark.parametrize("kind", [normcore.BatchNorm, normcore.GroupNorm])
def test_a_failed_initializer_leaves_a_module_lazy(kind: Any) -> None:
    norm = kind(bias_init=nn.init.xavier_uniform_)
    for call in (norm, norm.init):
        with pytest.raises(ValueError, match="fewer than 2 dimensions"):
            call(torch.randn(4, 32))
        assert lazy(norm)
    norm.bias_init = None
    assert norm.init(torch.randn(4, 32)).initialized


def test_the_first_call_of_a_subclass() -> None:
    class Twice(normcore.BatchNorm):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * super().forward(x)

    x = torch.randn(4, 3)
    norm = Twice(momentum=1.0)
    assert torch.equal(norm(x), norm(x))


@on_every_device
def test_a_failed_call_changes_no_statistics() -> None:
    norm = normcore.BatchNorm(num_features=3)
    for arguments in (
        {"mask": torch.ones(7, 7)},
        {"residual": torch.ones(4)},
        {"x": torch.randn(4, 2)},
    ):
        with pytest.raises(ValueError, match="expected"):
            norm(**{"x": torch.randn(4, 3), **arguments})
    assert torch.equal(norm.mean, torch.zeros(3))
    assert torch.equal(norm.var, torch.ones(3))


@on_every_device
def test_empty_batch() -> None:
    norm = normcore.BatchNorm(num_features=3)
    assert norm(torch.empty(0, 3)).shape == (0, 3)
    assert torch.equal(norm.mean, torch.zeros(3))
    assert torch.equal(norm.var, torch.ones(3))


@on_every_device
def test_mask_does_not_count_padding() -> None:
    lengths = torch.tensor([5, 2, 7])
    x = torch.randn(3, 7, 4)
    mask = (torch.arange(7) < lengths[:, None])[..., None]
    norm = normcore.BatchNorm(momentum=0.0)
    norm(x, mask=mask)
    valid = x[mask.squeeze(-1)]
    torch.testing.assert_close(norm.mean, valid.mean(0))
    torch.testing.assert_close(norm.var, valid.var(0, unbiased=False))


@on_every_device
@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_format_is_kept(channels_last: bool) -> None:
    x = torch.randn(2, 4, 5, 6)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    for norm in (normcore.BatchNorm(axis=1), normcore.GroupNorm(num_groups=2, axis=1)):
        y = norm(x)
        (grad,) = torch.autograd.grad(y, x, torch.randn(2, 4, 5, 6))
        assert y.stride() == grad.stride() == x.stride()


@pytest.mark.parametrize(
    ("norm", "text"),
    [
        (normcore.BatchNorm(), "num_features=None, axis=-1, momentum=0.99, epsilon=1e-05"),
        (
            normcore.BatchNorm(num_features=(4, 5), axis=(1, 2), dtype=None, use_bias=False),
            "num_features=(4, 5), axis=(1, 2), momentum=0.99, epsilon=1e-05, dtype=None, "
            "use_bias=False",
        ),
        (
            normcore.BatchNorm(num_features=4, activation="relu", axis_name="dp").freeze(),
            "num_features=4, axis=-1, momentum=0.99, epsilon=1e-05, axis_name='dp', "
            "activation='relu', frozen=True",
        ),
        (
            normcore.GroupNorm(num_features=32),
            "num_features=32, axis=-1, num_groups=32, epsilon=1e-05",
        ),
        (
            normcore.GroupNorm(group_size=4, reduction_axes=(1, 2), param_dtype=torch.float16),
            "num_features=None, axis=-1, group_size=4, reduction_axes=[1, 2], epsilon=1e-05, "
            "param_dtype=torch.float16",
        ),
    ],
)
def test_repr(norm: nn.Module, text: str) -> None:
    assert norm.extra_repr() == text
