"""Tensor subclasses and dispatch modes that know nothing of this library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

ops = torch.ops.normcore


class Wrapper(Tensor):
    """Holds a tensor, and hands every operator on to it."""

    held: Tensor
    seen: list[str]

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapper:
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, dtype=held.dtype, device=held.device, strides=held.stride()
        )
        self.held = held
        return self

    seen = []  # noqa: RUF012  (of all of them)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func.name().removeprefix("normcore::"))
        given = tree_map(lambda t: t.held if isinstance(t, Wrapper) else t, (args, kwargs or {}))
        result = func(*given[0], **given[1])
        return tree_map(lambda t: Wrapper(t) if isinstance(t, Tensor) else t, result)


class Logger(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name().removeprefix("normcore::"))
        return func(*args, **(kwargs or {}))


CALLS: dict[str, Callable[[Tensor, list[Tensor]], Tensor]] = {
    "_batch_norm_train": lambda x, stats: ops.batch_norm(x, *stats, training=True),
    "_batch_norm_eval": lambda x, stats: ops.batch_norm(x, *stats, activation="silu"),
    "_group_norm": lambda x, stats: ops.group_norm(x, 2),
}


@pytest.fixture(params=[torch.enable_grad, torch.no_grad, torch.inference_mode])
def mode(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("name", CALLS)
def test_wrapper_subclass(name: str, mode: Any) -> None:
    with mode():
        x = torch.randn(4, 6, 5)
        stats, expected_stats = ([torch.zeros(6), torch.ones(6)] for _ in range(2))
        Wrapper.seen.clear()
        y = CALLS[name](Wrapper(x), stats)
        assert Wrapper.seen == [name]
        assert isinstance(y, Wrapper)
        assert torch.equal(y.held, CALLS[name](x, expected_stats))
        assert all(map(torch.equal, stats, expected_stats))


def test_wrapper_subclass_of_an_instance_norm(mode: Any) -> None:
    """Composed of other operators: the subclass sees those in every mode."""
    with mode():
        x = torch.randn(4, 6, 5)
        Wrapper.seen.clear()
        y = ops._instance_norm_train(Wrapper(x), Wrapper(torch.zeros(6)), Wrapper(torch.ones(6)))
        assert "_instance_norm_train" not in Wrapper.seen
        assert "_batch_norm_train" in Wrapper.seen
        expected = ops._instance_norm_train(x, torch.zeros(6), torch.ones(6))
        assert torch.equal(y.held, expected)


@pytest.mark.parametrize("name", CALLS)
def test_dispatch_mode(name: str, mode: Any) -> None:
    with mode():
        x, stats = torch.randn(4, 6, 5), [torch.zeros(6), torch.ones(6)]
        with Logger() as logger:
            CALLS[name](x, stats)
        assert logger.seen == [name]


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors(name: str, mode: Any) -> None:
    with mode(), FakeTensorMode():
        y = CALLS[name](torch.randn(4, 6, 5), [torch.zeros(6), torch.ones(6)])
        assert y.shape == (4, 6, 5)


def test_gradients_of_a_wrapper_subclass() -> None:
    x, grad = torch.randn(4, 6, 5, requires_grad=True), torch.randn(4, 6, 5)
    wrapped = Wrapper(x.detach()).requires_grad_()
    for t, g in ((x, grad), (wrapped, Wrapper(grad))):
        ops.group_norm(ops.batch_norm(t, None, None, training=True), 2).backward(g)
    assert isinstance(wrapped.grad, Wrapper)
    assert torch.equal(wrapped.grad.held, x.grad)


def test_an_error_leaves_the_statistics_alone() -> None:
    stats = [torch.zeros(6), torch.ones(6)]
    with pytest.raises(ValueError, match="batch_norm: expected weight to have shape"):
        ops.batch_norm(Wrapper(torch.randn(4, 6)), *stats, torch.ones(3), training=True)
    assert torch.equal(stats[0], torch.zeros(6))
    assert torch.equal(stats[1], torch.ones(6))
