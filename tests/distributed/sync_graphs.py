"""Norms over ranks in compiled and exported programs, against the same without a compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from graphs import calls
from rank_groups import assert_the_same_everywhere, group_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor import config
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import normcore
import normcore.functional as NF

CHANNELS = 6


class Functional(nn.Module):
    """A call of the function with the group in one of its forms."""

    def __init__(self, group: Any, **options: Any) -> None:
        super().__init__()
        self.group, self.options = group, options
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("var", torch.ones(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return NF.batch_norm(
            x, self.mean, self.var, training=True, group=self.group, **self.options
        )


NORMS: dict[str, Callable[[], nn.Module]] = {
    "SyncBatchNorm": lambda: normcore.nn.SyncBatchNorm(CHANNELS, activation="relu"),
    "SyncBatchNorm of a group": lambda: normcore.nn.SyncBatchNorm(
        CHANNELS, process_group=group_of("world")
    ),
    "BatchNorm": lambda: normcore.BatchNorm(
        num_features=CHANNELS, axis=1, axis_name="data", activation="silu"
    ),
    "BatchNorm by rank": lambda: normcore.BatchNorm(
        num_features=CHANNELS,
        axis=1,
        axis_name="world",
        axis_index_groups=[[0, 1]],
        sync_weighting="rank",
    ),
    "GroupNorm": lambda: normcore.GroupNorm(
        num_features=CHANNELS, num_groups=2, axis=1, reduction_axes=(0, 1, 2, 3), axis_name="world"
    ),
    "group": lambda: Functional(group_of("world")),
    "name": lambda: Functional(group_of("world", "name"), activation="gelu"),
    "world": lambda: Functional("world"),
}


def network(norm: str) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, CHANNELS, 1), NORMS[norm](), nn.Conv2d(CHANNELS, 2, 1))


def own_part(sizes: tuple[int, ...]) -> Tensor:
    return torch.randn(sum(sizes), 3, 4, 5).split(sizes)[dist.get_rank()]


def steps(model: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of two training steps."""
    results: list[Tensor] = []
    for _ in range(2):
        x = x.detach().requires_grad_()
        y = function(x)
        y.square().sum().backward()
        assert x.grad is not None
        results += [y.detach(), x.grad]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*results, *gradients, *model.buffers()]


def check_compiled(norm: str, backend: str, sizes: tuple[int, ...]) -> None:
    """Results, and that there is one graph for all steps."""
    torch.compiler.reset()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data",))
    plain, model, x = network(norm), network(norm), own_part(sizes)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    one_thread = config.patch(compile_threads=1)  # no pool of processes for each rank
    with normcore.distributed.use_mesh(mesh), one_thread:
        got, want = steps(model, compiled, x), steps(plain, plain, x)
    assert counter.frame_count == 1
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5, equal_nan=True)
    for buffer in model.buffers():
        assert_the_same_everywhere(buffer)


def graphs_of(model: nn.Module, x: Tensor) -> list[list[str]]:
    """Calls in the forward and in the backward graph that a compiler is given."""
    found: list[list[str]] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.append(calls(graph))
        return graph.forward

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        result: Callable[..., Any] = aot_module_simplified(graph, inputs, fw_compiler=compiler)
        return result

    torch.compile(model, backend=backend, fullgraph=True)(x).square().sum().backward()
    return found


def collectives_of(graph: list[str]) -> list[str]:
    return [n for n in graph if "c10d" in n and "wait_tensor" not in n]


def check_graphs(norm: str) -> None:
    """One collective in each graph."""
    torch.compiler.reset()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data",))
    with normcore.distributed.use_mesh(mesh):
        graphs = graphs_of(network(norm), own_part((2, 3)))
    assert len(graphs) == 2
    for graph in graphs:
        assert collectives_of(graph) == ["_c10d_functional.all_reduce.default"]


def check_many_sizes() -> None:
    """A second size of the batch compiles for all."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network("SyncBatchNorm"), backend=counter, fullgraph=True)
    plain = network("SyncBatchNorm")
    frames = []
    for size in (2, 3, 5, 8):
        x = own_part((size, size + 1))
        y = compiled(x)
        y.sum().backward()
        torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-5)
        frames.append(counter.frame_count)
    assert frames[1:] == [2, 2, 2]


def check_data_parallel() -> None:
    """DistributedDataParallel, compiled, whose optimizer splits the graph where buckets end."""
    torch.compiler.reset()
    plain, model, x = network("SyncBatchNorm"), network("SyncBatchNorm"), own_part((3, 3))
    parallel = [DistributedDataParallel(m) for m in (model, plain)]
    compiled = torch.compile(parallel[0], backend="aot_eager")
    got, want = steps(model, compiled, x), steps(plain, parallel[1], x)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def check_compiled_autograd() -> None:
    torch.compiler.reset()
    plain, model, x = network("SyncBatchNorm"), network("SyncBatchNorm"), own_part((2, 3))
    want = steps(plain, plain, x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        got = steps(model, model, x)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def check_export(norm: str, strict: bool) -> None:
    """Evaluation has no collective: one rank exports what every program can run."""
    torch.compiler.reset()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data",))
    with normcore.distributed.use_mesh(mesh):
        model, x = network(norm).eval(), torch.randn(2, 3, 4, 5)
        if dist.get_rank() == 0:
            exported = torch.export.export(model, (x,), strict=strict)
            for program in (exported, exported.run_decompositions()):
                assert collectives_of(calls(program.graph_module)) == []
                torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
