"""What torch's tests are run against: its own names under the override, or our own names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.nn.functional as F
from torch import nn
from torch.testing._internal.common_modules import ModuleInfo

import normcore
import normcore.functional as NF

#: The functions of torch.nn.functional that normcore.functional has too.
FUNCTIONS = ("batch_norm", "instance_norm", "group_norm")

Function = Callable[..., Any]


class Override:
    """Calls torch; `normcore.override_aten` brings the call to our kernels."""

    name = "override"
    is_torch = True  # same outputs and memory formats, and the functions raise the same errors

    def function(self, entry: str, op: Function) -> Function | None:
        return op

    def module(self, info: ModuleInfo) -> type[nn.Module]:
        return info.module_cls

    @contextmanager
    def active(self) -> Iterator[Callable[[], int]]:
        """Yields how many calls have run on our kernels in the context."""
        with normcore.override_aten() as override:
            yield lambda: override.calls.normcore


@contextmanager
def counting_functions(place: Any) -> Iterator[Callable[[], int]]:
    """In the context `place` holds our functions; yields how often one ran."""
    calls = 0

    def counted(function: Function) -> Function:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in FUNCTIONS:
            stack.enter_context(patch.object(place, name, counted(getattr(NF, name))))
        yield lambda: calls


class Functional:
    """Calls normcore.functional with the arguments of torch's function."""

    name = "functional"
    is_torch = False

    def function(self, entry: str, op: Function) -> Function | None:
        """Ours with the arguments of torch's entry; None where there is none."""
        return functions().get(entry)

    def active(self) -> AbstractContextManager[Callable[[], int]]:
        """In the context torch.nn.functional holds our functions; gives how often one ran."""
        return counting_functions(F)


class Modules:
    """The modules of normcore.nn in the place of torch's."""

    name = "nn"
    is_torch = False

    def module(self, info: ModuleInfo) -> type[nn.Module]:
        """Ours with the name of torch's entry."""
        ours = getattr(normcore.nn, info.module_cls.__name__)
        assert issubclass(ours, info.module_cls)
        return ours

    def active(self) -> AbstractContextManager[Callable[[], int]]:
        """Gives how often one of the modules has called one of our functions in the context."""
        return counting_functions(normcore.nn)


def functions() -> dict[str, Function]:
    """What calls the functions that `Functional.active` has put there, by torch's entry."""

    def found(name: str) -> Function:
        return lambda *args, **kwargs: getattr(F, name)(*args, **kwargs)

    return {f"nn.functional.{name}": found(name) for name in FUNCTIONS} | {
        "nn.functional.batch_norm.without_cudnn": found("batch_norm"),
        "native_batch_norm": native_batch_norm,
        "_native_batch_norm_legit": native_batch_norm_legit,
        "native_group_norm": native_group_norm,
    }


def native_batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: Any, momentum: Any, eps: Any
) -> Any:
    return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def native_batch_norm_legit(x: Any, weight: Any, bias: Any, *args: Any) -> Any:
    statistics = args[:-3] or (None, None)
    return native_batch_norm(x, weight, bias, *statistics, *args[-3:])


def native_group_norm(
    x: Any, weight: Any, bias: Any, n: Any, c: Any, hxw: Any, group: Any, eps: Any
) -> Any:
    return F.group_norm(x, group, weight, bias, eps)


Target = Override | Functional | Modules
BY_NAME: dict[str, Target] = {kind.name: kind() for kind in (Override, Functional, Modules)}
