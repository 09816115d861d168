"""What bounds the time of a case: the call, the memory or the arithmetic.

Each is estimated in microseconds: `calls` by the same operation on the least tensor, `memory` by
the copy of the case, `arithmetic` by the same operation on two tensors which the second-level cache
holds: what the larger takes beyond a call, and for further values what lies between the two. So
what a channel costs, whatever its number of values, is counted once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from .cases import BYTES, STREAMS, TINY, Case, Shape, text_of
from .machine import cache_bytes

# Of the second-level cache, for the operands; the rest is for parameters, sums and code, and for
# what falls into the same sets.
OPERANDS_SHARE = 0.8


def shrunk(shape: Shape, values: float) -> Shape:
    """With fewer samples or, of planes that are too long, positions; channels and groups stay."""
    samples, channels, *axes = shape.size
    if samples * channels * math.prod(axes) <= values:
        return shape
    positions = max(1, int(values) // channels)
    plane = math.prod(axes)
    if plane <= positions:
        size: tuple[int, ...] = (positions // plane, channels, *axes)
    else:
        size = (1, channels, positions)
    return Shape(f"{text_of(size)} in {shape.groups} groups", size, shape.groups)


class Bounds:
    """The estimates of a run. Many cases share the times they follow from."""

    def __init__(self, threads: int) -> None:
        second_level = cache_bytes(2)
        # Each thread works on its part in a cache of its own.
        self._bytes = OPERANDS_SHARE * second_level * threads if second_level else None
        self._times: dict[Case, float] = {}

    def _least(self, case: Case) -> Case:
        return replace(case, shape=TINY)

    def _cached(self, case: Case) -> Case | None:
        """None where the size of the cache is not known."""
        if self._bytes is None:
            return None
        values = self._bytes / (STREAMS[case.operation] * BYTES[case.dtype])
        return replace(case, shape=shrunk(case.shape, values))

    def _half(self, cached: Case) -> Case:
        return replace(cached, shape=shrunk(cached.shape, cached.values / 2))

    def missing(self, case: Case) -> list[Case]:
        """What has to be measured beside the case, and has not been yet."""
        wanted, cached = [self._least(case)], self._cached(case)
        if cached is not None and cached != case:
            wanted += [cached, self._half(cached)]
        return [c for c in dict.fromkeys(wanted) if c != case and c not in self._times]

    def learn(self, times: Mapping[Case, float | None]) -> None:
        """Microseconds; None for what could not be measured."""
        self._times.update({case: us for case, us in times.items() if us is not None})

    def _in_cache(self, case: Case) -> float | None:
        """The time that the case would take if the cache held all of it."""
        cached = self._cached(case)
        if cached is None or cached not in self._times:
            return None
        time, more = self._times[cached], case.values - cached.values
        if more == 0:
            return time
        half = self._half(cached)
        if half not in self._times or half.values == cached.values:
            return None
        return time + more * (time - self._times[half]) / (cached.values - half.values)

    def of(self, case: Case, copy: float | None) -> dict[str, float | None]:
        calls, in_cache = self._times.get(self._least(case)), self._in_cache(case)
        arithmetic = None
        if calls is not None and in_cache is not None:
            arithmetic = max(0.0, in_cache - calls)
        return {"calls": calls, "memory": copy, "arithmetic": arithmetic}
