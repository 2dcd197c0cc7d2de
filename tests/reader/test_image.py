"""Images: reads, extents and chunks, compared with the bytes that were backed up."""

from __future__ import annotations

import random

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from pbsfs.base.errors import DamageError, KeyRequiredError, SourceError
from pbsfs.base.names import Archive
from pbsfs.formats import index
from pbsfs.formats.manifest import CryptMode
from pbsfs.reader.image import Extent, Image
from pbsfs.reader.reader import open_reader
from pbsfs.sources.base import FileInfo, SnapshotInfo
from tests.reader.images import (
    NAME,
    SNAPSHOT,
    STORAGES,
    STREAM,
    opened,
    stored,
    with_index,
)
from tests.support import made
from tests.support.run import in_trio, run
from tests.support.sources import CHUNK_SIZE, MemorySource, file_of


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


# --- chunks


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
