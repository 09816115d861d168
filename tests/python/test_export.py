"""torch.export, AOTInductor and ONNX: no operator of this library where none is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from graphs import EVALUATIONS, GROUP_NORMS, Network, calls, evaluate, group, of_normcore
from torch import Tensor, nn

import normcore

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
BATCH = torch.export.Dim("batch", min=1, max=64)


class Call(nn.Module):
    """One call of a norm, as a module."""

    def __init__(self, function: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(x, self.options)
        return y


CALLS = [("evaluation", name) for name in EVALUATIONS] + [("group", name) for name in GROUP_NORMS]


# Where results are rounded in between, or not.
ROUNDED = [call for call in CALLS if call[1] in ("activation", "float32 output", "mask")]


@pytest.mark.parametrize(
    ("norm", "name", "dtype"),
    [(*call, torch.float32) for call in CALLS] + [(*call, torch.bfloat16) for call in ROUNDED],
)
def test_every_call_decomposes(norm: str, name: str, dtype: torch.dtype) -> None:
    is_group = norm == "group"
    module = Call(group, GROUP_NORMS[name]) if is_group else Call(evaluate, EVALUATIONS[name])
    x = torch.randn(2, 8, 6, 6).to(dtype)
    program = torch.export.export(module, (x,)).run_decompositions()
    assert of_normcore(calls(program.graph_module)) == []
    got, want = program.module()(x), module(x)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert got.stride() == want.stride()
    error = (got.double() - want.double()).abs().max()
    assert error <= 8 * torch.finfo(want.dtype).eps * (1 + want.double().abs().max())


@pytest.mark.parametrize("axis", [1, -1])
def test_memory_format_inside_of_a_program(axis: int) -> None:
    module = Call(lambda x, options: group(x, options).view(-1), {"axis": axis})
    x = torch.randn(2, 8, 6, 6)
    program = torch.export.export(module, (x,)).run_decompositions()
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)


def test_masked_out_values_in_an_exported_program() -> None:
    """Padding of NaN and infinity reaches no gradient, and large means cost few digits."""
    mask = torch.ones(8, 6, 6, dtype=torch.bool)
    mask[:, :, 4:] = False
    norm = normcore.GroupNorm(num_features=8, num_groups=2, axis=1)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(x, mask=mask)
            return y

    x = torch.randn(2, 8, 6, 6) + 1e4
    program = torch.export.export(Masked(), (x,)).run_decompositions().module()
    torch.testing.assert_close(program(x), norm(x, mask=mask), rtol=1e-5, atol=1e-5)
    x[..., 4] = float("nan")
    x[..., 5] = float("inf")
    dy = torch.randn(2, 8, 6, 6) * mask
    got, want = x.clone().requires_grad_(), x.clone().requires_grad_()
    for t, call in ((got, program), (want, lambda t: norm(t, mask=mask))):
        (call(t)[:, mask].mul(dy[:, mask])).sum().backward()
    torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-4)
    assert got.grad is not None
    assert got.grad.isfinite().all()


@pytest.mark.parametrize("strict", [True, False])
def test_evaluation(strict: bool) -> None:
    network, x = Network(), torch.randn(2, 3, 8, 8)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: BATCH},), strict=strict)
    decomposed = program.run_decompositions()
    names = calls(decomposed.graph_module)
    assert of_normcore(names) == []
    assert "aten._native_batch_norm_legit_no_training.default" in names
    assert "aten.native_group_norm.default" in names
    for batch in (2, 5):
        x = torch.randn(batch, 3, 8, 8)
        for exported in (program, decomposed):
            torch.testing.assert_close(exported.module()(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
def test_training_keeps_the_operator(strict: bool) -> None:
    network, x = Network(training=True, norms="batch"), torch.randn(4, 3, 8, 8)
    program = torch.export.export(network, (x,), strict=strict).run_decompositions()
    assert len([n for n in calls(program.graph_module) if "auto_functionalized" in n]) == 1
    module = program.module()
    torch.testing.assert_close(module(x), network(x))
    got, want = dict(module.named_buffers()), dict(network.named_buffers())
    for name in ("batch.mean", "batch.var"):
        torch.testing.assert_close(got[name], want[name])


def test_saved_program_runs_without_the_library(tmp_path: Path) -> None:
    """Decomposed, saved, and loaded in a process that has never heard of normcore."""
    network, x = Network(), torch.randn(2, 3, 8, 8)
    program = torch.export.export(network, (x,)).run_decompositions()
    torch.export.save(program, tmp_path / "network.pt2")
    torch.save((x, network(x).detach()), tmp_path / "data.pt")
    script = (
        "import sys, torch\n"
        "x, y = torch.load(sys.argv[2])\n"
        "got = torch.export.load(sys.argv[1]).module()(x)\n"
        "torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-5)\n"
        "assert 'normcore' not in sys.modules\n"
        "print('equal')\n"
    )
    arguments = [sys.executable, "-c", script, tmp_path / "network.pt2", tmp_path / "data.pt"]
    run = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "equal", run.stderr


def test_aot_inductor() -> None:
    network, x = Network(), torch.randn(2, 3, 8, 8)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: BATCH},))
    package = torch._inductor.aoti_compile_and_package(program)
    compiled = torch._inductor.aoti_load_package(package)
    for batch in (2, 5):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)


def test_onnx() -> None:
    network, x = Network(), torch.randn(2, 3, 8, 8)
    program = torch.onnx.export(
        network, (x,), dynamo=True, dynamic_shapes=({0: BATCH},), verbose=False
    )
    assert program is not None
    model = program.model_proto
    assert {node.domain for node in model.graph.node} == {""}
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}  # folded
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for batch in (2, 5):
        x = torch.randn(batch, 3, 8, 8)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), network(x).detach(), rtol=1e-4, atol=1e-4)
