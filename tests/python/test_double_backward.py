"""Double backward: against its formula, torch's norms and float64; saved tensors; training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from derivatives import ACTIVATIONS, MODES, leaf, norm
from double_backward_calls import CLOSE, INF, KINDS, NAN, OPERANDS, double, image, make_call
from shape_list import Shape, masks, shape_named, shapes
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile

import normcore

on_devices = pytest.mark.usefixtures("device")
ops = torch.ops.normcore

# ---- calls of the operators themselves


@on_devices
@pytest.mark.parametrize("shape", shapes(), ids=lambda s: s.name)
@pytest.mark.parametrize("mode", ["train", "eval", "group"])
def test_kernel_agrees_with_the_formula(mode: str, shape: Shape) -> None:
    """In every layout, on every axis; of empty inputs and of one value per channel too."""
    x = shape.randn()
    options: dict[str, Any] = {"axis": shape.axis, "running": mode == "eval"}
    if mode == "group":
        options["num_groups"] = shape.groups
    for mask, activation in zip(masks(x, [a % x.dim() for a in shape.axis]), [None, "silu", None]):
        results = make_call(x, mask=mask, activation=activation, **options).check()
        for i in (0, 1, 4):
            assert results[i].stride() == torch.empty_like(x).stride()
        if x.numel() == 0:
            assert not any(results[i].any() for i in (2, 3))
        if mode == "eval":
            break


@on_devices
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues_and_masks(activation: str | None, kind: str) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        x = image(layout)
        operands = OPERANDS if layout == torch.channels_last else OPERANDS[:3]
        for mask in masks(x, [1]):
            make_call(x, operands=operands, activation=activation, mask=mask, **KINDS[kind]).check()


@on_devices
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "eval"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_masked_out_values_without_a_gradient(activation: str | None, kind: str) -> None:
    """Those that are NaN or infinite count as the mean; nobody else sees them."""
    for layout in (torch.contiguous_format, torch.channels_last):
        for mask in list(masks(image(), [1]))[1:]:
            mask = mask.expand(3, 4, 5, 2).clone()
            mask[0] = mask[:, :, 0] = True
            clean = make_call(image(layout), activation=activation, mask=mask, **KINDS[kind])
            lost = ~mask
            t = clean.tensors
            t["grad_output"] = t["grad_output"].masked_fill(lost, 0.0)
            x = t["input"].clone()
            x[lost] = torch.tensor([NAN, INF, -INF, 1.0], dtype=x.dtype).repeat(30)[: lost.sum()]
            poisoned = clean.with_tensors(
                input=x, residual=t["residual"].masked_fill(lost & (double(3, 4, 5, 2) > 0), NAN)
            )
            for got, want in zip(poisoned.check(), clean(), strict=True):
                assert got.isfinite().all()
                where = mask if got.dim() == 4 else torch.ones_like(got, dtype=torch.bool)
                torch.testing.assert_close(got[where], want[where], **CLOSE)


@on_devices
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("eval", "whole batch")])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_slice_without_valid_values(activation: str | None, kind: str) -> None:
    """NaN where it has a gradient; elsewhere it is constant, and everything is finite."""
    for layout in (torch.contiguous_format, torch.channels_last):
        mask = torch.rand(3, 4, 5, 2) < 0.9
        empty = torch.zeros_like(mask)
        if kind == "train":
            empty[:, 1] = True
        elif kind == "some axes":
            empty[:, :2, 3, 1] = True
        else:
            empty[1, 2:] = True
        mask &= ~empty
        mask[:, :, 0] |= ~empty[:, :, 0]
        call = make_call(image(layout), activation=activation, mask=mask, **KINDS[kind])
        everywhere = call.check()
        assert torch.equal(everywhere[1].isnan(), empty)
        grad_output = call.tensors["grad_output"]
        half = empty & (torch.rand(empty.shape) < 0.5)
        results = call.with_tensors(grad_output=grad_output.masked_fill(half, 0.0)).check()
        assert torch.equal(results[1].isnan(), empty & ~half)
        x = call.tensors["input"].masked_fill(empty, NAN)
        nowhere = call.with_tensors(input=x, grad_output=grad_output.masked_fill(empty, 0.0))
        assert all(t.isfinite().all() for t in nowhere.check())


@on_devices
@pytest.mark.parametrize("kind", ["train", "eval", "group", "per sample"])
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_absent_operands(activation: str | None, kind: str) -> None:
    for given in itertools.product([False, True], repeat=3):
        operands = [name for name, is_given in zip(OPERANDS[1:], given) if is_given]
        results = make_call(
            image(), operands=operands, activation=activation, **KINDS[kind]
        ).check()
        assert [t is not None for t in results] == [True, True, *given]


@on_devices
@pytest.mark.parametrize("kind", ["train", "eval", "group", "per sample"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_absent_cotangents_are_zeros(activation: str | None, kind: str) -> None:
    call = make_call(image(), activation=activation, **KINDS[kind])
    for given in itertools.product([False, True], repeat=4):
        names = [f"grad_grad_{name}" for name, there in zip(OPERANDS, given) if not there]
        absent = call.with_tensors(**dict.fromkeys(names))
        zeros = {name: torch.zeros_like(call.tensors[name]) for name in names}
        torch.testing.assert_close(absent.check(), call.with_tensors(**zeros)(), **CLOSE)


@on_devices
@pytest.mark.parametrize(
    ("dtype", "activation"), [(torch.float32, "silu"), (torch.bfloat16, None)], ids=str
)
@pytest.mark.parametrize(
    "name", ["image_nchw", "image_channels_last", "many_small_samples", "slice_over_one_chunk"]
)
@pytest.mark.parametrize("mode", ["train", "eval", "group"])
def test_computes_what_is_asked_for(
    mode: str, name: str, dtype: torch.dtype, activation: str | None
) -> None:
    shape = shape_named(name)
    options = {"eval": {"running": True}, "group": {"num_groups": shape.groups}}.get(mode, {})
    call = make_call(shape.randn(dtype), activation=activation, **options)
    everything = call()
    for wanted in itertools.product([False, True], repeat=5):
        if sum(wanted) in (0, 1, 4):
            for got, expected, want in zip(call(wanted), everything, wanted, strict=True):
                assert torch.equal(got, expected) if want else got is None


# ---- accuracy


@on_devices
@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["train", "eval", "group", "per sample"])
def test_accuracy(kind: str, dtype: torch.dtype, mean: float) -> None:
    """Of a narrow input with float32 parameters. `mean`: in standard deviations."""
    if mean and dtype != torch.float32:
        pytest.skip("the input cannot hold it")
    for layout, activation in itertools.product(
        (torch.contiguous_format, torch.channels_last), (None, "gelu")
    ):
        x = (double(8, 16, 12, 10) + mean).to(dtype).contiguous(memory_format=layout)
        call = make_call(x, activation=activation, **KINDS[kind])
        parameters = ("weight", "bias", "grad_grad_weight", "grad_grad_bias")
        call = call.with_tensors(**{name: call.tensors[name].float() for name in parameters})
        exact = call.with_tensors(**{name: t.double() for name, t in call.tensors.items()})
        if call.running:
            call.running = call.running[0].float() + mean, call.running[1].float()
            exact.running = call.running[0].double(), call.running[1].double()
        got = call()
        assert [t.dtype for t in got] == [dtype, dtype, torch.float32, torch.float32, dtype]
        for result, want in zip(got, exact(), strict=True):
            limit = 1e-6 if result.dtype == torch.float32 else torch.finfo(result.dtype).eps / 2
            assert (result.double() - want).norm() <= limit * want.norm()


@on_devices
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("kind", ["train", "group", "per sample"])
def test_accuracy_with_a_nearly_constant_cotangent(kind: str, activation: str | None) -> None:
    """What u has in common over a slice does not matter to any result."""
    call = make_call(double(8, 4, 12, 10), activation=activation, **KINDS[kind])
    u = call.tensors["grad_grad_input"]
    single = {name: t.float() for name, t in call.tensors.items()}
    single["grad_grad_input"] = (u + 1e4).float()
    got = call.with_tensors(**single)()
    exact = call.with_tensors(**{name: t.double() for name, t in single.items()})()
    for result, want in zip(got, exact, strict=True):
        assert (result - want).norm() <= 2e-6 * want.norm()


@on_devices
def test_one_value_that_counts_beside_masked_out_ones() -> None:
    """It is the mean: nothing of u reaches x, and no large terms are left of it."""
    mask = torch.zeros(1, 4, 8, dtype=torch.bool)
    mask[..., 3] = True
    x, u = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    _, mean, rstd = ops._group_norm(x, None, None, None, mask, 4, [1], None, 1e-5, None, None)
    _, grad_x, *_ = ops._group_norm_double_backward(
        u, None, None, None, mask * torch.randn(1, 4, 8), x, None, None, None, mask, mean, rstd,
        4, [1], None, 1e-5, None, [True, True, False, False, False],
    )  # fmt: skip
    assert torch.equal(grad_x, torch.zeros_like(x))


@on_devices
@pytest.mark.parametrize("operand", ["input", "grad_output", "grad_grad_input"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_running_statistics_keep_positions_apart(activation: str | None, operand: str) -> None:
    """A value that is not finite, or whose sums overflow, changes its own results only."""
    for value in (float("nan"), float("inf"), 1e38):
        call = make_call(
            image(torch.contiguous_format).float(), activation=activation, **KINDS["eval"]
        )
        spoiled = call.tensors[operand].clone()
        spoiled[0, 1, 0, 0] = value
        for got, want in zip(
            call.with_tensors(**{operand: spoiled})()[:2], call()[:2], strict=True
        ):
            got[0, 1, 0, 0] = want[0, 1, 0, 0]
            assert torch.equal(got, want)


@on_devices
def test_results_have_the_dtype_of_their_operand() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.bfloat16, requires_grad=True)
    w = torch.rand(4, dtype=torch.float32, requires_grad=True)
    b = torch.rand(4, dtype=torch.float16, requires_grad=True)
    r = torch.rand(3, 4, 5, dtype=torch.float32, requires_grad=True)
    y = ops.group_norm(x, 2, w, b, activation="gelu", residual=r, dtype=torch.float32)
    dy = torch.randn(3, 4, 5, requires_grad=True)
    grads = torch.autograd.grad(y, (x, w, b, r), dy, create_graph=True)
    for create_graph in (False, True):
        second = torch.autograd.grad(
            sum(g.float().pow(2).sum() for g in grads),
            (dy, x, w, b, r),
            create_graph=create_graph,
            retain_graph=True,
        )
        assert [g.dtype for g in second] == [t.dtype for t in (dy, x, w, b, r)]


# ---- as derivatives


def second_derivative(
    function: Callable[..., Tensor], dy: Tensor, cotangents: Sequence[Tensor], *inputs: Tensor
) -> tuple[Tensor, ...]:
    grads = torch.autograd.grad(function(*inputs), inputs, dy, create_graph=True)
    return torch.autograd.grad(
        grads, (dy, *inputs), cotangents, create_graph=True, materialize_grads=True
    )


@on_devices
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", ["train", "eval", "group"])
def test_agrees_with_torch(mode: str, activation: str | None, layout: torch.memory_format) -> None:
    mean, var = double(4), double(4).square() + 0.5

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if mode == "group":
            return ops.group_norm(x, 2, w, b, activation=activation)
        return ops.batch_norm(
            x, mean.clone(), var.clone(), w, b, mode == "train", activation=activation
        )

    def torchs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if mode == "group":
            z = F.group_norm(x, 2, w, b)
        else:
            z = F.batch_norm(x, mean.clone(), var.clone(), w, b, mode == "train")
        return reference.ACTIVATIONS[activation](z)

    x, w, b = image(layout).requires_grad_(), leaf(4), leaf(4)
    arguments = leaf(*x.shape), [double(*t.shape) for t in (x, w, b)], x, w, b
    for got, want in zip(
        second_derivative(ours, *arguments), second_derivative(torchs, *arguments), strict=True
    ):
        torch.testing.assert_close(got, want, **CLOSE)


# What test_autograd.py and test_forward_mode.py have no second derivatives of.
@on_devices
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (1, 4, 1), (1, 4, 3)], ids=str)
def test_numerically_with_few_values(shape: tuple[int, ...], activation: str | None) -> None:
    inputs = leaf(*shape), leaf(4), leaf(4), leaf(*shape)
    for groups in (1, 2, 4):
        for mask in (None, torch.ones(shape, dtype=torch.bool)):
            options: Any = {"activation": activation, "mask": mask}
            assert gradgradcheck(
                lambda x, w, b, r, g=groups, o=options: ops.group_norm(x, g, w, b, residual=r, **o),
                inputs,
                fast_mode=True,
            )
    for mode in ("train", "eval"):
        assert gradgradcheck(norm(mode, activation=activation), inputs, fast_mode=True)


@on_devices
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("op", ["batch_norm", "group_norm"])
def test_numerically_with_an_empty_slice_and_values_that_do_not_count(
    op: str, activation: str | None
) -> None:
    inputs = leaf(2, 4, 3), leaf(4), leaf(4), leaf(2, 4, 3)
    mask = torch.ones(2, 4, 3, dtype=torch.bool)
    mask[0, :, 1] = False
    mask[1] = mask[1] if op == "batch_norm" else False
    mask[:, 2] = mask[:, 2] if op == "group_norm" else False
    bad = torch.where(mask, 0.0, torch.tensor([NAN, INF, -INF], dtype=torch.float64))

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        x = torch.where(mask, x, bad)
        y = norm("group" if op == "group_norm" else "train", activation=activation, mask=mask)
        return torch.where(mask, y(x, *rest), 0.0)

    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@on_devices
@pytest.mark.parametrize(
    ("mode", "activation"),
    [
        *(("eval", activation) for activation in ("silu", "gelu", "gelu_tanh")),
        ("train", None),
        ("train", "silu"),
        ("group", "gelu"),
        ("group of some axes", "gelu_tanh"),
    ],
)
def test_third_derivative(mode: str, activation: str | None) -> None:
    mask = torch.rand(2, 4, 3) < 0.8
    mask[..., 0] = mask[0, ::2] = True  # a value that counts in every slice
    function = norm(mode, activation=activation, **({} if mode == "eval" else {"mask": mask}))
    inputs = leaf(2, 4, 3), leaf(4), leaf(4), leaf(2, 4, 3)

    def gradients(dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs), inputs, dy, create_graph=True)

    assert gradgradcheck(
        gradients, (leaf(2, 4, 3), *inputs), fast_mode=True, check_fwd_over_rev=True
    )


@on_devices
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_forward_over_second_derivatives_far_away(activation: str) -> None:
    """Where one value counts, rstd is 1 / sqrt(eps), and the others lie hundreds of it away."""
    mask = torch.zeros(2, 4, 3, dtype=torch.bool)
    mask[0, :, 0] = True
    inputs = leaf(2, 4, 3), leaf(4), leaf(4), leaf(2, 4, 3)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, double(*t.shape)) for t in inputs]
        grads: Sequence[Tensor] = (norm("train", activation=activation, mask=mask)(*duals),)
        for _ in range(2):
            cotangents = [double(*t.shape) for t in grads]
            grads = torch.autograd.grad(grads, duals, cotangents, create_graph=True)
        for grad in grads:
            assert grad.isfinite().all()
            assert forward_ad.unpack_dual(grad).tangent.isfinite().all()


@on_devices
@pytest.mark.parametrize("mode", MODES)
def test_many_cotangents_at_once(mode: str) -> None:
    """Under vmap the node runs the formula, for all of them together."""
    inputs = leaf(2, 4, 3), leaf(4), leaf(4), leaf(2, 4, 3)
    dy = leaf(2, 4, 3)
    y = norm(mode, activation="silu")(*inputs)
    grads = torch.autograd.grad(y, inputs, dy, create_graph=True)
    every = [double(3, *t.shape) for t in grads]

    def second(cotangents: Sequence[Tensor], **options: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(grads, (dy, *inputs), cotangents, retain_graph=True, **options)

    got = second(every, is_grads_batched=True)
    want = [second([t[i] for t in every]) for i in range(3)]
    for g, *w in zip(got, *want, strict=True):
        torch.testing.assert_close(g, torch.stack(w), **CLOSE)


# ---- nodes and what they keep


def recorded(
    activation: str | None = "silu",
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Operands with the gradient of y, and gradients of the operands with a graph."""
    x, w, b, r, dy = leaf(3, 4, 2), leaf(4), leaf(4), leaf(3, 4, 2), leaf(3, 4, 2)
    y = ops.group_norm(x, 2, w, b, residual=r, activation=activation)
    grads = torch.autograd.grad(y, (x, w, b, r), dy, create_graph=True)
    return {"dy": dy, "x": x, "w": w, "b": b, "r": r}, grads


def total(grads: Sequence[Tensor]) -> Tensor:
    return torch.stack([g.pow(3).sum() for g in grads]).sum()


@on_devices
@pytest.mark.parametrize("op", ["batch_norm", "group_norm"])
def test_the_results_of_a_backward_pass_know_their_node(op: str) -> None:
    x, w = leaf(3, 4, 2), leaf(4)
    y = norm("group" if op == "group_norm" else "train")(x, w)
    name = "NormcoreGroupNormBackward" if op == "group_norm" else "NormcoreBatchNormBackward"
    assert y.grad_fn.name() == name
    grads = torch.autograd.grad(y, (x, w), torch.ones_like(y), create_graph=True)
    assert [g.grad_fn.name() for g in grads] == [f"{name}Backward"] * 2
    second = torch.autograd.grad(total(grads), (x, w), create_graph=True)
    assert all(g.requires_grad for g in second)


@on_devices
@pytest.mark.parametrize("name", ["dy", "x", "w", "b", "r"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_changes_before_the_second_backward_pass(activation: str | None, name: str) -> None:
    """Without an activation gradients do not depend on what is added, and it may change."""
    tensors, grads = recorded(activation)
    others = [t for key, t in tensors.items() if activation or key not in "br"]
    with torch.no_grad():
        tensors[name].add_(1)
    if activation is None and name in "br":
        assert all(t.isfinite().all() for t in torch.autograd.grad(total(grads[:2]), others))
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total(grads), others)


@on_devices
def test_without_an_activation_nothing_depends_on_what_is_added() -> None:
    tensors, grads = recorded(None)
    second = torch.autograd.grad(total(grads), list(tensors.values()), allow_unused=True)
    assert [t is None for t in second] == [False, False, False, True, True]


@on_devices
def test_retained_graphs() -> None:
    tensors, grads = recorded()
    inputs = list(tensors.values())
    everything = torch.autograd.grad(total(grads), inputs, retain_graph=True)
    for t, expected in zip(inputs, everything, strict=True):
        assert torch.equal(torch.autograd.grad(total(grads), t, retain_graph=True)[0], expected)
    torch.autograd.grad(total(grads), inputs)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total(grads), inputs)


@on_devices
def test_saved_tensor_hooks() -> None:
    x, w, b = leaf(3, 4, 2), leaf(4), leaf(4)
    y = ops.group_norm(x, 2, w, b)
    packed: list[torch.Size] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.shape)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        grads = torch.autograd.grad(y, (x, w), y, create_graph=True)
    assert sorted(packed) == sorted([x.shape, w.shape, b.shape, (3, 2), (3, 2), y.shape])
    plain = torch.autograd.grad(ops.group_norm(x, 2, w, b), (x, w), y, create_graph=True)
    for got, want in zip(
        torch.autograd.grad(total(grads), (x, w), retain_graph=True),
        torch.autograd.grad(total(plain), (x, w)),
        strict=True,
    ):
        assert torch.equal(got, want)


# ---- a gradient penalty


class Critic(nn.Module):
    def __init__(self, *, ours: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.score = nn.Linear(6 * 4 * 4, 1)
        if ours:
            options: Any = {"axis": 1, "dtype": torch.float64}
            self.batch = normcore.BatchNorm(num_features=8, activation="relu", **options)
            self.group = normcore.GroupNorm(
                num_features=6, num_groups=2, activation="silu", **options
            )
        else:
            self.batch = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
            self.group = nn.Sequential(nn.GroupNorm(2, 6), nn.SiLU())
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.second(self.batch(self.first(x))))
        return self.score(x.flatten(1))

    def loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """That of WGAN-GP."""
        share = torch.rand(len(real), 1, 1, 1, dtype=real.dtype)
        between = (share * real + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return self(fake).mean() - self(real).mean() + 10 * penalty


@on_devices
def test_training_with_a_gradient_penalty() -> None:
    models = [Critic(ours=True), Critic(ours=False)]
    with torch.no_grad():
        for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
            theirs.copy_(nn.init.normal_(mine, std=0.3))
    batches = double(3, 2, 4, 3, 8, 8)
    for model in models:
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for real, fake in batches:
            optimizer.zero_grad()
            model.loss(real, fake).backward()
            optimizer.step()
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_one_operator_per_layer() -> None:
    """A profile of a training step on the CPU: no pass of a norm runs any other operator."""
    model = Critic(ours=True)
    with profile(activities=[ProfilerActivity.CPU]) as steps:
        model.loss(double(4, 3, 8, 8), double(4, 3, 8, 8)).backward()
    ran: list[str] = []
    for event in steps.events():
        inner = [child.name for child in event.cpu_children]
        if event.name.startswith("normcore::_"):
            assert not inner
            ran.append(event.name)
        elif event.name.startswith("Normcore"):
            kind = "batch" if "Batch" in event.name else "group"
            order = "double_backward" if event.name.endswith("BackwardBackward") else "backward"
            assert inner == [f"normcore::_{kind}_norm_{order}"]
    for kind in ("batch", "group"):
        assert ran.count(f"normcore::_{kind}_norm_double_backward") == 1
