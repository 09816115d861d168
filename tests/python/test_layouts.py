"""Any strides give the right values, and results keep the layout that shape inference promised."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import reference
import torch
from derivatives import grad_by_formula
from shape_list import masks
from tolerance import assert_close
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import normcore  # noqa: F401  (loads the operators)

pytestmark = pytest.mark.usefixtures("device")
ops = torch.ops.normcore


def strided_inputs() -> Iterator[tuple[str, Tensor]]:
    for order in itertools.permutations(range(4)):
        sizes = (2, 4, 3, 5)
        memory = torch.randn([sizes[d] for d in order])
        yield f"order {order}", memory.permute([order.index(d) for d in range(4)])
    base = torch.randn(4, 4, 6, 5)
    yield "channels_last", base.contiguous(memory_format=torch.channels_last)
    yield "sliced batch", base[::2]
    yield "sliced channels", torch.randn(2, 8, 3, 5)[:, ::2]
    yield "sliced positions", base[..., 1::2]
    yield "sliced channels_last", base.contiguous(memory_format=torch.channels_last)[:, :, 1:4]
    yield "transposed and sliced", base.transpose(2, 3)[:, :, ::2]
    yield "expanded channels", torch.randn(3, 1, 5, 2).expand(3, 4, 5, 2)
    yield "expanded batch", torch.randn(4, 5, 2).expand(3, 4, 5, 2)
    yield "expanded positions", torch.randn(3, 4, 1, 1).expand(3, 4, 5, 2)
    yield "one position", torch.randn(3, 4, 1, 1)
    yield "one position, channels_last", torch.randn(3, 1, 1, 4).permute(0, 3, 1, 2)
    yield "one sample", torch.randn(1, 4, 5, 2)
    yield "ambiguous", torch.randn(1, 4, 1, 1).contiguous(memory_format=torch.channels_last)
    yield "odd unit strides", torch.randn(3, 4, 5).as_strided((3, 4, 1, 5), (20, 5, 1, 1))
    yield "overlapping", torch.randn(40).as_strided((3, 4, 2, 2), (3, 2, 1, 1))
    yield "unaligned", torch.randn(121)[1:].view(2, 4, 3, 5)
    yield "rank 2", torch.randn(6, 4)
    yield "rank 2, transposed", torch.randn(4, 6).t()
    yield "rank 3, transposed", torch.randn(2, 6, 4).transpose(1, 2)
    x = torch.randn(2, 4, 3, 2, 5)
    yield "channels_last_3d", x.contiguous(memory_format=torch.channels_last_3d)


STRIDED = list(dict(strided_inputs()))


def norms(rank: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments for a rank: every axis, and the pairs that are kept, split or reduced."""
    for axis in range(rank):
        yield "batch", {"axis": [axis]}
        yield "group", {"axis": [axis]}
    if rank == 4:
        yield "batch", {"axis": [1, 2]}
        yield "batch", {"axis": [3, 0]}
        yield "group", {"axis": [2, 3]}
        yield "group", {"axis": [1, 3]}
        yield "group", {"axis": [1], "reduction_axes": [0, 1, 3]}
        yield "group", {"axis": [3], "reduction_axes": [2, 3]}


def groups_of(x: Tensor, axis: list[int]) -> int:
    channels = math.prod(x.shape[a] for a in axis)
    return next(g for g in (2, 3, 5, 1) if channels % g == 0)


@pytest.mark.parametrize("name", STRIDED)
def test_values_do_not_depend_on_strides(name: str) -> None:
    x = dict(strided_inputs())[name]
    dy = torch.randn(x.shape)
    residual = torch.randn(x.shape[::-1]).permute(*range(x.dim() - 1, -1, -1))
    for family, options in norms(x.dim()):
        shape = [x.shape[a] for a in sorted(options["axis"])]
        parameters = torch.rand(shape) + 0.5, torch.randn(shape)
        leaves = [t.detach().requires_grad_() for t in (x, *parameters, residual)]
        for mask in masks(x, options["axis"]):
            arguments = {"mask": mask, "activation": "silu", "dy": dy, **options}
            arguments |= dict(
                zip(("weight", "bias", "residual"), (*parameters, residual), strict=True)
            )
            if family == "batch":
                want = reference.batch_norm(x, **arguments)
                arguments |= {"running_mean": None, "running_var": None, "training": True}
                op = ops.batch_norm
            else:
                arguments["num_groups"] = groups_of(x, options["axis"])
                want = reference.group_norm(x, **arguments)
                op = ops.group_norm
            del arguments["dy"]
            arguments |= dict(zip(("input", "weight", "bias", "residual"), leaves, strict=True))
            y = op(**arguments)
            formula = grad_by_formula(y, leaves, dy, retain_graph=True)
            grads = torch.autograd.grad(y, leaves, dy)
            layout = torch.empty_like(x).stride()
            assert y.stride() == grads[0].stride() == grads[3].stride() == layout
            for gradient in (formula[0], formula[3]):  # strides of single elements mean nothing
                assert all(
                    n == 1 or got == want
                    for n, got, want in zip(x.shape, gradient.stride(), layout, strict=True)
                )
            names = "y", "x", "weight", "bias", "residual"
            for key, got in zip(names, (y, *grads), strict=True):
                assert_close(
                    got,
                    want.value[key],
                    length=want.length,
                    magnitude=want.magnitude.get(key),
                    name=f"{key} of {family} norm, {options}, mask {mask is not None}",
                )


def results(x: Tensor, p: Tensor, r: Tensor) -> list[Tensor]:
    """Everything that has the shape of x, from every low-level operator."""
    mean, var = torch.zeros_like(p), torch.ones_like(p)
    half = torch.bfloat16
    y, m, s, _ = ops._batch_norm_train(
        x, p, p, r, None, None, None, None, [1], 0.1, 1e-5, True, "relu", half
    )
    z, t = ops._batch_norm_eval(x, p, p, r, mean, var, [1], 1e-5, None, None)
    g, u, v = ops._group_norm(x, p, p, r, None, 1, [1], None, 1e-5, "silu", half)
    batch = x, p, p, r, None, m, s, [1], True, 1e-5, "relu", [True] * 4
    frozen = x, p, p, r, None, mean, t, [1], False, 1e-5, None, [True] * 4
    group = x, p, p, r, None, u, v, 1, [1], None, 1e-5, "silu", [True] * 4
    every = (
        ops._batch_norm_backward(y, *batch),
        ops._batch_norm_backward(z, *frozen),
        ops._group_norm_backward(g, *group),
    )
    cotangents = y, p, p, z
    twice = (
        ops._batch_norm_double_backward(*cotangents, y, *batch[:-1], [True] * 5),
        ops._batch_norm_double_backward(*cotangents, z, *frozen[:-1], [True] * 5),
        ops._group_norm_double_backward(*cotangents, g, *group[:-1], [True] * 5),
    )
    return [
        *(y, z, g),
        *(gradients[i] for gradients in every for i in (0, 3)),
        *(gradients[i] for gradients in twice for i in (0, 1, 4)),
    ]


def significant_strides(t: Tensor) -> list[int]:
    """Strides that say where elements are: torch itself chooses the others in several ways."""
    if t.numel() == 0:
        return []
    return [int(stride) for size, stride in zip(t.shape, t.stride(), strict=True) if size != 1]


def empty_inputs() -> Iterator[tuple[str, Tensor]]:
    yield "no sample", torch.empty(0, 4, 3, 3)
    yield "no channel", torch.empty(2, 0, 3, 3)
    yield "no position, channels_last", torch.empty(2, 3, 0, 4).permute(0, 3, 1, 2)


EMPTY = list(dict(empty_inputs()))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", [*STRIDED, *EMPTY])
def test_shape_inference_gives_the_strides_of_the_results(name: str, dynamic: bool) -> None:
    x = dict(itertools.chain(strided_inputs(), empty_inputs()))[name]
    p = torch.rand(x.shape[1])
    r = torch.randn(x.shape[::-1], dtype=torch.float16).permute(*range(x.dim() - 1, -1, -1))
    mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None)
    with mode:
        options = {} if dynamic else {"static_shapes": True}
        inferred = results(*(mode.from_tensor(t, **options) for t in (x, p, r)))
    for got, want in zip(inferred, results(x, p, r), strict=True):
        assert (tuple(got.shape), got.dtype) == (tuple(want.shape), want.dtype)
        assert significant_strides(got) == significant_strides(want)


@pytest.mark.parametrize("family", ["train", "eval", "group"])
def test_vectors_of_any_stride(family: str) -> None:
    x = torch.randn(3, 4, 5)
    tables = [torch.rand(4, 3) + 0.5 for _ in range(4)]
    strided = [table[:, 1] for table in tables]
    dense = [t.contiguous() for t in strided]
    around = [table[:, ::2].clone() for table in tables]

    def run(w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        if family == "group":
            y = ops.group_norm(leaves[0], 2, *leaves[1:])
        else:
            y = ops.batch_norm(leaves[0], mean, var, *leaves[1:], family == "train")
        return [y, *torch.autograd.grad(y.pow(2).sum(), leaves), mean, var]

    for got, want in zip(run(*strided), run(*dense), strict=True):
        assert torch.equal(got, want)
    for table, before in zip(tables, around, strict=True):
        assert torch.equal(table[:, ::2], before)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("shape", [(3, 1, 5), (3, 4, 5), (1, 4, 1), (5,), (4, 1), (1, 1, 1)])
def test_masks_of_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 5)
    mask = (torch.rand(shape) < 0.7).to(dtype) * (2 if dtype != torch.bool else 1)
    full = mask.bool().expand(3, 4, 5).contiguous()
    for call in (
        lambda m: ops.batch_norm(x, None, None, training=True, mask=m),
        lambda m: ops.group_norm(x, 2, mask=m),
    ):
        torch.testing.assert_close(call(mask), call(full), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_parameters_per_sample_follow_the_sample_axis_in_any_layout() -> None:
    w, b = torch.rand(2, 4), torch.randn(2, 4)
    for name, x in strided_inputs():
        if not name.startswith("order"):
            continue
        got = ops.group_norm(x, 2, w, b)
        want = ops.group_norm(x, 2) * w[:, :, None, None] + b[:, :, None, None]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
