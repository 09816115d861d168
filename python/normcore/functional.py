"""Batch, group and instance normalization as functions.

Their positional arguments are those of :mod:`torch.nn.functional`. Both compute

    y = activation((x - mean) * (rstd * weight) + bias + residual),   rstd = 1 / sqrt(var + eps)

with the biased variance. Statistics and arithmetic are at least float32 and there is one rounding,
when ``y`` is stored. This module is the only one that names ``torch.ops.normcore``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .distributed import group_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["batch_norm", "batch_norm_functional", "explain", "group_norm", "instance_norm"]

# The operators themselves, for code that TorchScript compiles: it has no keyword-only defaults.
batch_norm_op: Callable[..., Tensor] = torch.ops.normcore.batch_norm
group_norm_op: Callable[..., Tensor] = torch.ops.normcore.group_norm
instance_norm_train_op: Callable[..., Tensor] = torch.ops.normcore._instance_norm_train


def given_options(
    axis: int | Sequence[int],
    mask: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Arguments that differ from the default: the dispatcher takes half a microsecond for each."""
    options: dict[str, Any] = {}
    if type(axis) is not int or axis != 1:
        options["axis"] = axis
    if mask is not None:
        options["mask"] = mask
    if activation is not None:
        options["activation"] = activation
    if residual is not None:
        options["residual"] = residual
    if dtype is not None:
        options["dtype"] = dtype
    return options


def sync_options(
    op: str, group: str | ProcessGroup | DeviceMesh | None, sync_weighting: str
) -> dict[str, Any]:
    """Those that differ from the default."""
    options: dict[str, Any] = {}
    if group is not None:
        options["group"] = group_name(op, "group", group)
    if sync_weighting != "count":
        options["sync_weighting"] = sync_weighting
    return options


def call_op(
    op: Callable[..., Tensor], arguments: tuple[Any, ...], options: dict[str, Any]
) -> Tensor:
    """For code that TorchScript parses: it has no syntax for this, not even in what it skips."""
    return op(*arguments, **options)


def group_norm_of_graph() -> Callable[..., Tensor]:
    """The operator of group norm: under an exporter the one that decomposes into aten's."""
    # In torch 2.11 the compiler takes is_exporting() for true.
    if torch.compiler.is_exporting() and torch.compiler._is_exporting_flag:
        return torch.ops.normcore._group_norm_decomposed
    return group_norm_op


def _as_type_error(op: str, error: RuntimeError) -> RuntimeError | TypeError:
    """What the dispatcher says of an argument of a wrong type, as the error of this library."""
    found = re.search(
        r"Expected a value of type '(.+)' for argument '(\w+)' but instead found type '(.+?)'",
        str(error),
    )
    if found:
        return TypeError(f"{op}: expected {found[2]} to be of type {found[1]}, got {found[3]}")
    if "no tensor arguments" in str(error):
        return TypeError(f"{op}: expected input to be of type Tensor")
    return error


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    axis: int | Sequence[int] = 1,
    mask: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    unbiased: bool = True,
    num_batches_tracked: Tensor | None = None,
    group: str | ProcessGroup | DeviceMesh | None = None,
    sync_weighting: str = "count",
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Batch normalization over every axis but ``axis``.

    .. math::
        y = \operatorname{act}\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} w + b + r\right)

    With ``training=True`` :math:`\mu` and :math:`\sigma^2` are the mean and the biased variance of
    the batch, and the running statistics, when given, become ``(1 - momentum) * running + momentum
    * batch`` in place. Otherwise they are ``running_mean`` and ``running_var``. One value per
    channel is legal: its variance is 0. An empty input gives an empty output and changes nothing.
    A call inside of a backward pass is the second one of an activation checkpoint: it takes the
    statistics of the batch and leaves the running ones alone, which have counted it before.

    Args:
        input: tensor of any rank >= 1 in float64, float32, bfloat16 or float16, of any strides. The
            output and the gradient keep its memory format.
        running_mean: of shape ``[input.shape[a] for a in sorted(axis)]``; may be None with
            ``training``.
        running_var: like ``running_mean``; both or neither.
        weight: factor per channel, of the shape of ``running_mean``; absent: 1.
        bias: summand per channel, of the shape of ``running_mean``; absent: 0.
        training: normalize with the statistics of the batch, and update the running ones.
        momentum: weight of the **new** value in the running statistics, as in :mod:`torch.nn`. None
            takes the cumulative average, which needs ``num_batches_tracked``.
        eps: added to the variance.
        axis: the feature axis, or several. All others are reduced, the batch axis too.
        mask: tensor of any dtype that broadcasts to ``input``; nonzero elements count for the
            statistics of the batch. The output is computed everywhere. A channel with no valid
            element gives NaN and keeps its running statistics. Ignored unless ``training``.
        activation: None, ``"relu"``, ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.
        residual: tensor of the shape of ``input``, added before the activation.
        unbiased: the running variance takes ``var * n / (n - 1)``, as in :mod:`torch.nn`; False
            takes the biased variance, as in Flax. Normalization always uses the biased one.
        num_batches_tracked: int64 scalar, incremented by a training call whose input is not empty.
        group: process group over which statistics are combined, its name, "world" for the default
            one, or a DeviceMesh of one dimension. All its ranks make the call; one without samples
            updates its running statistics like the others. None takes the statistics of this rank,
            and so does any group while torch.distributed is not initialized. Ignored unless
            ``training``.
        sync_weighting: "count" weighs ranks by their number of values that count: a value counts as
            much as any other in the group. "rank" weighs ranks equally, as Flax does; a rank
            without a valid value then gives NaN on all of them, which keep their running
            statistics. Running statistics then need ``unbiased=False``.
        dtype: dtype of the output, by default that of ``input``.

    ``weight``, ``bias`` and the statistics may be of any of the four dtypes in any mix. If any of
    them, ``residual`` or ``dtype`` is float64, everything is computed in float64.

    Returns:
        A tensor of the shape and memory format of ``input``.

    Raises:
        ValueError: a shape or a value does not fit, or this rank is not in ``group``; the message
            names the argument, the rule and the actual value.
        TypeError: unsupported dtype.
        IndexError: ``axis`` is out of range.

        A call that raises leaves the running statistics unchanged.

    Source: Ioffe and Szegedy, `Batch Normalization <https://arxiv.org/abs/1502.03167>`_, 2015.

    In TorchScript, call ``torch.ops.normcore.batch_norm``, which has the same arguments; its
    ``group`` is a name.
    """
    options = given_options(axis, mask, activation, residual, dtype)
    if group is not None or sync_weighting != "count":
        options |= sync_options("batch_norm", group, sync_weighting)
    if unbiased is not True:
        options["unbiased"] = unbiased
    if num_batches_tracked is not None:
        options["num_batches_tracked"] = num_batches_tracked
    try:
        return batch_norm_op(
            input, running_mean, running_var, weight, bias, training, momentum, eps, **options
        )
    except RuntimeError as error:
        raise _as_type_error("batch_norm", error) from None


def batch_norm_functional(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    axis: int | Sequence[int] = 1,
    mask: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    unbiased: bool = True,
    num_batches_tracked: Tensor | None = None,
    group: str | ProcessGroup | DeviceMesh | None = None,
    sync_weighting: str = "count",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`batch_norm` in training, without changing any argument.

    For code whose state is a value, and for :func:`torch.vmap` over some arguments only: the new
    statistics are mapped if anything they depend on is. They are constants to differentiation, as
    those of torch.nn are. The arguments are those of :func:`batch_norm`; ``num_batches_tracked``,
    the number of batches before this one, is needed with ``momentum=None``.

    Returns:
        ``y``, and the running mean and variance after this batch, of the shapes and dtypes given.

    Raises:
        ValueError, TypeError, IndexError: as :func:`batch_norm`.
    """
    if running_mean is None or running_var is None:
        absent = "running_mean" if running_mean is None else "running_var"
        raise TypeError(f"batch_norm_functional: expected {absent} to be of type Tensor, got None")
    options = given_options(axis, mask, activation, residual, dtype)
    options |= {"unbiased": unbiased, "num_batches_tracked": num_batches_tracked}
    if group is not None or sync_weighting != "count":
        options |= sync_options("batch_norm_functional", group, sync_weighting)
    arguments = (input, running_mean, running_var, weight, bias, momentum, eps)
    try:
        y, mean, var = torch.ops.normcore.batch_norm_functional(*arguments, **options)
    except RuntimeError as error:
        raise _as_type_error("batch_norm_functional", error) from None
    return y, mean, var


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    axis: int | Sequence[int] = 1,
    reduction_axes: Sequence[int] | None = None,
    mask: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    group: str | ProcessGroup | DeviceMesh | None = None,
    sync_weighting: str = "count",
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Group normalization over blocks of ``C / num_groups`` neighbouring channels of each sample.

    .. math::
        y = \operatorname{act}\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} w + b + r\right)

    :math:`\mu` and :math:`\sigma^2` are the mean and the biased variance of the group, over its
    channels and the other reduced axes. ``num_groups=1`` is layer normalization over everything but
    the samples, ``num_groups=C`` is instance normalization. One value per group is legal: its
    variance is 0. An empty input gives an empty output.

    Args:
        input: tensor of any rank >= 1 in float64, float32, bfloat16 or float16, of any strides. The
            output and the gradient keep its memory format.
        num_groups: number of groups; divides the number of channels C.
        weight: factor per channel, of shape ``[C]``, or ``[N, C]`` for one of every sample
            (adaptive normalization). With several axes ``[input.shape[a] for a in sorted(axis)]``,
            behind the sizes of the axes that are not reduced where every sample has its own.
            Absent: 1.
        bias: summand per channel, of the shapes that ``weight`` may have. Absent: 0.
        eps: added to the variance.
        axis: the feature axis, or several: they are flattened in ascending order, then grouped.
        reduction_axes: the axes that a statistic is taken over, the feature axes among them; every
            other axis keeps statistics of its own. By default all axes but axis 0.
        mask: tensor of any dtype that broadcasts to ``input``; nonzero elements count for the
            statistics. The output is computed everywhere. A group with no valid element gives NaN.
        activation: None, ``"relu"``, ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.
        residual: tensor of the shape of ``input``, added before the activation.
        group: process group over which statistics are combined, its name, "world" for the default
            one, or a DeviceMesh of one dimension. All its ranks make the call, with the same sizes
            of the axes that are not reduced. None takes the statistics of this rank, and so does
            any group while torch.distributed is not initialized.
        sync_weighting: "count" weighs ranks by their number of values that count: a value counts as
            much as any other in the group. "rank" weighs ranks equally, as Flax does; a rank
            without a valid value then gives NaN on all of them.
        dtype: dtype of the output, by default that of ``input``.

    ``weight`` and ``bias`` may be of any of the four dtypes in any mix. If ``dtype``, ``weight``,
    ``bias`` or ``residual`` is float64, everything is computed in float64.

    Returns:
        A tensor of the shape and memory format of ``input``.

    Raises:
        ValueError: a shape or a value does not fit, or this rank is not in ``group``; the message
            names the argument, the rule and the actual value.
        TypeError: unsupported dtype.
        IndexError: ``axis`` or ``reduction_axes`` is out of range.

    Source: Wu and He, `Group Normalization <https://arxiv.org/abs/1803.08494>`_, 2018.

    In TorchScript, call ``torch.ops.normcore.group_norm``, which has the same arguments; its
    ``group`` is a name.
    """
    options = given_options(axis, mask, activation, residual, dtype)
    if group is not None or sync_weighting != "count":
        options |= sync_options("group_norm", group, sync_weighting)
    if reduction_axes is not None:
        options["reduction_axes"] = reduction_axes
    try:
        return group_norm_of_graph()(input, num_groups, weight, bias, eps, **options)
    except RuntimeError as error:
        raise _as_type_error("group_norm", error) from None


def _channels_of_instances(input: Tensor, axis: int | Sequence[int]) -> int:
    rank, sizes = input.dim(), []
    for a in [axis] if isinstance(axis, int) else axis:
        if not -rank <= a < rank:
            raise IndexError(
                f"instance_norm: expected axis in [{-rank}, {rank - 1}] for an input of rank "
                f"{rank}, got {a}"
            )
        if a % rank == 0:
            raise ValueError(f"instance_norm: expected axis without the batch axis 0, got {axis}")
        sizes.append(input.shape[a])
    return math.prod(sizes)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int | Sequence[int] = 1,
    mask: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Instance normalization: every channel of every sample has statistics of its own.

    .. math::
        y = \operatorname{act}\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} w + b + r\right)

    With ``use_input_stats`` :math:`\mu` and :math:`\sigma^2` are the mean and the biased variance
    of a channel of a sample; running statistics, when given, take ``(1 - momentum) * running +
    momentum * new``, where ``new`` is the mean over the samples, of unbiased variances. Otherwise
    they are ``running_mean`` and ``running_var``. One value per channel is legal: its variance
    is 0.

    Args:
        input: ``[N, C, *]`` by default, in float64, float32, bfloat16 or float16, of any strides.
            The output and the gradient keep its memory format.
        running_mean: of shape ``[input.shape[a] for a in sorted(axis)]``; may be None with
            ``use_input_stats``.
        running_var: like ``running_mean``; both or neither.
        weight: factor per channel, of the shape of ``running_mean``; absent: 1.
        bias: summand per channel, of the shape of ``running_mean``; absent: 0.
        use_input_stats: normalize with the statistics of the input.
        momentum: weight of the **new** value in the running statistics.
        eps: added to the variance.
        axis: the feature axis, or several, without axis 0, the samples.
        mask: tensor of any dtype that broadcasts to ``input``; nonzero elements count for the
            statistics. Ignored without ``use_input_stats``.
        activation: None, ``"relu"``, ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.
        residual: tensor of the shape of ``input``, added before the activation.
        dtype: dtype of the output, by default that of ``input``.

    Returns:
        A tensor of the shape and memory format of ``input``.

    Raises:
        ValueError, TypeError, IndexError: as :func:`batch_norm`.

    Source: Ulyanov et al., `Instance Normalization <https://arxiv.org/abs/1607.08022>`_, 2016.
    """
    options = given_options(axis, mask, activation, residual, dtype)
    if not use_input_stats:
        return batch_norm(
            input, running_mean, running_var, weight, bias, False, momentum, eps, **options
        )
    if running_mean is None and running_var is None:
        channels = _channels_of_instances(input, axis)
        return group_norm(input, channels, weight, bias, eps, **options)
    if running_mean is None or running_var is None:
        given = "running_var" if running_mean is None else "running_mean"
        raise ValueError(
            "instance_norm: expected both or none of running_mean and running_var, got only "
            + given
        )
    return call_op(
        instance_norm_train_op,
        (input, running_mean, running_var, weight, bias, momentum, eps),
        options,
    )


def explain(
    input: Tensor,
    op: str,
    *,
    axis: int | Sequence[int] = 1,
    num_groups: int = 32,
    reduction_axes: Sequence[int] | None = None,
    mask: Tensor | None = None,
    activation: str | None = None,
    affine_per_sample: bool = False,
    training: bool = True,
    backward: bool = False,
    device: torch.device | str | None = None,
) -> str:
    """How a call of :func:`batch_norm` or :func:`group_norm` would run, in one line.

    Nothing is computed: the answer follows from shape, strides and dtype, so ``input`` may be a
    meta tensor and ``device`` one that this machine does not have.

    Args:
        input: as for the function.
        op: ``"batch_norm"`` or ``"group_norm"``.
        axis: as for the function.
        num_groups: as for :func:`group_norm`.
        reduction_axes: as for :func:`group_norm`.
        mask: as for the function; only its shape matters.
        activation: as for the function.
        affine_per_sample: whether weight and bias of :func:`group_norm` are ``[N, C]``.
        training: of :func:`batch_norm`: whether statistics are those of the batch.
        backward: the backward pass, with all gradients wanted, instead of the forward pass.
        device: a CPU or CUDA device, by default that of ``input``. A CUDA device that is not there
            is taken to have 132 multiprocessors.

    Raises:
        ValueError, TypeError, IndexError: as the function, and for an unknown ``op``.
        NotImplementedError: another kind of device.

    Example::

        >>> x = torch.empty(32, 512, 28, 28, dtype=torch.bfloat16, device="meta")
        >>> normcore.explain(x, "group_norm", device="cuda")  # doctest: +ELLIPSIS
        'group_norm forward on cuda, ...: block path, planes: 1024 blocks of 224 threads, ...'
    """
    plan: str = torch.ops.normcore.explain(
        input,
        op,
        axis=axis,
        num_groups=num_groups,
        reduction_axes=reduction_axes,
        mask=mask,
        activation=activation,
        affine_per_sample=affine_per_sample,
        training=training,
        backward=backward,
        device=None if device is None else torch.device(device),
    )
    return plan
