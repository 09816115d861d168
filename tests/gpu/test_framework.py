"""torch.compile with inductor, autocast, and a library that was built without CUDA kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from devices import needs_cuda
from shape_list import Shape
from torch import Tensor, nn
from workloads import NORMS, SMALL, Workload, assert_same_bits, name_of

import normcore
import normcore.functional as NF


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        normcore.BatchNorm(num_features=32, axis=1, activation="relu", dtype=None),
        nn.Conv2d(32, 32, 3),
        normcore.GroupNorm(num_features=32, num_groups=8, axis=1, activation="silu", dtype=None),
    ).cuda()


@needs_cuda
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_inductor(layout: torch.memory_format, training: bool, mode: str) -> None:
    """One graph; values, gradients and statistics as in eager mode.

    With CUDA graphs ("reduce-overhead") no call may keep memory of the graphs' pool, and every
    replay is a step.
    """
    torch.compiler.reset()
    eager = network().train(training).to(memory_format=layout)
    compiled = copy.deepcopy(eager)
    step = torch.compile(compiled, fullgraph=True, mode=mode)
    for _ in range(2 if mode == "default" else 5):  # warm-up, recording, replays
        # Gradients of a replay are memory of the graph, which the next replay overwrites.
        torch.compiler.cudagraph_mark_step_begin()
        eager.zero_grad(set_to_none=True)
        compiled.zero_grad(set_to_none=True)
        x = torch.randn(4, 3, 24, 24, device="cuda").contiguous(memory_format=layout)
        want, got = eager(x), step(x)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        want.square().mean().backward()
        got.square().mean().backward()
        for p, q in zip(compiled.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-2, atol=1e-3)
    for a, b in zip(compiled.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@needs_cuda
@pytest.mark.parametrize("shape", [SMALL[1], SMALL[2], SMALL[6]], ids=name_of)
@pytest.mark.parametrize("norm", NORMS)
def test_inductor_calls_the_same_kernels(norm: str, shape: Shape) -> None:
    torch.compiler.reset()
    workload = Workload.random(norm, shape, torch.bfloat16)
    eager, compiled = workload.to("cuda"), workload.to("cuda")

    @torch.compile(fullgraph=True, backend="inductor")
    def function(x: Tensor) -> Tensor:
        return compiled.function(x, **compiled.operands)

    got, want = function(compiled.x), eager.forward()
    if norm == "batch_norm eval":
        # The graph has plain operations of torch instead, which inductor may contract.
        torch.testing.assert_close(got, want)
    else:
        assert_same_bits({"y": got}, {"y": want}, "with inductor")


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """Half precision in, half precision out; statistics and parameters stay float32."""
    net = network()
    x = torch.randn(4, 3, 24, 24, device="cuda")
    kinds: list[tuple[torch.dtype, torch.dtype]] = []
    for index in (1, 3):
        net[index].register_forward_hook(lambda _, i, y: kinds.append((i[0].dtype, y.dtype)))
    with torch.autocast("cuda", dtype):
        conv, norm = net[0](x), net[1]
        y = NF.batch_norm(conv, None, None, norm.scale, norm.bias, True)
        z = NF.group_norm(conv, 8, norm.scale, norm.bias)
        loss = net(x).float().square().mean()
    loss.backward()
    assert conv.dtype == y.dtype == z.dtype == dtype
    # The modules promote half precision with their float32 parameters, as Flax does.
    assert [k[0] for k in kinds] == [dtype, dtype]
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())
    assert net[1].mean.dtype == torch.float32
    exact = NF.group_norm(conv.double(), 8, norm.scale.double(), norm.bias.double())
    torch.testing.assert_close(z.double(), exact, rtol=2**-7, atol=2**-7)


@pytest.mark.skipif(
    normcore.build_info()["cuda"] or not torch.cuda.is_available(),
    reason="needs a CUDA device and a build without CUDA kernels",
)
def test_a_build_without_cuda_says_so() -> None:
    x = torch.randn(4, 8, device="cuda")
    for call in (
        lambda: NF.group_norm(x, 2),
        lambda: NF.batch_norm(x, None, None, training=True),
    ):
        with pytest.raises(NotImplementedError, match=r"no kernels for device cuda.*with nvcc"):
            call()
