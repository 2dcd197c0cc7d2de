"""What is open exists once, is fetched once, and stays within its limit of memory."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pbsfs.base.errors import DamageError, SourceError, errno_of
from pbsfs.base.names import CLIENT_LOG, Archive, Snapshot
from pbsfs.chunks.limits import FetchLimits
from pbsfs.formats import index
from pbsfs.formats.manifest import CryptMode
from pbsfs.reader.damage import ZeroedRanges
from pbsfs.reader.image import Image
from pbsfs.reader.reader import Reader, open_reader
from pbsfs.runtime.memory import MemoryLimitError
from pbsfs.sources.base import SnapshotInfo
from tests.support import made
from tests.support.run import in_trio
from tests.support.sources import CHUNK_SIZE, MemorySource, file_of

T = TypeVar("T")

NAME = "disk.img.fidx"
STREAM = "root.pxar.didx"
CONF = "qemu-server.conf.blob"
CONTENT = made.image(1, "rrtr0r", tail=77)
TABLE = 7 * index.FIXED_ENTRY_SIZE
"""Bytes of the digest table of `CONTENT`."""
REST = 7
"""Bytes that its index takes besides."""


def several(count: int, **options: object) -> tuple[MemorySource, list[SnapshotInfo]]:
    """Snapshots one after the other that hold the same image, stream and configuration."""
    source = MemorySource()
    files = {NAME: CONTENT, STREAM: CONTENT, CONF: b"cores: 2\n" * 50}
    group = made.snapshot().group
    infos = [source.add(Snapshot(group, 1_700_000_000 + n), files, **options) for n in range(count)]  # type: ignore[arg-type]
    return source, infos


def open_image(reader: Reader, info: SnapshotInfo, name: str = NAME) -> Awaitable[Image]:
    return reader.open_image(info, file_of(info, name))


async def started(nursery: trio.Nursery, work: Callable[[], Awaitable[T]], into: list[T]) -> trio.CancelScope:
    """Starts `work`, whose result goes `into`; cancelling the scope ends it."""
    scope = trio.CancelScope()

    async def run() -> None:
        with scope:
            into.append(await work())

    nursery.start_soon(run)
    await wait_all_tasks_blocked()
    return scope


# --- once for all who ask


@in_trio
async def test_many_that_open_an_image_at_once_fetch_its_index_once() -> None:
    source, (info,) = several(1)
    gate = source.hold("fetch_file")
    images: list[Image] = []
    async with open_reader(source) as reader, trio.open_nursery() as nursery:
        for _ in range(10):
            await started(nursery, lambda: open_image(reader, info), images)
        gate.set()
    assert source.calls["fetch_file"] == 1
    assert len(images) == 10
    assert len(set(map(id, images))) == 1


@in_trio
async def test_the_others_get_the_image_when_the_first_that_asked_is_cancelled() -> None:
    source, (info,) = several(1)
    gate = source.hold("fetch_file")
    images: list[Image] = []
    async with open_reader(source) as reader, trio.open_nursery() as nursery:
        scopes = [await started(nursery, lambda: open_image(reader, info), images) for _ in range(3)]
        scopes[0].cancel()
        await wait_all_tasks_blocked()
        gate.set()
    assert source.calls["fetch_file"] == 1
    assert len(images) == 2


@in_trio
async def test_when_all_are_cancelled_the_fetch_ends_and_the_next_begins_anew() -> None:
    source, (info,) = several(1)
    gate = source.hold("fetch_file")
    images: list[Image] = []
    async with open_reader(source) as reader, trio.open_nursery() as nursery:
        scopes = [await started(nursery, lambda: open_image(reader, info), images) for _ in range(2)]
        for scope in scopes:
            scope.cancel()
        await wait_all_tasks_blocked()
        assert not reader._opened._under_way
        assert reader._opened._fetching.taken == 0
        await started(nursery, lambda: open_image(reader, info), images)
        assert source.calls["fetch_file"] == 2
        gate.set()
    assert len(images) == 1


@in_trio
async def test_a_failure_to_open_reaches_all_who_wait_and_the_next_is_tried() -> None:
    source, (info,) = several(1)
    gate = source.hold("fetch_file")
    source.fail("fetch_file", SourceError("no answer"))
    failures: list[SourceError] = []

    async def failing() -> SourceError:
        with pytest.raises(SourceError, match="no answer") as caught:
            await open_image(reader, info)
        return caught.value

    async with open_reader(source) as reader:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                await started(nursery, failing, failures)
            gate.set()
        assert len(set(map(id, failures))) == 3  # each its own
        assert (await open_image(reader, info)).size == len(CONTENT)
    assert source.calls["fetch_file"] == 2


@in_trio
async def test_opening_ends_with_the_reader() -> None:
    source, (info,) = several(1)
    source.hold("fetch_file")
    failures: list[str] = []

    async def failing(reader: Reader) -> None:
        with pytest.raises(SourceError) as caught:
            await open_image(reader, info)
        failures.append(str(caught.value))

    async with trio.open_nursery() as nursery, open_reader(source) as reader:
        nursery.start_soon(failing, reader)
        await wait_all_tasks_blocked()
    assert failures == ["reading ends: the source is being closed"]


@pytest.mark.parametrize("mode", list(CryptMode))
@in_trio
async def test_a_blob_that_is_open_is_shared_and_fetched_once(mode: CryptMode) -> None:
    key = None if mode is CryptMode.NONE else made.KEY
    source, (info,) = several(1, crypt_mode=mode, key=key, client_log=b"all is well\n" * 9)
    async with open_reader(source, keys={made.KEY.fingerprint: made.KEY} if key else None) as reader:
        for name in (CONF, CLIENT_LOG.filename, "index.json.blob"):
            first = await reader.open_blob(info, file_of(info, name))
            asked = source.calls["fetch_file"]
            assert await reader.open_blob(info, file_of(info, name)) is first
            # Only content tells whether a file without a checksum is the same.
            assert source.calls["fetch_file"] - asked == (name != CONF)
            del first
            gc.collect()
            assert not reader._opened._blobs


@in_trio
async def test_many_that_open_a_blob_at_once_fetch_it_once() -> None:
    source, (info,) = several(1, client_log=b"log")
    gate = source.hold("fetch_file")
    blobs: list[object] = []
    async with open_reader(source) as reader, trio.open_nursery() as nursery:
        for name in (CONF, CLIENT_LOG.filename):
            for _ in range(5):
                await started(nursery, lambda name=name: reader.open_blob(info, file_of(info, name)), blobs)  # type: ignore[misc]
        gate.set()
    assert source.calls["fetch_file"] == 2
    assert len(blobs) == 10
    assert len(set(map(id, blobs))) == 2


@in_trio
async def test_a_log_that_changed_is_not_taken_for_the_one_that_is_open() -> None:
    source, (info,) = several(1, client_log=b"old")
    async with open_reader(source) as reader:
        old = await reader.open_blob(info, file_of(info, CLIENT_LOG.filename))
        changed = several(1, client_log=b"new")[0]
        source.files |= changed.files
        new = await reader.open_blob(info, file_of(info, CLIENT_LOG.filename))
        assert (old.data, new.data) == (b"old", b"new")


# --- within the limit


def loaded(images: list[Image]) -> list[int]:
    return [number for number, image in enumerate(images) if image.index.has_table()]


@in_trio
async def test_the_images_that_were_read_least_recently_drop_their_tables() -> None:
    source, infos = several(5)
    async with open_reader(source, cache_size=0, open_limit=3 * TABLE + 5 * REST) as reader:
        images = [await open_image(reader, info) for info in infos[:3]]
        assert loaded(images) == [0, 1, 2]
        assert images[0].read_cached(0, 10) is None
        images.append(await open_image(reader, infos[3]))
        assert loaded(images) == [0, 2, 3]
        images.append(await open_image(reader, infos[4]))
        assert loaded(images) == [0, 3, 4]
        assert [image.data_size() for image in images] == [len(CONTENT) - CHUNK_SIZE] * 5
        assert await images[1].read(5, CHUNK_SIZE) == CONTENT[5:][:CHUNK_SIZE]
        assert loaded(images) == [1, 3, 4]


@pytest.mark.parametrize("name", [NAME, STREAM])
@in_trio
async def test_every_way_to_read_fetches_the_table_again(name: str) -> None:
    source, infos = several(1)
    async with open_reader(source) as reader:
        image = await open_image(reader, infos[0], name)
        for offset in range(0, len(CONTENT), CHUNK_SIZE):
            image.index.drop_table()
            assert await image.read(offset, CHUNK_SIZE) == CONTENT[offset:][:CHUNK_SIZE]
            image.index.drop_table()
            handle = image.handle(whole=True)
            assert await handle.read(offset, 100) == CONTENT[offset:][:100]
            image.index.drop_table()
            handle.fetch_ahead()  # has nothing to go by, and does nothing
            handle.close()
        image.index.drop_table()
        assert (image.read_cached(4 * CHUNK_SIZE, 9) is None) == (name == STREAM)  # a hole needs no table
        assert not image.prefetch(0)
        assert not image.index.has_table()


@in_trio
async def test_a_table_that_is_dropped_while_the_source_keeps_it_is_fetched_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, (info,) = several(1)
    async with open_reader(source) as reader:
        image = await open_image(reader, info)
        image.index.drop_table()
        confirmed = source.confirmed

        async def kept(work: Callable[[], Awaitable[T]]) -> T:
            result = await confirmed(work)
            await trio.sleep(1)  # as a cache that is full waits
            image.index.drop_table()  # for another image
            monkeypatch.undo()
            return result

        monkeypatch.setattr(source, "confirmed", kept)
        assert await image.read(0, 10) == CONTENT[:10]


def test_a_thread_that_reads_gets_the_table_again() -> None:
    class Loop:
        """The loop of this test, as a thread sees it."""

        patience = 1.0

        def call(self, work: Callable[[], Awaitable[T]]) -> T:
            async def run() -> T:
                return await work()

            return trio.from_thread.run(run)

        def post(self, work: Callable[[], object]) -> None:
            trio.from_thread.run_sync(work)

        def check(self) -> None:
            pass

    async def main() -> None:
        source, (info,) = several(1)
        async with open_reader(source) as reader:
            image = await open_image(reader, info)
            handle = image.handle()
            buffer = bytearray(len(CONTENT))
            image.index.drop_table()
            await trio.to_thread.run_sync(handle.read_into, memoryview(buffer), 0, Loop())
            assert buffer == CONTENT
            image.index.drop_table()
            source.files.clear()
            with pytest.raises(SourceError, match="the index is missing"):
                await trio.to_thread.run_sync(handle.read_into, memoryview(buffer), 0, Loop())
            handle.close()

    trio.run(main)  # threads on a true clock


@in_trio
async def test_many_that_read_a_dropped_image_fetch_its_table_once() -> None:
    source, (info,) = several(1)
    async with open_reader(source) as reader:
        image = await open_image(reader, info)
        image.index.drop_table()
        gate = source.hold("fetch_file")
        read: list[object] = []
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                await started(nursery, lambda: image.read(0, 10), read)
            gate.set()
        assert read == [CONTENT[:10]] * 10
    assert source.calls["fetch_file"] == 2


@in_trio
async def test_what_fits_exactly_stays() -> None:
    source, infos = several(2)
    async with open_reader(source, cache_size=0, open_limit=2 * (TABLE + REST)) as reader:
        images = [await open_image(reader, info) for info in infos]
        assert loaded(images) == [0, 1]
        for image in images * 2:
            assert await image.read(0, len(CONTENT)) == CONTENT
    assert source.calls["fetch_file"] == 2


@in_trio
async def test_that_tables_are_fetched_again_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    source, infos = several(2)
    with caplog.at_level("INFO"):
        async with open_reader(source, cache_size=0, open_limit=TABLE + 3 * REST) as reader:
            images = [await open_image(reader, info) for info in infos]
            assert not caplog.messages
            for image in images * 3:
                await image.read(0, 1)
    (message,) = caplog.messages
    assert message.startswith(f"open files need more than the {TABLE + 3 * REST} bytes ")


@in_trio
async def test_an_empty_image_can_drop_its_table_too() -> None:
    source = MemorySource()
    info = source.add(made.snapshot(), {NAME: b""})
    async with open_reader(source) as reader:
        image = await open_image(reader, info)
        image.index.drop_table()
        assert await image.read(0, 10) == b""


@in_trio
async def test_a_table_larger_than_the_limit_stays_for_the_image_that_is_read() -> None:
    source, infos = several(2)
    async with open_reader(source, cache_size=0, open_limit=10 + 2 * REST) as reader:
        images = [await open_image(reader, info) for info in infos]
        assert loaded(images) == [1]
        for number in (0, 0, 1, 0, 1):
            assert await images[number].read(0, len(CONTENT)) == CONTENT
            assert loaded(images) == [number]


@in_trio
async def test_those_that_read_images_beyond_the_limit_all_get_on() -> None:
    source, infos = several(3)
    reads = 0

    async def read_all(image: Image) -> None:
        nonlocal reads
        for offset in range(0, len(CONTENT), 10_000):
            assert await image.read(offset, 10_000) == CONTENT[offset:][:10_000]
            reads += 1

    async with open_reader(source, cache_size=0, open_limit=TABLE + 3 * REST) as reader:
        images = [await open_image(reader, info) for info in infos]
        async with trio.open_nursery() as nursery:
            for image in images * 3:
                nursery.start_soon(read_all, image)
        # None has to fetch a table twice for one read.
        assert source.calls["fetch_file"] <= len(images) + reads
        assert not reader._opened._awaited


@in_trio
async def test_a_table_that_is_waited_for_is_not_dropped_before_it_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, infos = several(2)
    async with open_reader(source, cache_size=0, open_limit=2 * (TABLE + REST)) as reader:
        opened = reader._opened
        images = [await open_image(reader, info) for info in infos]
        images[0].index.drop_table()
        forget = opened._forget

        def another_needs_room(
            *arguments: Any,
        ) -> None:  # between the fetch and the turn of the one that waits
            forget(*arguments)
            opened._memory.limit = 0
            opened._memory.reclaim()

        monkeypatch.setattr(opened, "_forget", another_needs_room)
        assert await images[0].read(0, 10) == CONTENT[:10]
        assert loaded(images) == [0]


@pytest.mark.parametrize("name", [NAME, STREAM])
@in_trio
async def test_another_index_is_never_taken_for_the_one_that_was_opened(name: str) -> None:
    source, (info,) = several(1)
    zeroed = ZeroedRanges()
    async with open_reader(source, zeroed=zeroed) as reader:
        image = await open_image(reader, info, name)
        place = (info.snapshot, Archive(name))
        good = source.files[place]
        image.index.drop_table()
        other = MemorySource()
        other.add(info.snapshot, {name: made.image(2, "rrtr0r", tail=77)})
        for stored, text in (
            (other.files[place], "not the one that was opened; open the file again"),
            (good[:-1] + bytes([good[-1] ^ 1]), "checksum mismatch"),
            (good[:-1], "not the one that was opened"),
            (good[:100], "cut short"),
        ):
            source.files[place] = stored
            with pytest.raises(DamageError, match=text) as caught:
                await image.read(0, 10)  # nor zeros in its place
            assert str(place[0]) in str(caught.value)
        del source.files[place]
        with pytest.raises(SourceError, match="the index is missing"):
            await image.read(0, 10)
        source.files[place] = good
        assert await image.read(0, 10) == CONTENT[:10]
    assert zeroed.count == 0


@in_trio
async def test_blobs_count_and_make_tables_go_but_never_the_other_way_round() -> None:
    source, infos = several(4)
    size = len(b"cores: 2\n" * 50)
    async with open_reader(source, cache_size=0, open_limit=2 * size + 20 + REST) as reader:
        image = await open_image(reader, infos[0])
        blobs = [await reader.open_blob(info, file_of(info, CONF)) for info in infos[:1]]
        assert image.index.has_table()
        while image.index.has_table():
            info = infos[len(blobs)]
            blobs.append(await reader.open_blob(info, file_of(info, CONF)))
        assert len(blobs) == 2
        assert await image.read(0, len(CONTENT)) == CONTENT
        assert all(blob.data == b"cores: 2\n" * 50 for blob in blobs)


@in_trio
async def test_a_blob_that_does_not_fit_beside_the_others_is_refused_until_one_is_closed() -> None:
    source, infos = several(3)
    async with open_reader(source, cache_size=0, open_limit=1000) as reader:
        blobs = [await reader.open_blob(info, file_of(info, CONF)) for info in infos[:2]]
        with pytest.raises(
            MemoryLimitError, match=r"qemu-server\.conf: its 450 bytes .*; close some"
        ) as caught:
            await reader.open_blob(infos[2], file_of(infos[2], CONF))
        assert errno_of(caught.value) == 12
        assert await reader.open_blob(infos[0], file_of(infos[0], CONF)) is blobs[0]
        blobs.pop()
        gc.collect()
        assert (await reader.open_blob(infos[2], file_of(infos[2], CONF))).data == blobs[0].data


@in_trio
async def test_a_large_blob_that_does_not_fit_is_not_fetched_at_all() -> None:
    source = MemorySource()
    files = {name: made.image(seed, "r") for seed, name in enumerate(("a.blob", "b.blob"))}
    info = source.add(made.snapshot(), files)
    async with open_reader(source, cache_size=0, open_limit=100_000) as reader:
        first = await reader.open_blob(info, file_of(info, "a.blob"))
        with pytest.raises(MemoryLimitError, match="close some files"):
            await reader.open_blob(info, file_of(info, "b.blob"))
        assert first.data == files["a.blob"]
    assert source.calls["fetch_file"] == 1


@in_trio
async def test_indexes_are_fetched_side_by_side_as_far_as_they_fit() -> None:
    limits = FetchLimits(file_budget=3 * index.FIXED_ENTRY_SIZE)
    source, infos = several(5)
    gate = source.hold("fetch_file")
    images: list[Image] = []
    async with open_reader(source, limits=limits) as reader, trio.open_nursery() as nursery:
        for info in infos:
            await started(nursery, lambda info=info: open_image(reader, info), images)  # type: ignore[misc]
        assert source.calls["fetch_file"] == 3
        gate.set()
    assert len(images) == 5
