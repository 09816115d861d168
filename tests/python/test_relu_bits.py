"""The bits of ReLU that batch norm in training keeps for its backward pass, not the residual."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import normcore
import normcore.functional as NF

pytestmark = pytest.mark.usefixtures("device")
ops = torch.ops.normcore
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULES = [1], 0.1, 1e-5, True  # axis, momentum, eps, unbiased

# Memory formats, with sizes that have bits.
FORMATS = {
    "rows": (torch.contiguous_format, (12, 16)),
    "rows of one position": (torch.contiguous_format, (5, 16, 1, 1)),
    "planes": (torch.contiguous_format, (3, 5, 4, 6)),
    "long planes": (torch.contiguous_format, (2, 2, 72, 64)),
    "channels_last": (torch.channels_last, (3, 24, 3, 5)),
    "channels_last_3d": (torch.channels_last_3d, (2, 8, 3, 2, 5)),
}


class Case:
    """Operands of y = relu(norm(x) + r), and the gradient of y."""

    def __init__(self, size: tuple[int, ...], format: torch.memory_format, dtype: torch.dtype):
        def elements() -> Tensor:
            return torch.randn(size).to(dtype).contiguous(memory_format=format)

        self.format = format
        self.x, self.r, self.dy = elements(), elements(), elements()
        self.w, self.b = torch.rand(size[1]) + 0.5, torch.randn(size[1])

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return self.x, self.w, self.b, self.r

    def forward(self, mask: Tensor | None = None, save: bool = True) -> Any:
        state = None, None, None
        order = self.format if save else None
        return ops._batch_norm_train(*self.operands, mask, *state, *RULES, "relu", None, order)

    def backward(self, *saved: Tensor, x: Tensor | None = None, mask: Tensor | None = None) -> Any:
        """Of mean, rstd and, instead of the residual, bits."""
        mean, rstd, *bits = saved
        r = None if bits else self.r
        x = self.x if x is None else x
        rest = [1], True, 1e-5, "relu", [True] * 4, *bits, *([self.format] if bits else [])
        return ops._batch_norm_backward(self.dy, x, self.w, self.b, r, mask, mean, rstd, *rest)


@pytest.fixture(params=FORMATS)
def format(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def case_of(format: str, dtype: torch.dtype = torch.float32) -> Case:
    memory_format, size = FORMATS[format]
    return Case(size, memory_format, dtype)


def unpacked(bits: Tensor, x: Tensor, format: torch.memory_format) -> Tensor:
    per_byte = 16 // x.element_size()
    assert bits.shape == (x.numel() // per_byte,)
    assert int(bits.max()) < 1 << per_byte
    elements = torch.stack([(bits >> i) & 1 for i in range(per_byte)], 1).bool()
    if format == torch.contiguous_format:
        return elements.view(x.shape)
    return elements.view(x.movedim(1, -1).shape).movedim(-1, 1)


def norm(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    return NF.batch_norm(x, None, None, w, b, training=True, activation="relu", residual=r)


def composed(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    """Of operations that have derivatives of any order."""
    axes = [d for d in range(x.ndim) if d != 1]
    centred = x - x.mean(axes, keepdim=True)
    xhat = centred * (centred.square().mean(axes, keepdim=True) + 1e-5).rsqrt()
    w, b = (p.view(-1, *[1] * (x.ndim - 2)) for p in (w, b))
    return torch.relu(xhat * w + b + r)


def leaves(case: Case, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in case.operands]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits(format: str, dtype: torch.dtype) -> None:
    case = case_of(format, dtype)
    y, _, _, bits = case.forward()
    assert bits.dtype == torch.uint8
    assert torch.equal(unpacked(bits, y, case.format), y > 0)
    meta = ops._batch_norm_train(
        *(t.to("meta") for t in case.operands), *[None] * 4, *RULES, "relu", None, case.format
    )[3]
    assert (meta.shape, meta.stride(), meta.dtype) == (bits.shape, bits.stride(), bits.dtype)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_bits_in_the_order_that_was_asked_for(format: torch.memory_format) -> None:
    """Whatever the strides of the input: compilers change them."""
    other = torch.channels_last if format == torch.contiguous_format else torch.contiguous_format
    case = Case((2, 16, 4, 8), other, torch.float32)
    want = case.forward(save=False)
    case.format = format
    y, mean, rstd, bits = case.forward()
    assert y.stride() == case.x.stride()
    torch.testing.assert_close(y, want[0])
    assert torch.equal(unpacked(bits, y, format), y > 0)
    assert all(map(torch.equal, case.backward(mean, rstd, bits), case.backward(mean, rstd)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(format: str, dtype: torch.dtype, masked: bool) -> None:
    case = case_of(format, dtype)
    mask = torch.rand(case.x.shape) > 0.3 if masked else None
    y, mean, rstd, bits = case.forward(mask)
    for got, want in zip(case.forward(mask, save=False), (y, mean, rstd, None), strict=True):
        assert got is want is None or torch.equal(got, want)
    of_bits = case.backward(mean, rstd, bits, mask=mask)
    of_residual = case.backward(mean, rstd, mask=mask)
    for got, want in zip(of_bits, of_residual, strict=True):
        assert torch.equal(got, want)
        assert (got.dtype, got.stride()) == (want.dtype, want.stride())


def test_autograd_keeps_bits_instead_of_the_residual(format: str) -> None:
    case, kept = case_of(format), []
    x, w, b, r = leaves(case)
    residual = r * 1

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = norm(x, w, b, residual)
    assert [t.dtype for t in kept].count(torch.uint8) == 1
    assert not any(t.data_ptr() == residual.data_ptr() for t in kept)
    kept.clear()
    gone = weakref.ref(residual)
    with torch.no_grad():
        residual.zero_()  # and may change
    want = case.backward(*case.forward(save=False)[1:3])
    got = torch.autograd.grad(y, (x, w, b, r), case.dy)
    assert all(map(torch.equal, got, want))
    del residual, y
    assert gone() is None


WITHOUT_BITS: dict[str, Callable[[], tuple[Case, dict[str, Any]]]] = {
    "positions": lambda: (Case((3, 8, 3, 7), torch.contiguous_format, torch.float32), {}),
    "channels": lambda: (Case((3, 6, 4, 4), torch.channels_last, torch.float32), {}),
    "positions of 16 bits": lambda: (
        Case((3, 8, 2, 6), torch.contiguous_format, torch.bfloat16),
        {},
    ),
    "float64": lambda: (Case((3, 8, 4, 8), torch.contiguous_format, torch.float64), {}),
    "residual of another dtype": lambda: (case_of("planes", torch.bfloat16), {"r": torch.float32}),
    "strides": lambda: (case_of("planes"), {"x": lambda x: x.transpose(0, 2).contiguous()}),
    "no activation": lambda: (case_of("planes"), {"activation": None}),
    "another activation": lambda: (case_of("planes"), {"activation": "silu"}),
    "no residual": lambda: (case_of("planes"), {"r": None}),
    "two axes": lambda: (case_of("planes"), {"axis": [1, 2]}),
}


@pytest.mark.parametrize("why", WITHOUT_BITS)
def test_inputs_without_bits(why: str) -> None:
    case, change = WITHOUT_BITS[why]()
    x, w, b, r = leaves(case)
    if "x" in change:
        x = change["x"](x).transpose(0, 2)
    r = r.detach().to(change["r"]).requires_grad_() if change.get("r") else r
    residual = None if "r" in change and change["r"] is None else r
    if "axis" in change:
        w = b = None  # type: ignore[assignment]
    activation = change.get("activation", "relu")
    args = x, w, b, residual, *[None] * 4, change.get("axis", [1]), *RULES[1:], activation, None
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ops._batch_norm_train(*args)[0]
    assert not any(t.dtype == torch.uint8 for t in kept)
    double = [None if t is None else t.detach().double().requires_grad_() for t in args[:4]]
    exact = ops._batch_norm_train(*double, *args[4:])[0]
    (got,), (want,) = (
        torch.autograd.grad(y, x, case.dy),
        torch.autograd.grad(exact, double[0], case.dy.double()),
    )
    close = (
        {"rtol": 1e-4, "atol": 1e-4} if x.dtype != torch.bfloat16 else {"rtol": 0.02, "atol": 0.02}
    )
    torch.testing.assert_close(got.double(), want, **close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_that_have_other_strides_in_the_backward_pass(dtype: torch.dtype) -> None:
    """As a compiler may give them."""
    case = Case((2, 16, 4, 8), torch.contiguous_format, dtype)
    _, mean, rstd, bits = case.forward()
    for x in (
        case.x.contiguous(memory_format=torch.channels_last),
        case.x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        of_bits = case.backward(mean, rstd, bits, x=x)
        assert all(map(torch.equal, of_bits, case.backward(mean, rstd, x=x)))
    elsewhere = torch.stack([bits, bits], 1)[:, 0]
    assert not elsewhere.is_contiguous()
    of_bits = case.backward(mean, rstd, elsewhere)
    assert all(map(torch.equal, of_bits, case.backward(mean, rstd)))


@pytest.mark.parametrize("change", [lambda t: t, lambda t: t[1:]], ids=["whole", "misaligned"])
def test_memory_that_starts_anywhere(change: Callable[[Tensor], Tensor]) -> None:
    memory = torch.randn(2 * 8 * 6 * 8 + 1)
    case = Case((2, 8, 6, 8), torch.contiguous_format, torch.float32)
    case.x = change(memory)[: case.x.numel()].view(case.x.shape)
    y, mean, rstd, bits = case.forward()
    assert torch.equal(unpacked(bits, y, torch.contiguous_format), y > 0)
    assert all(map(torch.equal, case.backward(mean, rstd, bits), case.backward(mean, rstd)))


@pytest.mark.parametrize("axis", [[4], [-5], [1, 1]])
def test_wrong_axes(axis: list[int]) -> None:
    x, w, b, r = leaves(case_of("planes"))
    with pytest.raises((IndexError, ValueError), match=r"^batch_norm: expected axis"):
        NF.batch_norm(x, None, None, w, b, True, axis=axis, activation="relu", residual=r)


def test_empty_inputs() -> None:
    for size in ((0, 8, 4, 4), (2, 8, 0, 4), (2, 0, 4, 4)):
        case = Case(size, torch.contiguous_format, torch.float32)
        tensors = leaves(case)
        y = norm(*tensors)
        got = torch.autograd.grad(y, tensors, case.dy)
        assert [g.shape for g in got] == [t.shape for t in tensors]
        assert not got[1].any()


def test_values_that_are_not_finite() -> None:
    case = case_of("planes")
    case.r.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    _, mean, rstd, bits = case.forward()
    assert int(bits.view(-1)[0]) & 7 == 3
    assert all(map(torch.equal, case.backward(mean, rstd, bits), case.backward(mean, rstd)))


def close_to(got: Any, want: Any) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=2e-4, atol=2e-4)


def test_second_derivatives(format: str) -> None:
    case = case_of(format)
    c = torch.randn_like(case.x)

    def derivatives(function: Callable[..., Tensor], dtype: torch.dtype) -> Any:
        x, w, b, r = leaves(case, dtype)
        dy = case.dy.to(dtype).requires_grad_()
        first = torch.autograd.grad(function(x, w, b, r), (x, w, r), dy, create_graph=True)
        loss = (first[0] * c).sum() + first[1].square().sum() + (first[2] * c).sum()
        second = torch.autograd.grad(loss, (x, w, dy), create_graph=True)
        third = torch.autograd.grad(second[0].square().sum(), (x, w))
        return (*first, *second, *third)

    got, want = derivatives(norm, torch.float32), derivatives(composed, torch.float64)
    for g, e in zip(got, want, strict=True):
        assert (g.double() - e).norm() <= 1e-4 * e.norm()


def test_transforms() -> None:
    case = case_of("planes")

    def loss(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        _, w, b, r = (t.to(dtype) for t in case.operands)
        return lambda x: (function(x, w, b, r) * case.dy.to(dtype)).sum()

    tangent = torch.randn_like(case.x)
    samples = torch.randn(3, *case.x.shape)
    for ours, exact in (
        [
            jvp(grad(loss(function, dtype)), (case.x.to(dtype),), (tangent.to(dtype),))
            for function, dtype in ((norm, torch.float32), (composed, torch.float64))
        ],
        [
            (vmap(grad(loss(norm, torch.float32)))(samples),),
            (torch.stack([grad(loss(composed, torch.float64))(x) for x in samples.double()]),),
        ],
    ):
        close_to(ours, exact)


def test_gradients_of_several_cotangents_at_once(format: str) -> None:
    case = case_of(format)
    tensors = leaves(case)
    y = norm(*tensors)
    dy = torch.randn(3, *y.shape)
    got = torch.autograd.grad(y, tensors, dy, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, tensors, g, retain_graph=True) for g in dy]
    for g, want in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(g, torch.stack(want))


class Block(torch.nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = normcore.nn.BatchNorm2d(channels, activation="relu")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x), residual=x)
        return y.sin()


def step(block: Callable[[Tensor], Tensor], network: Block, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = block(x)
    wanted = (x, *network.parameters())
    return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compile(backend: str, dynamic: bool, memory_format: torch.memory_format) -> None:
    torch.compiler.reset()
    network = Block(8)
    compiled = torch.compile(network, backend=backend, dynamic=dynamic, fullgraph=True)
    # The last has no bits as planes.
    sizes = [(2, 8, 4, 8), (3, 8, 6, 12), (3, 8, 6, 7)] if dynamic else [(2, 8, 4, 8)]
    for size in sizes:
        x = torch.randn(size).contiguous(memory_format=memory_format)
        for got, want in zip(step(compiled, network, x), step(network, network, x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_compiled_graphs_hold_bits() -> None:
    torch.compiler.reset()
    graphs: list[torch.fx.Graph] = []

    def compiler(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=compiler)
    network, x = Block(8), torch.randn(2, 8, 4, 8)
    step(torch.compile(network, backend=backend, fullgraph=True), network, x)
    _, backward = graphs
    op = ops._batch_norm_backward.default
    (call,) = (node for node in backward.nodes if node.target is op)
    given = dict(zip((a.name for a in op._schema.arguments), call.args, strict=True))
    assert given["residual"] is None
    assert given["relu_bits"].meta["val"].dtype == torch.uint8


def test_export_in_training() -> None:
    network, x = Block(8), torch.randn(2, 8, 4, 8)
    program = torch.export.export(network, (x,)).module()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    y = network(x)
    network.load_state_dict(state)
    torch.testing.assert_close(program(x), y)


def test_checkpoint() -> None:
    case = case_of("channels_last")
    tensors = leaves(case)
    y = checkpoint(norm, *tensors, use_reentrant=False)
    assert isinstance(y, Tensor)
    got = torch.autograd.grad(y, tensors, case.dy)
    assert all(map(torch.equal, got, torch.autograd.grad(norm(*tensors), tensors, case.dy)))
