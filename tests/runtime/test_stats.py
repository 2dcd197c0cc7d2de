"""The numbers of what the process did."""

from __future__ import annotations

import re

from pbsfs.runtime.stats import LIMITS, Counts


def test_each_number_is_listed_once_by_a_plain_name() -> None:
    counts = Counts()
    names = [name for name, _value in counts]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)
    assert {name for name in Counts.__slots__ if not name.startswith("_")} <= set(names)
    assert all(value == 0 for _name, value in counts)


def test_fetches_are_counted_by_the_time_that_they_take() -> None:
    counts = Counts()
    for seconds in (0.0, *LIMITS, 0.0011, 60.0):
        counts.chunk_fetched(100, seconds)
    found = dict(counts)
    assert found["fetches"] == 8
    assert found["bytes_fetched"] == 800
    assert found["fetch_seconds"] == sum(LIMITS) + 60.0011
    within = [found[f"fetches_within_{name}"] for name in ("1ms", "10ms", "100ms", "1s", "10s")]
    assert within == [2, 4, 5, 6, 7]  # the slowest is in `fetches` only
