"""Every rule about arguments: type and text of the error, the same for real and fake tensors, and
raised before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import place
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import normcore.functional as NF

pytestmark = pytest.mark.usefixtures("device")
ops = torch.ops.normcore


def x() -> Tensor:
    return torch.randn(3, 4, 5)


def train(input: Tensor | None = None, **arguments: Any) -> Callable[[], Any]:
    def call() -> Any:
        given = {"input": x() if input is None else place(input), "training": True}
        given |= {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
        given["num_batches_tracked"] = torch.tensor(0)
        return ops.batch_norm(**(given | place(arguments)))

    return call


def evaluate(**arguments: Any) -> Callable[[], Any]:
    return train(**{"training": False, **arguments})


def group(input: Tensor | None = None, num_groups: int = 2, **arguments: Any) -> Callable[[], Any]:
    def call() -> Any:
        return ops.group_norm(
            x() if input is None else place(input), num_groups, **place(arguments)
        )

    return call


def gradient_arguments(op: str) -> dict[str, Any]:
    """What the backward and the double backward operator of a norm have in common."""
    arguments: dict[str, Any] = {"grad_output": x(), "input": x(), "axis": [1], "eps": 1e-5}
    arguments |= dict.fromkeys(("weight", "bias", "residual", "mask", "activation"))
    if op == "batch_norm":
        size, arguments["batch_statistics"] = (4,), True
    else:
        size, arguments["num_groups"], arguments["reduction_axes"] = (3, 2), 2, None
    return arguments | {"mean": torch.zeros(size, dtype=torch.float64), "rstd": torch.ones(size)}


def batch_backward(**changes: Any) -> Callable[[], Any]:
    def call() -> Any:
        arguments = gradient_arguments("batch_norm") | {"output_mask": [True, True, True, False]}
        return ops._batch_norm_backward(**(arguments | place(changes)))

    return call


def group_backward(**changes: Any) -> Callable[[], Any]:
    def call() -> Any:
        arguments = gradient_arguments("group_norm") | {"output_mask": [True] * 4}
        return ops._group_norm_backward(**(arguments | place(changes)))

    return call


def double_backward(op: str, **changes: Any) -> Any:
    names = ("grad_grad_input", "grad_grad_weight", "grad_grad_bias", "grad_grad_residual")
    arguments = gradient_arguments(op) | dict.fromkeys(names) | {"output_mask": [True] * 5}
    return getattr(ops, f"_{op}_double_backward")(**(arguments | place(changes)))


def low_level_train(**changes: Any) -> Callable[[], Any]:
    def call() -> Any:
        arguments = {"input": x(), "weight": None, "bias": None, "residual": None, "mask": None}
        arguments |= {"running_mean": None, "running_var": None, "num_batches_tracked": None}
        arguments |= {"axis": [1], "momentum": 0.1, "eps": 1e-5, "unbiased": True}
        arguments |= {"activation": None, "dtype": None}
        return ops._batch_norm_train(**(arguments | place(changes)))

    return call


f64, f32, f16, i64 = torch.float64, torch.float32, torch.float16, torch.int64
NAN = float("nan")
FLOATS = "float64, float32, bfloat16 or float16"


def bits_backward(**changes: Any) -> Callable[[], Any]:
    bits = {"relu_bits": torch.zeros(12, dtype=torch.uint8), "activation": "relu"}
    planes = {"input": torch.randn(3, 4, 4), "grad_output": torch.randn(3, 4, 4)}
    order = {"relu_bits_format": torch.contiguous_format}
    return batch_backward(**(bits | planes | order | changes))


ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    # axes
    (
        train(axis=3),
        IndexError,
        "batch_norm: expected axis in [-3, 2] for an input of rank 3, got 3",
    ),
    (
        train(axis=-4),
        IndexError,
        "batch_norm: expected axis in [-3, 2] for an input of rank 3, got -4",
    ),
    (
        group(torch.ones(4)),
        IndexError,
        "group_norm: expected axis in [-1, 0] for an input of rank 1, got 1",
    ),
    (
        train(torch.tensor(1.0)),
        IndexError,
        "batch_norm: expected axis in [0, -1] for an input of rank 0, got 1",
    ),
    (train(axis=[1, -2]), ValueError, "batch_norm: expected axis without duplicates, got [1, -2]"),
    (
        group(reduction_axes=[1, 3]),
        IndexError,
        "group_norm: expected reduction_axes in [-3, 2] for an input of rank 3, got 3",
    ),
    (
        group(reduction_axes=[1, 1]),
        ValueError,
        "group_norm: expected reduction_axes without duplicates, got [1, 1]",
    ),
    (
        group(reduction_axes=[0, 2]),
        ValueError,
        "group_norm: expected reduction_axes to contain the feature axes [1], got [0, 2]",
    ),
    (
        group(reduction_axes=[]),
        ValueError,
        "group_norm: expected reduction_axes to contain the feature axes [1], got []",
    ),
    # groups
    (
        group(num_groups=3),
        ValueError,
        "group_norm: expected num_groups to divide the number of channels (4), got 3",
    ),
    (group(num_groups=0), ValueError, "group_norm: expected num_groups to be positive, got 0"),
    (group(num_groups=-2), ValueError, "group_norm: expected num_groups to be positive, got -2"),
    # dtypes
    (
        train(torch.ones(3, 4, dtype=i64)),
        TypeError,
        f"batch_norm: expected input to have dtype {FLOATS}, got int64",
    ),
    (
        group(torch.ones(3, 4, dtype=torch.complex64)),
        TypeError,
        f"group_norm: expected input to have dtype {FLOATS}, got complex64",
    ),
    (
        train(weight=torch.ones(4, dtype=i64)),
        TypeError,
        f"batch_norm: expected weight to have dtype {FLOATS}, got int64",
    ),
    (
        group(bias=torch.ones(4, dtype=torch.bool)),
        TypeError,
        f"group_norm: expected bias to have dtype {FLOATS}, got bool",
    ),
    (
        group(residual=torch.ones(3, 4, 5, dtype=i64)),
        TypeError,
        f"group_norm: expected residual to have dtype {FLOATS}, got int64",
    ),
    (
        evaluate(running_var=torch.ones(4, dtype=i64)),
        TypeError,
        f"batch_norm: expected running_var to have dtype {FLOATS}, got int64",
    ),
    (group(dtype=i64), TypeError, f"group_norm: expected dtype to have dtype {FLOATS}, got int64"),
    (
        train(num_batches_tracked=torch.tensor(0, dtype=torch.int32)),
        TypeError,
        "batch_norm: expected num_batches_tracked to have dtype int64, got int32",
    ),
    (
        low_level_train(weight=torch.ones(4, dtype=f64)),
        TypeError,
        "batch_norm: expected a float64 input with weight of dtype float64, got float32",
    ),
    (
        low_level_train(dtype=f64),
        TypeError,
        "batch_norm: expected a float64 input with dtype of dtype float64, got float32",
    ),
    (
        batch_backward(mean=torch.zeros(4)),
        TypeError,
        "batch_norm: expected mean to have dtype float64, got float32",
    ),
    (
        group_backward(rstd=torch.ones(3, 2, dtype=f64)),
        TypeError,
        "group_norm: expected rstd to have dtype float32, got float64",
    ),
    # shapes
    (
        train(weight=torch.ones(5)),
        ValueError,
        "batch_norm: expected weight to have shape [4], got [5]",
    ),
    (train(bias=torch.ones(1)), ValueError, "batch_norm: expected bias to have shape [4], got [1]"),
    (
        train(weight=torch.ones(3, 4)),
        ValueError,
        "batch_norm: expected weight to have shape [4], got [3, 4]",
    ),
    (
        group(weight=torch.ones(4, 5), axis=[1, 2], bias=torch.ones(20)),
        ValueError,
        "group_norm: expected bias to have shape [4, 5], got [20]",
    ),
    (
        group(weight=torch.ones(2, 4)),
        ValueError,
        "group_norm: expected weight to have shape [3, 4], got [2, 4]",
    ),
    (
        group(weight=torch.ones(3, 4), reduction_axes=[1]),
        ValueError,
        "group_norm: expected weight to have shape [4], got [3, 4]",
    ),
    (
        group(weight=torch.ones(4), bias=torch.ones(3, 4)),
        ValueError,
        "group_norm: expected weight and bias to have the same shape, got [4] and [3, 4]",
    ),
    (
        train(running_mean=torch.zeros(3)),
        ValueError,
        "batch_norm: expected running_mean to have shape [4], got [3]",
    ),
    (
        evaluate(running_var=torch.ones(5)),
        ValueError,
        "batch_norm: expected running_var to have shape [4], got [5]",
    ),
    (
        train(residual=torch.ones(3, 4, 1)),
        ValueError,
        "batch_norm: expected residual to have shape [3, 4, 5], got [3, 4, 1]",
    ),
    (
        train(mask=torch.ones(3, 5)),
        ValueError,
        "batch_norm: expected mask to broadcast to the input's shape [3, 4, 5], got [3, 5]",
    ),
    (
        group(mask=torch.ones(1, 3, 4, 5)),
        ValueError,
        "group_norm: expected mask to broadcast to the input's shape [3, 4, 5], got [1, 3, 4, 5]",
    ),
    (
        train(num_batches_tracked=torch.zeros(2, dtype=i64)),
        ValueError,
        "batch_norm: expected num_batches_tracked to have one element, got shape [2]",
    ),
    (
        batch_backward(grad_output=torch.ones(3, 4, 1)),
        ValueError,
        "batch_norm: expected grad_output to have shape [3, 4, 5], got [3, 4, 1]",
    ),
    (
        bits_backward(activation="silu"),
        ValueError,
        "batch_norm: expected activation 'relu' with relu_bits, got silu",
    ),
    (
        bits_backward(residual=torch.randn(3, 4, 4)),
        ValueError,
        "batch_norm: expected either residual or relu_bits, got both",
    ),
    (
        bits_backward(relu_bits=torch.zeros(12)),
        TypeError,
        "batch_norm: expected relu_bits to have dtype uint8, got float32",
    ),
    (
        bits_backward(relu_bits=torch.zeros(3, 4, dtype=torch.uint8)),
        ValueError,
        "batch_norm: expected relu_bits to have shape [12], got [3, 4]",
    ),
    (
        bits_backward(relu_bits_format=None),
        ValueError,
        "batch_norm: expected relu_bits_format with relu_bits, got None",
    ),
    (
        bits_backward(relu_bits_format=torch.channels_last),
        ValueError,
        "batch_norm: expected relu_bits_format to be a dense format of rank 3, got ChannelsLast",
    ),
    (
        bits_backward(input=x(), grad_output=x()),
        ValueError,
        "batch_norm: expected neighbours in memory of format Contiguous, positions of a channel or "
        "channels of a position, to be a multiple of 4 with relu_bits, got shape [3, 4, 5] with "
        "axis [1]",
    ),
    (
        bits_backward(input=torch.randn(3, 4, 4).double(), rstd=torch.ones(4, dtype=f64)),
        TypeError,
        "batch_norm: expected an input of dtype float32, bfloat16 or float16 with relu_bits, got "
        "float64",
    ),
    (
        low_level_train(activation="silu", relu_bits_format=torch.contiguous_format),
        ValueError,
        "batch_norm: expected activation 'relu' with relu_bits, got silu",
    ),
    (
        batch_backward(rstd=torch.ones(5)),
        ValueError,
        "batch_norm: expected rstd to have shape [4], got [5]",
    ),
    (
        group_backward(mean=torch.zeros(3, 4, dtype=f64)),
        ValueError,
        "group_norm: expected mean to have shape [3, 2], got [3, 4]",
    ),
    # values and combinations
    (train(eps=-1.0), ValueError, "batch_norm: expected eps to be finite and not negative, got -1"),
    (group(eps=NAN), ValueError, "group_norm: expected eps to be finite and not negative, got nan"),
    (
        group(activation="tanh"),
        ValueError,
        "group_norm: expected activation to be None, relu, silu, gelu or gelu_tanh, got tanh",
    ),
    (
        train(running_mean=torch.zeros(1).expand(4)),
        ValueError,
        "batch_norm: expected running_mean not to be expanded, got strides [0]",
    ),
    (
        train(**dict.fromkeys(("running_mean", "running_var"), torch.ones(4))),
        ValueError,
        "batch_norm: expected running_mean and running_var in different memory, "
        "got tensors that overlap",
    ),
    (
        train(**dict(zip(("running_mean", "running_var"), torch.ones(5).unfold(0, 4, 1)))),
        ValueError,
        "batch_norm: expected running_mean and running_var in different memory, "
        "got tensors that overlap",
    ),
    (
        train(running_mean=torch.zeros(4, requires_grad=True), running_var=torch.ones(4)),
        ValueError,
        "batch_norm: expected running_mean not to require grad, got requires_grad=True",
    ),
    (
        evaluate(mask=torch.ones(3, 3)),
        ValueError,
        "batch_norm: expected mask to broadcast to the input's shape [3, 4, 5], got [3, 3]",
    ),
    (
        train(running_var=None),
        ValueError,
        "batch_norm: expected both or none of running_mean and running_var, got only running_mean",
    ),
    (
        train(running_mean=None),
        ValueError,
        "batch_norm: expected both or none of running_mean and running_var, got only running_var",
    ),
    (
        train(momentum=None, num_batches_tracked=None),
        ValueError,
        "batch_norm: expected num_batches_tracked with momentum None (cumulative average), "
        "got None",
    ),
    (
        evaluate(running_mean=None),
        ValueError,
        "batch_norm: expected running_mean and running_var with training False, "
        "got only running_var",
    ),
    (
        evaluate(running_mean=None, running_var=None),
        ValueError,
        "batch_norm: expected running_mean and running_var with training False, got None",
    ),
    # devices
    (
        group(weight=torch.ones(4, device="meta")),
        ValueError,
        "group_norm: expected weight on device {device}, got meta",
    ),
    (
        train(running_mean=torch.ones(4, device="meta")),
        ValueError,
        "batch_norm: expected running_mean on device {device}, got meta",
    ),
]


def text_of(error: BaseException) -> str:
    return str(error).split("\n")[0]


@pytest.mark.parametrize("index", range(len(ERRORS)), ids=lambda i: ERRORS[i][2][:60])
def test_error(index: int, device: torch.device) -> None:
    call, kind, text = ERRORS[index]
    with pytest.raises(kind) as caught:
        call()
    assert text_of(caught.value) == text.replace("{device}", str(device))
    assert type(caught.value) is kind


DOUBLE_BACKWARD_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"grad_grad_input": torch.ones(3, 4, 1)},
        ValueError,
        "expected grad_grad_input to have shape [3, 4, 5], got [3, 4, 1]",
    ),
    (
        {"grad_grad_weight": torch.ones(3, 4), "weight": torch.ones(4)},
        ValueError,
        "expected grad_grad_weight to have shape [4], got [3, 4]",
    ),
    (
        {"grad_grad_bias": torch.ones(1), "bias": torch.ones(4)},
        ValueError,
        "expected grad_grad_bias to have shape [4], got [1]",
    ),
    (
        {"grad_grad_residual": torch.ones(4, 5), "residual": torch.ones(3, 4, 5)},
        ValueError,
        "expected grad_grad_residual to have shape [3, 4, 5], got [4, 5]",
    ),
    *(
        (
            {f"grad_grad_{operand}": torch.ones(shape)},
            ValueError,
            f"expected no grad_grad_{operand} without {operand}, got one of shape {shape}",
        )
        for operand, shape in (("weight", [4]), ("bias", [4]), ("residual", [3, 4, 5]))
    ),
    (
        {"grad_grad_input": torch.ones(3, 4, 5, dtype=i64)},
        TypeError,
        f"expected grad_grad_input to have dtype {FLOATS}, got int64",
    ),
    (
        {"grad_grad_weight": torch.ones(4, dtype=f64), "weight": torch.ones(4)},
        TypeError,
        "expected a float64 input with grad_grad_weight of dtype float64, got float32",
    ),
    (
        {"grad_grad_input": torch.ones(3, 4, 5, device="meta")},
        ValueError,
        "expected grad_grad_input on device {device}, got meta",
    ),
    # those of the backward operator
    (
        {"grad_output": torch.ones(3, 4, 1)},
        ValueError,
        "expected grad_output to have shape [3, 4, 5], got [3, 4, 1]",
    ),
    (
        {"rstd": torch.ones(4, dtype=f64)},
        TypeError,
        "expected rstd to have dtype float32, got float64",
    ),
    ({"weight": torch.ones(5)}, ValueError, "expected weight to have shape [4], got [5]"),
    (
        {"activation": "tanh"},
        ValueError,
        "expected activation to be None, relu, silu, gelu or gelu_tanh, got tanh",
    ),
    ({"eps": -1.0}, ValueError, "expected eps to be finite and not negative, got -1"),
]


@pytest.mark.parametrize("by_formula", [False, True], ids=["kernel", "formula"])
@pytest.mark.parametrize("op", ["batch_norm", "group_norm"])
@pytest.mark.parametrize(
    "index", range(len(DOUBLE_BACKWARD_ERRORS)), ids=lambda i: DOUBLE_BACKWARD_ERRORS[i][2][:60]
)
def test_error_of_double_backward(
    index: int, op: str, by_formula: bool, device: torch.device
) -> None:
    changes, kind, text = DOUBLE_BACKWARD_ERRORS[index]
    with pytest.raises(kind) as caught:  # what requires grad takes the formula
        double_backward(op, **{"input": x().requires_grad_(by_formula), **changes})
    assert text_of(caught.value) == f"{op}: {text}".replace("{device}", str(device))
    assert type(caught.value) is kind


def test_rules_hold_for_symbolic_shapes() -> None:
    """Shape inference runs the same rules on sizes that are not known."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    symbolic = mode.from_tensor(x())
    assert any(isinstance(size, torch.SymInt) for size in symbolic.shape)
    cases = [
        (lambda t: ops.group_norm(t, 3), "expected num_groups to divide the number of channels"),
        (lambda t: ops.group_norm(t, 2, torch.ones(5)), "expected weight to have shape"),
        (lambda t: ops.group_norm(t, 2, residual=t[:1]), "expected residual to have shape"),
        (lambda t: ops.group_norm(t, 2, mask=t[:, :3]), "expected mask to broadcast"),
        (
            lambda t: ops.batch_norm(t, torch.ones(5), torch.ones(5)),
            "expected running_mean to have",
        ),
        (
            lambda t: double_backward("batch_norm", input=t, grad_output=t, grad_grad_input=t[:1]),
            "expected grad_grad_input to have shape",
        ),
    ]
    for call, text in cases:
        with mode, pytest.raises(ValueError, match=text):
            call(symbolic)


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": torch.ones(5)},
        {"residual": torch.ones(3, 4, 1)},
        {"mask": torch.ones(7)},
        {"activation": "tanh"},
        {"running_var": torch.ones(5)},
        {"running_var": torch.ones(1).expand(4)},
        {"num_batches_tracked": torch.tensor(0.0)},
    ],
    ids=lambda w: next(iter(w)),
)
def test_failed_call_changes_nothing(wrong: dict[str, Any]) -> None:
    state = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    state["num_batches_tracked"] = torch.tensor(3)
    before = {name: t.clone() for name, t in state.items()}
    with pytest.raises((ValueError, TypeError)):
        ops.batch_norm(**{"input": x(), "training": True, **state, **place(wrong)})
    for name, t in state.items():
        assert torch.equal(t, before[name])
        assert t._version == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_have_no_derivative(name: str, training: bool) -> None:
    state = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    state[name].requires_grad_()
    with pytest.raises(ValueError, match=f"batch_norm: expected {name} not to require grad, got"):
        ops.batch_norm(x(), **state, training=training)
    with torch.no_grad():
        ops.batch_norm(x(), **state, training=training)


def test_compiled_code_reports_the_same_error() -> None:
    compiled = torch.compile(lambda t: ops.group_norm(t, 3), backend="eager")
    with pytest.raises(Exception, match="expected num_groups to divide the number of channels"):
        compiled(x())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: NF.batch_norm(x(), None, None, weight=1.0, training=True),
            "batch_norm: expected weight to be of type Optional.Tensor., got float",
        ),
        (
            lambda: NF.group_norm(x(), 2.0),
            "group_norm: expected num_groups to be of type int, got float",
        ),
        (
            lambda: NF.group_norm(x(), 2, activation=torch.relu),
            "group_norm: expected activation to be of type Optional.str., got builtin_function",
        ),
        (
            lambda: NF.group_norm(x(), 2, mask=[1]),
            "group_norm: expected mask to be of type Optional.Tensor., got list",
        ),
        (lambda: NF.group_norm(None, 2), "group_norm: expected input to be of type Tensor"),
        (
            lambda: NF.group_norm(x(), 2, group=3),
            "group_norm: expected group to be a process group or its name, got 3",
        ),
    ],
)
def test_types_of_python(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        call()
