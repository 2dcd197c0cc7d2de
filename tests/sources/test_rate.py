"""The limit of the bytes a second that are fetched: who comes next, and what counts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pbsfs.base.errors import SourceError
from pbsfs.sources.rate import Rate
from tests.support.run import in_trio


@asynccontextmanager
async def running(limit: int) -> AsyncIterator[tuple[Rate, trio.Nursery]]:
    async with trio.open_nursery() as nursery:
        rate = Rate(limit)
        nursery.start_soon(rate.run)
        async with trio.open_nursery() as inner:
            yield rate, inner
        nursery.cancel_scope.cancel()


class Asked:
    """Takes turns, and notes when each came."""

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self.started = trio.current_time()
        self.times: dict[str, float] = {}

    async def take(
        self, name: str, size: int = 10, came: int | None = None, awaited: Callable[[], bool] = lambda: True
    ) -> None:
        async with self.rate.turn(size, awaited) as turn:
            self.times[name] = round(trio.current_time() - self.started, 6)
            turn.size = size if came is None else came


@in_trio
async def test_the_bucket_holds_a_second_and_then_the_rate_holds() -> None:
    async with running(20) as (rate, nursery):
        asked = Asked(rate)
        for name in "abcde":
            nursery.start_soon(asked.take, name)
            await wait_all_tasks_blocked()
    assert asked.times == {"a": 0, "b": 0, "c": 0, "d": 0.5, "e": 1.0}


@in_trio
async def test_a_pause_gives_no_more_than_a_second() -> None:
    async with running(10) as (rate, nursery):
        asked = Asked(rate)
        await asked.take("first", 10)
        await trio.sleep(3600)
        for name in "abc":
            nursery.start_soon(asked.take, name)
            await wait_all_tasks_blocked()
    assert asked.times == {"first": 0, "a": 3600, "b": 3600, "c": 3601}


@in_trio
async def test_what_came_counts_and_not_what_was_expected() -> None:
    async with running(10) as (rate, _nursery):
        asked = Asked(rate)
        await asked.take("a", 1000, came=20)  # a second of it was in the bucket
        await asked.take("b", 10, came=30)
        await asked.take("c")
    assert asked.times == {"a": 0, "b": 1, "c": 4}


@in_trio
async def test_who_waits_for_the_bytes_comes_first_and_may_begin_to_wait_late() -> None:
    async with running(10) as (rate, nursery):
        asked, awaited = Asked(rate), set[str]()
        await asked.take("taken", 20)
        for name in ("ahead 1", "ahead 2", "ahead 3"):
            nursery.start_soon(partial(asked.take, name, awaited=partial(awaited.__contains__, name)))
            await wait_all_tasks_blocked(0.001)
        nursery.start_soon(asked.take, "read")
        await wait_all_tasks_blocked(0.001)
        awaited.add("ahead 3")
    assert sorted(asked.times, key=asked.times.__getitem__) == [
        "taken",
        "ahead 3",
        "read",
        "ahead 1",
        "ahead 2",
    ]


@in_trio
async def test_who_gives_up_takes_nothing_and_holds_up_nobody() -> None:
    async with running(10) as (rate, _nursery):
        asked = Asked(rate)
        await asked.take("a", 30)
        with trio.move_on_after(0.5) as scope:
            await asked.take("gives up", 10**9)
        assert scope.cancelled_caught
        await asked.take("b")
        with pytest.raises(SourceError):
            async with rate.turn(10**9):
                raise SourceError("the disk is gone")
        await asked.take("c")
    # `b` had its turn when the debt of `a` was paid; the failed turn came a second later, and cost nothing.
    assert asked.times == {"a": 0, "b": 2, "c": 3}


@in_trio
async def test_a_large_request_that_brought_little_wakes_those_that_wait() -> None:
    async with running(10) as (rate, nursery):
        asked = Asked(rate)

        async def slow() -> None:
            async with rate.turn(10**9) as turn:
                await trio.sleep(5)
                turn.size = 20

        nursery.start_soon(slow)
        await wait_all_tasks_blocked(0.001)
        nursery.start_soon(asked.take, "read")
    assert asked.times["read"] == pytest.approx(5, abs=0.01)
