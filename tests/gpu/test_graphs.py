"""Training steps recorded as a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from devices import needs_cuda
from shape_list import Shape
from torch import Tensor
from workloads import LARGE, NORMS, SMALL, Workload, assert_same_bits, name_of

import normcore

pytestmark = needs_cuda


def record(
    workload: Workload, run: Callable[[Workload], dict[str, Tensor]] = Workload.run
) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    """A graph of one run on the workload's own tensors, and the results it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(workload.to("cuda"))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(workload)
    return graph, results


@pytest.mark.parametrize("cumulative", [False, True], ids=["decay", "cumulative"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SMALL, LARGE[2], LARGE[4]], ids=name_of)
@pytest.mark.parametrize("norm", NORMS)
def test_replay(norm: str, shape: Shape, dtype: torch.dtype, cumulative: bool) -> None:
    """Each replay is a step: new input, the same bits as eager, statistics that move on.

    Counters between blocks are zero again after a replay, or the second one would go wrong.
    """
    if cumulative and norm != "batch_norm":
        pytest.skip("only training has a cumulative average")
    counted = {"num_batches_tracked": torch.tensor(3), "momentum": None} if cumulative else {}
    workload = Workload.random(norm, shape, dtype, activation="silu", **counted)
    captured, eager = workload.to("cuda"), workload.to("cuda")
    graph, results = record(captured)
    for step in range(4):
        x = shape.randn(dtype, mean=float(step)).cuda()
        captured.x.copy_(x)
        eager.x.copy_(x)
        graph.replay()
        assert_same_bits(results, eager.run(), f"in replay {step}")
        if cumulative:
            assert captured.operands["num_batches_tracked"].item() == 4 + step


@pytest.mark.parametrize("shape", [LARGE[0], LARGE[1], LARGE[3]], ids=name_of)
@pytest.mark.parametrize("norm", ["batch_norm", "group_norm"])
@pytest.mark.parametrize("path", ["cluster", "team"], indirect=True)
def test_replay_of_blocks_that_run_together(path: str, norm: str, shape: Shape) -> None:
    workload = Workload.random(norm, shape, torch.bfloat16)
    if not workload.takes(path):
        pytest.skip(f"the {path} path cannot run it")
    captured, eager = workload.to("cuda"), workload.to("cuda")
    graph, results = record(captured)
    for step in range(4):
        graph.replay()
        assert_same_bits(results, eager.run(), f"in replay {step}")


@pytest.mark.parametrize("shape", [SMALL[1], SMALL[2], SMALL[6]], ids=name_of)
@pytest.mark.parametrize("norm", NORMS)
def test_replay_of_double_backward(norm: str, shape: Shape) -> None:
    workload = Workload.random(norm, shape, activation="silu").to("cuda")
    want = workload.run_double()
    graph, results = record(workload, Workload.run_double)
    for step in range(3):
        for t in results.values():
            t.fill_(float("nan"))
        graph.replay()
        assert_same_bits(results, want, f"in replay {step}")


@pytest.mark.parametrize("shape", [SMALL[2], SMALL[6]], ids=name_of)
def test_replays_on_two_streams(shape: Shape) -> None:
    """Two graphs that run at once do not share counters."""
    workload = Workload.random("batch_norm", shape)
    want = workload.to("cuda").run()
    recorded = [(w, *record(w)) for w in (workload.to("cuda"), workload.to("cuda"))]
    streams = [torch.cuda.Stream() for _ in recorded]
    torch.cuda.synchronize()
    for stream, (_, graph, _) in zip(streams, recorded, strict=True):
        with torch.cuda.stream(stream):
            graph.replay()
    torch.cuda.synchronize()
    for _, _, results in recorded:
        assert_same_bits(results, want, "in a replay beside another")


def test_training_of_a_network() -> None:
    """Forward, backward and optimizer in one graph, against the same steps in eager mode."""

    def network() -> torch.nn.Module:
        torch.manual_seed(1)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 32, 3),
            normcore.BatchNorm(num_features=32, axis=1, activation="relu"),
            torch.nn.Conv2d(32, 32, 3),
            normcore.GroupNorm(num_features=32, num_groups=8, axis=1, activation="silu"),
        ).cuda()

    x = torch.randn(4, 3, 20, 20, device="cuda")
    captured, eager = network(), network()
    optimizers = {n: torch.optim.SGD(n.parameters(), lr=0.01) for n in (captured, eager)}

    def step(net: torch.nn.Module) -> None:
        optimizers[net].zero_grad(set_to_none=True)
        net(x).square().mean().backward()
        optimizers[net].step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(captured)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizers[captured].zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step(captured)
    for _ in range(5):
        graph.replay()
    for _ in range(3 + 5):
        step(eager)
    for got, want in zip(captured.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
