"""Readers of contents in threads: what they read, how they are cancelled, whose threads they take."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pbsfs.base.errors import DamageError
from pbsfs.chunks.limits import DEFAULT
from pbsfs.reader.bridge import Bridge, ImageStream
from pbsfs.reader.damage import ZeroedRanges
from pbsfs.reader.reader import open_reader
from pbsfs.sources.base import FileInfo, SnapshotInfo
from tests.support import made
from tests.support.run import in_trio, until
from tests.support.sources import CHUNK_SIZE, MemorySource, file_of

NAME = "root.pxar.didx"
COUNT = 20
CONTENT = random.Random(5).randbytes(COUNT * CHUNK_SIZE - 7)
LIMIT = 10.0
"""Seconds after which work that should have been cancelled gives up, so that the test fails."""


def stored() -> tuple[MemorySource, list[bytes]]:
    """A source with one stream, and the digests of its chunks in order."""
    source = MemorySource()
    source.add(made.snapshot(), {NAME: CONTENT})
    return source, list(source.chunks)


def first(source: MemorySource) -> tuple[SnapshotInfo, FileInfo]:
    """What `Reader.open_image` needs to open the stream."""
    (info,) = source.infos.values()
    return info, file_of(info, NAME)


def reads_all(stream: ImageStream, start: int = 0) -> bytes:
    """The whole stream from `start` on, and what comes before it, by reads that cross chunks."""
    step = CHUNK_SIZE + 11
    read = [stream.pread(offset, step) for offset in range(start, stream.size, step)]
    return stream.pread(0, start) + b"".join(read)


@in_trio
async def test_ten_side_by_side_read_what_was_backed_up() -> None:
    source, _digests = stored()
    results: dict[int, bytes] = {}
    async with open_reader(source) as reader:
        image = await reader.open_image(*first(source))

        async def one(number: int) -> None:
            stream = ImageStream(image)
            results[number] = await reader.bridge.run(lambda: reads_all(stream, number * CHUNK_SIZE))
            stream.close()

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(one, number)
        assert all(results[number] == CONTENT for number in range(10))
        assert reader.store.sequential_readers == 0


@in_trio
async def test_reads_are_short_only_at_the_end() -> None:
    source, _digests = stored()
    async with open_reader(source) as reader:
        stream = ImageStream(await reader.open_image(*first(source)))
        size = stream.size
        assert await reader.bridge.run(lambda: stream.pread(size - 5, 100)) == CONTENT[-5:]
        assert await reader.bridge.run(lambda: stream.pread(size, 100)) == b""


@in_trio
async def test_a_stream_that_is_read_whole_keeps_the_chunk_that_was_read_last() -> None:
    source, _digests = stored()
    async with open_reader(source) as reader:
        image = await reader.open_image(*first(source))
        whole, other = ImageStream(image, whole=True), ImageStream(image)
        start, end = 3 * CHUNK_SIZE, 4 * CHUNK_SIZE

        def work() -> None:
            assert whole.kept(start, 5) is None
            assert whole.view(start - 5, 10) == CONTENT[start - 5 : start + 5]
            for offset, size in ((start, 5), (start, CHUNK_SIZE), (end - 5, 5), (start + 7, 0)):
                assert whole.kept(offset, size) == CONTENT[offset : offset + size]
                assert whole.view(offset, size) == CONTENT[offset : offset + size]
            for offset, size in ((start - 1, 5), (end - 5, 6), (end, 1), (0, 1)):
                assert whole.kept(offset, size) is None
            assert whole.view(end - 5, 10) == CONTENT[end - 5 : end + 5]
            assert whole.kept(start, 5) is None
            assert whole.view(whole.size - 5, 100) == CONTENT[-5:]
            assert whole.kept(whole.size - 5, 100) is None
            assert other.view(start, 5) == CONTENT[start : start + 5]
            assert other.kept(start, 5) is None

        await reader.bridge.run(work)


@in_trio
async def test_reads_of_a_kept_chunk_count_as_read_in_sequence() -> None:
    """Otherwise each chunk that is read in small steps looked like a jump, and nothing was fetched ahead."""
    source, digests = stored()
    limits = replace(DEFAULT, reorder_distance=CHUNK_SIZE // 4, evidence=CHUNK_SIZE // 2)
    async with open_reader(source, limits=limits) as reader:
        stream = ImageStream(await reader.open_image(*first(source)), whole=True)

        def work() -> None:
            for offset in range(7 * CHUNK_SIZE, 9 * CHUNK_SIZE, CHUNK_SIZE // 16):
                assert stream.view(offset, 50) == CONTENT[offset : offset + 50]

        await reader.bridge.run(work)
        await until(lambda: digests[9] in source.fetched)
        stream.close()


@in_trio
async def test_a_hundred_at_once_take_no_threads_of_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers have threads of their own, even where only one is left for all other work."""
    source, _digests = stored()
    limiter = trio.to_thread.current_default_thread_limiter()
    monkeypatch.setattr(limiter, "total_tokens", 1)
    lock = threading.Lock()
    running, peak, done = 0, 0, 0

    def work(stream: ImageStream) -> None:
        nonlocal running, peak, done
        with lock:
            running += 1
            peak = max(peak, running)
        try:
            assert reads_all(stream) == CONTENT
        finally:
            with lock:
                running -= 1
                done += 1

    async with open_reader(source, cache_size=4 * CHUNK_SIZE) as reader:
        image = await reader.open_image(*first(source))
        async with trio.open_nursery() as nursery:
            for _number in range(100):
                stream = ImageStream(image)
                nursery.start_soon(reader.bridge.run, lambda stream=stream: work(stream))
            await until(lambda: done == 100)
    assert 1 < peak <= 8


@in_trio
async def test_a_bridge_runs_no_more_than_its_threads() -> None:
    bridge = Bridge(threads=2)
    go = threading.Event()
    started: list[int] = []

    def work(number: int) -> None:
        started.append(number)
        go.wait(LIMIT)

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(bridge.run, lambda number=number: work(number))
        await until(lambda: len(started) == 2)
        await wait_all_tasks_blocked()
        assert len(started) == 2
        go.set()
    assert sorted(started) == list(range(5))


@in_trio
async def test_a_read_that_waits_ends_when_its_task_is_cancelled() -> None:
    source, _digests = stored()
    source.hold("fetch_chunk")
    async with open_reader(source) as reader:
        stream = ImageStream(await reader.open_image(*first(source)))
        assert await cancelled(
            reader.bridge, lambda: stream.pread(0, 10), lambda: source.calls["fetch_chunk"] > 0
        )


@in_trio
async def test_work_that_reads_only_cached_bytes_ends_when_its_task_is_cancelled() -> None:
    source, _digests = stored()
    async with open_reader(source) as reader:
        stream = ImageStream(await reader.open_image(*first(source)))
        await reader.bridge.run(lambda: stream.pread(0, 10))
        fetched = len(source.fetched)
        reads = 0

        def work() -> None:
            nonlocal reads
            end = time.monotonic() + LIMIT
            while time.monotonic() < end:
                stream.pread(0, 10)
                reads += 1

        assert await cancelled(reader.bridge, work, lambda: reads > 10)
        assert len(source.fetched) == fetched


async def cancelled(bridge: Bridge, work: Callable[[], object], ready: Callable[[], bool]) -> bool:
    """Cancels the task that waits for `work` once `ready`; whether a read of `work` raised for it."""
    raised: list[BaseException] = []

    def recorded() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)
            raise

    async with trio.open_nursery() as nursery:
        nursery.start_soon(bridge.run, recorded)
        await until(ready)
        nursery.cancel_scope.cancel()
    return [type(error) for error in raised] == [trio.Cancelled]


@pytest.mark.parametrize("zeroed", [None, ZeroedRanges()], ids=["fail", "zero"])
@in_trio
async def test_damage_passes_through_the_work_as_it_is(zeroed: ZeroedRanges | None) -> None:
    """Also with --on-damage zero: zeros that pbsfs made up must not be parsed."""
    source, digests = stored()
    source.damage(digests[3], 500)
    async with open_reader(source, zeroed=zeroed) as reader:
        stream = ImageStream(await reader.open_image(*first(source)))
        with pytest.raises(DamageError, match=digests[3].hex()) as caught:
            await reader.bridge.run(lambda: reads_all(stream))
        assert type(caught.value) is DamageError
        whole = await reader.bridge.run(lambda: stream.pread(0, 3 * CHUNK_SIZE))
        assert whole == CONTENT[: 3 * CHUNK_SIZE]
    assert zeroed is None or zeroed.count == 0


@in_trio
async def test_a_damaged_chunk_is_not_tried_for_each_read(monkeypatch: pytest.MonkeyPatch) -> None:
    source, digests = stored()
    source.damage(digests[3], 500)
    async with open_reader(source) as reader:
        stream = ImageStream(await reader.open_image(*first(source)))

        def tries() -> int:
            before = source.fetched.count(digests[3])
            for offset, size in [
                (3 * CHUNK_SIZE, 10),
                (3 * CHUNK_SIZE + 50, 10),
                (2 * CHUNK_SIZE, 5 * CHUNK_SIZE),
            ]:
                with pytest.raises(DamageError, match=digests[3].hex()):
                    stream.pread(offset, size)
            assert stream.pread(4 * CHUNK_SIZE, 9) == CONTENT[4 * CHUNK_SIZE :][:9]
            return source.fetched.count(digests[3]) - before

        assert await reader.bridge.run(tries) <= 2
        assert await reader.bridge.run(tries) == 0
        monkeypatch.setattr("pbsfs.reader.bridge.DAMAGE_LASTS", 0.0)
        assert await reader.bridge.run(tries) >= 1  # it may be repaired meanwhile


@in_trio
async def test_a_read_across_chunks_finds_which_is_damaged() -> None:
    source, digests = stored()
    source.damage(digests[3], 500)
    async with open_reader(source) as reader:
        stream = ImageStream(await reader.open_image(*first(source)))

        def work() -> bytes:
            with pytest.raises(DamageError, match=digests[3].hex()):
                stream.pread(0, 5 * CHUNK_SIZE)
            tried = source.fetched.count(digests[3])
            with pytest.raises(DamageError, match=digests[3].hex()):
                stream.pread(3 * CHUNK_SIZE, 1)
            assert source.fetched.count(digests[3]) == tried
            return stream.pread(0, 3 * CHUNK_SIZE)

        assert await reader.bridge.run(work) == CONTENT[: 3 * CHUNK_SIZE]


@in_trio
async def test_prefetch_fetches_scattered_ranges_side_by_side() -> None:
    source, digests = stored()
    gate = source.hold("fetch_chunk")
    numbers = [1, 4, 9, 15]
    async with open_reader(source) as reader:
        stream = ImageStream(await reader.open_image(*first(source)))
        await reader.bridge.run(lambda: stream.prefetch([(n * CHUNK_SIZE, 10) for n in numbers]))
        await until(lambda: source.in_flight == len(numbers))
        gate.set()
        await until(lambda: source.in_flight == 0)
        await wait_all_tasks_blocked()
        parts = await reader.bridge.run(lambda: [stream.pread(n * CHUNK_SIZE, 10) for n in numbers])
    assert parts == [CONTENT[n * CHUNK_SIZE :][:10] for n in numbers]
    assert sorted(source.fetched) == sorted(digests[number] for number in numbers)
