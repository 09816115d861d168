"""Streams, devices, host synchronization, running statistics on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from devices import needs_cuda
from shape_list import Shape
from tolerance import assert_close
from torch import Tensor
from workloads import LARGE, NORMS, SMALL, Workload, assert_same_bits, name_of

import normcore
import normcore.functional as NF

pytestmark = needs_cuda


@pytest.mark.parametrize("shape", [SMALL[2], SMALL[6], LARGE[2], LARGE[4]], ids=name_of)
@pytest.mark.parametrize("norm", NORMS)
def test_two_streams_at_once(norm: str, shape: Shape) -> None:
    """Calls that overlap on two streams give what they give alone: no counter is shared."""
    workload = Workload.random(norm, shape, torch.bfloat16)
    want = workload.to("cuda").run()
    streams = [torch.cuda.Stream() for _ in range(2)]
    copies = [[workload.to("cuda") for _ in range(10)] for _ in streams]
    torch.cuda.synchronize()
    results: list[dict[str, Tensor]] = []
    for pair in zip(*copies, strict=True):
        for stream, own in zip(streams, pair, strict=True):
            with torch.cuda.stream(stream):
                results.append(own.run())
    torch.cuda.synchronize()
    for got in results:
        assert_same_bits(got, want, "on a side stream")


def test_a_call_waits_for_its_stream_only() -> None:
    """Work that is enqueued on another stream does not hold a call up."""
    workload = Workload.random("batch_norm", SMALL[1]).to("cuda")
    workload.run()
    busy, done = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(6_000_000_000)  # cycles: a few seconds
        done.record()
    workload.run()
    torch.cuda.current_stream().synchronize()
    assert not done.query()
    torch.cuda.synchronize()


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Makes every operation of torch that waits for the device raise."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_synchronization_would_be_noticed() -> None:
    x = torch.ones(1, device="cuda")
    with no_synchronization(), pytest.raises(RuntimeError, match="synchroniz"):
        x.item()


@pytest.mark.parametrize("shape", SMALL, ids=name_of)
@pytest.mark.parametrize("norm", NORMS)
def test_nothing_synchronizes(norm: str, shape: Shape) -> None:
    counted = {"num_batches_tracked": torch.tensor(0), "momentum": None}
    options = counted if norm == "batch_norm" else {}
    workload = Workload.random(norm, shape, masked=True, activation="silu", **options).to("cuda")
    with no_synchronization():
        workload.run()


@pytest.mark.parametrize("kind", [normcore.BatchNorm, normcore.GroupNorm])
def test_modules_do_not_synchronize(kind: type[torch.nn.Module]) -> None:
    module = kind(num_features=32, axis=1, device="cuda")
    x = torch.randn(4, 32, 9, 9, device="cuda", requires_grad=True)
    grad = torch.randn_like(x)
    with no_synchronization():
        module(x).backward(grad)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", SMALL, ids=name_of)
def test_running_statistics_on_the_device(shape: Shape, momentum: float | None) -> None:
    """Several training calls: decay or cumulative average, and the count of batches."""
    features = shape.features
    mean, var = torch.zeros(features, device="cuda"), torch.ones(features, device="cuda")
    count = torch.tensor(0, device="cuda")
    want_mean, want_var = torch.zeros(features).double(), torch.ones(features).double()
    others = [a for a in range(len(shape.size)) if a != shape.axis[0] % len(shape.size)]
    length = shape.lay_out(torch.empty(shape.size)).numel() // features[0]
    for step in range(1, 5):
        x = shape.randn(torch.float32) * step
        factor = 1 / step if momentum is None else momentum
        want_mean += factor * (x.double().mean(others) - want_mean)
        want_var += factor * (x.double().var(others) - want_var)
        NF.batch_norm(
            x.cuda(), mean, var, training=True, momentum=momentum, axis=shape.axis,
            num_batches_tracked=count,
        )  # fmt: skip
        assert count.item() == step
        assert_close(mean.cpu(), want_mean, length=length, magnitude=10.0, name="mean")
        assert_close(var.cpu(), want_var, length=length, magnitude=100.0, name="var")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("shape", [SMALL[1], SMALL[2], SMALL[6]], ids=name_of)
@pytest.mark.parametrize("norm", NORMS)
def test_every_device(norm: str, shape: Shape) -> None:
    """Tensors decide where a call runs, not the current device."""
    workload = Workload.random(norm, shape)
    want = {name: t.cpu() for name, t in workload.to("cuda:0").run().items()}
    for index in range(torch.cuda.device_count()):
        got = workload.to(f"cuda:{index}").run()
        assert torch.cuda.current_device() == 0
        assert all(t.device.index == index for t in got.values())
        assert_same_bits({name: t.cpu() for name, t in got.items()}, want, f"on device {index}")


def test_operands_on_several_devices_are_refused() -> None:
    x = torch.randn(3, 4, device="cuda")
    with pytest.raises(ValueError, match="expected weight on device cuda:0, got cpu"):
        NF.group_norm(x, 2, torch.ones(4))
