"""Readers of an image: what they fetch ahead, and what they leave to others."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from trio.testing import wait_all_tasks_blocked

from pbsfs.base.errors import DamageError
from pbsfs.chunks import decoder, store
from pbsfs.chunks.limits import FetchLimits
from pbsfs.formats import index
from pbsfs.reader.handle import Handle
from pbsfs.reader.image import Image
from pbsfs.runtime.threads import Threads
from tests.reader.images import (
    NAME,
    STORAGES,
    opened,
    stored,
    with_index,
)
from tests.support import made
from tests.support.run import in_trio, run, until
from tests.support.sources import CHUNK_SIZE, MemorySource

MIB = 1 << 20
REQUEST = 16 << 10

SMALL = FetchLimits(reorder_distance=32 << 10, evidence=32 << 10, max_window=8 * CHUNK_SIZE)
"""Scales the policy to chunks of 64 KiB: a window of 8 chunks, as for 4 MiB by default."""


async def read_through(handle: Handle, start: int, end: int, step: int = REQUEST) -> bytes:
    parts = []
    for offset in range(start, end, step):
        size = min(step, end - offset)
        cached = handle.read_cached(offset, size)
        parts.append(bytes(await handle.read(offset, size) if cached is None else cached))
    return b"".join(parts)


@in_trio
async def test_a_sequential_reader_finds_what_comes_next_at_hand() -> None:
    content = made.image(1, "r" * 16)
    source, info = stored(content)
    async with opened(source, info, limits=SMALL) as image:
        handle = image.handle()
        assert await read_through(handle, 0, 4 * CHUNK_SIZE) == content[: 4 * CHUNK_SIZE]
        # What is ahead comes without anybody asking for it; a fetch that is joined ends with it.
        for number in range(4, 8):
            await image.read(number * CHUNK_SIZE, 1)
        asked = len(source.fetched)
        assert (
            handle.read_cached(4 * CHUNK_SIZE, 4 * CHUNK_SIZE) == content[4 * CHUNK_SIZE :][: 4 * CHUNK_SIZE]
        )
        assert asked > 8
        handle.close()


@in_trio
async def test_reading_in_sequence_fetches_every_chunk_once_and_nothing_twice() -> None:
    content = made.image(1, "rrr0rr000rrrrrr0r", tail=300)
    source, info = stored(content)
    async with opened(source, info, limits=SMALL) as image:
        handle = image.handle()
        assert await read_through(handle, 0, len(content)) == content
        handle.close()
        data = [image.index.digest(n) for n in range(image.index.count) if not image.index.is_hole(n)]
    assert sorted(source.fetched) == sorted(data)


@in_trio
async def test_what_is_fetched_ahead_skips_holes_however_long() -> None:
    content = made.image(1, "rr" + "0" * 40 + "rr")
    source, info = stored(content)
    async with opened(source, info, limits=SMALL) as image:
        handle = image.handle()
        await read_through(handle, 0, 2 * CHUNK_SIZE)
        await wait_all_tasks_blocked()
        behind = [image.index.digest(42), image.index.digest(43)]
        assert source.fetched[2:] == behind
        handle.close()


@in_trio
async def test_a_reader_that_leaves_out_holes_keeps_its_window() -> None:
    content = made.image(1, "rr" + "0" * 40 + "r" * 12)
    for skips in (True, False):
        source, info = stored(content)
        async with opened(source, info, limits=SMALL) as image:
            handle = image.handle()
            await read_through(handle, 0, 2 * CHUNK_SIZE)
            if skips:
                handle.skip_hole(42 * CHUNK_SIZE)
            await handle.read(42 * CHUNK_SIZE, REQUEST)
            await wait_all_tasks_blocked()
            assert (image.index.digest(50) in source.fetched) == skips
            handle.close()


@in_trio
async def test_sequential_reading_keeps_several_fetches_in_flight() -> None:
    content = made.image(1, "r" * 24)
    source, info = stored(content)
    async with opened(source, info, limits=SMALL) as image:
        handle = image.handle()
        await read_through(handle, 0, 6 * CHUNK_SIZE)
        for number in range(6, 14):  # all earlier fetches have to end, so that only new ones count
            await image.read(number * CHUNK_SIZE, 1)
        source.hold("fetch_chunk")
        await read_through(handle, 6 * CHUNK_SIZE, 12 * CHUNK_SIZE)
        await wait_all_tasks_blocked()
        assert source.in_flight == 6


def test_sequential_reading_decodes_several_chunks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    content = made.image(1, "r" * 16)
    source, info = stored(content)
    real = decoder.decode_chunk
    decoding = 0
    most = 0
    several = threading.Event()
    lock = threading.Lock()

    def decode(raw: bytes, *, digest: bytes, **others: Any) -> bytes:
        nonlocal decoding, most
        with lock:
            decoding += 1
            most = max(most, decoding)
            if decoding > 1:
                several.set()
        if digest in ahead:
            assert several.wait(30)  # a thread by itself would wait in vain
        with lock:
            decoding -= 1
        return real(raw, digest=digest, **others)

    ahead: set[bytes] = set()

    async def main() -> None:
        async with opened(source, info, limits=SMALL) as image:
            image.store._decoders = Threads(4)
            ahead.update(image.index.digest(number) for number in range(1, 16))
            monkeypatch.setattr(decoder, "decode_chunk", decode)
            handle = image.handle()
            assert await read_through(handle, 0, len(content)) == content
            handle.close()

    run(main)
    assert most > 1


@pytest.mark.parametrize("storage", ["plain", "encrypted"])
@in_trio
async def test_a_random_reader_fetches_nothing_ahead(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_store: store.ChunkStore, chunk: store.Chunk) -> bool:
        raise AssertionError(f"fetches {chunk} ahead")

    monkeypatch.setattr(store.ChunkStore, "prefetch", refuse)
    content = made.image(1, "r" * 16, chunk_size=MIB)
    source, info = stored(content, storage=STORAGES[storage], chunk_size=MIB)
    reader = random.Random(1)
    async with opened(source, info) as image:
        handle = image.handle()
        for _ in range(3000):
            offset = reader.randrange(len(content) // 4096) * 4096
            assert await read_through(handle, offset, offset + 4096) == content[offset : offset + 4096]
        assert image.store.sequential_readers == 0
    assert len(source.fetched) == 16


@in_trio
async def test_sequential_readers_share_half_of_the_cache() -> None:
    content = made.image(1, "r" * 64)
    source, info = stored(content)
    capacity = 32 * CHUNK_SIZE
    async with opened(source, info, cache_size=capacity, limits=SMALL) as image:
        handles = [image.handle() for _ in range(4)]
        assert image.store.window_limit == capacity // 2
        for count, handle in enumerate(handles, 1):
            await read_through(handle, 0, 2 * CHUNK_SIZE)
            assert image.store.sequential_readers == count
            assert image.store.window_limit == capacity // 2 // count
        # A jump ends a sequence, and so does closing; closing again changes nothing.
        await handles[0].read(40 * CHUNK_SIZE, REQUEST)
        assert image.store.sequential_readers == 3
        for handle in (handles[1], handles[1], handles[0]):
            handle.close()
        assert image.store.sequential_readers == 2
        for handle in handles:
            handle.close()
        assert image.store.sequential_readers == 0
        assert image.store.window_limit == capacity // 2


@in_trio
async def test_what_is_fetched_ahead_stays_within_the_reader_s_share_of_the_cache() -> None:
    content = made.image(1, "r" * 32)
    for readers, most in ((1, 4), (4, 1)):
        source, info = stored(content)
        async with opened(source, info, cache_size=8 * CHUNK_SIZE, limits=SMALL) as image:
            image.store.sequential_readers = readers - 1
            handle = image.handle()
            await read_through(handle, 0, 8 * CHUNK_SIZE)
            await wait_all_tasks_blocked()
            # The last request ended on a chunk's end, so that the window begins with the next one.
            ahead = {image.index.digest(number) for number in range(8, 32)} & set(source.fetched)
            assert 1 <= len(ahead) <= most
            handle.close()


@in_trio
async def test_nothing_is_fetched_behind_the_end() -> None:
    content = made.image(1, "rrrr", tail=100)
    source, info = stored(content)
    async with opened(source, info, limits=SMALL) as image:
        handle = image.handle()
        assert await read_through(handle, 0, len(content)) == content
        assert await handle.read(len(content), REQUEST) == b""
        assert handle.read_cached(len(content), REQUEST) == b""
        handle.close()
    assert len(source.fetched) == 5


@in_trio
async def test_a_damaged_chunk_that_was_fetched_ahead_fails_only_the_read_that_needs_it() -> None:
    content = made.image(1, "r" * 8)
    source, info = stored(content)
    async with opened(source, info, limits=SMALL) as image:
        handle = image.handle()
        source.damage(image.index.digest(5), 999)
        assert await read_through(handle, 0, 5 * CHUNK_SIZE) == content[: 5 * CHUNK_SIZE]
        with pytest.raises(DamageError):
            await handle.read(5 * CHUNK_SIZE, 10)
        assert await read_through(handle, 6 * CHUNK_SIZE, 8 * CHUNK_SIZE) == content[6 * CHUNK_SIZE :]
        handle.close()


@in_trio
async def test_what_could_not_be_fetched_ahead_is_not_tried_again_before_it_is_read() -> None:
    content = made.image(1, "r" * 10)
    source, info = stored(content)
    async with opened(source, info, limits=SMALL) as image:
        handle = image.handle()
        digest = image.index.digest(5)
        source.damage(digest, 999)
        for offset in range(0, 5 * CHUNK_SIZE, REQUEST):
            await handle.read(offset, REQUEST)
            await until(lambda: not image.store._fetches)
        assert source.fetched.count(digest) == 1
        handle.close()


@in_trio
async def test_after_a_jump_back_the_next_sequence_is_fetched_ahead_too() -> None:
    content = made.image(1, "r" * 30)
    source, info = stored(content)
    async with opened(source, info, limits=SMALL) as image:
        handle = image.handle()
        await read_through(handle, 20 * CHUNK_SIZE, 30 * CHUNK_SIZE)
        await read_through(handle, 0, CHUNK_SIZE)
        await wait_all_tasks_blocked()
        assert image.index.digest(2) in source.fetched
        handle.close()


@in_trio
async def test_each_chunk_is_looked_at_once_to_be_fetched_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []
    data_chunks = Image.data_chunks

    def noted(image: Image, offset: int, size: int) -> Iterator[int]:
        for number in data_chunks(image, offset, size):
            looked_at.append(number)
            yield number

    monkeypatch.setattr(Image, "data_chunks", noted)
    content = made.image(1, "r" * 20 + "0" * 5 + "r" * 40, tail=300)
    source, info = stored(content)
    async with opened(source, info, limits=SMALL) as image:
        handle = image.handle()
        # Requests that end within chunks, too.
        assert await read_through(handle, 0, len(content), REQUEST * 3 // 4) == content
        handle.close()
    assert len(set(looked_at)) > 50
    assert len(looked_at) <= len(set(looked_at)) + 4  # those that did not fit at first


def test_looking_ahead_in_a_huge_image_without_holes_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 1 << 16
    digests = [b"%032d" % number for number in range(count)]
    raw, csum = index.encode_fixed(digests, size=count << 22, chunk_size=4 * MIB, ctime=0)
    source = MemorySource()
    info = with_index(source, NAME, raw, csum, count << 22)

    def refuse(*_arguments: object) -> tuple[bool, int]:
        raise AssertionError("searched the index for the end of a run of data")

    async def main() -> None:
        async with opened(source, info) as image:
            monkeypatch.setattr(index.FixedIndex, "run", refuse)
            assert list(image.data_chunks(5 * MIB, 8 * MIB)) == [1, 2, 3]

    run(main)
