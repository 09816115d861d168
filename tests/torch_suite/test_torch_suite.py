"""torch's own tests of its norms, run on our kernels by child processes (`__main__.py`).

An override is for the whole process: no test of torch's own kernels runs beside it. There is one
test for each target and entry of torch's database; it passes if no check of a sample failed.
"""

from __future__ import annotations

import pytest
from entries import ENTRIES
from outcomes import Outcome, summary


@pytest.mark.parametrize(
    ("target", "entry"), [(target, entry) for target in ENTRIES for entry in ENTRIES[target]]
)
def test_entry(target: str, entry: str, outcomes: list[Outcome]) -> None:
    mine = [o for o in outcomes if (o.target, o.entry) == (target, entry)]
    found = {o.status for o in mine}
    assert found, "the entry was not run"
    assert "failed" not in found, summary(mine)
    if "passed" not in found:
        pytest.skip("; ".join(sorted({o.message for o in mine})))
