"""Every skip of the suite and its reason, in two tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from outcomes import Skip
from targets import Functional, Target
from torch import Tensor


@dataclass(frozen=True)
class Facts:
    """What a rule may look at."""

    target: Target
    entry: str
    check: str
    input: Tensor
    eps: float

    @property
    def is_ours(self) -> bool:
        """Whether torch's samples meet the rules of normcore.functional, not those of torch."""
        return isinstance(self.target, Functional)


Rule = tuple[Callable[[Facts], bool], str]

#: Samples that are not run.
NOT_RUN: list[Rule] = [
    (
        lambda f: f.entry == "_batch_norm_with_update",
        "no function and no module of torch calls _batch_norm_with_update, so it is not overridden",
    ),
    (
        lambda f: f.is_ours and f.check != "errors" and f.eps < 0,
        "a negative eps is an error in normcore.functional",
    ),
    (
        lambda f: f.is_ours and f.check != "errors" and f.input.dim() < 2,
        "an input of rank 1 has no axis 1: IndexError in normcore.functional",
    ),
    (
        lambda f: f.is_ours and f.check == "errors" and f.input.numel() == 0,
        "empty inputs are legal in normcore.functional",
    ),
    (
        lambda f: f.is_ours and f.check == "errors" and f.eps == 0,
        "eps = 0 is legal in normcore.functional",
    ),
]

#: Samples that are run and compared, but that torch computes itself: none of our kernels runs.
NOT_REACHED: list[Rule] = [
    (lambda f: f.input.numel() == 0, "torch's own kernel keeps empty inputs"),
    (lambda f: f.eps <= 0, "torch's own kernel keeps eps <= 0"),
]


def skip_by(rules: list[Rule], facts: Facts) -> None:
    """Raises Skip with the reason of the first rule that applies."""
    for applies, reason in rules:
        if applies(facts):
            raise Skip(reason)


def run_on_our_kernels(facts: Facts, body: Callable[[], object]) -> None:
    """Runs `body`, unless a rule leaves it out; fails if none of our kernels took part in it."""
    skip_by(NOT_RUN, facts)
    with facts.target.active() as calls:
        body()
        if facts.check != "errors" and calls() == 0:
            skip_by(NOT_REACHED, facts)
            raise AssertionError("no call ran on the kernels of normcore")
