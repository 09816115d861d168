"""Errors of norms over ranks: the same on all of them for wrong arguments, and soon where others
fail, leave or do something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import failing_calls as calls
import pytest
from ranks import Ranks

NAMES = ["batch_norm", "group_norm", "SyncBatchNorm"]


@pytest.mark.parametrize("name", calls.MISTAKES)
def test_mistakes(two: Ranks, name: str) -> None:
    two.run(calls.check_mistake, name)


@pytest.mark.parametrize("form", ["object", "name"])
def test_a_rank_outside_of_the_group(two: Ranks, form: str) -> None:
    two.run(calls.check_rank_outside, form)


@pytest.fixture
def short_lived() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def op_of(name: str) -> str:
    return "group_norm" if name == "group_norm" else "batch_norm"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("job", [calls.leave_before_the_call, calls.leave_before_the_backward_pass])
def test_a_rank_that_dies(short_lived: Ranks, job: Callable[[str], None], name: str) -> None:
    first, second = short_lived.answers(job, name)
    assert f"DistBackendError: {op_of(name)}: expected every rank of group" in first
    assert second == "ended"


@pytest.mark.parametrize("name", ["batch_norm", "group_norm"])
def test_a_rank_that_does_not_call(short_lived: Ranks, name: str) -> None:
    first, second = short_lived.answers(calls.do_not_call, name)
    assert f"DistBackendError: {op_of(name)}: expected every rank of group" in first
    assert second == ""


def test_training_and_evaluation(short_lived: Ranks) -> None:
    """Evaluation needs nobody; who trains does not get statistics of a part of the ranks."""
    first, second = short_lived.answers(calls.call_in_two_modes)
    assert "DistBackendError: batch_norm: expected every rank of group" in first
    assert second == ""


@pytest.mark.parametrize(
    ("job", "op"),
    [
        (calls.call_with_different_features, "batch_norm"),
        (calls.call_with_different_samples, "group_norm"),
    ],
)
def test_different_numbers_of_statistics(
    short_lived: Ranks, job: Callable[[], None], op: str
) -> None:
    """gloo ends the process that receives more than it expects, with its own words on stderr."""
    answers = short_lived.answers(job)
    told = [answer for answer in answers if f"{op}: expected every rank of group" in answer]
    assert told
    assert all(answer in told or answer == "ended" for answer in answers)


@pytest.fixture(scope="module")
def checked() -> Iterator[Ranks]:
    ranks = Ranks(2, environment={"NORMCORE_DEBUG_SYNC": "1"})
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    "name", ["modes", "features", "gradients", "samples", "norms", "weighting"]
)
def test_reports_by_rank(checked: Ranks, name: str) -> None:
    checked.run(calls.check_report, name)
