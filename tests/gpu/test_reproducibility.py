"""The same bits in every run, beside other work, and for every batch size where that is asked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from devices import needs_cuda
from shape_list import Shape
from torch import Tensor
from workloads import LARGE, NORMS, SMALL, Workload, assert_same_bits, name_of

import normcore

pytestmark = needs_cuda

RUNS = 1000
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t: Tensor) -> Tensor:
    return t.view(INTEGER[t.element_size()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SMALL[2], SMALL[6], SMALL[8], LARGE[0], LARGE[3]], ids=name_of)
@pytest.mark.parametrize("norm", NORMS)
def test_a_thousand_runs(norm: str, shape: Shape, dtype: torch.dtype) -> None:
    """Forward and backward; matrix products on another stream keep changing who runs when."""
    workload = Workload.random(norm, shape, dtype, activation="silu").to("cuda")
    state = {
        name: t.clone() for name, t in workload.operands.items() if name.startswith("running_")
    }
    matrix = torch.randn(1024, 1024, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    want = {name: t.clone() for name, t in workload.run().items()}
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for run in range(RUNS):
        if run % 5 == 0:
            with torch.cuda.stream(side):
                matrix @ matrix
        for name, before in state.items():
            workload.operands[name].copy_(before)
        got = workload.run()
        for name, t in got.items():
            differ += (bits(t) != bits(want[name])).sum()
    assert differ.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SMALL[2], SMALL[6], LARGE[0], LARGE[3]], ids=name_of)
@pytest.mark.parametrize("norm", NORMS)
def test_double_backward_runs(norm: str, shape: Shape, dtype: torch.dtype) -> None:
    workload = Workload.random(norm, shape, dtype, activation="silu").to("cuda")
    want = workload.run_double()
    for run in range(100):
        assert_same_bits(workload.run_double(), want, f"in run {run}")


@pytest.fixture
def batch_invariant() -> Iterator[None]:
    normcore.set_batch_invariant(True)
    try:
        yield
    finally:
        normcore.set_batch_invariant(False)


@pytest.mark.usefixtures("batch_invariant")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [*SMALL, *LARGE], ids=name_of)
@pytest.mark.parametrize("norm", ["batch_norm eval", "group_norm"])
def test_batch_invariance(norm: str, shape: Shape, dtype: torch.dtype) -> None:
    """A sample's output and gradient are the same bits alone and in any batch."""
    options = {"masked": True} if norm == "group_norm" else {}
    whole = Workload.random(norm, shape, dtype, activation="gelu", **options).to("cuda")

    def of_samples(workload: Workload) -> dict[str, Tensor]:
        first, second = workload.run(), workload.run_double()
        return {"y": first["y"], "x": first["x"]} | {f"second {n}": second[n] for n in ("dy", "x")}

    want = of_samples(whole)
    samples = shape.size[0]
    for begin, end in {(0, 1), (samples - 1, samples), (0, samples // 2)}:
        if begin == end:
            continue
        part = slice(begin, end)
        operands = dict(whole.operands)
        if "mask" in operands:
            operands["mask"] = operands["mask"][part]
        got = of_samples(Workload(norm, shape, whole.x[part], whole.dy[part], operands))
        expected = {name: t[part] for name, t in want.items()}
        assert_same_bits(got, expected, f"for samples {begin} to {end}")


@pytest.mark.usefixtures("batch_invariant")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SMALL[0], SMALL[3], SMALL[7]], ids=name_of)
def test_batch_invariance_of_equal_samples(shape: Shape, dtype: torch.dtype) -> None:
    """Samples that start anywhere in a vector of memory, of a batch that starts anywhere too."""
    workload = Workload.random("group_norm", shape, dtype).to("cuda")
    for t in (workload.x, workload.dy):
        t.copy_(t[:1].expand_as(t).clone())
    want = workload.run()
    assert all(torch.equal(want["y"][0], y) for y in want["y"])
    assert all(torch.equal(want["x"][0], grad) for grad in want["x"])
    shifted = torch.empty(workload.x.numel() + 1, dtype=dtype, device="cuda")[1:]
    x = shifted.as_strided(workload.x.shape, workload.x.stride(), 1).copy_(workload.x)
    got = Workload("group_norm", shape, x, workload.dy, workload.operands).run()
    assert_same_bits(got, want, "behind the start of a vector")
