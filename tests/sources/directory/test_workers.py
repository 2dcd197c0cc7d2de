"""Storage that does not answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from pbsfs.base.errors import SourceError
from pbsfs.sources.directory.limits import DirectoryLimits
from pbsfs.sources.directory.root import Root
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.sources.layout import Steps
from pbsfs.sources.workers import LATE, WorkerLimits
from pbsfs.testing.writer import DatastoreWriter
from tests.sources.conformance import CONFIG, FIRST, IMAGE, LIMIT, add, stored

LIMITS = WorkerLimits()


class Stuck:
    """A file system that does not answer until it is released: files called `name`, or all.

    `clock`, where it is set, runs only while a thread is stuck; `loop`: the one that it belongs to.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._answers = threading.Event()
        self.name: str | None = None
        self.clock: MockClock | None = None
        self.loop: trio.lowlevel.TrioToken | None = None

        real = Root.read_file

        def read_file(root: Root, steps: Steps, limit: int) -> bytes:
            if self.name in (None, steps[-1]) and not self._answers.is_set():
                if self.clock is not None:
                    trio.from_thread.run_sync(
                        setattr, self.clock, "autojump_threshold", 0, trio_token=self.loop
                    )
                self._answers.wait()
            return real(root, steps, limit)

        monkeypatch.setattr(Root, "read_file", read_file)

    def release(self) -> None:
        self._answers.set()


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    storage = Stuck(monkeypatch)
    yield storage
    storage.release()


def test_a_stuck_file_system_is_an_error_after_the_timeout(writer: DatastoreWriter, stuck: Stuck) -> None:
    add(writer)
    source = DirectorySource(writer.path)

    async def main() -> float:
        start = trio.current_time()
        with pytest.raises(
            SourceError, match=f"no answer from datastore directory .* within {LIMITS.io_timeout:.0f} s"
        ) as e:
            await source.fetch_file(FIRST, CONFIG, LIMIT)
        assert e.value.retryable
        return trio.current_time() - start

    assert trio.run(main, clock=MockClock(autojump_threshold=0)) == pytest.approx(LIMITS.io_timeout)
    stuck.release()


def test_more_stuck_calls_than_threads_all_get_their_error_and_later_ones_their_answer(
    writer: DatastoreWriter, stuck: Stuck
) -> None:
    add(writer)
    source = DirectorySource(writer.path, DirectoryLimits(workers=WorkerLimits(io_timeout=0.05)))
    errors: list[SourceError] = []
    calls = LIMITS.threads + 20

    async def call() -> None:
        try:
            await source.fetch_file(FIRST, CONFIG, LIMIT)
        except SourceError as error:
            errors.append(error)

    async def main() -> bytes:
        async with trio.open_nursery() as nursery:
            for _turn in range(calls):
                nursery.start_soon(call)
        # Other work runs in trio's own threads, which stuck storage must not use up.
        with trio.fail_after(10):
            assert await trio.to_thread.run_sync(lambda: "decoded") == "decoded"
        stuck.release()
        with trio.fail_after(10):
            while source.workers.stuck():
                await trio.lowlevel.checkpoint()
            while True:
                try:
                    return await source.fetch_file(FIRST, CONFIG, LIMIT)
                except SourceError:  # the short limit
                    continue

    assert trio.run(main) == stored(writer, CONFIG)
    assert len(errors) == calls


def test_while_an_operation_is_stuck_others_fail_fast(writer: DatastoreWriter, stuck: Stuck) -> None:
    add(writer)
    source = DirectorySource(writer.path)

    clock = stuck.clock = MockClock()

    async def waited() -> float:
        start = trio.current_time()
        with pytest.raises(SourceError, match="no answer from datastore directory") as caught:
            await source.fetch_file(FIRST, CONFIG, LIMIT)
        assert caught.value.retryable
        clock.autojump_threshold = float("inf")
        return trio.current_time() - start

    async def main() -> list[float]:
        stuck.loop = trio.lowlevel.current_trio_token()
        found = [await waited() for _ in range(3)]
        clock.jump(LIMITS.stuck_pause)
        return found + [await waited() for _ in range(3)]

    assert trio.run(main, clock=clock) == pytest.approx([LIMITS.io_timeout, 0, 0, LIMITS.stuck_timeout, 0, 0])


def test_what_can_be_read_beside_a_stuck_operation_is_read(writer: DatastoreWriter, stuck: Stuck) -> None:
    add(writer)
    source = DirectorySource(writer.path)
    clock, stuck.name = MockClock(), IMAGE.filename
    stuck.clock = clock

    async def main() -> list[bytes]:
        stuck.loop = trio.lowlevel.current_trio_token()
        with pytest.raises(SourceError, match="within 60 s"):
            await source.fetch_file(FIRST, IMAGE, LIMIT)
        clock.autojump_threshold = float("inf")
        clock.jump(LIMITS.stuck_pause)
        return [await source.fetch_file(FIRST, CONFIG, LIMIT) for _ in range(3)]

    assert trio.run(main, clock=clock) == [stored(writer, CONFIG)] * 3


def test_a_stop_of_the_process_is_no_fault_of_the_storage(writer: DatastoreWriter, stuck: Stuck) -> None:
    add(writer)
    source = DirectorySource(writer.path)
    clock = MockClock()

    async def main() -> bytes:
        async with trio.open_nursery() as nursery:
            found: list[bytes] = []

            async def read() -> None:
                found.append(await source.fetch_file(FIRST, CONFIG, LIMIT))

            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            clock.jump(LIMITS.io_timeout + 2 * LATE)  # all at once
            await trio.testing.wait_all_tasks_blocked()
            stuck.release()
        assert not source.workers.stuck()
        return found[0]

    assert trio.run(main, clock=clock) == stored(writer, CONFIG)
