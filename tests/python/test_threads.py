"""Results have the same bits for every number of threads, where threads really share the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from compare import call
from torch import Tensor

import normcore
import normcore.functional as NF

THREADS = (1, 2, 3)

# Large enough to be shared. "slices": every thread has slices of its own; "chunks": threads share a
# slice.
SHAPES = {
    "slices": ((3, 24, 64, 64), torch.contiguous_format, 8),
    "chunks": ((1, 2, 400, 500), torch.contiguous_format, 1),
    "rows": ((2, 24, 120, 120), torch.channels_last, 8),
    "rows of one sample": ((1, 65, 101, 103), torch.channels_last, 5),
}


@contextmanager
def number_of_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_shared(plan: str) -> bool:
    """Whether the explained plan has work for several threads."""
    return "chunk path" in plan or ("slice path" in plan and " 1 tasks" not in plan)


def masks(x: Tensor) -> dict[str, Tensor | None]:
    rows = torch.rand(x.shape[0], 1, *x.shape[2:]) < 0.9
    return {"none": None, "rows": rows, "elements": torch.rand(x.shape) < 0.9}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", ["batch_norm", "group_norm"])
def test_bits_do_not_depend_on_the_number_of_threads(
    op: str, dtype: torch.dtype, name: str
) -> None:
    size, layout, groups = SHAPES[name]
    x = torch.randn(size).to(dtype).contiguous(memory_format=layout)
    dy, residual = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    channels = size[1]
    arguments: dict[str, Any] = {
        "weight": torch.rand(channels) + 0.5,
        "bias": torch.randn(channels),
        "residual": residual,
        "activation": "silu",
    }
    for kind, mask in masks(x).items():
        results = []
        for threads in THREADS:
            state: dict[str, Tensor] = {}
            with number_of_threads(threads):
                if threads > 1:
                    for backward in (False, True):
                        plan = normcore.explain(
                            x, op, num_groups=groups, mask=mask, backward=backward
                        )
                        assert is_shared(plan), plan
                if op == "batch_norm":
                    state = {"running_mean": torch.zeros(channels)}
                    state["running_var"] = torch.ones(channels)
                    y, grads = call(
                        NF.batch_norm, x, dy, training=True, mask=mask, **state, **arguments
                    )
                else:
                    y, grads = call(NF.group_norm, x, dy, num_groups=groups, mask=mask, **arguments)
            results.append([y, *grads.values(), *state.values()])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other)), kind


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("op", ["batch_norm", "group_norm"])
def test_bits_of_double_backward_do_not_depend_on_the_number_of_threads(op: str, name: str) -> None:
    size, layout, groups = SHAPES[name]
    x = torch.randn(size).contiguous(memory_format=layout).requires_grad_()
    inputs = [x, *(torch.randn(size[1]).requires_grad_() for _ in ("weight", "bias"))]
    dy, *cotangents = [torch.randn(t.shape).requires_grad_() for t in (x, *inputs)]
    for kind, mask in masks(x).items():
        options: dict[str, Any] = {"mask": mask, "activation": "silu"}
        if op == "batch_norm":
            y = torch.ops.normcore.batch_norm(x, None, None, *inputs[1:], True, **options)
        else:
            y = torch.ops.normcore.group_norm(x, groups, *inputs[1:], **options)
        grads = torch.autograd.grad(y, inputs, dy, create_graph=True)
        results = []
        for threads in THREADS:
            with number_of_threads(threads):
                results.append(
                    torch.autograd.grad(grads, (dy, *inputs), cotangents, retain_graph=True)
                )
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other)), kind


@pytest.mark.parametrize("name", SHAPES)
def test_bits_in_eval_do_not_depend_on_the_number_of_threads(name: str) -> None:
    size, layout, _ = SHAPES[name]
    x = torch.randn(size).contiguous(memory_format=layout)
    statistics = torch.randn(size[1]), torch.rand(size[1]) + 0.5
    results = []
    for threads in THREADS:
        with number_of_threads(threads):
            results.append(call(NF.batch_norm, x, torch.ones_like(x), running_mean=statistics[0],
                                running_var=statistics[1], activation="gelu"))  # fmt: skip
    for y, grads in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(grads["x"], results[0][1]["x"])
