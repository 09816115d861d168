"""Models with the norms of this library in place of their own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from .distributed import group_name, resolve
from .nn import SyncBatchNorm, _Norm

# What a conversion may replace: every other forward() is the work of a subclass.
_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, _Norm.forward)

# What a module must have for itself. Hooks are shared with the module that is replaced, so that
# their handles still remove them.
_OWN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Replaces every batch norm of :mod:`torch.nn` by :class:`normcore.nn.SyncBatchNorm`.

    As :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm`, for the CPU too. A norm that replaces
    another has its parameters, buffers, hooks and all other attributes; one that stands at several
    places of the model is replaced by one. :func:`revert` undoes it.

    Left alone are :class:`normcore.BatchNorm`, which has ``axis_name``, and with a warning what
    would lose something: parametrized norms, and subclasses with a ``forward`` of their own.

    Args:
        model: a model or a norm. Its norms of any class derived from ``BatchNorm1d``,
            ``BatchNorm2d``, ``BatchNorm3d`` or ``SyncBatchNorm`` are replaced.
        process_group: the ranks that share statistics, as for :class:`normcore.nn.SyncBatchNorm`;
            None is the default group.

    Returns:
        `model`, changed in place, or the new norm if `model` is one.

    Raises:
        ValueError: a lazy norm has not seen an input yet, or this rank is not in the group.
        TypeError: `process_group` is no process group. A call that raises changes nothing.
    """
    group_name("convert_sync_batchnorm", "process_group", process_group)  # checks it

    def replacement(name: str, module: nn.Module) -> nn.Module:
        if not isinstance(module, _BatchNorm):
            return module
        kind: type[nn.Module] = type(module)
        if getattr(module.forward, "__func__", None) not in _FORWARDS or is_parametrized(module):
            reason = "is parametrized" if is_parametrized(module) else "has its own forward"
            warnings.warn(
                f"convert_sync_batchnorm: {kind.__name__} {name!r} {reason} and stays as it is",
                stacklevel=4,
            )
            return module
        if isinstance(module, LazyModuleMixin):
            raise ValueError(
                "convert_sync_batchnorm: expected norms that know their number of features, got "
                f"{kind.__name__} {name!r}; call the model once before"
            )
        converted = _with_class(module, SyncBatchNorm)
        assert isinstance(converted, SyncBatchNorm)
        converted.process_group = process_group
        if kind is not SyncBatchNorm:
            converted._former_class = kind
            converted._former_group = getattr(module, "process_group", None)
        return converted

    return _replace(model, replacement)


def revert(model: nn.Module) -> nn.Module:
    """Undoes :func:`convert_sync_batchnorm`: every norm gets the class back that it had.

    Parameters, buffers and what has been changed meanwhile stay as they are. A
    :class:`normcore.nn.SyncBatchNorm` that replaced nothing is left alone.

    Returns:
        `model`, changed in place, or the former norm if `model` is one.
    """

    def replacement(name: str, module: nn.Module) -> nn.Module:
        if not isinstance(module, SyncBatchNorm) or module._former_class is None:
            return module
        kind = module._former_class
        reverted = _with_class(module, kind)
        for name in ("_former_class", "_former_group", "process_group"):
            reverted.__dict__.pop(name, None)
        if issubclass(kind, (nn.SyncBatchNorm, SyncBatchNorm)):
            reverted.process_group = resolve(module._former_group)
        return reverted

    return _replace(model, replacement)


def _with_class(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A module of class `kind` with all that `module` has."""
    other = kind.__new__(kind)
    other.__dict__.update(module.__dict__)
    other.__dict__.pop("_compiled_call_impl", None)  # it calls `module`
    for name in _OWN:
        other.__dict__[name] = module.__dict__[name].copy()
    return other


def _replace(model: nn.Module, replacement: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """Replaces modules of `model`; nothing, if `replacement` raises for one of them."""
    replaced = {}
    for name, module in model.named_modules():
        replaced[module] = replacement(name, module)
    for module in replaced.values():
        for name, child in module._modules.items():
            if child is not None and replaced[child] is not child:
                module._modules[name] = replaced[child]
    return replaced[model]
