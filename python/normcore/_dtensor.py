"""Sharding rules of the operators, for ``torch.distributed.tensor.DTensor``.

A DTensor stands for the whole tensor: a norm of one gives what it would give on a single device.
The kernels run on shards wherever that is so without communication:

=============================  =====================================================
batch norm in training         feature axes sharded
batch norm in evaluation       any axis sharded
group norm                     kept axes sharded (the batch)
=============================  =====================================================

A batch norm in training whose batch is sharded is composed of aten operations, between which
DTensor sums the statistics over the devices (csrc/formulas.h). Everything else is redistributed to
the cheapest of these placements, as DTensor does for any operator.

``register_sharding`` would not do: it has no notion of arguments that are updated, and remembers
placements by the tensors of a call alone, although axes and groups decide about them too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import OpSchema, OpStrategy, RuntimeSchemaInfo
from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

# Arguments, and what has their shape among the results.
_ELEMENTS = ("input", "residual", "grad_output", "grad_grad_input", "grad_grad_residual", "y")
_PARAMETERS = ("weight", "bias", "grad_grad_weight", "grad_grad_bias")
_STATISTICS = ("mean", "rstd", "running_mean", "running_var")
_UPDATED = ("running_mean", "running_var", "num_batches_tracked")

_RESULTS = {
    "_batch_norm_train": ("y", "mean", "rstd", "relu_bits"),
    "_batch_norm_eval": ("y", "rstd"),
    "_group_norm": ("y", "mean", "rstd"),
    "_batch_norm_backward": ("input", "weight", "bias", "residual"),
    "_group_norm_backward": ("input", "weight", "bias", "residual"),
    "_batch_norm_double_backward": ("grad_output", "input", "weight", "bias", "residual"),
    "_group_norm_double_backward": ("grad_output", "input", "weight", "bias", "residual"),
}


@dataclass(frozen=True)
class _Split:
    """A placement on one dimension of the mesh: ``axis`` of the input is sharded."""

    axis: int
    parameters: Placement
    statistics: Placement
    parameter_gradients: Placement


def _axes(axis: Sequence[int], ndim: int) -> list[int]:
    return sorted(a % ndim for a in axis)


def _can_shard(shape: Sequence[int], axes: Sequence[int], devices: int) -> bool:
    """Whether shards of the first of ``axes`` are shards of what all of them flatten to.

    None of them is empty: that device would not count the batch.
    """
    size = shape[axes[0]]
    is_even = size % devices == 0
    has_empty = (devices - 1) * -(-size // devices) >= size
    return is_even or (len(axes) == 1 and not has_empty)


def _batch_norm_splits(input: DTensorSpec, axis: Sequence[int], batch: bool) -> Iterator[_Split]:
    """``batch``: the statistics are constants, so the other axes can be sharded as well."""
    features = _axes(axis, input.ndim)
    if _can_shard(input.shape, features, input.mesh.size()):
        yield _Split(features[0], Shard(0), Shard(0), Shard(0))
    for d in range(input.ndim) if batch else ():
        if d not in features:
            yield _Split(d, Replicate(), Replicate(), Partial())


def _group_norm_splits(
    input: DTensorSpec,
    parameter: DTensorSpec | None,
    axis: Sequence[int],
    reduction_axes: Sequence[int] | None,
) -> Iterator[_Split]:
    features = _axes(axis, input.ndim)
    others = range(1, input.ndim) if reduction_axes is None else _axes(reduction_axes, input.ndim)
    kept = [d for d in range(input.ndim) if d not in {*features, *others}]
    if not kept or not _can_shard(input.shape, kept, input.mesh.size()):
        return
    if parameter is not None and parameter.ndim == len(kept) + len(features):  # per sample
        yield _Split(kept[0], Shard(0), Shard(0), Shard(0))
    else:
        yield _Split(kept[0], Replicate(), Shard(0), Partial())


def _splits(name: str, arguments: dict[str, Any]) -> Iterator[_Split]:
    input = arguments["input"]
    if name.startswith("_group_norm"):
        parameter = arguments["weight"] if arguments["weight"] is not None else arguments["bias"]
        yield from _group_norm_splits(
            input, parameter, arguments["axis"], arguments["reduction_axes"]
        )
    else:
        are_constants = not arguments.get("batch_statistics", name != "_batch_norm_eval")
        yield from _batch_norm_splits(input, arguments["axis"], are_constants)


def _placement_of_mask(mask: DTensorSpec, input: DTensorSpec, axis: int) -> Placement:
    own = axis - (input.ndim - mask.ndim)
    return Replicate() if own < 0 or mask.shape[own] == 1 else Shard(own)


def _placement(name: str, split: _Split | None, arguments: dict[str, Any]) -> Placement:
    if split is None or name == "num_batches_tracked":
        return Replicate()
    if name == "mask":
        return _placement_of_mask(arguments["mask"], arguments["input"], split.axis)
    if name in _ELEMENTS:
        return Shard(split.axis)
    return split.parameters if name in _PARAMETERS else split.statistics


def _tensors(arguments: dict[str, Any]) -> dict[str, DTensorSpec]:
    return {n: spec for n, spec in arguments.items() if isinstance(spec, DTensorSpec)}


def _placements(
    name: str, split: _Split | None, arguments: dict[str, Any]
) -> list[Placement | None]:
    """Those of the results, then of the arguments; None for results that are not wanted."""
    placements: list[Placement | None] = []
    wanted = arguments.get("output_mask")  # of gradients
    for i, result in enumerate(_RESULTS[name]):
        is_unwanted = wanted is not None and (not wanted[i] or arguments[result] is None)
        if is_unwanted or result == "relu_bits":  # which are not asked for
            placements.append(None)
        elif wanted is not None and split is not None and result in _PARAMETERS:
            placements.append(split.parameter_gradients)
        else:
            placements.append(_placement(result, split, arguments))
    return placements + [_placement(n, split, arguments) for n in _tensors(arguments)]


def _stays(arguments: dict[str, Any], placed: Sequence[DTensorSpec]) -> bool:
    """Whether what is updated stays where it is: the update of a copy would be lost."""
    return all(
        spec.placements == there.placements
        for (n, spec), there in zip(_tensors(arguments).items(), placed)
        if n in _UPDATED
    )


def _strategy(name: str, names: Sequence[str], schema: OpSchema) -> OpStrategy:
    """All placements in which the kernel gives what it would give on one device."""

    def spec_of(argument: object) -> object:
        return argument.strategies[0].output_spec if isinstance(argument, OpStrategy) else argument

    arguments = dict(zip(names, map(spec_of, schema.args_schema)))
    strategy = expand_to_full_mesh_op_strategy(
        schema.get_mesh_from_args(),
        schema,
        [_placements(name, split, arguments) for split in (None, *_splits(name, arguments))],
        input_index=len(_RESULTS[name]),
    )
    if name == "_batch_norm_train":
        strategy.strategies = [
            choice for choice in strategy.strategies if _stays(arguments, choice.input_specs or ())
        ]
    return strategy


def _register(op: OpOverload) -> None:
    name = op._schema.name.removeprefix("normcore::")
    arguments = [argument.name for argument in op._schema.arguments]
    DTensor._op_dispatcher.sharding_propagator.register_op_strategy(
        op,
        partial(_strategy, name, arguments),
        # Every argument from the first one on that is no tensor decides about the placements.
        RuntimeSchemaInfo(static_argnum=1, needs_pytree=True),
    )


for _name in _RESULTS:
    _register(getattr(torch.ops.normcore, _name).default)


def is_dtensor(op: str, input: Tensor, others: dict[str, Tensor]) -> bool:
    """Whether `input` is a DTensor, and then all of `others`.

    Raises:
        TypeError: one of them is not, or the counter would have to be added up first.
    """
    if not isinstance(input, DTensor):
        return False
    for name, tensor in others.items():
        if not isinstance(tensor, DTensor) and tensor.ndim != 0:
            raise TypeError(
                f"{op}: expected {name} to be a DTensor like input, got a {type(tensor).__name__}; "
                "torch.distributed.tensor.distribute_module makes DTensors of what a module holds"
            )
    counter = others.get("num_batches_tracked")
    if isinstance(counter, DTensor) and any(p.is_partial() for p in counter.placements):
        raise TypeError(
            f"{op}: expected num_batches_tracked to have placements without Partial, "
            f"got {counter.placements}"
        )
    return True


class _Gather(torch.autograd.Function):
    """The same tensor without shares, and so its gradient, which ``redistribute`` leaves shared."""

    @staticmethod
    def forward(sum: DTensor) -> DTensor:
        placements = [Replicate() if p.is_partial() else p for p in sum.placements]
        return sum.redistribute(placements=placements)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return gathered(grad)


def gathered(sum: Tensor) -> Tensor:
    """A sum with shares on several devices as the whole sum on all of them."""
    if not isinstance(sum, DTensor) or not any(p.is_partial() for p in sum.placements):
        return sum
    result: Tensor = _Gather.apply(sum)
    return result


def is_spread(
    input: DTensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    axis: Sequence[int],
) -> bool:
    """Whether a batch norm in training takes statistics, or updates them, across devices."""
    features = _axes(axis, input.ndim)
    by_feature = Shard(features[0])
    if not all(p in (Replicate(), by_feature) for p in input.placements):
        return True
    if by_feature in input.placements and not _can_shard(
        input.shape, features, input.device_mesh.size()
    ):
        return True
    # Where the statistics of the batch arise.
    arising = tuple(Shard(0) if p == by_feature else Replicate() for p in input.placements)
    here = tuple(Replicate() for _ in arising)
    return any(
        isinstance(t, DTensor) and t.placements != placements
        for t, placements in (
            (running_mean, arising),
            (running_var, arising),
            (num_batches_tracked, here),
        )
    )
