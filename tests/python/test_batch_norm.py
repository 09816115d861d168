"""normcore.functional.batch_norm against the float64 reference: values, gradients, statistics."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from compare import call, check_batch_norm
from devices import place
from hypothesis import given
from hypothesis import strategies as st
from shape_list import Shape, extents, shape_named, shapes
from tolerance import assert_close
from torch import Tensor

import normcore.functional as NF

pytestmark = pytest.mark.usefixtures("device")
HALVES = [torch.bfloat16, torch.float16]
FLOATS = [torch.float64, torch.float32, *HALVES]
BASIC = ["image_nchw", "image_channels_last", "rows_of_features"]


def affine(shape: Shape, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return {
        "weight": (torch.rand(shape.features, dtype=torch.float64) + 0.5).to(dtype),
        "bias": torch.randn(shape.features, dtype=torch.float64).to(dtype),
        "axis": shape.axis,
    }


def running(shape: Shape, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "running_mean": torch.randn(shape.features, dtype=torch.float64).to(dtype),
        "running_var": (torch.rand(shape.features, dtype=torch.float64) + 0.5).to(dtype),
    }


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", shapes(), ids=lambda s: s.name)
def test_every_shape(shape: Shape, dtype: torch.dtype, training: bool) -> None:
    x = shape.randn(dtype)
    y = check_batch_norm(
        x, **running(shape, dtype), **affine(shape, dtype), training=training, unbiased=False
    )
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("shape", extents(), ids=lambda s: s.name)
def test_every_extent(shape: Shape) -> None:
    arguments = running(shape) | affine(shape, torch.float32)
    check_batch_norm(shape.randn(torch.float32), **arguments, activation="silu")


@pytest.mark.parametrize("layout", ["image_nchw", "image_channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("params", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_every_mix_of_dtypes(
    dtype: torch.dtype, params: torch.dtype, state: torch.dtype, training: bool, layout: str
) -> None:
    shape = shape_named(layout)
    check_batch_norm(
        shape.randn(dtype), **running(shape, state), **affine(shape, params), training=training
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("out", FLOATS, ids=str)
def test_output_dtype(dtype: torch.dtype, out: torch.dtype) -> None:
    shape = shape_named("odd_sizes")
    check_batch_norm(
        shape.randn(dtype), **running(shape), **affine(shape, torch.float32), dtype=out
    )


@pytest.mark.parametrize("wide", ["weight", "bias", "residual", "dtype"])
def test_one_float64_operand_makes_the_arithmetic_float64(wide: str) -> None:
    shape = shape_named("odd_sizes")
    x = shape.randn(torch.float32)
    arguments: dict[str, Any] = affine(shape, torch.float32)
    if wide == "dtype":
        arguments["dtype"] = torch.float64
    elif wide == "residual":
        arguments["residual"] = torch.randn(shape.size, dtype=torch.float64)
    else:
        arguments[wide] = arguments[wide].double()
    check_batch_norm(x, **running(shape), **arguments)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BASIC)
def test_epilogue(name: str, dtype: torch.dtype, activation: str | None, training: bool) -> None:
    shape = shape_named(name)
    check_batch_norm(
        shape.randn(dtype),
        **running(shape),
        **affine(shape, torch.float32),
        residual=torch.randn(shape.size).to(dtype),
        activation=activation,
        training=training,
    )


def test_residual_of_another_layout_and_dtype() -> None:
    shape = shape_named("image_channels_last")
    residual = torch.randn(shape.size, dtype=torch.bfloat16)
    check_batch_norm(shape.randn(torch.float32), residual=residual, activation="silu")


@pytest.mark.parametrize("present", [(), ("weight",), ("bias",)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_absent_parameters(present: tuple[str, ...], training: bool) -> None:
    shape = shape_named("image_nchw")
    arguments = {k: v for k, v in affine(shape).items() if k in (*present, "axis")}
    check_batch_norm(shape.randn(), **running(shape), **arguments, training=training)


def masks_of(x: Tensor) -> dict[str, Tensor]:
    """Masks for an image [n, c, h, w], each with some valid element for every channel."""
    n, c, h, w = x.shape
    element = torch.rand(x.shape) < 0.6
    return {
        "element": element,
        "row": torch.rand(n, 1, h, w) < 0.6,
        "sample": torch.tensor([True, False] * n)[:n].view(n, 1, 1, 1),
        "lower_rank": torch.rand(h, w) < 0.6,
        "int32": element.int() * 7,
        "float": element.double() * 0.25,
        "channel_dependent": torch.rand(1, c, 1, w) < 0.8,
    }


@pytest.mark.parametrize("kind", list(masks_of(torch.empty(2, 3, 2, 2))))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["image_nchw", "image_channels_last", "odd_sizes"])
def test_mask(name: str, dtype: torch.dtype, kind: str) -> None:
    shape = shape_named(name)
    x = shape.randn(dtype)
    mask = masks_of(x)[kind]
    check_batch_norm(x, **running(shape), **affine(shape, dtype), mask=mask, activation="silu")


@pytest.mark.parametrize("hidden", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("name", ["image_nchw", "image_channels_last"])
def test_what_the_mask_hides_reaches_nothing(name: str, hidden: float) -> None:
    shape = shape_named(name)
    x = shape.randn(torch.float32)
    mask = masks_of(x)["element"]
    dy = torch.randn(shape.size) * mask
    parameters = affine(shape, torch.float32)
    results = []
    for value in (0.0, hidden):
        poisoned = torch.where(mask, x, value)
        state = {"running_mean": torch.zeros(32), "running_var": torch.ones(32)}
        y, grads = call(
            NF.batch_norm, poisoned, dy, **state, **parameters, training=True, mask=mask
        )
        results.append([y[mask], grads["x"][mask], grads["weight"], grads["bias"], *state.values()])
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)


def test_mask_is_ignored_with_running_statistics() -> None:
    shape = shape_named("image_nchw")
    x = shape.randn()
    plain = NF.batch_norm(x, **running(shape))
    torch.manual_seed(0)
    x = shape.randn()
    masked = NF.batch_norm(x, **running(shape), mask=torch.zeros(1))
    assert torch.equal(plain, masked)


def test_channel_without_valid_element() -> None:
    x = torch.randn(4, 3, 5)
    mask = torch.ones(3, 1)
    mask[1] = 0
    mean, var = torch.full((3,), 0.5), torch.full((3,), 2.0)
    y = NF.batch_norm(x, mean, var, training=True, mask=mask)
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()
    assert (mean[1], var[1]) == (0.5, 2.0)
    assert (mean[[0, 2]] != 0.5).all()
    assert (var[[0, 2]] != 2.0).all()


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e-30, 1e10])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", BASIC)
def test_constant_input_gives_exactly_bias(name: str, dtype: torch.dtype, value: float) -> None:
    shape = shape_named(name)
    x = torch.full_like(shape.randn(dtype), min(value, torch.finfo(dtype).max))
    bias = torch.randn(shape.features).to(dtype)
    y = NF.batch_norm(x, None, None, None, bias, training=True, axis=shape.axis)
    assert torch.equal(y.movedim(shape.axis[0], -1), bias.expand_as(y.movedim(shape.axis[0], -1)))


@pytest.mark.parametrize("ratio", [1e1, 1e3, 1e4, 1e6])
@pytest.mark.parametrize("name", ["image_nchw", "image_channels_last", "rows_of_features"])
def test_large_mean(name: str, ratio: float) -> None:
    shape = shape_named(name)
    x = shape.randn(torch.float32, mean=ratio)
    expected = reference.batch_norm(x, axis=shape.axis).value["y"]
    y = NF.batch_norm(x, None, None, training=True, axis=shape.axis)
    # |y| is up to 4 here; 1e-6 is relative to its standard deviation, which is 1.
    assert (y - expected).abs().max() < 1e-6 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("name", ["one_value_per_channel", "one_value_per_channel_rows", "rank_1"])
def test_one_value_per_channel(name: str, unbiased: bool) -> None:
    shape = shape_named(name)
    x = shape.randn(torch.float32)
    arguments = affine(shape, torch.float32)
    mean, var = torch.zeros(shape.features), torch.ones(shape.features)
    y = NF.batch_norm(x, mean, var, training=True, momentum=0.5, unbiased=unbiased, **arguments)
    assert torch.equal(y.flatten(), arguments["bias"])
    assert torch.equal(mean, x.flatten() * 0.5)
    assert torch.equal(var, torch.full_like(var, 0.5))


@pytest.mark.parametrize("shape", [s for s in shapes() if 0 in s.size], ids=lambda s: s.name)
def test_empty_input_changes_nothing(shape: Shape) -> None:
    x = shape.randn(torch.float32)
    state = running(shape)
    before = {name: t.clone() for name, t in state.items()}
    counter = torch.tensor(3)
    y, grads = call(
        NF.batch_norm, x, torch.empty_like(x), **state, **affine(shape, torch.float32),
        training=True, num_batches_tracked=counter,
    )  # fmt: skip
    assert y.shape == x.shape
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert counter == 3
    assert grads["x"].shape == x.shape
    assert not grads["weight"].any()
    assert not grads["bias"].any()


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize("unbiased", [True, False])
def test_running_statistics_over_several_calls(momentum: float | None, unbiased: bool) -> None:
    mean, var, counter = torch.zeros(5), torch.ones(5), torch.tensor(0)
    want_mean, want_var = mean.double(), var.double()
    for step in range(1, 4):
        x = torch.randn(6, 5, 3) * step + step
        factor = 1 / step if momentum is None else momentum
        batch_var = x.double().var((0, 2), unbiased=unbiased)
        want_mean = (1 - factor) * want_mean + factor * x.double().mean((0, 2))
        want_var = (1 - factor) * want_var + factor * batch_var
        NF.batch_norm(
            x, mean, var, training=True, momentum=momentum, unbiased=unbiased,
            num_batches_tracked=counter,
        )  # fmt: skip
        assert counter == step
        assert_close(mean, want_mean, length=18, magnitude=10.0, name="mean")
        assert_close(var, want_var, length=18, magnitude=100.0, name="var")


@pytest.mark.usefixtures("batch_invariant")
@pytest.mark.parametrize("name", BASIC)
def test_bits_in_eval_do_not_depend_on_the_batch_size(name: str) -> None:
    shape = shape_named(name)
    x, parameters = shape.randn(torch.float32), affine(shape, torch.float32)
    state = running(shape)
    whole = NF.batch_norm(x, **state, **parameters, activation="gelu")
    for i in range(shape.size[0]):
        one = NF.batch_norm(x[i : i + 1], **state, **parameters, activation="gelu")
        assert torch.equal(one, whole[i : i + 1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": torch.ones(5)},
        {"bias": torch.ones(4, 1)},
        {"residual": torch.ones(2, 4)},
        {"mask": torch.ones(3, 4, 3)},
        {"activation": "tanh"},
        {"eps": -1.0},
        {"axis": 3},
        {"axis": (1, 1)},
        {"dtype": torch.int32},
        {"num_batches_tracked": torch.tensor(0.0)},
        {"momentum": None},
        {"running_var": torch.ones(5)},
    ],
    ids=lambda w: next(iter(w)),
)
def test_a_failed_call_changes_nothing(wrong: dict[str, Any]) -> None:
    state = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    counter = {"num_batches_tracked": torch.tensor(0)} if "momentum" not in wrong else {}
    arguments = {**state, **counter, "training": True, **place(wrong)}
    with pytest.raises((ValueError, TypeError, IndexError), match=r"^batch_norm: expected .*got "):
        NF.batch_norm(torch.randn(2, 4, 3), **arguments)
    assert not state["running_mean"].any()
    assert (state["running_var"] == 1).all()
    assert all(t == 0 for t in counter.values())


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    rank = draw(st.integers(1, 5))
    size = draw(st.lists(st.integers(1, 6), min_size=rank, max_size=rank))
    axis = draw(st.lists(st.integers(0, rank - 1), min_size=1, max_size=rank, unique=True))
    axis = [a - rank if draw(st.booleans()) else a for a in axis]
    order = draw(st.permutations(range(rank)))
    return {
        "size": size,
        "axis": axis,
        "order": list(order),
        "dtype": draw(st.sampled_from(FLOATS)),
        "training": draw(st.booleans()),
        "weight": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "activation": draw(st.sampled_from([None, "silu", "gelu", "gelu_tanh"])),
        "residual": draw(st.booleans()),
        "mask": draw(st.sampled_from([None, "element", "row"])),
        "unbiased": draw(st.booleans()),
        "eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "momentum": draw(st.sampled_from([0.01, 0.1, 1.0])),
        "seed": draw(st.integers(0, 2**31)),
    }


@given(problems())
def test_random_problems(problem: dict[str, Any]) -> None:
    torch.manual_seed(problem["seed"])
    size, dtype = problem["size"], problem["dtype"]
    rank = len(size)
    axes = sorted(a % rank for a in problem["axis"])
    shape = [size[a] for a in axes]
    order = problem["order"]
    x = torch.randn(size, dtype=torch.float64).to(dtype)
    x = x.permute(order).contiguous().permute([order.index(a) for a in range(rank)])
    arguments: dict[str, Any] = {k: problem[k] for k in ("activation", "eps", "unbiased", "axis")}
    for name in ("weight", "bias"):
        if problem[name]:
            arguments[name] = torch.randn(shape, dtype=torch.float64).to(dtype)
    if problem["residual"]:
        arguments["residual"] = torch.randn(size, dtype=torch.float64).to(dtype)
    if problem["mask"]:
        size = [1 if a in axes and problem["mask"] == "row" else s for a, s in enumerate(size)]
        mask = torch.rand(size) < 0.7
        # Every channel keeps a valid element; a test of its own covers those without one.
        others = [a for a in range(rank) if a not in axes]
        first = tuple(0 if a in others else slice(None) for a in range(rank))
        mask[first] = True
        arguments["mask"] = mask
    check_batch_norm(
        x,
        torch.randn(shape),
        torch.rand(shape) + 0.5,
        training=problem["training"],
        momentum=problem["momentum"],
        **arguments,
    )
