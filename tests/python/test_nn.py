"""normcore.nn beside torch.nn: results and errors; activation, residual and mask."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn_cases import (
    ACTIVATIONS,
    SIZES,
    assert_same,
    each_case,
    each_kind,
    on_every_device,
    one_thread,  # noqa: F401  (a fixture)
    pair,
    randomize,
    step,
)
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch_version import IS_2_11

import normcore
import normcore.nn as NN

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]


# ---- torch's results ----


@pytest.mark.parametrize("kind", SIZES)
def test_interface(kind: str) -> None:
    ours, theirs = getattr(NN, kind), getattr(nn, kind)
    assert issubclass(ours, theirs)
    assert ours.__name__ in NN.__all__
    *parameters, activation = inspect.signature(ours).parameters.values()
    assert parameters == list(inspect.signature(theirs).parameters.values())
    assert (activation.name, activation.default) == ("activation", None)
    assert activation.kind is inspect.Parameter.KEYWORD_ONLY
    own = inspect.signature(ours.forward).parameters
    assert list(own) == ["self", "input", "mask", "residual"]
    assert list(own)[:2] == list(inspect.signature(theirs.forward).parameters)


@on_every_device
@each_case
def test_results(kind: str, size: tuple[int, ...], options: dict[str, Any]) -> None:
    ours, theirs = pair(kind, **options)
    assert repr(ours) == repr(theirs)
    for training in (True, False, True):
        ours.train(training)
        theirs.train(training)
        x = torch.randn(size, dtype=torch.float64) * 2 + 1
        assert_same(step(ours, x), step(theirs, x))


@on_every_device
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("kind", ["BatchNorm2d", "BatchNorm3d", "InstanceNorm2d", "GroupNorm"])
def test_layouts(kind: str, layout: str, training: bool) -> None:
    ours, theirs = pair(kind)
    size = (3, 6, 4, 4, 2) if kind == "BatchNorm3d" else (3, 6, 4, 4)
    x = torch.randn(size, dtype=torch.float64)
    if layout == "channels_last":
        last = torch.channels_last_3d if kind == "BatchNorm3d" else torch.channels_last
        x = x.to(memory_format=last)
    else:
        x = x.transpose(-1, 0) if layout == "transposed" else x[..., ::2, :]
        x = x[:, :1].expand(-1, 6, *x.shape[2:]) if x.shape[1] != 6 else x
    ours.train(training)
    theirs.train(training)
    got = step(ours, x)
    assert_same(got, step(theirs, x))
    if layout == "channels_last":
        assert got["output"].stride() == got["gradient of input"].stride() == x.stride()


@on_every_device
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "size"), [(kind, SIZES[kind][-1]) for kind in SIZES], ids=str)
def test_half_input_with_float32_parameters(
    kind: str, size: tuple[int, ...], dtype: torch.dtype, training: bool, device: torch.device
) -> None:
    ours, theirs = pair(kind, torch.float32)
    ours.train(training)
    theirs.double().train(training)
    x = torch.randn(size).to(dtype)
    with torch.autocast(device.type, dtype):
        y = ours(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), theirs(x.double()), rtol=1e-2, atol=1e-2)
    assert all(t.dtype in (torch.float32, torch.int64) for t in ours.state_dict().values())
    ours.half()
    assert ours(x.half()).dtype == torch.float16


@each_kind
def test_empty_batch(kind: str, size: tuple[int, ...], options: dict[str, Any]) -> None:
    ours, theirs = pair(kind, **options)
    x = torch.randn(0, 6, *(5,) * (len(SIZES[kind][0]) - 2), dtype=torch.float64)
    if kind.startswith("InstanceNorm"):  # torch's has a gradient for none of them
        assert ours(x).shape == x.shape
        return
    assert_same(step(ours, x), step(theirs, x))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_cumulative_averages_of_a_loader(momentum: float | None) -> None:
    ours, theirs = pair("BatchNorm1d", momentum=momentum)
    batches = [torch.randn(n, 6, dtype=torch.float64) for n in (8, 8, 3)]
    for module in (ours, theirs):
        update_bn(batches, nn.Sequential(module))
    assert ours.num_batches_tracked == 3
    assert ours.momentum == momentum
    assert_same(ours.state_dict(), theirs.state_dict())


# ---- errors ----


def wrong(kind: str, *size: int, training: bool = True, **options: Any) -> Any:
    text = ", ".join([str(size), *(f"{k}={v}" for k, v in options.items())])
    return pytest.param(kind, size, training, options, id=f"{kind} {text} {training}")


ERRORS = [
    *(wrong("BatchNorm1d", *size) for size in [(), (6,), (2, 6, 3, 3), (1, 6), (1, 6, 1)]),
    *(wrong("BatchNorm2d", *size) for size in [(6, 3, 3), (2, 6, 3, 3, 3), (1, 6, 1, 1)]),
    *(wrong("BatchNorm3d", *size) for size in [(6, 3, 3, 3), (2, 6), (1, 6, 1, 1, 1)]),
    wrong("BatchNorm1d", 1, 6, training=False, track_running_stats=False),
    wrong("BatchNorm2d", 6, training=False),
    wrong("BatchNorm1d", 4, 6, eps=0.0),
    wrong("BatchNorm1d", 4, 6, eps=-1.0),
    wrong("BatchNorm1d", 4, 6, eps=-1.0, training=False),
    *(wrong("InstanceNorm1d", *size) for size in [(6,), (2, 6, 3, 3), (4, 6, 1), (6, 1)]),
    *(wrong("InstanceNorm2d", *size) for size in [(6, 3), (2, 6, 3, 3, 3), (2, 6, 1, 1)]),
    *(wrong("InstanceNorm3d", *size) for size in [(6, 3, 3), (2,) * 6, (6, 1, 1, 1)]),
    wrong("InstanceNorm2d", 6, 1, 1, training=False),
    *(wrong("InstanceNorm1d", *size, affine=True) for size in [(4, 5, 3), (5, 3)]),
    *(wrong("GroupNorm", *size) for size in [(), (6,), (1, 3), (1, 3, 1, 1)]),
    wrong("GroupNorm", 1, 3, 1, affine=False, training=False),
]


def raised(call: Callable[[], Any]) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (compared with another)
        call()
    return caught.type, str(caught.value)


@pytest.mark.parametrize(("kind", "size", "training", "options"), ERRORS)
def test_errors(kind: str, size: tuple[int, ...], training: bool, options: dict[str, Any]) -> None:
    ours, theirs = pair(kind, **options)
    ours.train(training)
    theirs.train(training)
    x = torch.randn(size, dtype=torch.float64)
    before = copy.deepcopy(ours.state_dict())
    got, want = raised(lambda: ours(x)), raised(lambda: theirs(x))
    if "eps" in options and IS_2_11:  # with another text
        got, want = got[:1], want[:1]
    assert got == want
    assert_same(ours.state_dict(), before, 0)


@pytest.mark.parametrize(
    ("kind", "size"),
    [("BatchNorm1d", (1, 6)), ("GroupNorm", (1, 3)), ("InstanceNorm2d", (6, 1, 1))],
)
def test_errors_in_torchscript(kind: str, size: tuple[int, ...]) -> None:
    x = torch.randn(size, dtype=torch.float64)
    got, want = (raised(lambda m=m: m(x)) for m in map(torch.jit.script, pair(kind)))
    assert got[0] is want[0] is torch.jit.Error
    assert got[1].splitlines()[-1] == want[1].splitlines()[-1]
    assert "Expected more than 1" in got[1]


@pytest.mark.parametrize("groups", [(4, 6), (0, 6)])
def test_errors_of_constructors(groups: tuple[int, int]) -> None:
    assert raised(lambda: NN.GroupNorm(*groups)) == raised(lambda: nn.GroupNorm(*groups))
    assert raised(lambda: NN.BatchNorm1d())[0] is TypeError
    with pytest.raises(TypeError, match="unexpected keyword argument 'axis'"):
        NN.BatchNorm1d(6, axis=1)


@pytest.mark.parametrize("size", [(4, 5, 3), (5, 3)])
def test_instance_norm_warns_of_other_channels(size: tuple[int, ...]) -> None:
    texts = []
    for kinds in (NN, nn):
        with pytest.warns(UserWarning, match="does not match num_features") as found:
            kinds.InstanceNorm1d(6)(torch.randn(size))
        texts.append([str(warning.message) for warning in found])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", SIZES)
def test_what_kernels_reject(kind: str) -> None:
    options = {} if kind == "GroupNorm" else {"track_running_stats": True}
    ours, theirs = pair(kind, **options)
    size = list(SIZES[kind][0])
    size[1] = 9
    x = torch.randn(size, dtype=torch.float64)
    before = copy.deepcopy(ours.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"expected \w+ to have shape \[9\], got \[6\]"):
            ours(x)
        with pytest.raises(RuntimeError):
            theirs(x)
    assert_same(ours.state_dict(), before, 0)
    with pytest.raises(TypeError, match=r"expected input to have dtype .*, got int64"):
        ours(torch.ones(SIZES[kind][0], dtype=torch.int64))


# ---- activation, residual and mask ----


def masked_norm(module: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """The definition of a module in training, with its update, in torch's operations."""
    unbatched = isinstance(module, nn.modules.instancenorm._InstanceNorm)
    unbatched = unbatched and x.dim() == module._get_no_batch_dim()
    counts = torch.ones_like(x) if mask is None else mask.to(x.dtype).expand_as(x)
    x, counts = (t[None] if unbatched else t for t in (x, counts))
    if isinstance(module, nn.GroupNorm):
        split = (x.shape[0], module.num_groups, -1, *x.shape[2:])
        axes = list(range(2, x.dim() + 1))
    else:
        split = x.shape
        axes = [0] * isinstance(module, nn.modules.batchnorm._BatchNorm) + [*range(2, x.dim())]
    values, counts = x.reshape(split), counts.reshape(split)
    n = counts.sum(axes, keepdim=True)
    mean = (values * counts).sum(axes, keepdim=True) / n
    var = ((values - mean).square() * counts).sum(axes, keepdim=True) / n
    y = ((values - mean) / (var + module.eps).sqrt()).reshape(x.shape)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    if module.weight is not None:
        y = y * module.weight.reshape(shape) + module.bias.reshape(shape)
    if getattr(module, "running_mean", None) is not None:
        new = {"running_mean": mean, "running_var": var * n / (n - 1)}
        for name, value in new.items():
            value = value.reshape(-1, x.shape[1]).mean(0).detach()
            getattr(module, name).lerp_(value, module.momentum)
        if axes[0] == 0:
            module.num_batches_tracked += 1
    return y[0] if unbatched else y


class Composition(nn.Module):
    """A module of torch and what extras of ours do, in torch's operations."""

    def __init__(self, norm: nn.Module, activation: str | None) -> None:
        super().__init__()
        self.norm = norm
        self.activation = activation

    def forward(
        self, x: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        of_running = not self.norm.training and getattr(self.norm, "track_running_stats", False)
        y = self.norm(x) if of_running else masked_norm(self.norm, x, mask)
        return ACTIVATIONS[self.activation](y if residual is None else y + residual)


def mask_for(kind: str, size: tuple[int, ...]) -> Tensor:
    """Of the whole size, with some elements of every channel and group of every sample."""
    mask = torch.rand(size) < 0.6
    if len(size) > 2 or kind.startswith("Instance"):
        mask[..., :2] = True
    elif kind == "BatchNorm1d":
        mask[:2] = True
    else:
        mask[:, ::2] = True
    return mask


@on_every_device
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("extras", "activation"),
    [
        ("mask", None),
        ("mask of lower rank", "relu"),
        ("residual", "silu"),
        ("mask, residual", "gelu"),
        ("mask, residual", "gelu_tanh"),
    ],
)
@pytest.mark.parametrize(
    ("kind", "size"), [(kind, size) for kind in SIZES for size in SIZES[kind][-2:]], ids=str
)
def test_extras(
    kind: str, size: tuple[int, ...], extras: str, activation: str | None, training: bool
) -> None:
    options = {} if kind == "GroupNorm" else {"affine": True, "track_running_stats": True}
    ours, theirs = pair(kind, **options)
    ours.activation = activation
    x = torch.randn(size, dtype=torch.float64)
    given: dict[str, Tensor] = {}
    if "mask" in extras:
        given["mask"] = mask_for(kind, size)
    if "lower rank" in extras and size != (4, 6):
        given["mask"] = torch.arange(size[-1]) != 1
    if "residual" in extras:
        given["residual"] = torch.randn(size, dtype=torch.float64)
    ours.train(training)
    theirs.train(training)
    got = step(ours, x, **given)
    want = step(Composition(theirs, activation), x, **given)
    assert_same(got, {name.replace("norm.", ""): t for name, t in want.items()}, 1e-11)


def test_the_gradient_of_a_residual() -> None:
    norm = NN.BatchNorm1d(6, activation="silu")
    x, residual = torch.randn(4, 6), torch.randn(4, 6, requires_grad=True)
    norm(x, residual=residual).sum().backward()
    other = residual.detach().requires_grad_()
    F.silu(nn.BatchNorm1d(6)(x) + other).sum().backward()
    torch.testing.assert_close(residual.grad, other.grad)


# ---- FrozenBatchNorm2d ----


def frozen(x: Tensor, state: dict[str, Tensor], eps: float) -> Tensor:
    """Its definition in torchvision."""
    w, b, mean, var = (
        state[name].reshape(1, -1, 1, 1)
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = w * (var + eps).rsqrt()
    return x * scale + (b - mean * scale)


@on_every_device
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.0, 0.1])
def test_frozen_batch_norm(eps: float, training: bool, layout: torch.memory_format) -> None:
    norm = randomize(NN.FrozenBatchNorm2d(6, eps)).double().train(training)
    assert list(norm.parameters()) == []
    x = torch.randn(4, 6, 5, 3, dtype=torch.float64).to(memory_format=layout)
    before = copy.deepcopy(norm.state_dict())
    got = step(norm, x)
    t = x.clone().requires_grad_()
    y = frozen(t, before, eps)
    cotangent = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    (grad,) = torch.autograd.grad(y, t, cotangent)
    assert_same(got, {"output": y.detach(), "gradient of input": grad, **before})
    assert got["output"].is_contiguous(memory_format=layout)


def test_state_of_frozen_batch_norm() -> None:
    norm = NN.FrozenBatchNorm2d(6)
    assert repr(norm) == "FrozenBatchNorm2d(6, eps=1e-05)"
    assert list(norm.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    x = torch.randn(4, 6, 5, 3)
    assert_same({"y": norm(x)}, {"y": x / (1 + 1e-5) ** 0.5}, 1e-6)
    _, trained = pair("BatchNorm2d", torch.float32)
    trained.eval()
    for state in (trained.state_dict(), dict(trained.state_dict())):
        result = norm.load_state_dict(state)
        assert result.missing_keys == result.unexpected_keys == []
        assert "num_batches_tracked" in state
    torch.testing.assert_close(norm(x), trained(x))
    nested = nn.Sequential(NN.FrozenBatchNorm2d(6))
    nested.load_state_dict(nn.Sequential(trained).state_dict())
    assert torch.equal(nested(x), norm(x))
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(twin(x), norm(x))
    assert norm(x.half()).dtype == torch.float16


def test_extras_of_frozen_batch_norm() -> None:
    norm = randomize(NN.FrozenBatchNorm2d(6, activation="gelu")).double()
    x, residual = torch.randn(2, 4, 6, 5, 3, dtype=torch.float64)
    want = F.gelu(frozen(x, norm.state_dict(), 1e-5) + residual)
    mask = torch.rand(5, 3) < 0.5  # there are no statistics to be taken
    torch.testing.assert_close(norm(x, residual=residual, mask=mask), want)


def test_compile_frozen_batch_norm() -> None:
    norm = randomize(NN.FrozenBatchNorm2d(6))
    x = torch.randn(4, 6, 5, 3)
    run = torch.compile(norm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(x), norm(x))


def test_is_a_part_of_the_package() -> None:
    assert normcore.nn is NN
    assert all(getattr(NN, name).__name__ == name for name in NN.__all__)
