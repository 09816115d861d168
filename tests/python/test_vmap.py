"""torch.vmap of the operators against a loop over the mapped axis."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

import normcore

ops = torch.ops.normcore
MODES = ["train", "eval", "group", "group of one sample", "group of some axes"]
SIZE = 3  # of the mapped axis
CLOSE: Any = {"rtol": 1e-10, "atol": 1e-11, "equal_nan": True}


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    """torch warns where it runs an operator sample by sample."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule.*")
        yield


def values(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


SHAPES = {"x": (2, 4, 3), "weight": (4,), "bias": (4,), "residual": (2, 4, 3), "mask": (4, 3)}


def norm(mode: str, activation: str | None = "silu") -> Callable[..., Tensor]:
    """f(x, weight, bias, residual, mask, mean, var): the operands of SHAPES, and statistics."""

    def function(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, mask: Tensor, *stats: Tensor
    ) -> Tensor:
        options: Any = {"activation": activation, "residual": residual}
        if mode == "eval":
            return ops.batch_norm(x, *stats, weight, bias, **options)
        options["mask"] = mask
        if mode == "train":
            return ops.batch_norm(x, None, None, weight, bias, True, **options)
        if mode == "group of one sample":
            return ops.group_norm(x, 2, weight, bias, reduction_axes=[0, 1, 2], **options)
        if mode == "group of some axes":
            return ops.group_norm(x, 2, weight, bias, reduction_axes=[1], **options)
        return ops.group_norm(x, 2, weight, bias, **options)

    return function


def operands() -> list[Tensor]:
    masks = torch.rand(SIZE, *SHAPES["mask"]) < 0.8
    masks[..., 0, :] = masks[..., 2, :] = True
    own = [values(SIZE, *shape) for name, shape in SHAPES.items() if name != "mask"]
    return [*own, masks, values(SIZE, 4), values(SIZE, 4).square() + 0.5]


def loop(function: Callable[..., Any], in_dims: tuple[int | None, ...], *tensors: Tensor) -> Any:
    results = [
        function(
            *(t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True))
        )
        for i in range(SIZE)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return tuple(torch.stack(r) for r in zip(*results, strict=True))


def check(
    function: Callable[..., Any],
    in_dims: tuple[int | None, ...],
    *tensors: Tensor,
    atol: float = CLOSE["atol"],
) -> None:
    got = vmap(function, in_dims=in_dims)(*tensors)
    torch.testing.assert_close(got, loop(function, in_dims, *tensors), **CLOSE | {"atol": atol})


@pytest.mark.parametrize("mode", MODES)
def test_every_subset_of_arguments(mode: str) -> None:
    own = operands()
    for mapped in itertools.product([True, False], repeat=len(own)):
        if any(mapped):
            tensors = [t if m else t[0] for t, m in zip(own, mapped, strict=True)]
            check(norm(mode), tuple(0 if m else None for m in mapped), *tensors)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_every_subset(mode: str) -> None:
    """Per-sample gradients: each index has parameters' gradients of its own."""
    own, wanted = operands(), (0, 1, 2, 3)
    gradients = grad(lambda *t: norm(mode)(*t).pow(3).sum(), argnums=wanted)
    for mapped in itertools.product([True, False], repeat=len(own)):
        if any(mapped):
            tensors = [t if m else t[0] for t, m in zip(own, mapped, strict=True)]
            check(gradients, tuple(0 if m else None for m in mapped), *tensors)


@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives(mode: str) -> None:
    """Of every operand, with one of the arguments mapped, all but one, or all."""
    own, wanted = operands(), (0, 1, 2, 3)
    first = grad(lambda *t: norm(mode)(*t).pow(3).sum(), argnums=wanted)
    second = grad(lambda *t: sum(g.pow(2).sum() for g in first(*t)), argnums=wanted)
    for mapped in itertools.product([True, False], repeat=len(own)):
        if sum(mapped) in (1, len(own) - 1, len(own)):
            tensors = [t if m else t[0] for t, m in zip(own, mapped, strict=True)]
            # slices of two values have terms that are far larger than their sum
            check(second, tuple(0 if m else None for m in mapped), *tensors, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_of_vmap(mode: str) -> None:
    tensors = operands()
    inputs = [t.requires_grad_() for t in tensors[:4]]
    dy = values(SIZE, *SHAPES["x"])
    got = torch.autograd.grad(vmap(norm(mode))(*tensors), inputs, dy)
    want = torch.autograd.grad(loop(norm(mode), (0,) * 7, *tensors), inputs, dy)
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("mode", MODES)
def test_other_axes(mode: str) -> None:
    tensors = operands()
    moved = [t.movedim(0, d) for t, d in zip(tensors, (1, 1, -1, 3, 2, 1, -1), strict=True)]
    got = vmap(norm(mode), in_dims=(1, 1, -1, 3, 2, 1, -1), out_dims=2)(*moved)
    want = loop(norm(mode), (0,) * 7, *tensors).movedim(0, 2)
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("axis", [[-1], [0, 2], [1, 2], [-1, 0]])
def test_feature_axes(axis: list[int]) -> None:
    x, mask = values(SIZE, 2, 3, 4), torch.rand(SIZE, 2, 3, 4) < 0.8
    shape = [x.shape[1:][a] for a in sorted(a % 3 for a in axis)]
    w, b = values(SIZE, *shape), values(SIZE, *shape)
    check(
        lambda x, w, b, m: ops.batch_norm(x, None, None, w, b, True, axis=axis, mask=m),
        (0, 0, None, 0),
        *(x, w, b[0], mask),
    )
    check(
        lambda x, w, b, m: ops.group_norm(x, 2, w, b, axis=axis, reduction_axes=[0, 1, 2], mask=m),
        (0, 0, None, 0),
        *(x, w, b[0], mask),
    )


def test_parameters_per_sample() -> None:
    x, w, b = values(SIZE, 2, 4, 3), values(SIZE, 2, 4), values(2, 4)

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ops.group_norm(x, 2, w, b)

    gradients = grad(lambda *t: function(*t).pow(3).sum(), argnums=(0, 1, 2))
    for transformed in (function, gradients):
        check(transformed, (0, 0, None), x, w, b)
        check(transformed, (None, 0, None), x[0], w, b)
        check(transformed, (0, None, None), x, w[0], b)


@pytest.mark.parametrize("mode", MODES)
def test_nested(mode: str) -> None:
    tensors = [t[0] for t in operands()]
    function = norm(mode)
    x, w = values(2, SIZE, *SHAPES["x"]), values(2, 4)

    def of_x_and_w(x: Tensor, w: Tensor) -> Tensor:
        return function(x, w, *tensors[2:])

    both = vmap(vmap(of_x_and_w, in_dims=(0, None)))(x, w)
    only_outer = vmap(lambda w: vmap(lambda x: of_x_and_w(x, w))(x[0]))(w)
    outer_x = vmap(lambda x: vmap(lambda w: of_x_and_w(x, w))(w))(x[:, 0])
    for i in range(2):
        for j in range(SIZE):
            torch.testing.assert_close(both[i, j], of_x_and_w(x[i, j], w[i]))
            torch.testing.assert_close(only_outer[i, j], of_x_and_w(x[0, j], w[i]))
        for j in range(2):
            torch.testing.assert_close(outer_x[i, j], of_x_and_w(x[i, 0], w[j]))


@pytest.mark.parametrize("mode", MODES)
def test_with_other_transforms(mode: str) -> None:
    tensors = [t[0] for t in operands()]
    function = norm(mode)
    x, tangent = values(SIZE, *SHAPES["x"]), values(SIZE, *SHAPES["x"])

    def of_x(x: Tensor) -> Tensor:
        return function(x, *tensors[1:])

    def loss(x: Tensor) -> Tensor:
        return of_x(x).pow(3).sum()

    check(lambda x, t: jvp(of_x, (x,), (t,)), (0, 0), x, tangent)
    want = loop(lambda x, t: jvp(of_x, (x,), (t,)), (0, 0), x, tangent)
    torch.testing.assert_close(jvp(vmap(of_x), (x,), (tangent,)), want)
    check(grad(lambda x: grad(loss)(x).pow(2).sum()), (0,), x)
    check(lambda x: vmap(grad(lambda x: loss(x.expand(2, -1, -1))))(x), (0,), x)
    torch.testing.assert_close(jacrev(loss)(x[0]), torch.autograd.functional.jacobian(loss, x[0]))


# ---- running statistics


def running() -> tuple[Tensor, Tensor, Tensor]:
    return values(SIZE, 4), values(SIZE, 4).square() + 0.5, torch.tensor([0, 4, 9])


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("mapped", ["all", "statistics", "input"])
def test_running_statistics(momentum: float | None, mapped: str) -> None:
    x, mask = values(SIZE, 2, 4, 3), torch.rand(SIZE, 2, 4, 3) < 0.8
    mask[1, :, 2] = False  # a channel that keeps its statistics
    ours, looped = running(), running()
    for mine, theirs in zip(ours, looped, strict=True):
        theirs.copy_(mine)
    w = values(SIZE, 4)
    is_mapped = {
        "all": (True,) * 3,
        "statistics": (False, True, False),
        "input": (True, False, False),
    }
    given = [t if m else t[0] for t, m in zip((x, w, mask), is_mapped[mapped], strict=True)]
    x, w, mask = given
    dims = tuple(0 if m else None for m in is_mapped[mapped])

    def function(x: Tensor, w: Tensor, m: Tensor, *state: Tensor) -> Tensor:
        mean, var, count = state
        return ops.batch_norm(
            x, mean, var, w, None, True, momentum, mask=m, num_batches_tracked=count
        )

    in_dims = (*dims, 0, 0, 0)
    y = vmap(function, in_dims=in_dims)(x, w, mask, *ours)
    torch.testing.assert_close(y, loop(function, in_dims, x, w, mask, *looped), equal_nan=True)
    torch.testing.assert_close(ours, looped)


def test_statistics_of_other_strides() -> None:
    x = values(SIZE, 2, 4, 3)
    (mean, var, count), looped = running(), running()
    for mine, theirs in zip((mean, var, count), looped, strict=True):
        theirs.copy_(mine)
    mean, var = mean.t().contiguous(), var.t().contiguous()

    def function(x: Tensor, mean: Tensor, var: Tensor, count: Tensor) -> Tensor:
        return ops.batch_norm(x, mean, var, training=True, num_batches_tracked=count)

    vmap(function, in_dims=(0, 1, 1, 0))(x, mean, var, count)
    loop(function, (0, 0, 0, 0), x, *looped)
    torch.testing.assert_close((mean.t(), var.t(), count), looped)


def test_statistics_that_are_the_same_for_all() -> None:
    """Parameters that differ: the statistics follow from the input, and are updated once."""
    x, w = values(2, 4, 3), values(SIZE, 4)
    state, expected = [t[0].clone() for t in running()], [t[0].clone() for t in running()]
    for mine, theirs in zip(state, expected, strict=True):
        theirs.copy_(mine)

    def function(w: Tensor, mean: Tensor, var: Tensor, count: Tensor) -> Tensor:
        return ops.batch_norm(x, mean, var, w, training=True, num_batches_tracked=count)

    y = vmap(function, in_dims=(0, None, None, None))(w, *state)
    function(w[0], *expected)
    torch.testing.assert_close(state, expected)
    for i in range(SIZE):
        scratch = [t[0].clone() for t in running()]
        torch.testing.assert_close(y[i], function(w[i], *scratch))


def test_one_set_of_statistics_cannot_be_updated_for_every_index() -> None:
    x, mean, var = values(SIZE, 2, 4), torch.zeros(4), torch.ones(4)
    with pytest.raises(ValueError, match="running_mean and running_var to be mapped by vmap"):
        vmap(lambda x: ops.batch_norm(x, mean, var, training=True))(x)
    assert torch.equal(mean, torch.zeros(4))
    assert torch.equal(var, torch.ones(4))


@pytest.mark.parametrize(
    ("count", "error", "match"),
    [
        (torch.zeros(SIZE, dtype=torch.int32), TypeError, "dtype int64"),
        (torch.zeros(SIZE, 2, dtype=torch.int64), ValueError, "one element"),
        (torch.zeros(1, dtype=torch.int64).expand(SIZE), ValueError, "not to be expanded"),
    ],
)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_counts_that_do_not_fit(
    count: Tensor, error: type[Exception], match: str, momentum: float | None
) -> None:
    x, mean, var = values(SIZE, 2, 4), torch.zeros(SIZE, 4), torch.ones(SIZE, 4)

    def function(x: Tensor, mean: Tensor, var: Tensor, count: Tensor) -> Tensor:
        return ops.batch_norm(x, mean, var, None, None, True, momentum, num_batches_tracked=count)

    with pytest.raises(error, match=match):
        vmap(function)(x, mean, var, count)
    assert mean.abs().sum() == 0
    assert count.sum() == 0


def test_no_index_at_all() -> None:
    x = values(0, 3, 4)
    assert vmap(lambda x: ops.group_norm(x, 2))(x).shape == (0, 3, 4)
    y = vmap(lambda x: ops.batch_norm(x, None, None, training=True))(x)
    assert y.shape == (0, 3, 4)


def test_errors_name_the_shapes_of_one_index() -> None:
    x = values(SIZE, 2, 4)
    with pytest.raises(ValueError, match=r"expected weight to have shape \[4\], got \[5\]"):
        vmap(lambda x: ops.group_norm(x, 2, torch.ones(5)))(x)
    with pytest.raises(IndexError, match="for an input of rank 2, got 2"):
        vmap(lambda x: ops.batch_norm(x, None, None, training=True, axis=2))(x)


def test_empty_input() -> None:
    state = running()
    before = [t.clone() for t in state]
    y = vmap(lambda x, m, v, n: ops.batch_norm(x, m, v, training=True, num_batches_tracked=n))(
        values(SIZE, 0, 4), *state
    )
    assert y.shape == (SIZE, 0, 4)
    assert vmap(lambda x: ops.group_norm(x, 2))(values(SIZE, 0, 4, 2)).shape == (SIZE, 0, 4, 2)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


# ---- the functional form


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_functional_form(momentum: float | None) -> None:
    x, (mean, var, count) = values(2, 4, 3), (t[1] for t in running())
    state = [t.clone() for t in (mean, var, count)]
    options: Any = {"momentum": momentum, "activation": "silu"}
    y, new_mean, new_var = normcore.functional.batch_norm_functional(
        x, mean, var, num_batches_tracked=count, **options
    )
    assert torch.equal(count, state[2])
    want = normcore.functional.batch_norm(
        x, state[0], state[1], training=True, num_batches_tracked=state[2], **options
    )
    assert torch.equal(y, want)
    assert torch.equal(new_mean, state[0])
    assert torch.equal(new_var, state[1])
    assert not torch.equal(mean, state[0])


def test_functional_form_of_every_subset() -> None:
    masks = torch.rand(SIZE, 2, 4, 3) < 0.8
    own = [values(SIZE, 2, 4, 3), *running(), values(SIZE, 4), masks]
    for momentum in (0.1, None):

        def function(
            x: Tensor,
            mean: Tensor,
            var: Tensor,
            count: Tensor,
            w: Tensor,
            mask: Tensor,
            momentum: float | None = momentum,
        ) -> Any:
            return ops.batch_norm_functional(
                x, mean, var, w, momentum=momentum, num_batches_tracked=count, mask=mask
            )

        for mapped in itertools.product([True, False], repeat=len(own)):
            if any(mapped):
                tensors = [t if m else t[0] for t, m in zip(own, mapped, strict=True)]
                in_dims = tuple(0 if m else None for m in mapped)
                got = vmap(function, in_dims=in_dims)(*tensors)
                want = loop(function, in_dims, *tensors)
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


# ---- models


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.batch = normcore.BatchNorm(num_features=8, axis=1, activation="relu")
        self.group = normcore.GroupNorm(num_features=8, num_groups=2, axis=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.group(self.batch(self.conv(x)))


@pytest.mark.parametrize("training", [True, False])
def test_ensemble(training: bool) -> None:
    models = [Block().train(training) for _ in range(SIZE)]
    x = torch.randn(2, 3, 6, 6)
    parameters, buffers = stack_module_state(models)
    base = Block().to("meta").train(training)

    def call(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return functional_call(base, (parameters, buffers), (x,))

    y = vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    for i, model in enumerate(models):
        torch.testing.assert_close(y[i], model(x), rtol=1e-4, atol=1e-5)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffers[name][i], buffer, rtol=1e-5, atol=1e-6)


def test_per_sample_gradients_of_a_model() -> None:
    model = Block().eval()
    x = torch.randn(SIZE, 3, 6, 6)
    parameters = dict(model.named_parameters())

    def loss(parameters: Any, x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x[None],)).square().sum()

    got = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(SIZE):
        want = grad(loss)(parameters, x[i])
        for name in want:
            torch.testing.assert_close(got[name][i], want[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_compiled(mode: str) -> None:
    torch.compiler.reset()
    tensors = operands()
    function = vmap(grad(lambda *t: norm(mode)(*t).pow(3).sum(), argnums=(0, 1)))
    got = torch.compile(function, backend="aot_eager", fullgraph=True)(*tensors)
    torch.testing.assert_close(got, function(*tensors), **CLOSE)
