"""The norms of :mod:`torch.nn` on the operators of this library, for models that exist.

Each class is a subclass of the torch class of its name (:class:`SyncBatchNorm`: of what torch's
batch norms have in common), with the same constructor, defaults, buffers, state_dict and ``repr``,
and the same meaning of attributes that are changed later. Results are those of torch, in the dtype
and memory format of the input. What torch does not have:

* ``activation`` in the constructor, ``residual`` and ``mask`` in a call: ``y = activation(norm(x) +
  residual)``, with the statistics of the elements that ``mask`` selects.
* Input, parameters and statistics may have different floating dtypes, and autocast leaves a half
  precision input alone.
* A call that raises changes nothing, and an activation checkpoint counts a batch once.

What the Python code of torch rejects is rejected with its words. What its kernels reject with a
RuntimeError is a ValueError or a TypeError that names the argument, the rule and the value.
"""

# TorchScript reads the annotations of attributes and methods, so they must not be strings here.
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, instancenorm

from ._base import check_activation, is_recorded, leaf
from .distributed import group_name, group_of_several, without_handle
from .functional import (
    batch_norm,
    batch_norm_op,
    group_norm,
    group_norm_op,
    instance_norm,
    instance_norm_train_op,
)
from .settings import DEBUG_SYNC

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "FrozenBatchNorm2d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "SyncBatchNorm",
]

_FunctionT = TypeVar("_FunctionT", bound=Callable[..., Any])


def _signature_of(torch_class: type[nn.Module]) -> Callable[[_FunctionT], _FunctionT]:
    """Gives a constructor the signature of the one of `torch_class`, and ``activation``.

    That of torch depends on its version, and its arguments are only passed on.
    """
    signature = inspect.signature(torch_class.__init__)
    activation = inspect.Parameter(
        "activation", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=str | None
    )
    parameters = [*signature.parameters.values(), activation]

    def decorate(function: _FunctionT) -> _FunctionT:
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return decorate


def _require_more_than_one(what: str, sizes: list[int], count: int) -> None:
    """Raises torch's error if there is one `what`: `count` for each position of an input."""
    for i in range(2, len(sizes)):
        count *= sizes[i]
    if count == 1:
        raise ValueError(f"Expected more than 1 {what} when training, got input size {sizes}")


class _Norm(nn.Module):
    """What the classes share: the activation, the arguments of a call, and being a leaf."""

    activation: str | None = None

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any) -> None:
        check_activation(type(self).__name__, activation)
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(
        self,
        input: Tensor,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Normalizes `input`; the result has its shape, dtype and memory format.

        Args:
            input: of the shapes that the torch class takes.
            mask: broadcasts to `input`; nonzero elements count for the statistics. The output is
                computed everywhere. Ignored where the running statistics are used.
            residual: tensor of the shape of `input`, added before the activation.

        Pass `mask` and `residual` by keyword: they would be keyword-only if TorchScript allowed it.
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            recorded = is_recorded(input)
            if recorded:
                node: Tensor = leaf(self, input, mask=mask, residual=residual)
                return node
        return self._normalize(input, mask, residual)

    def _normalize(self, input: Tensor, mask: Tensor | None, residual: Tensor | None) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """That of the torch class, and the activation if there is one."""
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation!r}"


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    mask: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    num_batches_tracked: Tensor | None = None,
    group: str | None = None,
) -> Tensor:
    """:func:`normcore.functional.batch_norm`, also in TorchScript."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return batch_norm_op(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            mask=mask,
            activation=activation,
            residual=residual,
            num_batches_tracked=num_batches_tracked,
        )
    else:
        return batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            mask=mask,
            activation=activation,
            residual=residual,
            num_batches_tracked=num_batches_tracked,
            group=group,
        )


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """:func:`normcore.functional.group_norm`, also in TorchScript."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return group_norm_op(
            input,
            num_groups,
            weight,
            bias,
            eps,
            mask=mask,
            activation=activation,
            residual=residual,
        )
    else:
        return group_norm(
            input,
            num_groups,
            weight,
            bias,
            eps,
            mask=mask,
            activation=activation,
            residual=residual,
        )


class _BatchNorm(_Norm, batchnorm._BatchNorm):
    __constants__ = [*batchnorm._BatchNorm.__constants__, "activation"]  # noqa: RUF012

    @_signature_of(batchnorm._BatchNorm)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def _group(self, of_batch: bool) -> str | None:
        """Name of the process group that shares the statistics of a batch, if there are others."""
        return None

    def _normalize(self, input: Tensor, mask: Tensor | None, residual: Tensor | None) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        mean: Tensor | None = self.running_mean
        var: Tensor | None = self.running_var
        count: Tensor | None = None
        momentum: float | None = self.momentum
        if self.training:
            if self.track_running_stats:
                count = self.num_batches_tracked
            else:
                mean, var = None, None
        if momentum is None and count is None:
            momentum = 0.0
        of_batch = self.training or (mean is None and var is None)
        group = self._group(of_batch)
        if of_batch and group is None and input.numel() == input.size(1):
            sizes = input.size()
            _require_more_than_one("value per channel", sizes, sizes[0])  # type: ignore[arg-type]
        if self.eps <= 0.0:
            if of_batch:
                raise ValueError(
                    f"batch_norm eps must be positive during training, but got {self.eps}"
                )
            if self.eps < 0.0:
                raise ValueError(f"batch_norm eps must be non-negative, but got {self.eps}")
        y = _batch_norm(
            input,
            mean,
            var,
            self.weight,
            self.bias,
            of_batch,
            momentum,
            self.eps,
            mask,
            self.activation,
            residual,
            count,
            group,
        )
        if count is not None and group is None and input.numel() == 0:
            count.add_(1)  # torch counts empty batches, the operator does not
        return y


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` for ``[N, C]`` and ``[N, C, L]``; see :mod:`normcore.nn`.

    The arguments are those of the torch class, and ``activation``: None, "relu", "silu", "gelu" or
    "gelu_tanh".
    """


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` for ``[N, C, H, W]``; see :mod:`normcore.nn`.

    The arguments are those of the torch class, and ``activation``: None, "relu", "silu", "gelu" or
    "gelu_tanh".
    """


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` for ``[N, C, D, H, W]``; see :mod:`normcore.nn`.

    The arguments are those of the torch class, and ``activation``: None, "relu", "silu", "gelu" or
    "gelu_tanh".
    """


_GROUPS = ("process_group", "_former_group")


class SyncBatchNorm(_BatchNorm):
    """:class:`torch.nn.SyncBatchNorm`, on the CPU too; see :mod:`normcore.nn`.

    In training the statistics are those of all values in the process group: ranks may have any
    number of samples, none too. In evaluation, and for a group of one rank, it is a batch norm of
    ``[N, C, *]``. :func:`normcore.convert_sync_batchnorm` puts it into a model,
    :func:`normcore.revert` takes it out again. TorchScript compiles its evaluation only.

    The arguments are those of the torch class, and ``activation``: None, "relu", "silu", "gelu" or
    "gelu_tanh". ``process_group`` may also be the name of a group or a DeviceMesh of one dimension.
    Copies and pickles hold the name of the group, which is looked up where they are called.

    It is a ``torch.nn.modules.batchnorm._BatchNorm``, but no :class:`torch.nn.SyncBatchNorm`, which
    rejects the CPU.
    """

    process_group: Any
    # Before convert_sync_batchnorm(), for revert().
    _former_class: type[nn.Module] | None = None
    _former_group: Any = None
    __jit_ignored_attributes__: ClassVar = ["process_group", "_former_class", "_former_group"]

    @_signature_of(nn.SyncBatchNorm)
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        group_name("SyncBatchNorm", "process_group", process_group)  # checks it
        super().__init__(num_features, eps, momentum, affine, track_running_stats, *args, **kwargs)
        self.process_group = process_group

    def _group(self, of_batch: bool) -> str | None:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            if self.training:
                raise NotImplementedError("SyncBatchNorm: training needs Python, not TorchScript")
            return None
        elif not self.training and (of_batch or not DEBUG_SYNC):
            return None
        else:
            group = self.process_group
            return group_of_several(
                "SyncBatchNorm", "process_group", "world" if group is None else group
            )

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.size(1) == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")

    def __getstate__(self) -> dict[str, Any]:
        """The attributes, with the name of the process group, which can be copied."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        groups = {name: without_handle(getattr(self, name)) for name in _GROUPS}
        return {**state, **groups}

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """:func:`normcore.convert_sync_batchnorm`."""
        from .convert import convert_sync_batchnorm

        return convert_sync_batchnorm(module, process_group)


class FrozenBatchNorm2d(_Norm):
    """Batch norm whose statistics, weight and bias are buffers: constants that nothing trains.

    It has the constructor, the state_dict and the results of
    ``torchvision.ops.FrozenBatchNorm2d``, and loads the state_dict of a batch norm, without its
    ``num_batches_tracked``. The output has the dtype of the input.

    Args:
        num_features: number of channels, the size of axis 1.
        eps: added to the variance.
        activation: None, "relu", "silu", "gelu" or "gelu_tanh".
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    __constants__: ClassVar = ["eps", "activation"]

    def __init__(
        self, num_features: int, eps: float = 1e-5, *, activation: str | None = None
    ) -> None:
        super().__init__(activation=activation)
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _normalize(self, input: Tensor, mask: Tensor | None, residual: Tensor | None) -> Tensor:
        return _batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            False,
            0.0,
            self.eps,
            mask,
            self.activation,
            residual,
        )

    def extra_repr(self) -> str:
        """Number of channels and eps, as in torchvision, and the activation if there is one."""
        text = f"{self.weight.shape[0]}, eps={self.eps}"
        return text if self.activation is None else f"{text}, activation={self.activation!r}"


class GroupNorm(_Norm, nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` for ``[N, C, *]``; see :mod:`normcore.nn`.

    The arguments are those of the torch class, and ``activation``: None, "relu", "silu", "gelu" or
    "gelu_tanh".
    """

    __constants__ = [*nn.GroupNorm.__constants__, "activation"]  # noqa: RUF012

    @_signature_of(nn.GroupNorm)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def _normalize(self, input: Tensor, mask: Tensor | None, residual: Tensor | None) -> Tensor:
        if input.dim() < 2:
            raise RuntimeError(
                f"Expected at least 2 dimensions for input tensor but received {input.dim()}"
            )
        groups = self.num_groups
        if input.numel() == groups:
            sizes = [input.size(0) * input.size(1) // groups, groups]
            sizes.extend(input.size()[2:])
            _require_more_than_one("value per channel", sizes, sizes[0])
        return _group_norm(
            input,
            groups,
            self.weight,
            self.bias,
            self.eps,
            mask,
            self.activation,
            residual,
        )


class _InstanceNorm(_Norm, instancenorm._InstanceNorm):
    __constants__ = [*instancenorm._InstanceNorm.__constants__, "activation"]  # noqa: RUF012

    @_signature_of(instancenorm._InstanceNorm)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def _normalize(self, input: Tensor, mask: Tensor | None, residual: Tensor | None) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        axis = input.dim() - self._get_no_batch_dim()  # type: ignore[no-untyped-call]
        if input.size(axis) != self.num_features:
            if self.affine:
                raise ValueError(
                    f"expected input's size at dim={axis} to match num_features"
                    f" ({self.num_features}), but got: {input.size(axis)}."
                )
            else:
                warnings.warn(
                    f"input's size at dim={axis} does not match num_features. "
                    "You can silence this warning by not passing in num_features, "
                    "which is not used because affine=False",
                    stacklevel=3,
                )
        if axis == 1:
            return self._normalize_batch(input, mask, residual)
        if residual is not None:
            residual = residual.unsqueeze(0)
        return self._normalize_batch(input.unsqueeze(0), mask, residual).squeeze(0)

    def _normalize_batch(
        self, input: Tensor, mask: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        of_samples = self.training or not self.track_running_stats
        if of_samples:
            sizes = input.size()
            _require_more_than_one("spatial element", sizes, 1)  # type: ignore[arg-type]
        mean: Tensor | None = self.running_mean
        var: Tensor | None = self.running_var
        momentum = self.momentum if self.momentum is not None else 0.0
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return instance_norm(
                input,
                mean,
                var,
                self.weight,
                self.bias,
                of_samples,
                momentum,
                self.eps,
                mask=mask,
                activation=self.activation,
                residual=residual,
            )
        elif not of_samples or (mean is None) != (var is None):
            # With only one of the statistics: the operator's error.
            return _batch_norm(
                input,
                mean,
                var,
                self.weight,
                self.bias,
                False,
                0.0,
                self.eps,
                mask,
                self.activation,
                residual,
            )
        elif mean is None or var is None:
            return _group_norm(
                input,
                input.size(1),
                self.weight,
                self.bias,
                self.eps,
                mask,
                self.activation,
                residual,
            )
        else:
            return instance_norm_train_op(
                input,
                mean,
                var,
                self.weight,
                self.bias,
                momentum,
                self.eps,
                mask=mask,
                activation=self.activation,
                residual=residual,
            )


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """:class:`torch.nn.InstanceNorm1d` for ``[N, C, L]`` and ``[C, L]``; see :mod:`normcore.nn`.

    The arguments are those of the torch class, and ``activation``: None, "relu", "silu", "gelu" or
    "gelu_tanh".
    """


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """:class:`torch.nn.InstanceNorm2d` for ``[N, C, H, W]`` and ``[C, H, W]``.

    The arguments are those of the torch class, and ``activation``: None, "relu", "silu", "gelu" or
    "gelu_tanh"; see :mod:`normcore.nn`.
    """


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """:class:`torch.nn.InstanceNorm3d` for ``[N, C, D, H, W]`` and ``[C, D, H, W]``.

    The arguments are those of the torch class, and ``activation``: None, "relu", "silu", "gelu" or
    "gelu_tanh"; see :mod:`normcore.nn`.
    """
