"""torch.compile: how often it compiles, what it generates, and what that computes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from graphs import Network, calls, of_normcore, reference
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import normcore

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _no_compiled_code() -> None:
    torch.compiler.reset()


def step(network: nn.Module, x: Tensor, wrap: Callable[..., Any] = lambda f: f) -> list[Tensor]:
    """Output, gradients and buffers of one training step of a copy."""
    network = copy.deepcopy(network)
    x = x.clone().requires_grad_()
    y = wrap(network)(x)
    y.square().sum().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert x.grad is not None
    return [y.detach(), x.grad, *gradients, *network.buffers()]


def check_step(network: nn.Module, x: Tensor, wrap: Callable[..., Any]) -> None:
    got, want = step(network, x, wrap), step(network, x)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_step(training: bool, backend: str) -> None:
    compiler = partial(torch.compile, backend=backend, fullgraph=True)
    check_step(Network(training=training), torch.randn(4, 3, 8, 8), compiler)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dynamic", [True, None])
def test_many_batch_sizes(training: bool, dynamic: bool | None) -> None:
    """One compilation for all; None: the second size says that there will be more."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        Network(training=training), backend=counter, fullgraph=True, dynamic=dynamic
    )
    counts = []
    for batch in (2, 3, 5, 8, 13):
        compiled(torch.randn(batch, 3, 8, 8)).sum().backward()
        counts.append(counter.frame_count)
    assert counts[-1] == counts[0 if dynamic else 1]


def graphs_of(network: nn.Module, x: Tensor) -> list[list[str]]:
    """Calls in the forward and in the backward graph that a compiler is given."""
    found: list[list[str]] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.append(calls(graph))
        return graph.forward

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        result: Callable[..., Any] = aot_module_simplified(graph, inputs, fw_compiler=compiler)
        return result

    torch.compile(network, backend=backend, fullgraph=True)(x).sum().backward()
    return found


def test_graphs() -> None:
    x = torch.randn(4, 3, 8, 8)
    forward, backward = graphs_of(Network(training=True), x)
    assert len([n for n in forward if "auto_functionalized" in n]) == 1
    assert of_normcore(forward) == ["normcore._group_norm.default"]
    assert sorted(of_normcore(backward)) == [
        "normcore._batch_norm_backward.default",
        "normcore._group_norm_backward.default",
    ]
    torch.compiler.reset()
    forward, backward = graphs_of(Network(norms="batch"), x)
    assert of_normcore(forward + backward) == []


def code_of(network: nn.Module, x: Tensor) -> tuple[Tensor, str]:
    y, code = run_and_get_code(torch.compile(network, fullgraph=True), x)
    return y, "\n".join(c[c.index("def call(") :] for c in code)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_running_statistics_are_updated_in_place(with_gradients: bool) -> None:
    """Without a copy of them: the operator is given the buffers themselves."""
    network = Network(training=True, norms="batch")
    with torch.set_grad_enabled(with_gradients):
        _, code = code_of(network, torch.randn(4, 3, 8, 8))
    (arguments,) = re.findall(r"torch\.ops\.normcore\._batch_norm_train\.default\((.*)\)", code)
    running = [a.strip() for a in arguments.split(",")][5:7]
    assert all(re.fullmatch(r"(arg|primals_)\d+(_1)?", name) for name in running), running
    assert "copy_" not in code


def test_evaluation_is_fused() -> None:
    network, x = Network(norms="batch"), torch.randn(4, 3, 8, 8)
    y, code = code_of(network, x)
    assert "normcore" not in code
    torch.testing.assert_close(y, reference(network)(x), rtol=1e-4, atol=1e-5)


def test_frozen_batch_norm_in_training() -> None:
    network = Network(training=True, norms="batch")
    network.batch.freeze()
    x = torch.randn(4, 3, 8, 8)
    _, code = code_of(network, x)
    assert "normcore" not in code
    torch.compiler.reset()
    check_step(network, x, partial(torch.compile, fullgraph=True))


def test_convolution_and_batch_norm_are_folded() -> None:
    network, x = Network(norms="batch"), torch.randn(4, 3, 8, 8)
    with torch.no_grad(), config.patch(freezing=True):
        y, code = code_of(network, x)
    assert "normcore" not in code
    assert "sqrt" not in code
    torch.testing.assert_close(y, reference(network)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_checkpoint_counts_a_batch_once(kind: str) -> None:
    contexts: Any = {}
    if kind == "selective":
        kept = [torch.ops.aten.convolution.default]
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, kept)

    def wrap(network: nn.Module) -> Callable[[Tensor], Tensor]:
        compiled: Callable[[Tensor], Tensor] = torch.compile(
            lambda x: checkpoint(network, x, use_reentrant=False, **contexts),
            backend="aot_eager",
            fullgraph=True,
        )
        return compiled

    check_step(Network(training=True), torch.randn(4, 3, 8, 8), wrap)


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_a_graph_recorded_inside_of_a_backward_pass_still_counts(name: str) -> None:
    """A checkpoint compiles again when it is computed again; later steps run that graph."""
    mean, var = torch.zeros(4), torch.ones(4)

    def norm(x: Tensor) -> Tensor:
        if name == "batch_norm":
            return normcore.functional.batch_norm(x, mean, var, training=True)
        return normcore.functional.instance_norm(x, mean, var)

    step = torch.compile(norm, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 4, 3, requires_grad=True)
    checkpoint(step, x, use_reentrant=True).sum().backward()
    for _ in range(3):
        before = mean.clone()
        step((torch.randn(5, 4, 3) + 5).requires_grad_()).sum().backward()
        assert (mean > before).all()


@pytest.mark.parametrize("axis", [1, -1])
def test_evaluation_keeps_the_memory_format(axis: int) -> None:
    norm = normcore.BatchNorm(num_features=8, axis=axis).eval()
    x = torch.randn(2, 8, 8, 8)
    for function in (lambda x: norm(x).view(-1, 8), lambda x: norm(x.mT).mT.view(-1, 8)):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), function(x), rtol=1e-4, atol=1e-5)
    last = normcore.BatchNorm(num_features=8, axis=axis).eval()
    for t in (x.permute(2, 1, 0, 3), x[:, :, ::2], x.to(memory_format=torch.channels_last)):
        torch.compiler.reset()
        compiled_last = torch.compile(last, backend="aot_eager", fullgraph=True)
        assert compiled_last(t).stride() == last(t).stride()


def test_reduce_overhead(device: torch.device) -> None:
    """CUDA graphs, on a device that has them: several steps, so that they are replayed."""
    network = Network(training=True).to(device)
    x = torch.randn(4, 3, 8, 8, device=device)
    eager, compiled = copy.deepcopy(network), copy.deepcopy(network)
    run = torch.compile(compiled, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        # Gradients of a replay are memory of the graph, which the next replay overwrites.
        for model in (eager, compiled):
            model.zero_grad(set_to_none=True)
        got, want = run(x), eager(x)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        got.square().sum().backward()
        want.square().sum().backward()
    for g, w in zip(compiled.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(g, w)
    for p, q in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_strides_of_fake_tensors(norm: str) -> None:
    """What the compiler believes of y is what the kernel gives."""
    layouts = {
        "contiguous": torch.randn(2, 4, 3, 5),
        "channels_last": torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last),
        "permuted": torch.randn(5, 3, 2, 4).permute(2, 3, 1, 0),
        "sliced": torch.randn(2, 4, 6, 5)[:, :, ::2],
        "expanded": torch.randn(2, 1, 3, 5).expand(2, 4, 3, 5),
        "empty": torch.randn(0, 4, 3, 5),
    }
    for name, x in layouts.items():
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(x)
        for dtype in (None, torch.float64):

            def call(t: Tensor, dtype: torch.dtype | None = dtype) -> Tensor:
                if norm == "batch":
                    return normcore.functional.batch_norm(t, None, None, training=True, dtype=dtype)
                return normcore.functional.group_norm(t, 2, dtype=dtype)

            with mode:
                y = call(fake)
            assert y.stride() == call(x).stride(), name
