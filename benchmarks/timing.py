"""Times of several contenders that take turns, so that other load on the machine meets them all."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Protocol, TypeVar

MINIMUM_SECONDS = 2e-3  # of one timing: far above the resolution of the clock


Name = TypeVar("Name", bound=Hashable)


class Contender(Protocol):
    def measure(self) -> float:
        """Microseconds of a call: the mean of as many as take MINIMUM_SECONDS."""


class Call:
    """A function of this process. `synchronize` waits for what it has started on a device."""

    def __init__(self, run: Callable[[], object], synchronize: Callable[[], None]) -> None:
        self._run = run
        self._synchronize = synchronize
        self._iterations = 1
        self._seconds()  # a first call may compile or allocate
        # The best of two, as other load on the machine must not make it look long enough.
        while min(self._seconds(), self._seconds()) < MINIMUM_SECONDS:
            self._iterations *= 2

    def _seconds(self) -> float:
        self._synchronize()
        start = time.perf_counter()
        for _ in range(self._iterations):
            self._run()
        self._synchronize()
        return time.perf_counter() - start

    def measure(self) -> float:
        return 1e6 * self._seconds() / self._iterations


def best_times(contenders: Mapping[Name, Contender], rounds: int) -> dict[Name, float]:
    """The best time of each in microseconds, over `rounds` rounds.

    Every round has another order: what a contender leaves in the caches meets each of them.
    """
    names, order = list(contenders), random.Random(0)
    best = dict.fromkeys(names, math.inf)
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            best[name] = min(best[name], contenders[name].measure())
    return best
