"""Images: reads, extents and read-ahead, held against the bytes that were backed up."""

from __future__ import annotations

import random
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from pbsfs.base.errors import DamageError, KeyRequiredError, SourceError
from pbsfs.base.names import Archive
from pbsfs.chunks import decoder, store
from pbsfs.chunks.limits import DEFAULT, FetchLimits
from pbsfs.formats import index
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import CryptMode
from pbsfs.reader.handle import Handle
from pbsfs.reader.image import Extent, Image
from pbsfs.reader.reader import open_reader
from pbsfs.runtime.threads import Threads
from pbsfs.sources.base import FileInfo, SnapshotInfo
from tests.support import made
from tests.support.run import in_trio, run, until
from tests.support.sources import CHUNK_SIZE, MemorySource, file_of

NAME = "disk.img.fidx"
STREAM = "root.pxar.didx"
SNAPSHOT = made.snapshot()
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Storage:
    """How an image is stored."""

    crypt_mode: CryptMode = CryptMode.NONE
    key: Key | None = None
    compress: bool = True


STORAGES = {
    "plain": Storage(compress=False),
    "compressed": Storage(),
    "encrypted": Storage(CryptMode.ENCRYPT, made.KEY, compress=False),
    "encrypted-compressed": Storage(CryptMode.ENCRYPT, made.KEY),
    "sign-only": Storage(CryptMode.SIGN_ONLY, made.KEY),
}


@asynccontextmanager
async def opened(
    source: MemorySource,
    info: SnapshotInfo,
    name: str = NAME,
    *,
    cache_size: int = 256 << 20,
    limits: FetchLimits = DEFAULT,
) -> AsyncIterator[Image]:
    keys = {made.KEY.fingerprint: made.KEY}
    async with open_reader(source, cache_size=cache_size, limits=limits, keys=keys) as reader:
        yield await reader.open_image(info, file_of(info, name))


def stored(
    content: bytes,
    *,
    name: str = NAME,
    storage: Storage = STORAGES["compressed"],
    chunk_size: int = CHUNK_SIZE,
) -> tuple[MemorySource, SnapshotInfo]:
    source = MemorySource()
    info = source.add(
        SNAPSHOT,
        {name: content},
        crypt_mode=storage.crypt_mode,
        key=storage.key,
        compress=storage.compress,
        chunk_size=chunk_size,
    )
    return source, info


def digest_of(image: Image, offset: int) -> bytes:
    return image.index.digest(image.index.find(offset))


# --- reading, against the original bytes


async def check_reads(image: Image, content: bytes, reads: list[tuple[int, int]]) -> None:
    assert image.size == len(content)
    handle = image.handle()
    for offset, size in reads:
        expected = content[offset : offset + size]
        before = image.read_cached(offset, size)
        assert before is None or before == expected
        assert await image.read(offset, size) == expected
        assert image.read_cached(offset, size) == expected
        assert handle.read_cached(offset, size) == expected
        assert await handle.read(offset, size) == expected
    handle.close()


@given(
    kinds=st.text("rt0s", max_size=6),
    tail=st.sampled_from([0, 1, 511, 512, 4096, CHUNK_SIZE - 1]),
    storage=st.sampled_from(sorted(STORAGES)),
    name=st.sampled_from([NAME, STREAM]),
    reads=st.lists(st.tuples(st.integers(0, 8 * CHUNK_SIZE), st.integers(0, 4 * CHUNK_SIZE)), max_size=8),
)
def test_any_read_of_any_image_gives_the_bytes_that_were_backed_up(
    kinds: str, tail: int, storage: str, name: str, reads: list[tuple[int, int]]
) -> None:
    # 's': a chunk that occurs again and again
    shared = made.image(99, "r")
    pieces = [shared if kind == "s" else made.image(i, kind) for i, kind in enumerate(kinds)]
    content = b"".join(pieces) + made.image(7, "", tail=tail)
    source, info = stored(content, name=name, storage=STORAGES[storage])

    async def main() -> None:
        async with opened(source, info, name) as image:
            await check_reads(image, content, reads)
            assert await image.read(0, len(content) + 1) == content
            assert await image.read(len(content), 10) == b""
            assert await image.read(len(content) + 5, 10) == b""
            assert image.read_cached(len(content), 10) == b""

    run(main)


@pytest.mark.parametrize("storage", sorted(STORAGES))
@pytest.mark.parametrize("exponent", range(16, 25))
def test_every_chunk_size_from_64_kib_to_16_mib_reads_right(exponent: int, storage: str) -> None:
    chunk_size = 1 << exponent
    source = random.Random(exponent)
    block = source.randbytes(4096)
    content = bytes(chunk_size) + (block * (chunk_size // 4096)) + bytes(chunk_size // 2) + block[:512]
    memory, info = stored(content, storage=STORAGES[storage], chunk_size=chunk_size)
    places = [0, chunk_size - 10, chunk_size * 2 - 1, chunk_size * 2, len(content) - 512, len(content) - 1]
    reads = [(place, size) for place in places for size in (1, 20, 4096)]
    reads += [(source.randrange(len(content)), source.randrange(1 << 17)) for _ in range(10)]

    async def main() -> None:
        async with opened(memory, info) as image:
            await check_reads(image, content, reads)
            assert image.index.chunk_size == chunk_size

    run(main)


@pytest.mark.parametrize("name", [NAME, STREAM])
@in_trio
async def test_an_empty_image_is_empty(name: str) -> None:
    source, info = stored(b"", name=name)
    async with opened(source, info, name) as image:
        assert image.size == 0
        assert await image.read(0, 4096) == b""
        assert image.read_cached(0, 4096) == b""
        assert await image.handle().read(0, 4096) == b""
        assert list(image.extents(0, 1 << 40)) == []
        assert image.next_data(0) is None
        assert image.next_hole(0) == 0
        assert image.data_size() == 0


@in_trio
async def test_holes_are_read_without_fetching_anything() -> None:
    content = bytes(3 * CHUNK_SIZE) + bytes(700)
    source, info = stored(content)
    async with opened(source, info) as image:
        assert image.read_cached(0, len(content)) == content
        assert await image.read(100, CHUNK_SIZE) == bytes(CHUNK_SIZE)
        assert await image.handle().read(0, len(content)) == content
        await wait_all_tasks_blocked()
    assert source.fetched == []


@in_trio
async def test_a_chunk_that_occurs_many_times_is_fetched_once() -> None:
    content = made.image(1, "r") * 5
    source, info = stored(content)
    async with opened(source, info) as image:
        assert await image.read(0, len(content)) == content
    assert len(source.fetched) == 1


@in_trio
async def test_all_chunks_of_a_read_are_fetched_side_by_side() -> None:
    content = made.image(1, "rrrr")
    source, info = stored(content)
    gate = source.hold("fetch_chunk")
    async with opened(source, info) as image, trio.open_nursery() as nursery:
        got: list[object] = []

        async def read() -> None:
            got.append(await image.read(10, len(content) - 20))

        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        assert source.in_flight == 4
        gate.set()
    assert got == [content[10:-10]]


@in_trio
async def test_cached_bytes_can_be_read_from_other_threads() -> None:
    content = made.image(1, "r0t", tail=100)
    source, info = stored(content)
    async with opened(source, info) as image:
        await image.read(0, len(content))
        threads = trio.CapacityLimiter(4)
        got: list[object] = []

        async def in_thread(offset: int) -> None:
            got.append(
                await trio.to_thread.run_sync(image.read_cached, offset, CHUNK_SIZE, limiter=threads)
                == content[offset : offset + CHUNK_SIZE]
            )

        async with trio.open_nursery() as nursery:
            for offset in range(0, len(content), 5000):
                nursery.start_soon(in_thread, offset)
        assert all(got)
        assert len(got) == len(range(0, len(content), 5000))


# --- extents


def extents_of(content: bytes, chunk_size: int) -> list[bool]:
    """For each chunk, whether it is a hole."""
    return [not any(content[i : i + chunk_size]) for i in range(0, len(content), chunk_size)]


@given(
    kinds=st.text("r0", max_size=10),
    tail=st.sampled_from([b"", b"\0", b"x", bytes(512), b"y" * 700]),
    storage=st.sampled_from(sorted(STORAGES)),
    offset=st.integers(0, 11 * CHUNK_SIZE),
    size=st.integers(0, 11 * CHUNK_SIZE),
)
def test_extents_cover_a_range_once_and_tell_what_is_zero(
    kinds: str, tail: bytes, storage: str, offset: int, size: int
) -> None:
    content = made.image(1, kinds) + tail
    source, info = stored(content, storage=STORAGES[storage])
    holes = extents_of(content, CHUNK_SIZE)
    boundaries = {i * CHUNK_SIZE for i in range(1, len(holes)) if holes[i] != holes[i - 1]}

    async def main() -> None:
        async with opened(source, info) as image:
            extents = list(image.extents(offset, size))
            end = min(offset + size, len(content))
            if offset >= end:
                assert extents == []
            else:
                assert extents[0].offset == offset
                ends = [e.offset + e.length for e in extents]
                assert ends == [*(e.offset for e in extents[1:]), end]
                assert {e.offset for e in extents[1:]} == {b for b in boundaries if offset < b < end}
                assert all(e.hole == holes[e.offset // CHUNK_SIZE] for e in extents)
            data = [o for o in (offset, *sorted(boundaries)) if offset <= o < len(content)]
            data = [o for o in data if not holes[o // CHUNK_SIZE]]
            assert image.next_data(offset) == (data[0] if data else None)
            hole = [o for o in (offset, *sorted(boundaries)) if offset <= o < len(content)]
            hole = [o for o in hole if holes[o // CHUNK_SIZE]]
            assert image.next_hole(offset) == (hole[0] if hole else len(content))
            counted = [i for i, is_hole in enumerate(holes) if not is_hole]
            assert image.data_size() == sum(len(content[i * CHUNK_SIZE :][:CHUNK_SIZE]) for i in counted)

    run(main)


@in_trio
async def test_extents_of_an_encrypted_image_know_the_zeros_of_its_key() -> None:
    content = made.image(1, "r00r")
    source, info = stored(content, storage=STORAGES["encrypted"])
    async with opened(source, info) as image:
        assert list(image.extents(0, image.size)) == [
            Extent(0, CHUNK_SIZE, hole=False),
            Extent(CHUNK_SIZE, 2 * CHUNK_SIZE, hole=True),
            Extent(3 * CHUNK_SIZE, CHUNK_SIZE, hole=False),
        ]


@in_trio
async def test_extents_of_a_stream_are_all_data() -> None:
    content = made.image(1, "0r0")
    source, info = stored(content, name=STREAM)
    async with opened(source, info, STREAM) as image:
        assert list(image.extents(100, 1 << 40)) == [Extent(100, len(content) - 100, hole=False)]
        assert image.next_data(5) == 5
        assert image.next_hole(5) == len(content)


# --- damage


@pytest.mark.parametrize("storage", sorted(STORAGES))
@pytest.mark.parametrize("name", [NAME, STREAM])
def test_a_bit_flip_fails_reads_that_touch_it_and_no_others(storage: str, name: str) -> None:
    content = made.image(1, "rtr", tail=700)
    clean, info = stored(content, name=name, storage=STORAGES[storage])
    sampled = random.Random(storage)

    async def damaged(number: int, bit: int) -> None:
        async with opened(clean, info, name) as image:
            digest = image.index.digest(number)
            whole = clean.chunks[digest]
            clean.damage(digest, bit)
            try:
                start, end = image.index.span(number)
                for offset, size in (
                    (start, 1),
                    (end - 1, 1),
                    (start - 1 if start else 0, 2),
                    (0, len(content)),
                ):
                    with pytest.raises(DamageError) as caught:
                        await image.read(offset, size)
                    for part in (
                        str(SNAPSHOT),
                        Archive(name).name,
                        digest.hex(),
                        f"bytes {start} to {end - 1}",
                    ):
                        assert part in str(caught.value)
                assert image.read_cached(start, 1) is None
                assert await image.read(0, start) == content[:start]
                assert await image.read(end, len(content)) == content[end:]
            finally:
                clean.chunks[digest] = whole

    async def main() -> None:
        async with opened(clean, info, name) as image:
            digests = [image.index.digest(number) for number in range(image.index.count)]
        for number, digest in enumerate(digests):
            bits = len(clean.chunks[digest]) * 8
            for bit in (0, bits - 1, 12 * 8, *(sampled.randrange(bits) for _ in range(4))):
                await damaged(number, bit)

    run(main)


@pytest.mark.parametrize("cut", [0, 8, 12, 100, -1])
@in_trio
async def test_a_chunk_that_was_cut_short_is_damage(cut: int) -> None:
    content = made.image(1, "rr")
    source, info = stored(content)
    async with opened(source, info) as image:
        digest = digest_of(image, 0)
        source.chunks[digest] = source.chunks[digest][:cut]
        with pytest.raises(DamageError, match=digest.hex()):
            await image.read(0, 10)
        assert await image.read(CHUNK_SIZE, 10) == content[CHUNK_SIZE:][:10]


def with_index(source: MemorySource, name: str, raw: bytes, csum: bytes, size: int) -> SnapshotInfo:
    """A snapshot whose only file has the index `raw`."""
    archive = Archive(name)
    source.files[SNAPSHOT, archive] = raw
    info = SnapshotInfo(SNAPSHOT, (FileInfo(archive, size, CryptMode.NONE, csum),))
    source.set_manifest(SNAPSHOT, info.files, None)
    return info


@pytest.mark.parametrize("first", [0, 1])
@in_trio
async def test_one_digest_with_two_lengths_is_damage_and_never_short_data(first: int) -> None:
    source = MemorySource()
    data = made.image(1, "r")[:700]
    digest = source.add_chunk(data)
    raw, csum = index.encode_dynamic([(700, digest), (1100, digest)], ctime=0)
    info = with_index(source, STREAM, raw, csum, 1100)
    async with opened(source, info, STREAM) as image:
        reads = [(0, 700), (700, 400)]
        for offset, size in (reads[first], reads[1 - first], reads[first], (650, 100), (0, 1100)):
            if (offset, size) == (0, 700):
                assert await image.read(offset, size) == data
                assert image.read_cached(offset, size) == data
            else:
                with pytest.raises(DamageError, match=digest.hex()):
                    await image.read(offset, size)
        with pytest.raises(DamageError, match="holds 700 bytes, the index says 400"):
            image.read_cached(700, 10)


@in_trio
async def test_two_images_that_disagree_about_a_length_do_not_harm_each_other() -> None:
    source = MemorySource()
    data = made.image(1, "r")[:700]
    digest = source.add_chunk(data)
    honest_raw, honest_csum = index.encode_dynamic([(700, digest)], ctime=0)
    lying_raw, lying_csum = index.encode_dynamic([(400, digest)], ctime=0)
    files = []
    for name, raw, csum, size in (
        ("a.pxar.didx", honest_raw, honest_csum, 700),
        ("b.pxar.didx", lying_raw, lying_csum, 400),
    ):
        source.files[SNAPSHOT, Archive(name)] = raw
        files.append(FileInfo(Archive(name), size, CryptMode.NONE, csum))
    info = SnapshotInfo(SNAPSHOT, tuple(files))
    source.set_manifest(SNAPSHOT, files, None)
    gate = source.hold("fetch_chunk")
    outcomes: list[str] = []

    async def read(image: Image) -> None:
        try:
            outcomes.append(f"{image.archive}: {await image.read(0, 1000) == data}")
        except DamageError:
            outcomes.append(f"{image.archive}: damage")

    async with open_reader(source) as reader, trio.open_nursery() as nursery:
        for file in reversed(files):
            nursery.start_soon(read, await reader.open_image(info, file))
            await wait_all_tasks_blocked()
        gate.set()
    assert sorted(outcomes) == ["a.pxar.didx: True", "b.pxar.didx: damage"]


@pytest.mark.parametrize("encrypted_first", [True, False])
@in_trio
async def test_a_plain_chunk_never_gets_into_an_encrypted_image_by_way_of_the_cache(
    encrypted_first: bool,
) -> None:
    source = MemorySource()
    evil = made.image(1, "r")
    digest = source.add_chunk(evil)
    raw, csum = index.encode_fixed([digest], size=len(evil), chunk_size=CHUNK_SIZE, ctime=0)
    files = {
        mode: FileInfo(Archive(f"{mode.value}.img.fidx"), len(evil), mode, csum)
        for mode in (CryptMode.NONE, CryptMode.ENCRYPT)
    }
    for file in files.values():
        source.files[SNAPSHOT, file.archive] = raw
    source.set_manifest(SNAPSHOT, list(files.values()), made.KEY)
    info = SnapshotInfo(SNAPSHOT, tuple(files.values()), key_fingerprint=made.KEY.fingerprint)
    async with open_reader(source, keys={made.KEY.fingerprint: made.KEY}) as reader:
        plain = await reader.open_image(info, files[CryptMode.NONE])
        sealed = await reader.open_image(info, files[CryptMode.ENCRYPT])
        if not encrypted_first:
            assert await plain.read(0, 100) == evil[:100]
        assert sealed.read_cached(0, 100) is None
        with pytest.raises(DamageError, match="not encrypted"):
            await sealed.read(0, 100)
        assert await plain.read(0, 100) == evil[:100]


@in_trio
async def test_a_source_that_fails_once_fails_one_read() -> None:
    content = made.image(1, "r")
    source, info = stored(content)
    async with opened(source, info) as image:
        source.fail("fetch_chunk", SourceError("no answer", retryable=True))
        with pytest.raises(SourceError, match="no answer"):
            await image.read(0, 10)
        assert await image.read(0, 10) == content[:10]


@in_trio
async def test_without_its_key_an_encrypted_image_is_refused_and_its_key_named() -> None:
    source, info = stored(made.image(1, "r"), storage=STORAGES["encrypted"])
    for keys in ({}, {made.OTHER_KEY.fingerprint: made.OTHER_KEY}):
        async with open_reader(source, keys=keys) as reader:
            with pytest.raises(KeyRequiredError, match=made.KEY.fingerprint):
                await reader.open_image(info, file_of(info, NAME))


# --- read-ahead


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


@in_trio
async def test_data_chunks_are_those_that_hold_the_next_bytes_of_data() -> None:
    content = made.image(1, "r00rr0r", tail=10)
    source, info = stored(content)
    async with opened(source, info) as image:

        def chunks(offset: int, size: int) -> list[int]:
            return list(image.data_chunks(offset, size))

        assert chunks(0, 1) == [0]
        assert chunks(0, CHUNK_SIZE) == [0]
        assert chunks(0, CHUNK_SIZE + 1) == [0, 3]
        assert chunks(CHUNK_SIZE - 1, 2) == [0, 3]
        assert chunks(CHUNK_SIZE, 3 * CHUNK_SIZE) == [3, 4, 6]
        assert chunks(0, 1 << 40) == [0, 3, 4, 6, 7]
        assert chunks(len(content), 10) == []
        assert chunks(0, 0) == []
