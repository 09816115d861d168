"""normcore's modules inside models: compile, trace, functional calls, parametrizations."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import normcore


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        normcore.BatchNorm(num_features=8, axis=1, activation="relu"),
        nn.Conv2d(8, 8, 3),
        normcore.GroupNorm(num_features=8, num_groups=2, axis=1, dtype=None),
    )


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile(training: bool) -> None:
    eager = model().train(training)
    compiled = copy.deepcopy(eager)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8)
    for _ in range(2):
        want, got = eager(x), step(x)
        torch.testing.assert_close(got, want)
        want.square().sum().backward()
        got.square().sum().backward()
    for a, b in zip(compiled.state_dict().values(), eager.state_dict().values()):
        torch.testing.assert_close(a, b)
    # Sums of convolutions come in another order on a device.
    tolerance = {} if x.is_cpu else {"rtol": 1e-3, "atol": 1e-4}
    for p, q in zip(compiled.parameters(), eager.parameters()):
        torch.testing.assert_close(p.grad, q.grad, **tolerance)


@pytest.mark.parametrize("kind", [normcore.BatchNorm, normcore.GroupNorm])
def test_compile_with_another_batch_size(kind: Any) -> None:
    norm = kind(num_features=32)
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(norm, fullgraph=True, backend=counter, dynamic=True)
    for batch in (3, 4, 7):
        assert step(torch.randn(batch, 32)).shape == (batch, 32)
    assert counter.frame_count == 1


def test_trace_without_warnings(recwarn: pytest.WarningsRecorder) -> None:
    torch.jit.trace(normcore.BatchNorm(num_features=4).eval(), torch.randn(3, 4))
    assert not [w for w in recwarn if issubclass(w.category, torch.jit.TracerWarning)]


@pytest.mark.parametrize("kind", ["BatchNorm", "GroupNorm"])
@pytest.mark.parametrize("initialized", [True, False])
def test_fx_leaves_the_modules_whole(kind: str, initialized: bool) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = getattr(normcore, kind)(num_features=32 if initialized else None)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(torch.sin(x), residual=x) + self.norm(x)
            return y

    network = Network()
    graph = torch.fx.symbolic_trace(network)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["norm", "norm"]
    x = torch.randn(4, 32)
    assert torch.equal(copy.deepcopy(graph)(x), network(x))


@pytest.mark.parametrize("norm", [normcore.BatchNorm(), normcore.nn.GroupNorm(2, 4)], ids=str)
def test_fx_cannot_record_a_norm_as_the_root(norm: nn.Module) -> None:
    with pytest.raises(RuntimeError, match=r"Norm: expected torch.fx to record a model"):
        torch.fx.symbolic_trace(norm)


def test_a_first_call_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch, normcore\n"
        "normcore.BatchNorm()(torch.randn(3, 4))\n"
        "print('torch._dynamo' in sys.modules, 'torch.distributed.tensor' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert result.stdout.split() == ["False", "False"]


def test_functional_call() -> None:
    norm = normcore.BatchNorm(num_features=3)
    state = {name: t.clone() for name, t in norm.state_dict().items()}
    state["bias"] += 2
    y = torch.func.functional_call(norm, state, torch.randn(8, 3))
    torch.testing.assert_close(y.mean(0), torch.full((3,), 2.0))
    assert not torch.equal(state["mean"], torch.zeros(3))
    assert torch.equal(norm.mean, torch.zeros(3))


def test_parametrization() -> None:
    class Double(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return 2 * t

    x = torch.randn(8, 3)
    norm = normcore.BatchNorm(num_features=3)
    plain = norm(x)
    nn.utils.parametrize.register_parametrization(norm, "scale", Double())
    assert torch.equal(norm(x), 2 * plain)
