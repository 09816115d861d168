"""normcore.override_aten: torch's own norms on our kernels, and torch's kernels back afterwards."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_version import IS_2_11

import normcore

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """torch has its kernels back after every test."""
    yield
    before = normcore.override_aten().calls
    F.group_norm(torch.randn(2, 4, 3), 2)
    assert normcore.override_aten().calls == before


def calls_of(function: Callable[[], Any]) -> tuple[int, int]:
    override = normcore.override_aten()
    with override:
        function()
    return override.calls


@pytest.mark.parametrize(
    "function",
    [
        lambda x, c: F.batch_norm(x, None, None, training=True),
        lambda x, c: F.batch_norm(x, torch.zeros(c), torch.ones(c)),
        lambda x, c: F.batch_norm(x, torch.zeros(c), torch.ones(c), training=True),
        lambda x, c: F.instance_norm(x),
        lambda x, c: F.instance_norm(x, torch.zeros(c), torch.ones(c)),
        lambda x, c: F.group_norm(x, 2),
        lambda x, c: nn.BatchNorm2d(c)(x),
        lambda x, c: torch.jit.trace(nn.GroupNorm(2, c), x)(x),
        lambda x, c: torch.vmap(lambda x: F.group_norm(x, 2))(x[None]),
        lambda x, c: torch.ops.aten._native_batch_norm_legit_no_training(
            x, None, None, torch.zeros(c), torch.ones(c), 0.1, 1e-5
        ),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torch_calls_our_kernels(function: Callable[..., Tensor], inference: bool) -> None:
    x = torch.randn(2, 4, 3, 5)
    with torch.inference_mode(inference):
        calls = calls_of(lambda: function(x, 4))
    assert calls.normcore >= 1
    assert calls.aten == 0


def test_a_whole_model_trains_as_without() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.GroupNorm(4, 8), nn.InstanceNorm2d(8, affine=True),
    )  # fmt: skip
    x = torch.randn(4, 3, 9, 9)
    other = deepcopy(model)
    model(x).square().mean().backward()
    override = normcore.override_aten()
    with override:
        other(x).square().mean().backward()
    assert override.calls == (6, 0)
    for got, want in zip(other.parameters(), model.parameters()):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)
    for got, want in zip(other.buffers(), model.buffers()):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backward_inside", [False, True])
def test_forward_and_backward_on_different_kernels(backward_inside: bool) -> None:
    x = torch.randn(3, 4, 5, 6, requires_grad=True)
    w = torch.rand(4, requires_grad=True)

    def loss() -> Tensor:
        y = F.batch_norm(x, torch.zeros(4), torch.ones(4), w, training=True)
        return (F.group_norm(y, 2, w) * torch.linspace(0, 1, 6)).sum()

    want = torch.autograd.grad(loss(), (x, w))
    if backward_inside:
        value = loss()
        with normcore.override_aten():
            got = torch.autograd.grad(value, (x, w))
    else:
        with normcore.override_aten():
            value = loss()
        got = torch.autograd.grad(value, (x, w))
    for g, e in zip(got, want):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)


def test_contexts_nest_and_exceptions_restore() -> None:
    x = torch.randn(2, 4, 3)
    outer, inner = normcore.override_aten(), normcore.override_aten()
    with outer:
        F.group_norm(x, 2)
        with pytest.raises(RuntimeError, match="divisible"), inner, outer:
            F.group_norm(x, 3)
        F.group_norm(x, 2)
    assert outer.calls == (2, 0)


def test_switch_and_decorator() -> None:
    x = torch.randn(2, 4, 3)
    override = normcore.override_aten().enable()
    F.group_norm(x, 2)
    override.disable()
    F.group_norm(x, 2)
    assert override.calls == (1, 0)
    with pytest.raises(RuntimeError, match=r"expected disable\(\) to follow enable\(\)"):
        override.disable()

    decorator = normcore.override_aten()
    decorator(F.group_norm)(x, 2)
    assert decorator.calls == (1, 0)


def test_other_threads_see_it() -> None:
    x = torch.randn(2, 4, 3)

    def in_a_thread() -> None:
        thread = threading.Thread(target=F.group_norm, args=(x, 2))
        thread.start()
        thread.join()

    assert calls_of(in_a_thread) == (1, 0)


def test_nothing_is_printed() -> None:
    # In a process of its own: torch warns once in a process.
    program = """
import warnings
import torch
import normcore
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        with normcore.override_aten():
            torch.nn.functional.group_norm(torch.randn(2, 4, 3), 2)
            warnings.warn("of the user")
assert [str(w.message) for w in caught] == ["of the user"] * 2, caught
override = normcore.override_aten().enable()  # still on when the process ends
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


def assert_same(got: Any, want: Any, tolerance: float) -> None:
    """Values, dtypes, shapes and strides of tensors, any of them undefined or None.

    On a device torch loses strides that are neither contiguous nor channels_last.
    """
    assert len(got) == len(want)
    for g, w in zip(got, want):
        assert (g is None) == (w is None)
        if g is None:
            continue
        assert (g.dtype, g.shape) == (w.dtype, w.shape)
        assert g.stride() == w.stride() or not w.is_cpu
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance, equal_nan=True)


def with_and_without(function: Callable[[], Any]) -> tuple[Any, Any]:
    want = function()
    override = normcore.override_aten()
    with override:
        got = function()
    assert override.calls.normcore > 0
    return got, want


@pytest.mark.parametrize(("dtype", "parameter_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_native_batch_norm(
    dtype: torch.dtype, parameter_dtype: torch.dtype, training: bool, layout: str
) -> None:
    x, dy = torch.randn(3, 4, 5, 6).to(dtype), torch.randn(3, 4, 5, 6).to(dtype)
    if layout == "channels_last":
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    if layout == "permuted":
        x = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    w, b, mean, var = torch.rand(4, 4).to(parameter_dtype).unbind()

    def run() -> list[Tensor | None]:
        running = mean.clone(), var.clone()
        y, *saved = torch.native_batch_norm(x, w, b, *running, training, 0.1, 1e-5)
        results = [y, *saved, *running]
        for mask in itertools.product([False, True], repeat=3):
            grads = torch.ops.aten.native_batch_norm_backward(
                dy, x, w, *running, *saved, training, 1e-5, mask
            )
            # On a device torch gives some that nobody asked for.
            results += [g if m or x.is_cpu else None for g, m in zip(grads, mask, strict=True)]
        return results

    got, want = with_and_without(run)
    assert_same(got, want, 4 * torch.finfo(dtype).eps * 10)


@pytest.mark.parametrize(("dtype", "parameter_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_native_group_norm(dtype: torch.dtype, parameter_dtype: torch.dtype, layout: str) -> None:
    if layout != "contiguous" and IS_2_11:
        pytest.skip("the backward pass of torch 2.11 itself raises or crashes")
    x, dy = torch.randn(3, 4, 5, 6).to(dtype), torch.randn(3, 4, 5, 6).to(dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "permuted":
        x = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    w, b = torch.rand(2, 4).to(parameter_dtype).unbind()

    def run() -> list[Tensor | None]:
        y, *saved = torch.native_group_norm(x, w, b, 3, 4, 30, 2, 1e-5)
        results = [y, *saved]
        for mask in itertools.product([False, True], repeat=3):
            results += torch.ops.aten.native_group_norm_backward(
                dy, x, *saved, w, 3, 4, 30, 2, mask
            )
        return results

    got, want = with_and_without(run)
    assert_same(got, want, 4 * torch.finfo(dtype).eps * 10)


def running(channels: int = 4) -> tuple[Tensor, Tensor]:
    return torch.zeros(channels), torch.ones(channels)


KEPT = {
    "empty batch": lambda: F.group_norm(torch.randn(0, 4, 3), 2),
    "one value per channel": lambda: torch.native_batch_norm(
        torch.randn(1, 4), None, None, *running(), True, 0.1, 1e-5
    ),
    "eps of zero": lambda: torch.native_batch_norm(
        torch.ones(3, 4), None, None, *running(), True, 0.1, 0.0
    ),
    "negative eps": lambda: torch.native_group_norm(
        torch.randn(2, 4), None, None, 2, 4, 1, 2, -1e-9
    ),
    "statistics in the same memory": lambda: torch.native_batch_norm(
        torch.randn(5, 4), None, None, *[torch.ones(4)] * 2, True, 0.1, 1e-5
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_torch_computes_in_its_own_way(name: str) -> None:
    def results() -> list[Tensor]:
        torch.manual_seed(0)
        result = KEPT[name]()
        return [result] if isinstance(result, Tensor) else list(result)

    want = results()
    override = normcore.override_aten()
    with override:
        got = results()
    assert override.calls == (0, 1)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)


BAD = {
    "rank": lambda x: F.group_norm(x[0, 0], 2),
    "groups": lambda x: F.group_norm(x, 3),
    "zero groups": lambda x: torch.native_group_norm(x, None, None, 3, 4, 5, 0, 1e-5),
    "weight": lambda x: F.batch_norm(x, *running(), torch.ones(3)),
    "statistics": lambda x: F.batch_norm(x, *running(3)),
    "no statistics": lambda x: F.batch_norm(x, None, None),
    "only a running mean": lambda x: torch.native_batch_norm(
        x, None, None, torch.ones(4), None, False, 0.1, 1e-5
    ),
    "dtype of the input": lambda x: F.group_norm(x.long(), 2),
    "float64 weight": lambda x: F.group_norm(x, 2, torch.ones(4, dtype=torch.float64)),
    "mixed parameters": lambda x: torch.native_batch_norm(
        x.bfloat16(), torch.ones(4), torch.ones(4).bfloat16(), *running(), True, 0.1, 1e-5
    ),
    "gradient dtype": lambda x: torch.ops.aten.native_group_norm_backward(
        x.double(), x, torch.ones(3, 2), torch.ones(3, 2), None, 3, 4, 5, 2, [True] * 3
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_those_of_torch(name: str) -> None:
    x = torch.randn(3, 4, 5)
    with pytest.raises(Exception) as want:  # noqa: PT011  (whatever torch raises)
        BAD[name](x)
    with normcore.override_aten(), pytest.raises(type(want.value)) as got:
        BAD[name](x)
    assert str(got.value) == str(want.value)


@pytest.mark.skipif(IS_2_11, reason="torch 2.11's own kernel asks an absent weight for its device")
def test_absent_parameters_have_gradients() -> None:
    x, dy = torch.randn(3, 4, 5), torch.randn(3, 4, 5)

    def run() -> list[Tensor]:
        _, mean, rstd = torch.native_group_norm(x, None, None, 3, 4, 5, 2, 1e-5)
        group = torch.ops.aten.native_group_norm_backward(
            dy, x, mean, rstd, None, 3, 4, 5, 2, [True] * 3
        )
        _, mean, rstd = torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
        batch = torch.ops.aten.native_batch_norm_backward(
            dy, x, None, None, None, mean, rstd, True, 1e-5, [True] * 3
        )
        return [*group, *batch]

    got, want = with_and_without(run)
    assert_same(got, want, 1e-5)


def test_higher_derivatives() -> None:
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    w = torch.rand(4, dtype=torch.float64, requires_grad=True)
    with normcore.override_aten():
        for function in (
            lambda x, w: F.group_norm(x, 2, w),
            lambda x, w: F.batch_norm(x, None, None, w, training=True),
        ):
            assert torch.autograd.gradcheck(function, (x, w), check_forward_ad=True)
            assert torch.autograd.gradgradcheck(function, (x, w))


def test_calls_are_those_of_the_context() -> None:
    x = torch.randn(2, 4, 3)
    with normcore.override_aten() as first:
        torch.nn.functional.group_norm(x, 2)
    with normcore.override_aten() as second:
        torch.nn.functional.group_norm(x, 2)
        torch.nn.functional.group_norm(x, 2)
    assert (first.calls.normcore, second.calls.normcore) == (1, 2)


def test_decorates_plain_functions_only() -> None:
    override = normcore.override_aten()

    @override
    def norm(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.group_norm(x, 2)

    norm(torch.randn(2, 4, 3))
    assert override.calls.normcore == 1
    with pytest.raises(TypeError, match="plain function"):

        @override
        def generate() -> Any:
            yield
