"""Second derivatives and forward mode across ranks against those of one process.

The norms of one process are this library's, whose derivatives tests/python compares with others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_groups import group_of, members, total
from sync_calls import Call, make_input, make_operands
from torch import Tensor
from torch.autograd import forward_ad

import normcore.functional as NF

CLOSE: Any = {"rtol": 1e-11, "atol": 1e-11}
Function = Callable[..., Tensor]


def norm(call: Call, names: Sequence[str], mask: Tensor | None, group: Any) -> Function:
    """f(x, *tensors) of the given names."""

    def function(x: Tensor, *tensors: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(names[1:], tensors, strict=True))
        given |= {"mask": mask, "group": group, **call.options}
        if call.num_groups is None:
            return NF.batch_norm(x, None, None, training=True, **given)
        return NF.group_norm(x, call.num_groups, **given)

    return function


class Problem:
    """A norm of the whole batch and the one of this rank's part, and their operands."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._rank = members(call.layout).index(dist.get_rank())
        operands = make_operands(call)
        mask = operands.get("mask")
        self.names = ["x", *call.names]
        self.whole = [make_input(call), *(operands[name] for name in call.names)]
        self.of_whole = norm(call, self.names, mask, None)
        my_mask = None if mask is None else self.part(mask)
        self.of_part = norm(call, self.names, my_mask, group_of(call.layout))

    def part(self, t: Tensor) -> Tensor:
        return self._call.part(t, self._rank).clone()

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self.part(t) for t in tensors]

    def sum_of_all(self, t: Tensor) -> Tensor:
        return total(t, self._call.layout)

    def compare(self, got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
        """Gradients: this rank's part, or where all have the same operand, the sum over ranks."""
        for name, g, w in zip(self.names, got, want, strict=True):
            if name in ("x", "residual"):
                close(g, self.part(w), w, name)
            else:
                close(self.sum_of_all(g), w, w, name)


def close(got: Tensor, want: Tensor, scale: Tensor, name: str) -> None:
    """`scale`: the tensor whose largest value the tolerance is relative to."""
    largest = max(1.0, scale.abs().max().item()) if scale.numel() else 1.0
    torch.testing.assert_close(
        got / largest, want / largest, msg=lambda text: f"{name}: {text}", **CLOSE
    )


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def penalty_gradients(
    function: Function, tensors: Sequence[Tensor], cotangent: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of a function of the gradients, which is a sum over ranks as the loss is."""
    tensors = leaves(tensors)
    loss = (function(*tensors).pow(3) * cotangent).sum()
    of_x, *others = torch.autograd.grad(loss, tensors, create_graph=True)
    penalty = (of_x.square() * weights[0]).sum()
    for gradient, weight in zip(others, weights[1:], strict=True):
        penalty = penalty + (gradient * weight).sum()
    return torch.autograd.grad(penalty, tensors)


def check_double_backward(call: Call) -> None:
    problem = Problem(call)
    cotangent = torch.randn_like(problem.whole[0])
    weights = [torch.randn_like(t) for t in problem.whole]
    want = penalty_gradients(problem.of_whole, problem.whole, cotangent, weights)
    got = penalty_gradients(
        problem.of_part, problem.parts(problem.whole), problem.part(cotangent),
        problem.parts(weights),
    )  # fmt: skip
    problem.compare(got, want)


def check_gradients_as_functions(call: Call) -> None:
    """torch.func.grad and vjp: those of the sum of the losses of all ranks."""
    problem = Problem(call)
    cotangent = torch.randn_like(problem.whole[0])
    numbers = tuple(range(len(problem.names)))

    def gradients(function: Function, weights: Tensor, tensors: Sequence[Tensor]) -> Any:
        return torch.func.grad(lambda *t: (function(*t) * weights).sum(), numbers)(*tensors)

    own = problem.parts(problem.whole)
    want = gradients(problem.of_whole, cotangent, problem.whole)
    problem.compare(gradients(problem.of_part, problem.part(cotangent), own), want)
    _, pull = torch.func.vjp(problem.of_part, *own)
    problem.compare(pull(problem.part(cotangent)), want)


def check_forward_mode(call: Call) -> None:
    problem = Problem(call)
    tangents = [torch.randn_like(t) for t in problem.whole]
    want = torch.func.jvp(problem.of_whole, tuple(problem.whole), tuple(tangents))
    own, own_tangents = problem.parts(problem.whole), problem.parts(tangents)
    got = torch.func.jvp(problem.of_part, tuple(own), tuple(own_tangents))
    for name, g, w in zip(("y", "tangent"), got, want, strict=True):
        close(g, problem.part(w), w, name)
    with forward_ad.dual_level():  # a tangent of the input alone
        y = problem.of_part(forward_ad.make_dual(own[0], own_tangents[0]), *own[1:])
        tangent = forward_ad.unpack_dual(y).tangent
    others = [torch.zeros_like(t) for t in tangents[1:]]
    _, w = torch.func.jvp(problem.of_whole, tuple(problem.whole), (tangents[0], *others))
    close(tangent, problem.part(w), w, "tangent of x")


def check_hessian_times_vector(call: Call) -> None:
    """Forward over reverse mode."""
    problem = Problem(call)
    cotangent = torch.randn_like(problem.whole[0])
    directions = [torch.randn_like(t) for t in problem.whole]

    def product(
        function: Function,
        tensors: Sequence[Tensor],
        weights: Tensor,
        directions: Sequence[Tensor],
    ) -> list[Tensor]:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, d) for t, d in zip(leaves(tensors), directions)]
            gradients = torch.autograd.grad((function(*duals).pow(3) * weights).sum(), duals)
            return [forward_ad.unpack_dual(g).tangent for g in gradients]

    want = product(problem.of_whole, problem.whole, cotangent, directions)
    got = product(
        problem.of_part, problem.parts(problem.whole), problem.part(cotangent),
        problem.parts(directions),
    )  # fmt: skip
    problem.compare(got, want)


def _grad_of_grad(function: Function, x: Tensor, v: Tensor) -> Tensor:
    gradient = torch.func.grad(lambda x: function(x).pow(3).sum())
    return torch.func.grad(lambda x: (gradient(x) * v).sum())(x)


def _jvp_of_grad(function: Function, x: Tensor, v: Tensor) -> Tensor:
    gradient = torch.func.grad(lambda x: function(x).pow(3).sum())
    return torch.func.jvp(gradient, (x,), (v,))[1]


def _grad_of_jvp(function: Function, x: Tensor, v: Tensor) -> Tensor:
    tangent = torch.func.grad(lambda x: torch.func.jvp(function, (x,), (v,))[1].pow(3).sum())
    return tangent(x)


def _jvp_of_jvp(function: Function, x: Tensor, v: Tensor) -> Tensor:
    return torch.func.jvp(lambda x: torch.func.jvp(function, (x,), (v,))[1], (x,), (v,))[1]


NESTED: dict[str, Callable[[Function, Tensor, Tensor], Tensor]] = {
    "grad of grad": _grad_of_grad,
    "jvp of grad": _jvp_of_grad,
    "grad of jvp": _grad_of_jvp,
    "jvp of jvp": _jvp_of_jvp,
}


def check_nested(call: Call, name: str) -> None:
    """Transforms of torch.func within each other are refused, on all ranks alike."""
    problem = Problem(replace(call, names=()))
    x, v = problem.whole[0], torch.randn_like(problem.whole[0])
    with pytest.raises(NotImplementedError, match=r"transforms of torch\.func within each other"):
        NESTED[name](problem.of_part, problem.part(x), problem.part(v))


def check_vmap(call: Call) -> None:
    problem = Problem(replace(call, names=()))
    batch = torch.stack([problem.part(problem.whole[0])] * 2)
    with pytest.raises(NotImplementedError, match=r"under torch\.vmap; call it outside"):
        torch.vmap(problem.of_part)(batch)


class _NoGradient(torch.autograd.Function):
    """The identity, through which no gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def check_rank_without_gradient(call: Call) -> None:
    """The first rank's output has none: its loss is 0 for the others, which it keeps company."""
    problem = Problem(call)
    rank = dist.get_rank()
    weights = torch.randn_like(problem.whole[0])
    weights[: call.sizes[0]] = 0
    whole, own = leaves(problem.whole), leaves(problem.parts(problem.whole))
    want = torch.autograd.grad((problem.of_whole(*whole) * weights).sum(), whole)
    y = problem.of_part(*own)
    y = _NoGradient.apply(y) if rank == 0 else y * problem.part(weights)
    y.sum().backward()
    for name, t, w in zip(problem.names, own, want, strict=True):
        if name == "x":
            close(t.grad, problem.part(w), w, name)
        else:
            close(problem.sum_of_all(torch.zeros_like(t) if t.grad is None else t.grad), w, w, name)


def check_differences(call: Call) -> None:
    """First and second derivatives against differences of the loss and the gradient of all ranks,
    when the operands of all ranks move at once."""
    problem = Problem(call)
    own = problem.parts(problem.whole)
    cotangent = problem.part(torch.randn_like(problem.whole[0]))
    steps = problem.parts([torch.randn_like(t) for t in problem.whole])
    weights = problem.parts([torch.randn_like(t) for t in problem.whole])
    size = 1e-5

    def loss(tensors: Sequence[Tensor]) -> Tensor:
        return (problem.of_part(*tensors).pow(3) * cotangent).sum()

    def penalty(tensors: Sequence[Tensor]) -> Tensor:
        tensors = leaves(tensors)
        gradients = torch.autograd.grad(loss(tensors), tensors)
        return sum(((g * w).sum() for g, w in zip(gradients, weights)), torch.zeros(()))

    def slope(function: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
        ahead = function([t + size * s for t, s in zip(own, steps)])
        behind = function([t - size * s for t, s in zip(own, steps)])
        return problem.sum_of_all(ahead - behind) / (2 * size)

    tensors = leaves(own)
    first = torch.autograd.grad(loss(tensors), tensors, create_graph=True)
    second = torch.autograd.grad(
        sum(((g * w).sum() for g, w in zip(first, weights)), torch.zeros(())), tensors
    )
    for function, gradients in ((loss, first), (penalty, second)):
        along = sum(((g.detach() * s).sum() for g, s in zip(gradients, steps)), torch.zeros(()))
        torch.testing.assert_close(problem.sum_of_all(along), slope(function), rtol=1e-6, atol=1e-6)
