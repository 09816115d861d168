"""Batch and group normalization as modules with the semantics of treex and Flax linen.

A module holds parameters and statistics, chooses the arguments and calls one operator. Unlike in
:mod:`torch.nn`, the feature axis may be any axis (by default the last), the number of features may
be left to the first input, ``momentum`` is the decay of the *old* running statistics, and the
running variance takes the biased variance of the batch.
"""

# TorchScript reads the annotations of attributes and methods, so they must not be strings here.
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ._base import (
    Initializer,
    NormBase,
    integer,
    integers,
    is_recorded,
    leaf,
    not_compiled,
    number,
    result_type,
)
from .distributed import axis_group
from .functional import (
    batch_norm_op,
    call_op,
    given_options,
    group_norm_of_graph,
    group_norm_op,
)
from .settings import DEBUG_SYNC

__all__ = ["BatchNorm", "GroupNorm", "freeze", "unfreeze"]

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


class _DefaultInt(int):
    """A default value that can be told from the same number passed by the caller."""


_DEFAULT_NUM_GROUPS = _DefaultInt(32)


class BatchNorm(NormBase):
    r"""Batch normalization of any feature axis, with the semantics of treex and Flax linen.

    .. math::
        y = \operatorname{act}\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \cdot scale + bias
        + residual\right)

    With the statistics of the batch, :math:`\mu` and the biased :math:`\sigma^2` are taken over
    every axis but ``axis``, and the running ones become ``momentum * running + (1 - momentum) *
    batch``. Which statistics a call uses:

    ======================== ============ ========== ============== =======
    ``use_running_average``  ``training`` ``frozen`` statistics     updated
    ======================== ============ ========== ============== =======
    None                     True         False      of the batch   yes
    None                     True         True       running        no
    None                     False        either     running        no
    True                     either       either     running        no
    False                    either       either     of the batch   yes
    ======================== ============ ========== ============== =======

    One value per channel is legal (the output is ``bias``), a channel without a valid element gives
    NaN and keeps its running statistics, and an empty input changes nothing.

    Args:
        num_features: size of the feature axis, or the sizes of several in ascending order of the
            axes. None takes it from :meth:`init`, a loaded state_dict or the first call.
        axis: the feature axis, or several. All others are reduced, the batch axis too.
        momentum: decay of the old running statistics, a float or a 0-dim tensor; may be changed
            at any time. ``1 - momentum`` is what :mod:`torch.nn` calls momentum. A tensor is read
            on the host in each call: it synchronises with its device and breaks a compiled graph.
        epsilon: added to the variance.
        dtype: dtype of the output. None takes the promotion of the dtypes of input, scale and
            bias. Whatever it is, the arithmetic is at least float32 with one rounding at the end.
        param_dtype: dtype of scale and bias.
        use_bias, use_scale: whether there is such a parameter, independently of each other.
        bias_init, scale_init: functions that fill a tensor in place, such as those of
            :mod:`torch.nn.init`; by default zeros and ones.
        axis_name: the ranks over which the statistics of a batch are combined: "world", or a
            dimension of the mesh that :func:`normcore.distributed.use_mesh` activates. All of them
            make the call; one without samples updates its statistics like the others. While
            torch.distributed is not initialized it has no effect. Not in TorchScript while batch
            statistics are used.
        axis_index_groups: partition of the indices of ranks in that dimension, such as ``[[0, 1],
            [2, 3]]``, into groups with statistics of their own. The first call makes them.
        sync_weighting: "count" weighs ranks by their number of values that count: a value counts as
            much as any other. "rank" weighs ranks equally, as Flax does; a rank without a valid
            value then gives NaN on all of them, which keep their running statistics.
        activation: None, "relu", "silu", "gelu" or "gelu_tanh", applied to the output.
        device: device of parameters and statistics; by default that of the first input of a lazy
            module, else torch's default device.

    State: parameters ``scale`` and ``bias`` (None when unused), buffers ``mean`` (0 at first) and
    ``var`` (1). The statistics are float32: half-precision conversions of the module leave them
    alone, ``.double()`` widens them, and a call never changes their dtype.

    Raises:
        ValueError: a shape or a value does not fit, there is no dimension `axis_name`; TypeError: a
            dtype is unsupported; IndexError: ``axis`` is out of range. A call that raises changes
            nothing; a lazy module stays lazy.

    Example::

        norm = normcore.BatchNorm(axis=1, momentum=0.9)
        y = norm(torch.randn(8, 64, 32, 32))

    Source: Ioffe and Szegedy, `Batch Normalization <https://arxiv.org/abs/1502.03167>`_, 2015;
    `flax.linen.BatchNorm <https://flax.readthedocs.io>`_.
    """

    mean: Tensor
    var: Tensor

    def __init__(
        self,
        *,
        num_features: int | Sequence[int] | None = None,
        axis: int | Sequence[int] = -1,
        momentum: float | Tensor = 0.99,
        epsilon: float = 1e-5,
        dtype: torch.dtype | None = torch.float32,
        param_dtype: torch.dtype = torch.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer | None = None,
        scale_init: Initializer | None = None,
        axis_name: str | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        sync_weighting: str = "count",
        activation: str | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(
            num_features=num_features,
            axis=axis,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            sync_weighting=sync_weighting,
            activation=activation,
            device=device,
        )
        if not isinstance(momentum, Tensor):
            momentum = number("BatchNorm", "momentum", momentum)
        elif momentum.dim() != 0:
            raise ValueError(
                "BatchNorm: expected momentum to be a float or a 0-dim tensor, got a tensor of "
                f"shape {list(momentum.shape)}"
            )
        self.momentum = momentum
        self._create_state(buffers=("mean", "var"))

    def reset_parameters(self) -> None:
        """Sets scale and bias to their initial values, and the statistics to (0, 1)."""
        super().reset_parameters()
        with torch.no_grad():
            self.mean.zero_()
            self.var.fill_(1.0)

    def forward(
        self,
        x: Tensor,
        use_running_average: bool | None = None,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Normalizes `x`; the result has its shape and memory format.

        Args:
            x: tensor of any rank >= 1, floating point or integer.
            use_running_average: overrides the mode; see the table of the class.
            mask: broadcasts to `x`; nonzero elements count for the statistics of the batch. The
                output is computed everywhere. Pass it by keyword.
            residual: tensor of the shape of `x`, added before the activation. Pass it by keyword.
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            recorded = is_recorded(x)
            if recorded:
                node: Tensor = leaf(
                    self,
                    x,
                    use_running_average=use_running_average,
                    mask=mask,
                    residual=residual,
                )
                return node
        if not self.initialized:
            y: Tensor = self._first_call(x, use_running_average, mask, residual)
            return y
        self._check_features(x)
        if use_running_average is None:
            batch = self.training and not self.frozen
        else:
            batch = not use_running_average
        group: str | None = None
        if self.axis_name is not None:
            if torch.jit.is_scripting():  # type: ignore[attr-defined]
                if batch:
                    raise NotImplementedError("BatchNorm: axis_name needs Python, not TorchScript")
            elif batch or DEBUG_SYNC:
                group = axis_group("BatchNorm", self.axis_name, self.axis_index_groups)
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            scale, bias, mean, var = self.scale, self.bias, self.mean, self.var
        else:
            scale, bias = self._affine()
            mean, var = self._statistics()
        dtype = self.dtype
        if dtype is None:
            dtype = result_type(x, scale, bias)
        if dtype != x.dtype and not x.is_floating_point() and not x.is_complex():
            x = x.to(torch.promote_types(dtype, torch.float32))
        momentum = 1.0 - float(self.momentum)
        out_dtype = None if dtype == x.dtype else dtype
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return batch_norm_op(
                x,
                mean,
                var,
                scale,
                bias,
                batch,
                momentum,
                self.epsilon,
                axis=self.axis,
                mask=mask,
                activation=self.activation,
                residual=residual,
                unbiased=False,
                dtype=out_dtype,
            )
        else:
            axis = 1 if self.axis == [1] else self.axis
            options = given_options(axis, mask, self.activation, residual, out_dtype)
            if batch:
                options["unbiased"] = False
            if group is not None:
                options |= {"group": group, "sync_weighting": self.sync_weighting}
            arguments = (x, mean, var, scale, bias, batch, momentum, self.epsilon)
            return call_op(batch_norm_op, arguments, options)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and var, faster than with the __getattr__ of nn.Module."""
        buffers = self._buffers
        try:
            return buffers["mean"], buffers["var"]  # type: ignore[return-value]
        except KeyError:
            return self.mean, self.var

    @torch.jit.unused
    @not_compiled
    def _first_call(
        self,
        x: Tensor,
        use_running_average: bool | None,
        mask: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        with self._lazy_if_it_raises():
            self._materialize_from(x)
            # Not self.forward: a subclass may override it and have called this one.
            return BatchNorm.forward(self, x, use_running_average, mask, residual)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BatchNorm":
        mean, var = self.mean, self.var
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.mean.dtype in (torch.float16, torch.bfloat16):
            self.mean, self.var = mean.to(self.mean.device), var.to(self.var.device)
        return self

    def extra_repr(self) -> str:
        """Options that differ from the default, for ``repr``."""
        return self._repr_of(momentum=(self.momentum, ...))


class GroupNorm(NormBase):
    r"""Group normalization of any feature axis, with the semantics of treex and Flax linen.

    .. math::
        y = \operatorname{act}\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \cdot scale + bias
        + residual\right)

    The channels are divided into blocks of neighbours; :math:`\mu` and the biased :math:`\sigma^2`
    are taken for each sample and block. Training, evaluation and :meth:`freeze` make no difference
    to the result. One value per group is legal (the output is ``bias``), and a group without a
    valid element gives NaN.

    Args:
        num_features: number of channels, or the sizes of several feature axes in ascending order of
            the axes. None takes it from :meth:`init`, a loaded state_dict or the first call.
        num_groups: number of groups; divides the number of channels.
        group_size: number of channels per group, instead of `num_groups`.
        axis: the feature axis, or several: they are flattened in ascending order, then grouped.
        epsilon: added to the variance.
        dtype: dtype of the output. None takes the promotion of the dtypes of input, scale and
            bias. Whatever it is, the arithmetic is at least float32 with one rounding at the end.
        param_dtype: dtype of scale and bias.
        use_bias, use_scale: whether there is such a parameter, independently of each other.
        bias_init, scale_init: functions that fill a tensor in place, such as those of
            :mod:`torch.nn.init`; by default zeros and ones.
        reduction_axes: the axes that a statistic is taken over, the feature axes among them; every
            other axis keeps statistics of its own. By default all axes but axis 0.
        axis_name: the ranks over which statistics are combined: "world", or a dimension of the mesh
            that :func:`normcore.distributed.use_mesh` activates. All of them make the call, with
            the same sizes of the axes that are not reduced. While torch.distributed is not
            initialized it has no effect. Not in TorchScript.
        axis_index_groups: partition of the indices of ranks in that dimension, such as ``[[0, 1],
            [2, 3]]``, into groups with statistics of their own. The first call makes them.
        sync_weighting: "count" weighs ranks by their number of values that count: a value counts as
            much as any other. "rank" weighs ranks equally, as Flax does; a rank without a valid
            value then gives NaN on all of them.
        activation: None, "relu", "silu", "gelu" or "gelu_tanh", applied to the output.
        device: device of the parameters; by default that of the first input of a lazy module, else
            torch's default device.

    State: parameters ``scale`` and ``bias`` (None when unused).

    Raises:
        ValueError: a shape or a value does not fit, both or neither of `num_groups` and
            `group_size` are given, there is no dimension `axis_name`; TypeError: a dtype is
            unsupported; IndexError: an axis is out of range.

    Example::

        norm = normcore.GroupNorm(num_groups=8, axis=1, activation="silu")
        y = norm(torch.randn(8, 64, 32, 32))

    Source: Wu and He, `Group Normalization <https://arxiv.org/abs/1803.08494>`_, 2018;
    `flax.linen.GroupNorm <https://flax.readthedocs.io>`_.
    """

    def __init__(
        self,
        *,
        num_features: int | Sequence[int] | None = None,
        num_groups: int | None = _DEFAULT_NUM_GROUPS,
        group_size: int | None = None,
        axis: int | Sequence[int] = -1,
        epsilon: float = 1e-5,
        dtype: torch.dtype | None = torch.float32,
        param_dtype: torch.dtype = torch.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer | None = None,
        scale_init: Initializer | None = None,
        reduction_axes: Sequence[int] | None = None,
        axis_name: str | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        sync_weighting: str = "count",
        activation: str | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        if num_groups is _DEFAULT_NUM_GROUPS:
            num_groups = None if group_size is not None else int(num_groups)
        if (num_groups is None) == (group_size is None):
            raise ValueError(
                "GroupNorm: expected either num_groups or group_size to be given, "
                f"got num_groups={num_groups} and group_size={group_size}"
            )
        if num_groups is not None:
            num_groups = integer("GroupNorm", "num_groups", num_groups)
        if group_size is not None:
            group_size = integer("GroupNorm", "group_size", group_size)
        for name, value in (("num_groups", num_groups), ("group_size", group_size)):
            if value is not None and value <= 0:
                raise ValueError(f"GroupNorm: expected {name} to be positive, got {value}")
        if reduction_axes is not None:
            reduction_axes = integers("GroupNorm", "reduction_axes", reduction_axes)
        super().__init__(
            num_features=num_features,
            axis=axis,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            sync_weighting=sync_weighting,
            activation=activation,
            device=device,
        )
        self.num_groups = num_groups
        self.group_size = group_size
        self.reduction_axes = reduction_axes
        self._create_state(buffers=())

    def _accept_channels(self, channels: int) -> None:
        for name, divisor in (("num_groups", self.num_groups), ("group_size", self.group_size)):
            if divisor is not None and channels % divisor != 0:
                raise ValueError(
                    f"GroupNorm: expected {name} to divide the number of channels ({channels}), "
                    f"got {divisor}"
                )

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Normalizes `x`; the result has its shape and memory format.

        Args:
            x: tensor of any rank >= 1, floating point or integer.
            mask: broadcasts to `x`; nonzero elements count for the statistics. The output is
                computed everywhere. Pass it by keyword.
            residual: tensor of the shape of `x`, added before the activation. Pass it by keyword.
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            recorded = is_recorded(x)
            if recorded:
                node: Tensor = leaf(self, x, mask=mask, residual=residual)
                return node
        if not self.initialized:
            y: Tensor = self._first_call(x, mask, residual)
            return y
        self._check_features(x)
        group: str | None = None
        if self.axis_name is not None:
            if torch.jit.is_scripting():  # type: ignore[attr-defined]
                raise NotImplementedError("GroupNorm: axis_name needs Python, not TorchScript")
            else:
                group = axis_group("GroupNorm", self.axis_name, self.axis_index_groups)
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            scale, bias = self.scale, self.bias
        else:
            scale, bias = self._affine()
        dtype = self.dtype
        if dtype is None:
            dtype = result_type(x, scale, bias)
        if dtype != x.dtype and not x.is_floating_point() and not x.is_complex():
            x = x.to(torch.promote_types(dtype, torch.float32))
        out_dtype = None if dtype == x.dtype else dtype
        num_groups = self.num_groups
        if num_groups is None:
            num_groups = self._num_groups_of_size()
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return group_norm_op(
                x,
                num_groups,
                scale,
                bias,
                self.epsilon,
                axis=self.axis,
                reduction_axes=self.reduction_axes,
                mask=mask,
                activation=self.activation,
                residual=residual,
                dtype=out_dtype,
            )
        else:
            axis = 1 if self.axis == [1] else self.axis
            options = given_options(axis, mask, self.activation, residual, out_dtype)
            if self.reduction_axes is not None:
                options["reduction_axes"] = self.reduction_axes
            if group is not None:
                options |= {"group": group, "sync_weighting": self.sync_weighting}
            arguments = (x, num_groups, scale, bias, self.epsilon)
            return call_op(group_norm_of_graph(), arguments, options)

    @torch.jit.unused
    @not_compiled
    def _first_call(
        self,
        x: Tensor,
        mask: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        with self._lazy_if_it_raises():
            self._materialize_from(x)
            # Not self.forward: a subclass may override it and have called this one.
            return GroupNorm.forward(self, x, mask, residual)

    def _num_groups_of_size(self) -> int:
        group_size = self.group_size
        assert group_size is not None
        channels = 1
        for size in self._features:
            channels *= size
        return channels // group_size

    def extra_repr(self) -> str:
        """Options that differ from the default, for ``repr``."""
        return self._repr_of(
            num_groups=(self.num_groups, None),
            group_size=(self.group_size, None),
            reduction_axes=(self.reduction_axes, None),
        )


def freeze(model: _ModuleT, mode: bool = True, *, affine: bool = True) -> _ModuleT:
    """Calls ``freeze(mode, affine=affine)`` on every norm of `model` and returns `model`.

    Frozen norms use their running statistics and never update them, also after ``model.train()``;
    with `affine` their scale and bias get ``requires_grad=False``. Freeze before
    :func:`torch.jit.script`: a scripted model raises TypeError.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("freeze: expected model to be a module in Python, got a ScriptModule")
    for module in model.modules():
        if isinstance(module, NormBase):
            module.freeze(mode, affine=affine)
    return model


def unfreeze(model: _ModuleT) -> _ModuleT:
    """Undoes :func:`freeze`: restores the former ``requires_grad`` of every norm of `model`."""
    return freeze(model, False)
