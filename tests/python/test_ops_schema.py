"""The operators themselves: schemas, registrations, shape inference, tracing and scripting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import normcore

pytestmark = pytest.mark.usefixtures("device")
ops = torch.ops.normcore

SCHEMAS = [
    "batch_norm(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor? weight=None, Tensor? bias=None, bool training=False, float? momentum=0.1, "
    "float eps=1e-05, *, int[1] axis=1, Tensor? mask=None, str? activation=None, "
    "Tensor? residual=None, bool unbiased=True, Tensor(c!)? num_batches_tracked=None, "
    'ScalarType? dtype=None, str? group=None, str sync_weighting="count") -> Tensor',
    "batch_norm_functional(Tensor input, Tensor running_mean, Tensor running_var, "
    "Tensor? weight=None, Tensor? bias=None, float? momentum=0.1, float eps=1e-05, *, "
    "int[1] axis=1, Tensor? mask=None, str? activation=None, Tensor? residual=None, "
    "bool unbiased=True, Tensor? num_batches_tracked=None, ScalarType? dtype=None, "
    'str? group=None, str sync_weighting="count") -> (Tensor, Tensor, Tensor)',
    "group_norm(Tensor input, int num_groups, Tensor? weight=None, Tensor? bias=None, "
    "float eps=1e-05, *, int[1] axis=1, int[]? reduction_axes=None, Tensor? mask=None, "
    "str? activation=None, Tensor? residual=None, ScalarType? dtype=None, str? group=None, "
    'str sync_weighting="count") -> Tensor',
    "explain(Tensor input, str op, *, int[1] axis=1, int num_groups=32, "
    "int[]? reduction_axes=None, Tensor? mask=None, str? activation=None, "
    "bool affine_per_sample=False, bool training=True, bool backward=False, "
    "Device? device=None) -> str",
    "_batch_norm_train(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor? mask, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, int[] axis, float? momentum, float eps, bool unbiased, "
    "str? activation, ScalarType? dtype, MemoryFormat? relu_bits_format=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "_batch_norm_eval(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor running_mean, Tensor running_var, int[] axis, float eps, str? activation, "
    "ScalarType? dtype) -> (Tensor, Tensor)",
    "_batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
    "Tensor? residual, Tensor? mask, Tensor mean, Tensor rstd, int[] axis, "
    "bool batch_statistics, float eps, str? activation, bool[4] output_mask, "
    "Tensor? relu_bits=None, MemoryFormat? relu_bits_format=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "_batch_norm_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, "
    "Tensor? grad_grad_bias, Tensor? grad_grad_residual, Tensor grad_output, Tensor input, "
    "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, Tensor mean, Tensor rstd, "
    "int[] axis, bool batch_statistics, float eps, str? activation, bool[5] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "_group_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, "
    "int num_groups, int[] axis, int[]? reduction_axes, float eps, str? activation, "
    "ScalarType? dtype) -> (Tensor, Tensor, Tensor)",
    "_group_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
    "Tensor? residual, Tensor? mask, Tensor mean, Tensor rstd, int num_groups, int[] axis, "
    "int[]? reduction_axes, float eps, str? activation, bool[4] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "_group_norm_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, "
    "Tensor? grad_grad_bias, Tensor? grad_grad_residual, Tensor grad_output, Tensor input, "
    "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, Tensor mean, Tensor rstd, "
    "int num_groups, int[] axis, int[]? reduction_axes, float eps, str? activation, "
    "bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
]

COMPOSITE = [
    "_group_norm_decomposed(Tensor input, int num_groups, Tensor? weight=None, Tensor? bias=None, "
    "float eps=1e-05, *, int[1] axis=1, int[]? reduction_axes=None, Tensor? mask=None, "
    "str? activation=None, Tensor? residual=None, ScalarType? dtype=None, str? group=None, "
    'str sync_weighting="count") -> Tensor',
    "_instance_norm_train(Tensor input, Tensor(a!) running_mean, Tensor(b!) running_var, "
    "Tensor? weight=None, Tensor? bias=None, float momentum=0.1, float eps=1e-05, *, "
    "int[1] axis=1, Tensor? mask=None, str? activation=None, Tensor? residual=None, "
    "ScalarType? dtype=None) -> Tensor",
    "_all_reduce_sum(Tensor t, str group) -> Tensor",
]

# What ranks do between the collectives; the derivatives are those of the composition.
SYNC = [
    "_sync_moments(Tensor input, Tensor? mask, int num_groups, int[] axis, int[]? reduction_axes, "
    "bool by_rank) -> Tensor",
    "_sync_statistics(Tensor own, Tensor total, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, bool unbiased, "
    "bool by_rank) -> (Tensor, Tensor, Tensor)",
    "_sync_apply(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, "
    "Tensor var, int num_groups, int[] axis, int[]? reduction_axes, float eps, str? activation, "
    "ScalarType? dtype) -> (Tensor, Tensor)",
    "_sync_gradient_sums(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
    "Tensor? residual, Tensor? mask, Tensor mean, Tensor rstd, int num_groups, int[] axis, "
    "int[]? reduction_axes, float eps, str? activation, bool[3] output_mask) "
    "-> (Tensor, Tensor, Tensor)",
    "_sync_gradient(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
    "Tensor? residual, Tensor? mask, Tensor mean, Tensor rstd, Tensor? sums, Tensor share, "
    "int num_groups, int[] axis, int[]? reduction_axes, float eps, str? activation, "
    "bool[2] output_mask) -> (Tensor, Tensor)",
]


@pytest.mark.parametrize("schema", [*SCHEMAS, *COMPOSITE, *SYNC], ids=lambda s: s.split("(")[0])
def test_schema_is_the_published_one(schema: str) -> None:
    name = schema.split("(")[0]
    packet = getattr(ops, name)
    assert packet.default._schema == torch._C.parse_schema(f"normcore::{schema}")
    assert torch.Tag.pt2_compliant_tag in packet.default.tags


LOW_LEVEL = [s.split("(")[0] for s in SCHEMAS if s.startswith("_")]


@pytest.mark.parametrize("name", LOW_LEVEL)
@pytest.mark.parametrize(
    "key",
    ["CPU", "CUDA", "Meta", "Autograd", "AutocastCPU", "AutocastCUDA", "FuncTorchBatched"],
)
def test_every_low_level_operator_is_registered_for(name: str, key: str) -> None:
    if key == "FuncTorchBatched" and name.endswith("double_backward"):
        key = "FuncTorchBatchedDecomposition"  # its formula
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"normcore::{name}", key)


@pytest.mark.parametrize("name", [s.split("(")[0] for s in SYNC])
@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta"])
def test_every_operator_between_collectives_is_registered_for(name: str, key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"normcore::{name}", key)


def parameters(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (
        (torch.rand(shape, dtype=dtype) + 0.5).requires_grad_(),
        torch.randn(shape, dtype=dtype).requires_grad_(),
    )


def statistics(channels: int) -> tuple[Tensor, Tensor]:
    return torch.randn(channels), torch.rand(channels) + 0.5


def nchw(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 6, 4, 5, dtype=dtype, requires_grad=True)


def channels_last() -> Tensor:
    x = torch.randn(3, 6, 4, 5).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_()


def batch_norm_train() -> Any:
    return ops.batch_norm, (nchw(), *statistics(6), *parameters(6), True), {}


def batch_norm_counted() -> Any:
    extra = {"num_batches_tracked": torch.tensor(2), "activation": "silu", "residual": nchw()}
    return ops.batch_norm, (nchw(), *statistics(6), *parameters(6), True, None), extra


def batch_norm_masked_last_axis() -> Any:
    mask = torch.rand(3, 6, 4, 1) > 0.3
    return ops.batch_norm, (nchw(), None, None, *parameters(5), True), {"axis": [-1], "mask": mask}


def batch_norm_eval() -> Any:
    return ops.batch_norm, (channels_last(), *statistics(6), *parameters(6)), {"activation": "gelu"}


def batch_norm_eval_half() -> Any:
    x = nchw(torch.bfloat16)
    return ops.batch_norm, (x, *statistics(6), *parameters(6)), {"dtype": torch.float32}


def batch_norm_promoted() -> Any:
    return ops.batch_norm, (nchw(), None, None, *parameters(6, dtype=torch.float64), True), {}


def batch_norm_functional() -> Any:
    return ops.batch_norm_functional, (nchw(), *statistics(6), *parameters(6)), {}


def group_norm_decomposed() -> Any:
    options = {"axis": -1, "activation": "silu"}
    return ops._group_norm_decomposed, (nchw(), 5, None, None), options


def group_norm() -> Any:
    return ops.group_norm, (nchw(), 3, *parameters(6)), {}


def group_norm_channels_last() -> Any:
    extra = {"activation": "gelu_tanh", "residual": nchw()}
    return ops.group_norm, (channels_last(), 2, *parameters(6)), extra


def group_norm_per_sample() -> Any:
    return ops.group_norm, (nchw(), 6, *parameters(3, 6)), {"activation": "silu"}


def group_norm_kept_axes() -> Any:
    mask = torch.rand(3, 6, 4, 5) > 0.3
    extra = {"axis": [3], "reduction_axes": [0, 3, 1], "mask": mask}
    return ops.group_norm, (nchw(), 5, *parameters(5)), extra


def low_level_train() -> Any:
    x = channels_last()
    args = (x, *parameters(6), nchw(), None, *statistics(6), torch.tensor(0))
    return ops._batch_norm_train, (*args, [1], 0.1, 1e-5, True, "relu", None), {}


def low_level_train_with_relu_bits() -> Any:
    x, r = torch.randn(3, 6, 4, 8), torch.randn(3, 6, 4, 8, requires_grad=True)
    args = (x, *parameters(6), r, None, *statistics(6), None, [1], 0.1, 1e-5, True, "relu", None)
    return ops._batch_norm_train, args, {"relu_bits_format": torch.contiguous_format}


def low_level_backward_of_relu_bits() -> Any:
    _, (x, w, b, *rest), order = low_level_train_with_relu_bits()
    y, mean, rstd, bits = (t.detach() for t in ops._batch_norm_train(x, w, b, *rest, **order))
    args = (torch.randn_like(y), x, w, b, None, None, mean, rstd, [1], True, 1e-5, "relu")
    return ops._batch_norm_backward, (*args, [True] * 4, bits), order


def low_level_eval() -> Any:
    args = (nchw(), *parameters(6), None, *statistics(6))
    return ops._batch_norm_eval, (*args, [1], 1e-5, None, None), {}


def low_level_backward() -> Any:
    x, (w, b) = channels_last(), parameters(6)
    y, mean, rstd, _ = ops._batch_norm_train(
        x, w, b, None, None, None, None, None, [1], 0.1, 1e-5, True, "silu", None
    )
    args = (torch.randn_like(y), x, w, b, None, None, mean, rstd, [1], True, 1e-5, "silu")
    return ops._batch_norm_backward, (*args, [True, False, True, False]), {}


def low_level_eval_backward() -> Any:
    x, (w, b), (mean, var) = nchw(), parameters(6), statistics(6)
    y, rstd = ops._batch_norm_eval(x, w, b, None, mean, var, [1], 1e-5, None, None)
    args = (torch.randn_like(y), x, w, b, None, None, mean, rstd, [1], False, 1e-5, None)
    return ops._batch_norm_backward, (*args, [True, True, True, False]), {}


def low_level_group_norm() -> Any:
    return ops._group_norm, (nchw(), None, None, nchw(), None, 3, [1], None, 1e-5, None, None), {}


def low_level_group_norm_backward() -> Any:
    x, (w, b), r = nchw(), parameters(3, 6), nchw()
    y, mean, rstd = ops._group_norm(x, w, b, r, None, 2, [1], None, 1e-5, "relu", None)
    args = (torch.randn_like(y), x, w, b, r, None, mean, rstd, 2, [1], None, 1e-5, "relu")
    return ops._group_norm_backward, (*args, [True] * 4), {}


def low_level_double_backward() -> Any:
    _, (dy, *args, _), _ = low_level_backward()
    cotangents = nchw(), *parameters(6), None
    return ops._batch_norm_double_backward, (*cotangents, dy, *args, [True] * 4 + [False]), {}


def low_level_eval_double_backward() -> Any:
    _, (dy, *args, _), _ = low_level_eval_backward()
    cotangents = None, *parameters(6), None
    wanted = [True, False, True, False, False]
    return ops._batch_norm_double_backward, (*cotangents, dy, *args, wanted), {}


def low_level_group_norm_double_backward() -> Any:
    _, (dy, *args, _), _ = low_level_group_norm_backward()
    cotangents = channels_last(), None, parameters(3, 6)[1], nchw()
    return ops._group_norm_double_backward, (*cotangents, dy, *args, [True] * 5), {}


# Two ranks of a batch norm, or of a group norm with as many groups.
def sync_statistics(groups: int = 0, axis: int = 1) -> tuple[Tensor, ...]:
    x, other = nchw().detach(), nchw().detach()
    own, others = (ops._sync_moments(t, None, groups, [axis], None, False) for t in (x, other))
    return x, own, own + others


def low_level_sync_moments() -> Any:
    mask = torch.rand(3, 6, 4, 1) > 0.3
    return ops._sync_moments, (nchw().detach(), mask, 0, [-1], None, True), {}


def low_level_sync_statistics() -> Any:
    _, own, total = sync_statistics()
    args = (own, total, *statistics(6), torch.tensor(2), None, True, False)
    return ops._sync_statistics, args, {}


def low_level_sync_apply() -> Any:
    x, own, total = sync_statistics(3)
    mean, var, _ = ops._sync_statistics(own, total, None, None, None, 0.1, False, False)
    w, b = (t.detach() for t in parameters(6))
    return ops._sync_apply, (x, w, b, x, mean, var, 3, [1], None, 1e-5, "silu", None), {}


def low_level_sync_gradient_sums() -> Any:
    _, (x, w, b, r, mean, var, *norm, dtype), _ = low_level_sync_apply()
    y, rstd = ops._sync_apply(x, w, b, r, mean, var, *norm, dtype)
    args = (torch.randn_like(y), x, w, b, r, None, mean, rstd, *norm)
    return ops._sync_gradient_sums, (*args, [True, True, False]), {}


def low_level_sync_gradient() -> Any:
    _, (*args, mean, rstd, groups, axis, reduction, eps, activation, _), _ = (
        low_level_sync_gradient_sums()
    )
    norm = groups, axis, reduction, eps, activation
    sums, _, _ = ops._sync_gradient_sums(*args, mean, rstd, *norm, [True, False, False])
    share = torch.full_like(mean, 0.01)
    return ops._sync_gradient, (*args, mean, rstd, sums, share, *norm, [True, True]), {}


CASES = [
    batch_norm_train,
    batch_norm_counted,
    batch_norm_masked_last_axis,
    batch_norm_eval,
    batch_norm_eval_half,
    batch_norm_promoted,
    batch_norm_functional,
    group_norm_decomposed,
    group_norm,
    group_norm_channels_last,
    group_norm_per_sample,
    group_norm_kept_axes,
    low_level_train,
    low_level_train_with_relu_bits,
    low_level_backward_of_relu_bits,
    low_level_eval,
    low_level_backward,
    low_level_eval_backward,
    low_level_group_norm,
    low_level_group_norm_backward,
    low_level_double_backward,
    low_level_eval_double_backward,
    low_level_group_norm_double_backward,
    low_level_sync_moments,
    low_level_sync_statistics,
    low_level_sync_apply,
    low_level_sync_gradient_sums,
    low_level_sync_gradient,
]
# Those of one output, compiled to the operators that they run in eager mode.
PUBLIC = [
    case
    for case in CASES
    if not case.__name__.startswith("low_level")
    and case not in (batch_norm_functional, group_norm_decomposed)
]


def name_of(case: Callable[[], Any]) -> str:
    return case.__name__


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_opcheck(case: Callable[[], Any]) -> None:
    op, args, kwargs = case()
    opcheck(op.default, args, kwargs)


def run(case: Callable[[], Any], wrap: Callable[..., Any] = lambda f: f) -> list[Tensor]:
    """Output, gradients and mutated statistics of one training step of `case`."""
    torch.manual_seed(1)
    op, args, kwargs = case()
    arguments = (
        dict(zip((a.name for a in op.default._schema.arguments), args, strict=False)) | kwargs
    )
    tensors = [t for t in arguments.values() if isinstance(t, Tensor)]
    options = {name: a for name, a in arguments.items() if not isinstance(a, Tensor)}
    names = [name for name in arguments if name not in options]
    y = wrap(lambda *t: op(**dict(zip(names, t, strict=False)), **options))(*tensors)
    leaves = [t for t in tensors if t.requires_grad]
    grads = torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    return [y.detach(), *grads, *(t for t in tensors if not t.requires_grad)]


@pytest.mark.parametrize("case", PUBLIC, ids=name_of)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(case: Callable[[], Any], dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = run(
        case,
        lambda f: torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=dynamic),
    )
    for index, (got, want) in enumerate(zip(compiled, run(case), strict=True)):
        is_of_aten = "eval" in case.__name__
        if is_of_aten:
            torch.testing.assert_close(got, want)
        else:
            assert torch.equal(got, want)
        # Gradients through aten's operations may lose their strides on a device; y may not.
        assert got.stride() == want.stride() or (is_of_aten and index > 0 and not got.is_cpu)


def test_compiled_backward_calls_the_fused_operator() -> None:
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    from functorch.compile import make_boxed_compiler
    from torch._dynamo.backends.common import aot_autograd

    compiler = aot_autograd(fw_compiler=make_boxed_compiler(backend))
    run(group_norm, lambda f: torch.compile(f, backend=compiler, fullgraph=True))
    assert "normcore._group_norm.default" in names
    assert "normcore._group_norm_backward.default" in names


@pytest.mark.parametrize("case", [batch_norm_train, batch_norm_eval, group_norm], ids=name_of)
def test_compiled_autograd(case: Callable[[], Any]) -> None:
    torch.compiler.reset()
    want = run(case)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        got = run(case)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize(
    ("norm", "activation", "order"),
    [(norm, "silu", order) for norm in ("train", "eval", "group") for order in (1, 2)]
    + [("train", None, 1)],
)
def test_compiled_autograd_of_an_eager_forward(
    norm: str, activation: str | None, order: int
) -> None:
    """Operations before and after the norm: its node sees gradients that do not exist yet."""
    mean, var = statistics(6)

    def step(wrap: Callable[[], Any]) -> list[Tensor]:
        torch.manual_seed(1)
        x, (w, b), r = nchw(), parameters(6), nchw()
        if norm == "group":
            y = ops.group_norm(x * 2, 2, w, b, activation=activation, residual=r)
        else:
            options = {"activation": activation, "residual": r}
            y = ops.batch_norm(x * 2, mean.clone(), var.clone(), w, b, norm == "train", **options)
        loss = y.square().sum()
        if order == 2:
            grads = torch.autograd.grad(loss, (x, w, b, r), create_graph=True)
            loss = torch.stack([grad.square().sum() for grad in grads]).sum()
        with wrap():
            loss.backward()
        return [t.grad for t in (x, w, b, r)]

    def compiled() -> Any:
        return torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager"))

    torch.compiler.reset()
    want = step(contextlib.nullcontext)
    for _ in range(2):
        got = step(compiled)
        for g, e in zip(got, want, strict=True):
            torch.testing.assert_close(g, e)


@pytest.mark.parametrize("op", ["_batch_norm_train", "_group_norm"])
def test_shape_inference_keeps_sizes_symbolic(op: str) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if op == "_group_norm":
                return ops.group_norm(x, 3)
            return ops.batch_norm(x, None, None, training=True)

    batch, height = torch.export.Dim("batch"), torch.export.Dim("height")
    exported = torch.export.export(
        Model(), (torch.randn(4, 6, 5, 5),), dynamic_shapes=({0: batch, 2: height},)
    ).run_decompositions()
    x = torch.randn(7, 6, 3, 5)
    assert torch.equal(exported.module()(x), Model()(x))


def test_meta_tensors() -> None:
    x = torch.empty(3, 6, 4, 5, device="meta").permute(0, 2, 3, 1)
    y, mean, rstd = ops._group_norm(
        x, None, None, None, None, 3, [-1], [1, 3], 1e-5, None, torch.float16
    )
    assert (y.shape, y.dtype, y.stride()) == (x.shape, torch.float16, x.stride())
    assert (mean.shape, mean.dtype) == ((15, 3), torch.float64)
    assert (rstd.shape, rstd.dtype) == ((15, 3), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_saved_statistics(dtype: torch.dtype) -> None:
    x = torch.randn(4, 2, 3, 5).to(dtype)
    _, mean, rstd, _ = ops._batch_norm_train(
        x, None, None, None, None, None, None, None, [1, 2], 0.1, 1e-5, True, None, None
    )
    assert mean.dtype == torch.float64
    assert rstd.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = x.double().transpose(0, 1).transpose(1, 2).reshape(6, -1)
    # Deviations from a value of the slice are summed in the compute dtype, 60 of them.
    unit = torch.finfo(rstd.dtype).eps * (8 + 6)
    deviation = (exact - exact[:, :1]).abs().mean(1)
    assert ((mean - exact.mean(1)).abs() <= unit * deviation).all()
    want = (exact.var(1, correction=0) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.double(), want, rtol=unit, atol=0)


def test_autocast_changes_nothing(device: torch.device) -> None:
    x = torch.randn(3, 6, 4, dtype=torch.bfloat16, requires_grad=True)
    w, b = parameters(6)
    mean, var = statistics(6)
    residual = torch.randn(3, 6, 4)

    def results(enabled: bool) -> list[Tensor]:
        rm, rv = mean.clone(), var.clone()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            y = ops.batch_norm(x, rm, rv, w, b, True, residual=residual)
            z = ops.group_norm(y, 3, w, b, activation="silu")
            full = ops.batch_norm(residual, rm, rv, w, b)
        assert (y.dtype, z.dtype, full.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        grads = torch.autograd.grad(z.float().sum() + full.sum(), (x, w, b))
        assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
        return [y, z, full, rm, rv, *grads]

    for on, off in zip(results(True), results(False), strict=True):
        assert torch.equal(on, off)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript() -> None:
    @torch.jit.script
    def step(x: Tensor, rm: Tensor, rv: Tensor, w: Tensor, n: Tensor) -> Tensor:
        y = torch.ops.normcore.batch_norm(
            x, rm, rv, w, None, True, activation="relu", num_batches_tracked=n
        )
        return torch.ops.normcore.group_norm(y, 2, w, axis=[1], reduction_axes=[1, 2])

    x, (w, _), (rm, rv) = torch.randn(3, 6, 4, requires_grad=True), parameters(6), statistics(6)
    counts = torch.tensor(0), torch.tensor(0)
    scripted_mean, scripted_var = rm.clone(), rv.clone()
    got = step(x, scripted_mean, scripted_var, w, counts[0])
    y = ops.batch_norm(x, rm, rv, w, None, True, activation="relu", num_batches_tracked=counts[1])
    want = ops.group_norm(y, 2, w)
    for g, e in zip(
        (
            got,
            scripted_mean,
            scripted_var,
            counts[0],
            *torch.autograd.grad(got.pow(2).sum(), (x, w)),
        ),
        (want, rm, rv, counts[1], *torch.autograd.grad(want.pow(2).sum(), (x, w))),
        strict=True,
    ):
        assert torch.equal(g, e)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_one_operator_per_layer(training: bool) -> None:
    """A profile of a layer in eager mode: the public operator, the one below it, and no other."""
    model = torch.nn.Sequential(
        normcore.BatchNorm(num_features=6, axis=1, activation="relu"),
        normcore.GroupNorm(num_features=6, num_groups=2, axis=1),
    ).train(training)
    x = nchw()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = model(x)
    batch = "normcore::_batch_norm_train" if training else "normcore::_batch_norm_eval"
    # On a device torch's functions for memory and launches are among them.
    names = [event.name for event in profile.events()]
    assert [name for name in names if x.is_cpu or name.startswith("normcore::")] == [
        "normcore::batch_norm",
        batch,
        "normcore::group_norm",
        "normcore::_group_norm",
    ]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(y, x, torch.ones_like(y))
    ours = [event.name for event in profile.events() if "::" in event.name]
    assert [name for name in ours if name.startswith("normcore::")] == [
        "normcore::_group_norm_backward",
        "normcore::_batch_norm_backward",
    ]


def test_statistics_have_no_derivative_in_recorded_graphs() -> None:
    x, mean, var = torch.randn(3, 4), torch.zeros(4), torch.ones(4)

    def gradient(mean: Tensor) -> Tensor:
        return torch.func.grad(lambda m: ops.batch_norm(x, m, var).sum())(mean)

    def tangent(mean: Tensor) -> Any:
        return torch.func.jvp(lambda m: ops.batch_norm(x, m, var), (mean,), (var,))

    for function in (gradient, tangent):
        with pytest.raises(ValueError, match="running_mean"):
            function(mean)
        with pytest.raises(ValueError, match="running_mean"):
            torch.fx.experimental.proxy_tensor.make_fx(function)(mean)


def test_public_operator_promotes_to_float64() -> None:
    x = torch.randn(8, 3)
    w = torch.rand(3, dtype=torch.float64)
    y = ops.batch_norm(x, None, None, w, training=True)
    exact = ops.batch_norm(x.double(), None, None, w, training=True)
    assert y.dtype == torch.float32
    assert torch.equal(y, exact.float())
    assert ops.group_norm(x, 1, dtype=torch.float64).dtype == torch.float64
