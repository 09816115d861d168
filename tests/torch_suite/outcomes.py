"""What the suite found: one outcome for each check of each sample."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest

STATUSES = ("passed", "skipped", "failed")


class Skip(Exception):  # noqa: N818  (not an error)
    """Raised by a check that does not apply; its text is the reason."""


@dataclass(frozen=True)
class Outcome:
    target: str  # what was tested: "override", "functional" or "nn"
    entry: str  # of torch's database, like "nn.functional.batch_norm" or "nn.BatchNorm2d"
    check: str
    dtype: str
    sample: str
    status: str
    message: str = ""  # reason of a skip, or what failed


class Outcomes:
    """Runs checks of one target and collects their outcomes."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.all: list[Outcome] = []

    def run(
        self, entry: str, check: str, dtype: str, sample: str, body: Callable[[], object]
    ) -> None:
        status, message = "passed", ""
        try:
            body()
        except Skip as reason:
            status, message = "skipped", str(reason)
        except (Exception, pytest.fail.Exception):  # whatever goes wrong is what is reported
            status, message = "failed", traceback.format_exc(limit=-4)
        self.all.append(Outcome(self.target, entry, check, dtype, sample, status, message))

    def skip(self, entry: str, reason: Skip) -> None:
        """Of all checks of an entry."""
        self.all.append(Outcome(self.target, entry, "", "", "", "skipped", str(reason)))


def summary(outcomes: list[Outcome]) -> str:
    """A table of counts by target and entry, then the reasons of skips and what failed."""
    counts = Counter((o.target, o.entry, o.status) for o in outcomes)
    lines = [f"{'':42}" + "".join(f"{status:>9}" for status in STATUSES)]
    for target, entry in dict.fromkeys((o.target, o.entry) for o in outcomes):
        numbers = (counts[target, entry, status] for status in STATUSES)
        lines.append(f"{target + ' ' + entry:42}" + "".join(f"{n:>9}" for n in numbers))
    total = Counter(o.status for o in outcomes)
    lines.append(f"{'all':42}" + "".join(f"{total[status]:>9}" for status in STATUSES))
    reasons = Counter((o.target, o.message) for o in outcomes if o.status == "skipped")
    lines += [f"skipped {n:>4}  {target}: {why}" for (target, why), n in sorted(reasons.items())]
    for o in outcomes:
        if o.status == "failed":
            last = o.message.strip().splitlines()[-1]
            lines.append(f"FAILED {o.target} {o.entry} {o.check} {o.dtype} [{o.sample}]: {last}")
    return "\n".join(lines)
