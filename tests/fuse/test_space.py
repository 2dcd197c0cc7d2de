"""What is known of a datastore's space: asked seldom, and never waited for."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from pbsfs.base.errors import SourceError
from pbsfs.fuse.space import KEPT, Space
from pbsfs.sources.base import Usage
from tests.support.sources import MemorySource


class Measured(MemorySource):
    """A source with space. `answers`: what it says, one after the other, and then the last one; an error is
    raised. `asked`: when."""

    def __init__(self, *answers: Usage | Exception | None) -> None:
        super().__init__()
        self.answers = list(answers)
        self.asked: list[float] = []

    async def usage(self) -> Usage | None:
        answer = self.answers[min(len(self.asked), len(self.answers) - 1)]
        self.asked.append(trio.current_time())
        await trio.sleep(1)
        if isinstance(answer, Exception):
            raise answer
        return answer


SMALL, LARGE = Usage(10, 4, 5), Usage(20, 4, 15)


def seen(source: Measured, *, every: float, times: int) -> list[Usage | None]:
    """What `last` says right at the start, and then `times` times."""

    async def run() -> list[Usage | None]:
        space = Space(source)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(space.keep)
            await wait_all_tasks_blocked()
            found = [space.last()]
            for _ in range(times):
                await trio.sleep(every)
                found.append(space.last())
            nursery.cancel_scope.cancel()
        return found

    return trio.run(run, clock=MockClock(autojump_threshold=0))


def test_it_is_asked_at_once_and_not_again_for_a_while() -> None:
    source = Measured(SMALL)
    assert seen(source, every=(KEPT - 1) / 5, times=5) == [None, *[SMALL] * 5]
    assert len(source.asked) == 1


def test_an_old_answer_is_given_while_a_new_one_is_fetched() -> None:
    assert seen(Measured(SMALL, LARGE), every=KEPT + 1, times=2) == [None, SMALL, LARGE]


def test_nothing_is_asked_while_nobody_looks() -> None:
    source = Measured(SMALL, LARGE)
    assert seen(source, every=100 * KEPT, times=1) == [None, SMALL]
    between = [time for time in source.asked if source.asked[0] < time < source.asked[0] + 99 * KEPT]
    assert not between


def test_an_answer_outlives_a_source_that_is_away() -> None:
    source = Measured(SMALL, SourceError("away"), LARGE)
    assert seen(source, every=KEPT + 1, times=3) == [None, SMALL, SMALL, LARGE]


def test_a_source_that_stops_telling_is_not_quoted() -> None:
    assert seen(Measured(SMALL, None, None), every=KEPT + 1, times=2) == [None, SMALL, None]


def test_a_bug_is_logged_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    source = Measured(SMALL, ZeroDivisionError("a bug"), LARGE)
    assert seen(source, every=KEPT + 1, times=3) == [None, SMALL, SMALL, LARGE]
    (record,) = caplog.records
    assert "a bug" in str(record.exc_info)
    caplog.clear()
