"""The results of Flax linen on 2, 4 and 8 devices (tests/golden), at their stated tolerances."""

from __future__ import annotations

from typing import Any

import pytest
from flax_checks import SYNC, check


def test_the_collection_is_complete() -> None:
    assert len(SYNC) == 7
    assert {case.world_size for case in SYNC.values()} == {2, 4, 8}


@pytest.mark.parametrize("axis_name", ["ranks", "world"])
@pytest.mark.parametrize("name", SYNC)
def test_means_of_means(request: pytest.FixtureRequest, name: str, axis_name: str) -> None:
    ranks: Any = request.getfixturevalue({2: "two", 4: "four", 8: "eight"}[SYNC[name].world_size])
    ranks.run(check, name, "rank", axis_name)


@pytest.mark.parametrize("name", [n for n, case in SYNC.items() if "mask" not in case.arrays])
def test_ranks_of_one_size_have_equal_weight(request: pytest.FixtureRequest, name: str) -> None:
    ranks: Any = request.getfixturevalue({2: "two", 4: "four", 8: "eight"}[SYNC[name].world_size])
    ranks.run(check, name, "count", "ranks")
