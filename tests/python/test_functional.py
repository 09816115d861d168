"""normcore.functional beside torch.nn.functional, its gradients, and its place in torch."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from devices import place
from shape_list import Shape, shape_named
from tolerance import assert_close
from torch import Tensor

import normcore.functional as NF

pytestmark = pytest.mark.usefixtures("device")
ACTIVATIONS = [None, "relu", "silu", "gelu", "gelu_tanh"]


@pytest.mark.parametrize("name", ["batch_norm", "group_norm"])
def test_positional_arguments_are_those_of_torch(name: str) -> None:
    def positional(function: Any) -> list[tuple[str, Any]]:
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(getattr(NF, name)) == positional(getattr(F, name))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("size", [(4, 3), (4, 3, 5), (4, 3, 5, 6), (2, 3, 4, 5, 6)], ids=str)
def test_batch_norm_replaces_that_of_torch(
    size: tuple[int, ...], affine: bool, training: bool
) -> None:
    x = torch.randn(size, dtype=torch.float64)
    parameters = (torch.rand(3).double(), torch.randn(3).double()) if affine else (None, None)
    results = []
    for function in (NF.batch_norm, F.batch_norm):
        mean, var = torch.zeros(3).double(), torch.ones(3).double()
        results.append((function(x, mean, var, *parameters, training, 0.3, 1e-4), mean, var))
    for got, want in zip(*results):
        assert_close(got, want, length=x.numel() // 3)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("size", [(4, 6), (4, 6, 5), (4, 6, 5, 6)], ids=str)
def test_group_norm_replaces_that_of_torch(size: tuple[int, ...], groups: int) -> None:
    x = torch.randn(size, dtype=torch.float64)
    arguments = (groups, torch.rand(6).double(), torch.randn(6).double(), 1e-4)
    assert_close(NF.group_norm(x, *arguments), F.group_norm(x, *arguments), length=x.numel())


LAYOUTS = ["small", "small_channels_last", "small_rows", "small_middle"]
SMALL = {
    "small": Shape("", (2, 4, 3, 2), (1,), 2, "contiguous", ()),
    "small_channels_last": Shape("", (2, 4, 3, 2), (1,), 2, "channels_last", ()),
    "small_rows": Shape("", (5, 4), (-1,), 2, "contiguous", ()),
    "small_middle": Shape("", (2, 3, 4), (2, 1), 3, "permuted", ()),
}


def leaf(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, requires_grad=True)


def gradcheck_arguments(
    shape: Shape, activation: str | None, masked: bool
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    residual = shape.lay_out(torch.randn(shape.size, dtype=torch.float64))
    if activation == "relu":  # keeps finite differences away from the kink
        residual = residual.sign() * 10 + residual
    tensors = (
        shape.randn().requires_grad_(), leaf(*shape.features), leaf(*shape.features),
        residual.requires_grad_(),
    )  # fmt: skip
    mask = None
    if masked:  # the same on every device: with none of its values a slice has NaN statistics
        chosen = torch.rand(
            shape.size, generator=torch.Generator("cpu").manual_seed(0), device="cpu"
        )
        mask = place(chosen < 0.8)
    return tensors, {"axis": shape.axis, "activation": activation, "mask": mask}


def check_gradients(function: Any, tensors: tuple[Tensor, ...]) -> None:
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("mode", ["train", "masked", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", SMALL)
def test_gradients_of_batch_norm(layout: str, activation: str | None, mode: str) -> None:
    tensors, options = gradcheck_arguments(SMALL[layout], activation, mode == "masked")
    features = SMALL[layout].features
    state = (torch.randn(features), torch.rand(features) + 0.5) if mode == "eval" else (None, None)

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return NF.batch_norm(x, *state, weight, bias, mode != "eval", residual=residual, **options)

    check_gradients(function, tensors)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", SMALL)
def test_gradients_of_group_norm(layout: str, activation: str | None, masked: bool) -> None:
    tensors, options = gradcheck_arguments(SMALL[layout], activation, masked)

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        groups = SMALL[layout].groups
        return NF.group_norm(x, groups, weight, bias, residual=residual, **options)

    check_gradients(function, tensors)


@pytest.mark.parametrize("reduction_axes", [None, (0, 1, 2), (1,)])
def test_gradients_of_group_norm_with_other_axes(reduction_axes: Any) -> None:
    x, weight, bias = leaf(2, 4, 3), leaf(4), leaf(4)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return NF.group_norm(x, 2, weight, bias, reduction_axes=reduction_axes)

    check_gradients(function, (x, weight, bias))


def test_gradients_of_an_affine_map_per_sample() -> None:
    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return NF.group_norm(x, 2, weight, bias, activation="silu")

    check_gradients(function, (leaf(3, 4, 2), leaf(3, 4), leaf(3, 4)))


@pytest.mark.parametrize("wanted", ["input", "weight", "bias", "residual"])
def test_only_the_wanted_gradient(wanted: str) -> None:
    x = {"input": torch.randn(3, 4, 2), "weight": torch.rand(4), "bias": torch.randn(4)}
    x["residual"] = torch.randn(3, 4, 2)
    everything = {name: t.clone().requires_grad_() for name, t in x.items()}
    one = {name: t.clone().requires_grad_(name == wanted) for name, t in x.items()}
    for function, options in (
        (NF.batch_norm, {"running_mean": None, "running_var": None, "training": True}),
        (NF.group_norm, {"num_groups": 2}),
    ):
        grads = []
        for arguments in (everything, one):
            y = function(**arguments, **options, activation="silu")
            grads += torch.autograd.grad(y, arguments[wanted], torch.ones_like(y))
        assert torch.equal(*grads)


def test_no_gradient_is_recorded_without_need() -> None:
    x = torch.randn(3, 4)
    assert not NF.batch_norm(x, None, None, training=True).requires_grad
    with torch.no_grad():
        assert not NF.group_norm(x.requires_grad_(), 2).requires_grad
    with torch.inference_mode():
        assert NF.group_norm(x, 2).is_inference()


@pytest.mark.parametrize("name", ["image_nchw", "image_channels_last", "permuted"])
def test_meta_tensors_agree_with_real_ones(name: str) -> None:
    shape = shape_named(name)
    x = shape.randn(torch.bfloat16)
    meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    for function, arguments in (
        (NF.batch_norm, {"running_mean": None, "running_var": None, "training": True}),
        (NF.group_norm, {"num_groups": 4}),
    ):
        for dtype in (None, torch.float32):
            real, fake = (function(t, dtype=dtype, **arguments) for t in (x, meta))
            assert (real.shape, real.stride(), real.dtype) == (
                fake.shape, fake.stride(), fake.dtype,
            )  # fmt: skip


def test_autocast_leaves_a_half_precision_input_alone(device: torch.device) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.bfloat16)
    residual = torch.randn(3, 4, 5)
    with torch.autocast(device.type, torch.bfloat16):
        batch = NF.batch_norm(x, None, None, torch.rand(4), training=True, residual=residual)
        group = NF.group_norm(x, 2, torch.rand(4), residual=residual)
    assert batch.dtype == group.dtype == torch.bfloat16


def test_writing_a_statistic_is_seen_by_autograd() -> None:
    mean, var = torch.zeros(4), torch.ones(4)
    product = mean.clone().requires_grad_() * mean  # saves mean
    NF.batch_norm(torch.randn(3, 4), mean, var, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("running", [(None, torch.ones(4)), (torch.zeros(4), None)])
@pytest.mark.parametrize("training", [True, False])
def test_both_running_statistics_or_none(running: Any, training: bool) -> None:
    with pytest.raises(ValueError, match="batch_norm: expected"):
        NF.batch_norm(torch.randn(3, 4), *place(running), training=training)
    if not training:
        with pytest.raises(ValueError, match="batch_norm: expected"):
            NF.batch_norm(torch.randn(3, 4), None, None)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"weight": torch.ones(3)}, ValueError, r"weight to have shape \[4\], got \[3\]"),
        ({"running_mean": torch.ones(4, 1)}, ValueError, r"running_mean to have shape \[4\]"),
        ({"input": torch.ones(3, 4, dtype=torch.int64)}, TypeError, r"input to have dtype .*int64"),
        ({"weight": torch.ones(4, dtype=torch.int32)}, TypeError, r"weight to have dtype .*int32"),
        ({"axis": 2}, IndexError, r"axis in \[-2, 1\] for an input of rank 2, got 2"),
        ({"axis": (0, -2)}, ValueError, r"axis without duplicates, got \[0, -2\]"),
        ({"mask": torch.ones(2, 4)}, ValueError, r"mask to broadcast to .*\[3, 4\], got \[2, 4\]"),
        ({"residual": torch.ones(4)}, ValueError, r"residual to have shape \[3, 4\], got \[4\]"),
        ({"eps": float("nan")}, ValueError, r"eps .*got nan"),
    ],
    ids=str,
)
def test_errors_name_argument_rule_and_value(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    state = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    for training in (True, False) if "mask" not in arguments else (True,):
        with pytest.raises(error, match=rf"^batch_norm: expected {text}"):
            NF.batch_norm(
                **{"input": torch.randn(3, 4), **state, **place(arguments)}, training=training
            )


@pytest.mark.parametrize("group", ["world", "some name"])
def test_without_a_process_group_any_group_is_this_process(group: str) -> None:
    x = torch.randn(4, 6)
    assert torch.equal(NF.group_norm(x, 2, group=group), NF.group_norm(x, 2))
    got = NF.batch_norm(x, None, None, training=True, group=group, sync_weighting="count")
    assert torch.equal(got, NF.batch_norm(x, None, None, training=True))


def test_errors_of_group() -> None:
    x = torch.randn(4, 6)
    with pytest.raises(TypeError, match=r"^group_norm: expected group to be a process .*3$"):
        NF.group_norm(x, 2, group=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_norm: expected sync_weighting to be 'count' or"):
        NF.batch_norm(x, None, None, training=True, sync_weighting="size")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_constant_float64_of_any_size_gives_the_bias(layout: torch.memory_format) -> None:
    x = torch.full((4, 6, 5, 5), 1e160, dtype=torch.float64).contiguous(memory_format=layout)
    bias = torch.randn(6, dtype=torch.float64)
    expected = bias[:, None, None].expand_as(x)
    y = NF.batch_norm(x, None, None, bias=bias, training=True)
    assert torch.equal(y, expected)
    assert torch.equal(NF.group_norm(x, 3, bias=bias), expected)


@pytest.mark.parametrize("magnitude", [1e18, 5e18])
@pytest.mark.parametrize("masked", [None, "rows", "values"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_that_float32_cannot_sum(
    dtype: torch.dtype,
    layout: torch.memory_format,
    masked: str | None,
    magnitude: float,
    device: torch.device,
) -> None:
    if device.type != "cpu":
        pytest.skip("sums of squares are float32 on a device")
    x = (torch.randn(3, 64, 17, 16) * magnitude).to(dtype).contiguous(memory_format=layout)
    mask = {
        None: torch.ones(1, 1, 1, 1),
        "rows": torch.rand(3, 1, 17, 16) < 0.7,
        "values": torch.rand(3, 64, 17, 16) < 0.7,
    }[masked]
    mean, var = torch.zeros(64, dtype=torch.float32), torch.ones(64, dtype=torch.float32)
    given = None if masked is None else mask
    y = NF.batch_norm(x, mean, var, training=True, momentum=1.0, unbiased=False, mask=given)
    counts = mask.expand_as(x).double()
    count = counts.sum((0, 2, 3), keepdim=True)
    wanted = (x.double() * counts).sum((0, 2, 3), keepdim=True) / count
    centered = x.double() - wanted
    wanted_var = (centered.square() * counts).sum((0, 2, 3), keepdim=True) / count
    torch.testing.assert_close(var, wanted_var.flatten().float(), rtol=1e-6, atol=0)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        y.double(), centered / wanted_var.sqrt(), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("bits", [0x7FFF, -1, 0x7F81, 0x7FC0])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_nan_of_bfloat16_stays_nan(
    layout: torch.memory_format, activation: str | None, bits: int
) -> None:
    x = torch.randn(2, 32, 7, 9, dtype=torch.bfloat16).contiguous(memory_format=layout)
    residual = torch.randn_like(x)
    where = torch.rand_like(x) < 0.1
    nan = torch.tensor(bits, dtype=torch.int16, device=x.device).view(torch.bfloat16)
    assert nan.isnan()
    residual[where] = nan
    y = NF.group_norm(x, 4, activation=activation, residual=residual)
    assert torch.equal(y.isnan(), where)


def test_float64_running_statistics_are_computed_in_float64() -> None:
    x = torch.rand(1000, 3) * 1e-3 + 1  # float32
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    y = NF.batch_norm(x, mean, var, training=True, momentum=1.0, unbiased=False)
    assert y.dtype == torch.float32
    expected = x.double().var(0, correction=0)
    torch.testing.assert_close(var, expected, rtol=1e-12, atol=0)
