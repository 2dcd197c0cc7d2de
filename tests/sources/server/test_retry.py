"""Trying again: with growing pauses, up to a limit, and said aloud once."""

from __future__ import annotations

import logging
import math
import time
from itertools import pairwise

import pytest
import trio

from pbsfs.base.errors import AuthError, ConnectError, DamageError, ForbiddenError, SourceError
from pbsfs.sources.pacing import DEFAULT_PACING, Pacing
from pbsfs.sources.retry import SharedTry, connecting, patience_ends, retried
from tests.support.run import in_trio


class Work:
    """Fails with `errors`, one each time and the last for ever, or for `times`; then is done."""

    def __init__(self, *errors: Exception, times: float = float("inf"), takes: float = 0) -> None:
        self.errors = errors
        self.times = times
        self.takes = takes
        self.started: list[float] = []

    async def __call__(self) -> str:
        self.started.append(trio.current_time())
        await trio.sleep(self.takes)
        if len(self.started) > self.times:
            return "done"
        raise self.errors[min(len(self.started), len(self.errors)) - 1]

    @property
    def pauses(self) -> list[float]:
        starts = self.started
        return [round(after - before - self.takes, 6) for before, after in pairwise(starts)]


def retryable(text: str = "gone") -> SourceError:
    return SourceError(text, retryable=True)


@in_trio
async def test_what_succeeds_is_asked_once_and_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    work = Work(times=0)
    assert await retried(work, 10, "reading") == "done"
    assert len(work.started) == 1
    assert not caplog.records


@in_trio
async def test_pauses_grow_up_to_the_longest(caplog: pytest.LogCaptureFixture) -> None:
    work = Work(retryable(), times=9)
    assert await retried(work, 120, "reading") == "done"
    assert work.pauses == [0.25, 0.5, 1, 2, 4, 8, 10, 10, 10]
    assert (work.pauses[0], work.pauses[-1]) == (DEFAULT_PACING.first_pause, DEFAULT_PACING.longest_pause)
    caplog.clear()


@in_trio
async def test_after_the_limit_the_last_error_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    work = Work(retryable("first"), retryable("second"), ConnectError("last"))
    started = trio.current_time()

    with pytest.raises(ConnectError, match="last"):
        await retried(work, 5, "reading")

    assert trio.current_time() - started == pytest.approx(5)
    assert work.pauses == [0.25, 0.5, 1, 2, 1.25]  # the last try is at the limit, not before it
    caplog.clear()


@in_trio
async def test_the_time_that_tries_take_counts(caplog: pytest.LogCaptureFixture) -> None:
    work = Work(retryable(), takes=3)
    with pytest.raises(SourceError, match="gone"):
        await retried(work, 5, "reading")
    assert work.pauses == [0.25]
    assert len(work.started) == 2
    caplog.clear()


@in_trio
async def test_the_limit_begins_once_more_after_a_try_that_was_not_silent_or_a_stop_of_the_process(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert await retried(Work(retryable(), takes=500, times=1), 120, "reading") == "done"
    limits: list[float] = []

    async def work() -> str:
        limits.append(patience_ends() - time.monotonic())
        await trio.sleep(500)
        raise retryable(f"try {len(limits)}")

    with pytest.raises(SourceError, match="try 2"):
        await retried(work, 120, "reading")
    assert limits == pytest.approx([120, 120 - DEFAULT_PACING.first_pause], abs=1)
    with pytest.raises(SourceError, match="try 3"):
        await retried(work, 0, "reading")
    caplog.clear()


class Connecting:
    """Never gets its connection."""

    def __init__(self) -> None:
        self.started: list[float] = []

    async def __call__(self) -> str:
        self.started.append(trio.current_time())
        with connecting("pbs:8007"):
            await trio.sleep(15)
            raise ConnectError("pbs:8007: no answer within 15 s")


@in_trio
async def test_connecting_ends_with_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    work = Connecting()
    started = trio.current_time()
    with pytest.raises(ConnectError, match="pbs:8007: no connection within 10 s"):
        await retried(work, 25.25, "reading")
    assert trio.current_time() - started == pytest.approx(25.25)
    assert work.started == pytest.approx([started, started + 15.25])
    caplog.clear()


@in_trio
async def test_a_try_has_some_seconds_for_its_connection_however_short_the_limit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for limit, takes in ((0, 5), (2, 5), (15.5, 20.25)):
        started = trio.current_time()
        with pytest.raises(ConnectError, match="no connection within 5 s"):
            await retried(Connecting(), limit, "reading")
        assert trio.current_time() - started == pytest.approx(takes)
    caplog.clear()


@in_trio
async def test_what_is_not_tried_again_has_no_limit_for_connecting() -> None:
    with pytest.raises(ConnectError, match="no answer within 15 s"):
        await Connecting()()


@in_trio
async def test_a_connected_server_that_shows_signs_of_life_may_take_longer_than_the_limit() -> None:
    async def work() -> str:
        with connecting("pbs:8007"):
            await trio.sleep(1)
        await trio.sleep(500)
        return "done"

    assert await retried(work, 10, "reading") == "done"


@in_trio
async def test_a_try_may_be_silent_up_to_the_limit_and_at_least_some_seconds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    left: list[float] = []

    async def work() -> None:
        left.append(patience_ends() - time.monotonic())
        await trio.sleep(8)
        raise retryable()

    with pytest.raises(SourceError, match="gone"):
        await retried(work, 18, "reading", pacing=Pacing(first_pause=1, least_try=3))
    assert left == pytest.approx([18, 9, 3], abs=0.5)
    assert patience_ends() == math.inf
    caplog.clear()


@in_trio
async def test_without_a_limit_of_time_there_is_one_try() -> None:
    work = Work(retryable())
    with pytest.raises(SourceError, match="gone"):
        await retried(work, 0, "reading")
    assert len(work.started) == 1


@pytest.mark.parametrize(
    "error",
    [
        SourceError("no"),
        AuthError("no"),
        ForbiddenError("no"),
        DamageError("no"),
        ValueError("no"),
        OSError("no"),
    ],
)
def test_what_cannot_get_better_is_raised_at_once(error: Exception) -> None:
    @in_trio
    async def tried() -> None:
        work = Work(error)
        with pytest.raises(type(error), match="no"):
            await retried(work, 100, "reading")
        assert len(work.started) == 1

    tried()


@in_trio
async def test_what_stops_getting_better_is_raised_at_once(caplog: pytest.LogCaptureFixture) -> None:
    work = Work(retryable(), retryable(), AuthError("revoked"))
    with pytest.raises(AuthError, match="revoked"):
        await retried(work, 100, "reading")
    assert len(work.started) == 3
    caplog.clear()


@in_trio
async def test_a_pause_ends_at_once_when_nobody_waits_any_more(caplog: pytest.LogCaptureFixture) -> None:
    work = Work(retryable())
    started = trio.current_time()

    with trio.move_on_after(3) as scope:
        await retried(work, 100, "reading")

    assert scope.cancelled_caught
    assert trio.current_time() - started == pytest.approx(3)
    assert len(work.started) == 4  # at 0, 0.25, 0.75 and 1.75
    caplog.clear()


@in_trio
async def test_one_failure_is_nobodys_concern(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    assert await retried(Work(retryable(), times=1), 100, "reading") == "done"
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]


@in_trio
async def test_trying_again_is_said_aloud_once_and_so_is_that_it_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert await retried(Work(retryable(), times=8), 100, "vm/100") == "done"

    assert [record.getMessage() for record in caplog.records] == [
        "vm/100: gone; trying again",
        "vm/100: available again",
    ]
    caplog.clear()


# --- tries that are shared


@in_trio
async def test_tasks_that_wait_for_one_try_share_what_it_finds() -> None:
    work, shared, kept = Work(times=0, takes=3), SharedTry[str](), list[str]()

    async def ask() -> str:
        kept.append(await work())
        return kept[-1]

    async with trio.open_nursery() as nursery:
        for _task in range(8):
            nursery.start_soon(shared.run, lambda: kept[0] if kept else None, ask)
    assert len(work.started) == 1
    assert trio.current_time() == 3
    assert shared.idle


@in_trio
async def test_many_tasks_are_done_at_the_limit_when_no_try_succeeds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    work, shared, ends = Work(retryable(), takes=5), SharedTry[str](), list[float]()

    async def read() -> None:
        with pytest.raises(SourceError, match="gone"):
            await retried(lambda: shared.run(lambda: None, work), 20, "reading")
        ends.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        for _task in range(8):
            nursery.start_soon(read)
    assert max(ends) <= 20 + 2 * 5, "the try that is under way at the limit, and one more"
    caplog.clear()


@in_trio
async def test_a_failure_is_shared_with_those_that_waited_and_nobody_later() -> None:
    work, shared = Work(retryable(), times=1), SharedTry[str]()
    with pytest.raises(SourceError):
        await shared.run(lambda: None, work)
    assert await shared.run(lambda: None, work) == "done"


@in_trio
async def test_the_others_go_on_when_the_one_that_tries_is_cancelled() -> None:
    work, shared, found = Work(times=0, takes=3), SharedTry[str](), list[str]()

    async def ask() -> None:
        found.append(await shared.run(lambda: None, work))

    async with trio.open_nursery() as nursery:
        with trio.move_on_after(1):
            await shared.run(lambda: None, work)
        nursery.start_soon(ask)
    assert found == ["done"]
