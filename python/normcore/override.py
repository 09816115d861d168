"""torch's own batch, group and instance norms on the kernels of this library."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ContextDecorator
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from typing import Any, NamedTuple, TypeVar

from . import _C

_FunctionT = TypeVar("_FunctionT", bound=Callable[..., Any])


class OverrideCalls(NamedTuple):
    """Calls of the overridden operators, forward and backward, by the kernels that ran them."""

    normcore: int
    aten: int


class override_aten(ContextDecorator):  # noqa: N801  (reads like torch.no_grad)
    """Runs the norms of :mod:`torch` on the kernels of this library, in models left as they are.

    Within the context :func:`torch.nn.functional.batch_norm`, ``instance_norm`` and ``group_norm``,
    the modules that call them and ``torch.native_batch_norm``, ``torch.native_group_norm`` and
    their backward passes use them::

        with normcore.override_aten() as override:
            model(x).sum().backward()
        print(override.calls)

    As a switch, ``override = normcore.override_aten().enable()`` lasts until
    ``override.disable()``. Contexts and switches nest: torch has its own kernels back when the last
    one has ended, also by an exception.

    Outputs, saved statistics, running statistics and errors have the values (up to rounding),
    shapes, dtypes and memory formats of torch. What torch computes in a way of its own stays on
    torch's kernels: empty inputs, ``eps <= 0``, one value per channel in training, and every call
    that it rejects.

    Limits:
        - The switch is for the whole process, so no other thread may run a norm while it changes.
        - CPU tensors, and CUDA tensors where this library was built with its CUDA kernels: there
          the override takes the place of cuDNN's batch norm too, except under vmap.
        - Saved statistics are rounded as torch rounds them, so that :mod:`normcore.functional` has
          the more accurate gradients.
        - First derivatives in reverse mode are ours. Formulas of second and forward-mode
          derivatives, and vmap, stay torch's own; they call the overridden operators.
        - Code that a compiler has generated is not affected; recorded graphs that run operator by
          operator are, where they still hold these operators.
        - As a decorator it is for plain functions: generators and coroutines raise TypeError.
    """

    def __init__(self) -> None:
        self._enabled = 0
        self._before = self._after = OverrideCalls(0, 0)

    def __call__(self, function: _FunctionT) -> _FunctionT:
        """A function that runs in the context."""
        kinds = (isgeneratorfunction, iscoroutinefunction, isasyncgenfunction)
        if any(is_kind(function) for is_kind in kinds):
            raise TypeError(
                "override_aten: expected a plain function to decorate, got a generator or coroutine"
            )
        return super().__call__(function)

    def enable(self) -> override_aten:
        """Switches to the kernels of this library, and counts calls from now on."""
        _C.enable_aten_override()
        if self._enabled == 0:
            self._before = OverrideCalls(*_C.aten_override_calls())
        self._enabled += 1
        return self

    def disable(self) -> None:
        """Undoes one :meth:`enable` of this object.

        Raises:
            RuntimeError: it is not enabled.
        """
        if self._enabled == 0:
            raise RuntimeError("override_aten: expected disable() to follow enable()")
        self._after = OverrideCalls(*_C.aten_override_calls())
        self._enabled -= 1
        _C.disable_aten_override()

    @property
    def calls(self) -> OverrideCalls:
        """Calls in the whole process while this object was enabled, the last time."""
        now = OverrideCalls(*_C.aten_override_calls()) if self._enabled else self._after
        return OverrideCalls(now.normcore - self._before.normcore, now.aten - self._before.aten)

    def __enter__(self) -> override_aten:  # noqa: D105
        return self.enable()

    def __exit__(self, *_: object) -> None:  # noqa: D105
        self.disable()
