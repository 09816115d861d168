"""normcore.functional.group_norm against the float64 reference: values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from compare import call, check_group_norm, cotangent
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
BASIC = ["image_nchw", "image_channels_last", "image_nhwc"]


def affine(
    shape: Shape, dtype: torch.dtype = torch.float64, per_sample: bool = False
) -> dict[str, Any]:
    size = [shape.size[0], *shape.features] if per_sample else shape.features
    return {
        "weight": (torch.rand(size, dtype=torch.float64) + 0.5).to(dtype),
        "bias": torch.randn(size, dtype=torch.float64).to(dtype),
        "axis": shape.axis,
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", shapes(), ids=lambda s: s.name)
def test_every_shape(shape: Shape, dtype: torch.dtype) -> None:
    y = check_group_norm(shape.randn(dtype), shape.groups, **affine(shape, dtype))
    assert y.stride() == torch.empty_like(shape.randn(dtype)).stride()


@pytest.mark.parametrize("shape", extents(), ids=lambda s: s.name)
def test_every_extent(shape: Shape) -> None:
    x = shape.randn(torch.float32)
    check_group_norm(x, shape.groups, **affine(shape, torch.float32), activation="silu")


@pytest.mark.parametrize("layout", ["image_nchw", "image_channels_last"])
@pytest.mark.parametrize("params", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_every_mix_of_dtypes(dtype: torch.dtype, params: torch.dtype, layout: str) -> None:
    shape = shape_named(layout)
    arguments = affine(shape, params)
    arguments["bias"] = arguments["bias"].float()
    check_group_norm(shape.randn(dtype), 8, **arguments)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("out", FLOATS, ids=str)
def test_output_dtype(dtype: torch.dtype, out: torch.dtype) -> None:
    shape = shape_named("odd_sizes")
    check_group_norm(shape.randn(dtype), 3, **affine(shape, torch.float32), dtype=out)


@pytest.mark.parametrize("wide", ["weight", "bias", "residual", "dtype"])
def test_one_float64_operand_makes_the_arithmetic_float64(wide: str) -> None:
    shape = shape_named("odd_sizes")
    arguments: dict[str, Any] = affine(shape, torch.float32)
    if wide == "dtype":
        arguments["dtype"] = torch.float64
    elif wide == "residual":
        arguments["residual"] = torch.randn(shape.size, dtype=torch.float64)
    else:
        arguments[wide] = arguments[wide].double()
    check_group_norm(shape.randn(torch.float32), 3, **arguments)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*BASIC, "rows_of_features"])
def test_epilogue(name: str, dtype: torch.dtype, activation: str | None) -> None:
    shape = shape_named(name)
    check_group_norm(
        shape.randn(dtype),
        shape.groups,
        **affine(shape, torch.float32),
        residual=torch.randn(shape.size).to(dtype),
        activation=activation,
    )


@pytest.mark.parametrize("present", [(), ("weight",), ("bias",)], ids=str)
def test_absent_parameters(present: tuple[str, ...]) -> None:
    shape = shape_named("image_nchw")
    arguments = {k: v for k, v in affine(shape).items() if k in (*present, "axis")}
    check_group_norm(shape.randn(), 8, **arguments)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*BASIC, "rows_of_features", "channels_65", "volume_ncdhw"])
def test_affine_map_per_sample(name: str, dtype: torch.dtype, activation: str | None) -> None:
    shape = shape_named(name)
    check_group_norm(
        shape.randn(dtype),
        shape.groups,
        **affine(shape, torch.float32, per_sample=True),
        activation=activation,
    )


@pytest.mark.parametrize(
    ("size", "axis", "groups", "reduction_axes"),
    [
        ((2, 5, 4, 4, 8), -1, 2, (0, 1, 3, 4)),
        ((2, 3, 4, 8), -1, 2, (-3, -2, -1)),
        ((2, 3, 4, 8), -1, 4, (-1,)),
        ((2, 3, 4, 8), -1, 4, (0, 1, 2, 3)),
        ((3, 4, 8), -1, 4, (-3, -2, -1)),
        ((2, 6, 4, 5), 1, 3, (1, 3)),
        ((2, 6, 4, 5), 1, 3, (0, 1)),
        ((2, 6, 4, 5), (1, 3), 5, (1, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_reduction_axes(
    size: tuple[int, ...],
    axis: int | tuple[int, ...],
    groups: int,
    reduction_axes: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    shape = Shape("", size, (axis,) if isinstance(axis, int) else axis, groups, "contiguous", ())
    arguments = affine(shape, dtype) | {"reduction_axes": reduction_axes}
    check_group_norm(shape.randn(dtype), groups, **arguments)
    mask = torch.rand(size) < 0.7
    check_group_norm(shape.randn(dtype), groups, mask=mask, activation="silu", **arguments)


@pytest.mark.parametrize("kind", ["element", "row", "lower_rank", "channels", "float"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["image_nchw", "image_channels_last", "odd_sizes"])
def test_mask(name: str, dtype: torch.dtype, kind: str) -> None:
    shape = shape_named(name)
    n, c, h, w = shape.size
    sizes = {"row": (n, 1, h, w), "lower_rank": (h, w), "channels": (1, c, 1, w)}
    mask = torch.rand(sizes.get(kind, shape.size)) < 0.7
    if kind == "float":
        mask = mask * 0.5
    check_group_norm(
        shape.randn(dtype), shape.groups, **affine(shape, dtype), mask=mask, activation="gelu"
    )


@pytest.mark.parametrize("hidden", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("name", ["image_nchw", "image_channels_last"])
def test_what_the_mask_hides_reaches_nothing(name: str, hidden: float) -> None:
    shape = shape_named(name)
    x = shape.randn(torch.float32)
    mask = torch.rand(shape.size) < 0.7
    dy = torch.randn(shape.size) * mask
    parameters = affine(shape, torch.float32)
    results = []
    for value in (0.0, hidden):
        poisoned = torch.where(mask, x, value)
        y, grads = call(NF.group_norm, poisoned, dy, num_groups=8, mask=mask, **parameters)
        results.append([y[mask], grads["x"][mask], grads["weight"], grads["bias"]])
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)


def test_group_without_valid_element() -> None:
    x = torch.randn(2, 6, 5)
    mask = torch.ones(2, 6, 1)
    mask[0, 2:4] = 0
    y = NF.group_norm(x, 3, mask=mask)
    assert y[0, 2:4].isnan().all()
    assert y[0, [0, 1, 4, 5]].isfinite().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e-30, 1e4])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", [*BASIC, "rows_of_features", "plane_7x7"])
def test_constant_input_gives_exactly_bias(name: str, dtype: torch.dtype, value: float) -> None:
    shape = shape_named(name)
    x = torch.full_like(shape.randn(dtype), value)
    bias = torch.randn(shape.features).to(dtype)
    y = NF.group_norm(x, shape.groups, None, bias, axis=shape.axis)
    last = y.movedim(shape.axis[0], -1)
    assert torch.equal(last, bias.expand_as(last))


@pytest.mark.parametrize("ratio", [1e1, 1e3, 1e4, 1e6])
@pytest.mark.parametrize("name", [*BASIC, "rows_of_features"])
def test_large_mean(name: str, ratio: float) -> None:
    shape = shape_named(name)
    x = shape.randn(torch.float32, mean=ratio)
    expected = reference.group_norm(x, shape.groups, axis=shape.axis).value["y"]
    y = NF.group_norm(x, shape.groups, axis=shape.axis)
    # 1e-6 is relative to the standard deviation of y, which is 1.
    assert (y - expected).abs().max() < 1e-6 * max(1.0, expected.abs().max().item())


def test_one_value_per_group() -> None:
    x, bias = torch.randn(5, 6), torch.randn(6)
    assert torch.equal(NF.group_norm(x, 6, None, bias), bias.expand(5, 6))


@pytest.mark.parametrize("shape", [s for s in shapes() if 0 in s.size], ids=lambda s: s.name)
def test_empty_input(shape: Shape) -> None:
    x = shape.randn(torch.float32)
    y, grads = call(NF.group_norm, x, torch.empty_like(x), num_groups=shape.groups, **affine(shape))
    assert y.shape == x.shape
    assert grads["x"].shape == x.shape
    assert not grads["weight"].any()
    assert not grads["bias"].any()


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_special_cases_of_the_number_of_groups(eps: float) -> None:
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    weight, bias = torch.rand(6).double(), torch.randn(6).double()
    layer = F.layer_norm(x, x.shape[1:], eps=eps) * weight.view(6, 1, 1) + bias.view(6, 1, 1)
    assert_close(NF.group_norm(x, 1, weight, bias, eps), layer, length=120)
    instance = F.instance_norm(x, None, None, weight, bias, eps=eps)
    assert_close(NF.group_norm(x, 6, weight, bias, eps), instance, length=20)


@pytest.mark.usefixtures("batch_invariant")
@pytest.mark.parametrize("name", [*BASIC, "rows_of_features", "many_small_samples"])
def test_bits_do_not_depend_on_the_batch_size(name: str) -> None:
    shape = shape_named(name)
    x, parameters = shape.randn(torch.float32), affine(shape, torch.float32)
    dy = cotangent(x, None)
    y, grads = call(NF.group_norm, x, dy, num_groups=shape.groups, **parameters)
    for i in range(0, shape.size[0], max(1, shape.size[0] // 5)):
        one, one_grads = call(
            NF.group_norm, x[i : i + 1], dy[i : i + 1], num_groups=shape.groups, **parameters
        )
        assert torch.equal(one, y[i : i + 1])
        assert torch.equal(one_grads["x"], grads["x"][i : i + 1])


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"num_groups": 3}, ValueError),
        ({"num_groups": 0}, ValueError),
        ({"weight": torch.ones(5)}, ValueError),
        ({"bias": torch.ones(3, 4)}, ValueError),
        ({"residual": torch.ones(2, 4)}, ValueError),
        ({"mask": torch.ones(3, 4, 3)}, ValueError),
        ({"activation": "tanh"}, ValueError),
        ({"reduction_axes": (0, 2)}, ValueError),
        ({"axis": 3}, IndexError),
        ({"axis": -4}, IndexError),
        ({"dtype": torch.int32}, TypeError),
        ({"input": torch.ones(2, 4, 3, dtype=torch.int32)}, TypeError),
    ],
    ids=str,
)
def test_errors(wrong: dict[str, Any], error: type[Exception]) -> None:
    arguments = {"input": torch.randn(2, 4, 3), "num_groups": 2, **place(wrong)}
    with pytest.raises(error, match=r"^group_norm: "):
        NF.group_norm(**arguments)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    rank = draw(st.integers(2, 5))
    size = draw(st.lists(st.integers(1, 6), min_size=rank, max_size=rank))
    axis = draw(st.lists(st.integers(1, rank - 1), min_size=1, max_size=rank - 1, unique=True))
    channels = math.prod(size[a] for a in axis)
    return {
        "size": size,
        "axis": [a - rank if draw(st.booleans()) else a for a in axis],
        "groups": draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0])),
        "order": list(draw(st.permutations(range(rank)))),
        "dtype": draw(st.sampled_from(FLOATS)),
        "weight": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "per_sample": draw(st.booleans()),
        "activation": draw(st.sampled_from([None, "silu", "gelu", "gelu_tanh"])),
        "residual": draw(st.booleans()),
        "mask": draw(st.booleans()),
        "reduction_axes": draw(st.sampled_from([None, "all", "features"])),
        "eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "seed": draw(st.integers(0, 2**31)),
    }


@given(problems())
def test_random_problems(problem: dict[str, Any]) -> None:
    torch.manual_seed(problem["seed"])
    size, dtype = problem["size"], problem["dtype"]
    rank = len(size)
    axes = reference.axes_of(problem["axis"], rank)
    order = problem["order"]

    def random(shape: list[int]) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    x = random(size).permute(order).contiguous().permute([order.index(a) for a in range(rank)])
    arguments: dict[str, Any] = {k: problem[k] for k in ("activation", "eps", "axis")}
    reduced = {"all": list(range(rank)), "features": axes}
    arguments["reduction_axes"] = reduced.get(problem["reduction_axes"])
    per_sample = problem["per_sample"] and len(axes) == 1 and problem["reduction_axes"] is None
    shape = [size[0]] * per_sample + [size[a] for a in axes]
    for name in ("weight", "bias"):
        if problem[name]:
            arguments[name] = random(shape)
    if problem["residual"]:
        arguments["residual"] = random(size)
    if problem["mask"] and len(axes) == 1:
        mask = torch.rand(size) < 0.7
        first = torch.arange(0, size[axes[0]], size[axes[0]] // problem["groups"])
        arguments["mask"] = mask.index_fill(axes[0], first, True)  # every group keeps some
    check_group_norm(x, problem["groups"], **arguments)
