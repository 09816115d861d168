"""CPU and CUDA against the same float64 reference, on new random inputs in every run.

Both are within the allowance of tests/python/tolerance.py, so they are within twice of it of each
other. CUDA results are written to memory that was NaN before.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import DIFFERENTIABLE, away_from_zero, compare
from devices import needs_cuda
from freed_memory import poison_freed_memory
from shape_list import Shape
from tolerance import compute_dtype
from torch import Tensor
from workloads import DTYPES, LARGE, NORMS, PATHS, SMALL, Workload, assert_same_bits, name_of

pytestmark = needs_cuda


def check(norm: str, shape: Shape, dtype: torch.dtype, **options: Any) -> None:
    check_workload(Workload.random(norm, shape, dtype, **options))


def check_workload(workload: Workload) -> None:
    expected = workload.expected()
    parts = (workload.operands.get(name) for name in DIFFERENTIABLE)
    compute = compute_dtype(workload.x, workload.operands.get("dtype"), *parts)
    on_device = workload.to("cuda")
    poison_freed_memory()
    device = on_device.run()
    host = workload.to("cpu").run()
    for name, result in device.items():
        assert result.device == on_device.x.device
        assert (result.dtype, result.stride()) == (host[name].dtype, host[name].stride())
    compare(host, expected, compute)
    compare({name: result.cpu() for name, result in device.items()}, expected, compute)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=name_of)
@pytest.mark.parametrize("norm", NORMS)
def test_small(norm: str, shape: Shape, dtype: torch.dtype) -> None:
    check(norm, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=name_of)
@pytest.mark.parametrize("norm", NORMS)
def test_large(norm: str, shape: Shape, dtype: torch.dtype) -> None:
    check(norm, shape, dtype, activation="silu")


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SMALL, *LARGE], ids=name_of)
@pytest.mark.parametrize("norm", ["batch_norm", "group_norm"])
@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_every_path(path: str, norm: str, shape: Shape, dtype: torch.dtype, masked: bool) -> None:
    workload = Workload.random(norm, shape, dtype, masked=masked, activation="silu")
    if not workload.takes(path):
        pytest.skip(f"the {path} path cannot run it")
    check_workload(workload)


def is_dense(x: Tensor, format: torch.memory_format) -> bool:
    rank = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(format, x.ndim)
    return x.ndim == rank and x.is_contiguous(memory_format=format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SMALL, *LARGE], ids=name_of)
@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_relu_bits(path: str, shape: Shape, dtype: torch.dtype) -> None:
    """The backward pass gives the same with bits of ReLU as with the residual."""
    workload = Workload.random("batch_norm", shape, dtype, activation="relu", residual=True)
    if not workload.takes(path):
        pytest.skip(f"the {path} path cannot run it")
    w = workload.to("cuda")
    weight, bias, residual = (w.operands[name] for name in ("weight", "bias", "residual"))
    axis = list(shape.axis)
    poison_freed_memory()
    ops = torch.ops.normcore
    formats = [torch.channels_last, torch.channels_last_3d, torch.contiguous_format]
    order = next(f for f in formats if f == torch.contiguous_format or is_dense(w.x, f))
    rest = None, None, None, None, axis, 0.1, 1e-5, True, "relu", None
    try:
        y, mean, rstd, bits = ops._batch_norm_train(w.x, weight, bias, residual, *rest, order)
    except ValueError:
        pytest.skip("neighbours in memory are no whole bytes")
    saved = None, mean, rstd, axis, True, 1e-5, "relu", [True] * 4
    of_residual = ops._batch_norm_backward(w.dy, w.x, weight, bias, residual, *saved)
    of_bits = ops._batch_norm_backward(w.dy, w.x, weight, bias, None, *saved, bits, order)
    names = ["x", *DIFFERENTIABLE]
    assert_same_bits(dict(zip(names, of_bits)), dict(zip(names, of_residual)))
    assert torch.equal(of_bits[3], torch.where(y > 0, w.dy, 0))


@pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=name_of)
@pytest.mark.parametrize("norm", NORMS)
def test_epilogue_and_residual(
    norm: str, shape: Shape, dtype: torch.dtype, activation: str | None
) -> None:
    check(norm, shape, dtype, activation=activation, residual=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=name_of)
@pytest.mark.parametrize("norm", NORMS)
def test_epilogue_with_relu(norm: str, shape: Shape, dtype: torch.dtype) -> None:
    workload = Workload.random(norm, shape, dtype, residual=True)
    z = workload.expected().value["y"]
    workload.operands["residual"] = away_from_zero(z, workload.operands["residual"])
    workload.operands["activation"] = "relu"
    check_workload(workload)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=name_of)
def test_affine_map_per_sample(shape: Shape, dtype: torch.dtype) -> None:
    check("group_norm", shape, dtype, per_sample=True, activation="silu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=name_of)
@pytest.mark.parametrize("norm", ["batch_norm", "group_norm"])
def test_mask(norm: str, shape: Shape, dtype: torch.dtype) -> None:
    check(norm, shape, dtype, masked=True)


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("statistics", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameters", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [SMALL[1], SMALL[2], SMALL[5], SMALL[6]], ids=name_of)
@pytest.mark.parametrize("norm", NORMS)
def test_mixed_dtypes(
    norm: str,
    shape: Shape,
    dtype: torch.dtype,
    parameters: torch.dtype,
    statistics: torch.dtype,
    out: torch.dtype,
) -> None:
    check(norm, shape, dtype, parameters=parameters, statistics=statistics, out=out)


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape", [*SMALL[:3], *SMALL[4:7]], ids=name_of)
@pytest.mark.parametrize("norm", ["batch_norm", "group_norm"])
def test_large_mean(norm: str, shape: Shape, ratio: float) -> None:
    """float32 results stay within 1e-6 of float64 (relative to the standard deviation of y)."""
    workload = Workload.random(norm, shape)
    workload.x += ratio
    del workload.operands["weight"], workload.operands["bias"]
    expected = workload.expected().value["y"]
    y = workload.to("cuda").forward().cpu()
    assert (y - expected).abs().max() < 1e-6 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=name_of)
@pytest.mark.parametrize("norm", NORMS)
def test_double_backward(
    norm: str, shape: Shape, dtype: torch.dtype, activation: str | None
) -> None:
    """Against the CPU in float64, up to the rounding of results."""
    masked = activation is not None and norm != "batch_norm eval"
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    options = {"activation": activation, "masked": masked, "residual": activation is not None}
    workload = Workload.random(norm, shape, dtype, parameters, **options)
    exact = workload.to("cpu").in_float64().run_double()
    on_device = workload.to("cuda")
    poison_freed_memory()
    results = on_device.run_double()
    assert results.keys() == exact.keys()
    bound = max(1e-12, {torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps))
    for name, result in results.items():
        error = (result.cpu().double() - exact[name]).norm() / exact[name].norm().clamp_min(1e-30)
        assert error <= bound, f"{name}: {error}"
