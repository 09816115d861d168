"""What the kernels write and read: all of the outputs, nothing that nobody wrote."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from devices import needs_cuda
from freed_memory import hands_out_poison, poison_freed_memory
from shape_list import Shape
from torch import Tensor
from workloads import NORMS, SMALL, Workload, assert_same_bits, name_of

import normcore.functional as NF

pytestmark = needs_cuda


@pytest.mark.parametrize("elements", [64, 5000, 1 << 20])
def test_new_tensors_are_poisoned(elements: int) -> None:
    poison_freed_memory()
    assert hands_out_poison(elements)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=name_of)
@pytest.mark.parametrize("norm", NORMS)
def test_results_do_not_depend_on_old_memory(norm: str, shape: Shape, dtype: torch.dtype) -> None:
    workload = Workload.random(norm, shape, dtype, residual=True, activation="silu")
    once, again = workload.to("cuda"), workload.to("cuda")
    want = once.run()
    poison_freed_memory()
    got = again.run()
    assert all(t.isfinite().all() for t in got.values())
    assert_same_bits(got, want, "after NaN in free memory")


PERIOD, REPETITIONS = 1024, 2**20 + 1


@pytest.fixture
def most_of_the_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One test at a time has it, of all processes of pytest-xdist: their folders have one parent.

    Not a group of xdist's, which pytest 9.2 and xdist 3.8 pay no attention to together.
    """
    with (tmp_path_factory.getbasetemp().parent / "most_of_the_memory.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        yield
        torch.cuda.empty_cache()  # before the next one looks for it


def ends(t: Tensor, along: int) -> Tensor:
    return torch.stack([t.narrow(along, 0, PERIOD), t.narrow(along, -PERIOD, PERIOD)])


@pytest.mark.usefixtures("most_of_the_memory")
@pytest.mark.parametrize("axis", [1, 2], ids=["planes", "rows"])
@pytest.mark.parametrize("norm", NORMS)
def test_more_than_two_to_the_31_elements(norm: str, axis: int) -> None:
    """The input repeats a short one, so output and gradient repeat its output and gradient."""
    needed = 5 * PERIOD * REPETITIONS * 2 * 2  # x, dy, y, dx in bfloat16, and something to spare
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of device memory")
    short = torch.randn((1, 2, PERIOD) if axis == 1 else (1, PERIOD, 2)).bfloat16().cuda()
    long = short.repeat([1, 1, REPETITIONS] if axis == 1 else [1, REPETITIONS, 1])
    assert long.numel() > 2**31
    parameters = torch.tensor([1.5, -0.5]).cuda(), torch.tensor([0.25, 1.0]).cuda()
    running = torch.tensor([0.1, -0.1]).cuda(), torch.tensor([1.5, 0.7]).cuda()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        if norm == "group_norm":
            y = NF.group_norm(leaf, 2, *parameters, axis=axis)
        else:
            training = norm == "batch_norm"
            y = NF.batch_norm(leaf, *(t.clone() for t in running), *parameters, training, axis=axis)
        y_ends = ends(y.detach(), 3 - axis)
        (grad,) = torch.autograd.grad(y, leaf, x)
        return y_ends, ends(grad, 3 - axis)

    for got, want in zip(run(long), run(short), strict=True):
        torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-5)
        assert torch.equal(got[0], got[1])


@pytest.mark.usefixtures("most_of_the_memory")
@pytest.mark.parametrize("axis", [1, 2], ids=["planes", "rows"])
def test_second_derivative_of_more_than_two_to_the_31_elements(axis: int) -> None:
    needed = 10 * PERIOD * REPETITIONS * 2 * 2  # x, dy, y, dx, a cotangent, two results, copies
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of device memory")
    short = torch.randn((1, 2, PERIOD) if axis == 1 else (1, PERIOD, 2)).bfloat16().cuda()
    long = short.repeat([1, 1, REPETITIONS] if axis == 1 else [1, REPETITIONS, 1])
    assert long.numel() > 2**31

    def run(x: Tensor) -> list[Tensor]:
        leaf, dy = x.detach().requires_grad_(), x.roll(1, axis).requires_grad_()
        y = NF.group_norm(leaf, 2, axis=axis, activation="silu")
        (grad,) = torch.autograd.grad(y, leaf, dy, create_graph=True)
        return [ends(t, 3 - axis) for t in torch.autograd.grad(grad, (dy, leaf), x.flip(axis))]

    for got, want in zip(run(long), run(short), strict=True):
        torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-5)
        assert torch.equal(got[0], got[1])


@pytest.mark.parametrize("norm", NORMS)
def test_memory_is_returned(norm: str) -> None:
    """After a call nothing stays allocated but its results."""
    workload = Workload.random(norm, SMALL[2]).to("cuda")
    workload.run()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        workload.run()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_runtime_serves_both_libraries() -> None:
    """torch's CUDA runtime is the only shared one: normcore's is linked statically."""
    maps = Path("/proc/self/maps").read_text()
    runtimes = {line.split()[-1] for line in maps.splitlines() if "libcudart" in line}
    assert len(runtimes) <= 1
