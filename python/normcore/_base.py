"""What the modules for batch and group norm share: affine parameters, lazy features, freezing."""

# TorchScript reads the annotations of attributes, so they must not be strings here.
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from . import _C

Initializer = Callable[[Tensor], Any]
NormT = TypeVar("NormT", bound="NormBase")
MethodT = TypeVar("MethodT", bound=Callable[..., Any])

_ACTIVATIONS: list[str] = _C.activation_names()


def result_type(x: Tensor, scale: Tensor | None, bias: Tensor | None) -> torch.dtype:
    """Flax's result type: the promotion of what takes part, float32 for integers alone."""
    if scale is None and bias is None and not x.is_floating_point() and not x.is_complex():
        return torch.float32
    dtype = x.dtype
    if scale is not None:
        dtype = torch.promote_types(dtype, scale.dtype)
    if bias is not None:
        dtype = torch.promote_types(dtype, bias.dtype)
    return dtype


def not_compiled(method: MethodT) -> MethodT:
    """``torch.compiler.disable``, which imports the compiler, where there is one at work."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(*args, **kwargs)
        return method(*args, **kwargs)

    return cast(MethodT, call)


def is_recorded(x: Any) -> bool:
    """Whether `x` stands for a tensor in a graph that torch.fx records."""
    return isinstance(x, torch.fx.Proxy)


def leaf(module: nn.Module, x: Any, **options: Any) -> Any:
    """One node of the graph that torch.fx records, as for any module of torch.nn.

    Raises:
        RuntimeError: the module is the root of the graph, of which it cannot be a node.
    """
    if x.tracer.root is module:
        raise RuntimeError(
            f"{type(module).__name__}: expected torch.fx to record a model that holds the norm, "
            "got the norm itself; wrap it in torch.nn.Sequential"
        )
    given = {name: value for name, value in options.items() if value is not None}
    path = x.tracer.path_of_module(module)
    return x.tracer.create_proxy("call_module", path, (x,), given)


def number(op: str, name: str, value: Any) -> float:
    """`value` as a float, as which TorchScript takes it."""
    if isinstance(value, str):
        raise TypeError(f"{op}: expected {name} to be a number, got {value!r}")
    try:
        return float(value)
    except TypeError:
        raise TypeError(f"{op}: expected {name} to be a number, got {value!r}") from None


def integer(op: str, name: str, value: Any) -> int:
    """`value`, which may be an integer of numpy."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: expected {name} to be an int, got {value!r}") from None


def check_activation(op: str, activation: str | None) -> None:
    """Raises ValueError unless `activation` is one that the operators know."""
    if activation is not None and activation not in _ACTIVATIONS:
        names = ", ".join(["None", *_ACTIVATIONS[:-1]])
        raise ValueError(
            f"{op}: expected activation to be {names} or {_ACTIVATIONS[-1]}, got {activation}"
        )


def _partition(op: str, groups: Any) -> list[list[int]]:
    """`groups` as lists, which have to hold every index from 0 on once."""
    lists = [integers(op, "axis_index_groups", group) for group in groups]
    indices = sorted(index for group in lists for index in group)
    if not all(lists) or indices != list(range(len(indices))):
        raise ValueError(
            f"{op}: expected axis_index_groups to be a partition of the indices 0, 1, ... of "
            f"axis_name, got {groups}"
        )
    return lists


def integers(op: str, name: str, value: Any) -> list[int]:
    """The integers of `value`, which is one or a sequence of them."""
    try:
        return [operator.index(item) for item in (value if hasattr(value, "__len__") else (value,))]
    except TypeError:
        raise TypeError(
            f"{op}: expected {name} to be an int or a sequence of ints, got {value!r}"
        ) from None


def _is_floating(dtype: Any) -> bool:
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


class _LazyTensor:
    """Lets copies, pickles and conversions of a tensor of unknown shape keep what is known."""

    _allowed_methods: ClassVar = [
        *UninitializedParameter._allowed_methods,  # type: ignore[attr-defined]
        Tensor.bfloat16,
    ]

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        kind, arguments = self.__reduce_ex__(4)
        return memo.setdefault(id(self), kind(*arguments))

    def __reduce_ex__(self: Any, proto: Any) -> tuple[Any, tuple[Any, ...]]:
        return type(self), (self.requires_grad, self.data.device, self.data.dtype)


class _LazyParameter(_LazyTensor, UninitializedParameter):
    pass


class _LazyBuffer(_LazyTensor, UninitializedBuffer):
    pass


def _new(
    lazy: Any,
    shape: tuple[int, ...] | None,
    device: torch.device | str | int | None,
    dtype: torch.dtype,
) -> Any:
    """An empty tensor, or an instance of the class `lazy` if its shape is not known yet."""
    if shape is None:
        return lazy(device=device, dtype=dtype)
    return torch.empty(shape, device=device, dtype=dtype)


class NormBase(nn.Module):
    """What batch and group norm share: the affine parameters, lazy features and freezing."""

    scale: Tensor | None
    bias: Tensor | None
    __jit_ignored_attributes__: ClassVar = ["scale_init", "bias_init", "_former_requires_grad"]

    def __init__(
        self,
        *,
        num_features: int | Sequence[int] | None,
        axis: int | Sequence[int],
        epsilon: float,
        dtype: torch.dtype | None,
        param_dtype: torch.dtype,
        use_bias: bool,
        use_scale: bool,
        bias_init: Initializer | None,
        scale_init: Initializer | None,
        axis_name: str | None,
        axis_index_groups: Sequence[Sequence[int]] | None,
        sync_weighting: str,
        activation: str | None,
        device: torch.device | str | int | None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        if sync_weighting not in ("count", "rank"):
            raise ValueError(
                f"{op}: expected sync_weighting to be 'count' or 'rank', got {sync_weighting!r}"
            )
        if axis_index_groups is not None and axis_name is None:
            raise ValueError(
                f"{op}: expected axis_name to be given with axis_index_groups, got None"
            )
        if axis_index_groups is not None:
            axis_index_groups = _partition(op, axis_index_groups)
        if axis_name is not None and not isinstance(axis_name, str):
            raise TypeError(f"{op}: expected axis_name to be a str or None, got {axis_name!r}")
        check_activation(op, activation)
        epsilon = number(op, "epsilon", epsilon)
        if not (math.isfinite(epsilon) and epsilon >= 0):
            raise ValueError(f"{op}: expected epsilon to be finite and >= 0, got {epsilon}")
        if dtype is not None and not _is_floating(dtype):
            raise ValueError(f"{op}: expected dtype to be None or floating point, got {dtype}")
        if not _is_floating(param_dtype):
            raise ValueError(f"{op}: expected param_dtype to be floating point, got {param_dtype}")
        self.axis = integers(op, "axis", axis)
        if not self.axis:
            raise ValueError(f"{op}: expected at least one axis, got {axis}")
        if len(set(self.axis)) != len(self.axis):
            raise ValueError(f"{op}: expected axis without duplicates, got {self.axis}")
        if num_features is not None:
            features = integers(op, "num_features", num_features)
            num_features = tuple(features)
        self.num_features = num_features
        self._features: list[int] = []  # sizes of the feature axes in ascending order
        self._op = op  # TorchScript has no type(self).__name__
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.bias_init = bias_init
        self.scale_init = scale_init
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.sync_weighting = sync_weighting
        self.activation = activation
        self.device = device
        self.frozen = False
        self.initialized = num_features is not None
        self._former_requires_grad: dict[str, bool] = {}

    def _create_state(self, buffers: Sequence[str]) -> None:
        """Registers parameters and float32 buffers; their shape stays open if the features are."""
        features = self.num_features
        shape = None if features is None else self._accept_features(features)
        for name, used in (("scale", self.use_scale), ("bias", self.use_bias)):
            parameter = _new(_LazyParameter, shape, self.device, self.param_dtype)
            if shape is not None:
                parameter = nn.Parameter(parameter)
            self.register_parameter(name, parameter if used else None)
        for name in buffers:
            self.register_buffer(name, _new(_LazyBuffer, shape, self.device, torch.float32))
        if self.initialized:
            self.reset_parameters()

    def _accept_features(self, sizes: Any) -> tuple[int, ...]:
        """Checks the sizes of the feature axes and stores them; returns the shape of the state."""
        shape = tuple(sizes)
        if len(shape) != len(self.axis):
            raise ValueError(
                f"{type(self).__name__}: expected num_features to hold one size for each axis of "
                f"{self.axis}, got {shape[0] if len(shape) == 1 else shape}"
            )
        if any(size <= 0 for size in shape):
            raise ValueError(
                f"{type(self).__name__}: expected num_features to be positive, got "
                f"{shape[0] if len(shape) == 1 else shape}"
            )
        self._accept_channels(math.prod(shape))
        self._features = list(shape)
        self.num_features = shape[0] if len(shape) == 1 else shape
        return shape

    def _accept_channels(self, channels: int) -> None:
        """Raises ValueError if the module cannot have so many channels."""

    def _state(self) -> dict[str, Any]:
        """Parameters and statistics by name, without the absent ones."""
        state = {**self._parameters, **self._buffers}
        return {name: tensor for name, tensor in state.items() if tensor is not None}

    def _feature_sizes(self, x: Tensor) -> list[int]:
        """The sizes of the feature axes of `x` in ascending order of the axes."""
        rank = x.dim()
        for axis in self.axis:
            if not -rank <= axis < rank:
                raise IndexError(
                    f"{type(self).__name__}: expected axis in [{-rank}, {rank - 1}] for an input "
                    f"of rank {rank}, got {axis}"
                )
        axes = sorted(axis % rank for axis in self.axis)
        if len(set(axes)) != len(axes):
            raise ValueError(
                f"{type(self).__name__}: expected axis without duplicates, got {self.axis}"
            )
        return [x.shape[axis] for axis in axes]

    def _check_features(self, x: Tensor) -> None:
        """Raises ValueError if `x` has not as many features as the module. TorchScript too."""
        if torch.jit.is_tracing():  # type: ignore
            return
        rank = x.dim()
        if len(self.axis) == 1:  # the usual case, on the path of every call
            axis = self.axis[0]
            if axis >= rank or axis < -rank:
                return  # the operator reports it
            size, features = x.size(axis), self._features[0]
            if size != features:
                raise ValueError(
                    f"{self._op}: expected {features} features on axis {self.axis}, got {size}"
                )
            return
        axes: list[int] = []
        for axis in self.axis:
            if axis >= rank or axis < -rank:
                return
            axes.append(axis if axis >= 0 else axis + rank)
        axes.sort()
        sizes: list[int] = []
        for axis in axes:
            sizes.append(x.size(axis))
        if sizes != self._features:
            raise ValueError(
                f"{self._op}: expected features of shape {self._features} on axis {self.axis}, "
                f"got {sizes}"
            )

    @contextmanager
    def _lazy_if_it_raises(self) -> Iterator[None]:
        """Makes a lazy module lazy again if the body raises."""
        former = [(tensor, type(tensor), tensor.data) for tensor in self._state().values()]
        try:
            yield
        except BaseException:
            for tensor, kind, data in former:
                tensor.data = data
                tensor.__class__ = kind
            self.num_features, self._features, self.initialized = None, [], False
            raise

    @not_compiled
    def _materialize_from(self, x: Tensor) -> None:
        self._materialize(self._feature_sizes(x), x.device if self.device is None else None)

    def _materialize(self, sizes: Sequence[int], device: torch.device | None) -> None:
        """Gives the state its shape and initial values; `device` None keeps the one it has."""
        with self._lazy_if_it_raises():
            shape = self._accept_features(sizes)
            for tensor in self._state().values():
                tensor.materialize(shape, device=device)
            self.reset_parameters()
            self.initialized = True

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        """Scale and bias, faster than with the __getattr__ of nn.Module."""
        parameters = self._parameters
        try:
            return parameters["scale"], parameters["bias"]
        except KeyError:  # a parametrization has taken one over
            return self.scale, self.bias

    def reset_parameters(self) -> None:
        """Sets scale and bias to their initial values."""
        with torch.no_grad():
            if self.scale is not None:
                (self.scale_init or nn.init.ones_)(self.scale)
            if self.bias is not None:
                (self.bias_init or nn.init.zeros_)(self.bias)

    def init(self: NormT, x: Tensor) -> NormT:
        """Takes the number of features from `x`, if it is open yet, else checks it.

        Updates no statistics.
        """
        if not self.initialized:
            self._materialize_from(x)
        else:
            self._feature_sizes(x)
            self._check_features(x)
        return self

    def freeze(self: NormT, mode: bool = True, *, affine: bool = True) -> NormT:
        """Freezes the statistics and, with `affine`, stops the gradients of scale and bias.

        It survives :meth:`train`; :meth:`unfreeze` restores the former ``requires_grad``.
        """
        parameters = dict(self.named_parameters())  # those of parametrizations among them
        for name, requires_grad in self._former_requires_grad.items():
            if name in parameters:  # not set to None or parametrized meanwhile
                parameters[name].requires_grad = requires_grad
        self._former_requires_grad = {}
        self.frozen = mode
        if mode and affine:
            for name, parameter in parameters.items():
                self._former_requires_grad[name] = parameter.requires_grad
                parameter.requires_grad = False
        return self

    def unfreeze(self: NormT) -> NormT:
        """Undoes :meth:`freeze`."""
        return self.freeze(False)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.initialized:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        else:  # uninitialized tensors cannot be detached; torch's lazy modules save them as well
            for name, tensor in self._state().items():
                destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if not self.initialized:
            saved = [(prefix + name, state_dict.get(prefix + name)) for name in self._state()]
            shapes = {
                key: None if is_lazy(tensor) else tuple(tensor.shape)
                for key, tensor in saved
                if isinstance(tensor, Tensor)
            }
            first = next(iter(shapes), None)
            shape = None if first is None else shapes[first]
            errors = [
                f"size mismatch for {key}: expected the shape of {first}, {shape}, got {other}"
                for key, other in shapes.items()
                if other != shape
            ]
            if shape is not None and not errors:
                try:
                    self._materialize(shape, None)
                except ValueError as error:
                    errors = [f"{prefix.rstrip('.')}: {error}"]
            if errors:
                error_msgs.extend(errors)
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _repr_of(self, **options: tuple[Any, Any]) -> str:
        """``name=value`` of the given options and the common ones that differ from the default."""
        shown: dict[str, tuple[Any, Any]] = {
            "num_features": (self.num_features, ...),
            "axis": (self.axis[0] if len(self.axis) == 1 else tuple(self.axis), ...),
            **options,
            "epsilon": (self.epsilon, ...),
            "dtype": (self.dtype, torch.float32),
            "param_dtype": (self.param_dtype, torch.float32),
            "use_bias": (self.bias is not None, True),
            "use_scale": (self.scale is not None, True),
            "axis_name": (self.axis_name, None),
            "axis_index_groups": (self.axis_index_groups, None),
            "sync_weighting": (self.sync_weighting, "count"),
            "activation": (self.activation, None),
            "frozen": (self.frozen, False),
        }
        return ", ".join(
            f"{name}={value!r}" for name, (value, default) in shown.items() if value != default
        )
