"""The policy for damage: reads fail, or zeros stand for just what is damaged, and it is told where."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from pbsfs.base.errors import DamageError, KeyRequiredError, PbsfsError, SourceError
from pbsfs.base.names import MANIFEST, Archive
from pbsfs.chunks.limits import DEFAULT, FetchLimits
from pbsfs.formats import blob, index
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import CryptMode
from pbsfs.reader import damage
from pbsfs.reader.damage import ZEROS_LAST, Range, ZeroedRanges, merged
from pbsfs.reader.image import Image
from pbsfs.reader.reader import Reader, open_reader
from pbsfs.sources.base import FileInfo, SnapshotInfo
from tests.support import made
from tests.support.run import in_trio, run
from tests.support.sources import CHUNK_SIZE, MemorySource, file_of

NAME = "disk.img.fidx"
STREAM = "root.pxar.didx"
SNAPSHOT = made.snapshot()
SHOWN = f"{SNAPSHOT}/disk.img"
CONTENT = made.image(1, "rtr0rrt", tail=700)
KEYS = {made.KEY.fingerprint: made.KEY}

KINDS = ("flip", "cut", "empty", "other", "longer", "shorter")


def spoil(source: MemorySource, digest: bytes, kind: str, *, key: Key | None = None) -> None:
    """Damages a stored chunk: what is wrong with it is found by magic, CRC, digest, tag or length."""
    raw = source.chunks[digest]
    content = blob.decode(raw, max_size=CHUNK_SIZE, key=key)
    changed = {
        "flip": raw[:-2] + bytes([raw[-2] ^ 4]) + raw[-1:],
        "cut": raw[: len(raw) // 2],
        "empty": b"",
        "other": blob.encode(bytes([content[0] ^ 1]) + content[1:], key=key),
        "longer": blob.encode(content + b"x", key=key),
        "shorter": blob.encode(content[:-1], key=key),
    }
    source.chunks[digest] = changed[kind]


def stored(
    content: bytes = CONTENT, name: str = NAME, mode: CryptMode = CryptMode.NONE
) -> tuple[MemorySource, SnapshotInfo]:
    source = MemorySource()
    key = None if mode is CryptMode.NONE else made.KEY
    return source, source.add(SNAPSHOT, {name: content}, crypt_mode=mode, key=key)


@asynccontextmanager
async def opened(
    source: MemorySource,
    info: SnapshotInfo,
    name: str = NAME,
    *,
    zeroed: ZeroedRanges | None,
    keys: Mapping[str, Key] = KEYS,
    limits: FetchLimits = DEFAULT,
) -> AsyncIterator[Image]:
    async with open_reader(source, keys=keys, zeroed=zeroed, limits=limits) as reader:
        yield await reader.open_image(info, file_of(info, name))


def damage_chunks(source: MemorySource, image: Image, numbers: Mapping[int, str]) -> None:
    key = made.KEY if image._encrypted else None
    for number, kind in numbers.items():
        spoil(source, image.index.digest(number), kind, key=key)


def with_zeros(content: bytes, image: Image, bad: Mapping[int, str] | set[int]) -> bytes:
    """`content` with zeros in the place of some of the image's chunks."""
    shown = bytearray(content)
    for number in bad:
        start, end = image.index.span(number)
        shown[start:end] = bytes(end - start)
    return bytes(shown)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings so far, taken out."""
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    return found


@contextmanager
def silent() -> Iterator[None]:
    """For generated examples, whose warnings another test looks at."""
    logger = logging.getLogger(damage.__name__)
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


# --- fail, or zero


@pytest.mark.parametrize("name", [NAME, STREAM])
@in_trio
async def test_unless_told_otherwise_damage_is_an_error_and_never_zeros(name: str) -> None:
    source, info = stored(name=name)
    async with opened(source, info, name, zeroed=None) as image:
        damage_chunks(source, image, {1: "flip"})
        start, end = image.index.span(1)
        for _ in range(2):
            for offset, size in ((start, 1), (end - 1, 1), (start - 1, 2), (0, len(CONTENT))):
                with pytest.raises(DamageError, match=image.index.digest(1).hex()):
                    await image.read(offset, size)
                with pytest.raises(DamageError):
                    await image.handle().read(offset, size)
            assert image.read_cached(start, 1) is None
        assert await image.read(end, len(CONTENT)) == CONTENT[end:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", CryptMode)
@pytest.mark.parametrize("name", [NAME, STREAM])
@in_trio
async def test_zeros_stand_for_the_damaged_chunks_and_for_nothing_else(
    caplog: pytest.LogCaptureFixture, name: str, mode: CryptMode, kind: str
) -> None:
    source, info = stored(name=name, mode=mode)
    zeroed = ZeroedRanges()
    async with opened(source, info, name, zeroed=zeroed) as image:
        last = image.index.count - 1
        bad = {1: kind, 4: kind, last: kind}
        damage_chunks(source, image, bad)
        expected = with_zeros(CONTENT, image, bad)
        handle = image.handle()
        assert await handle.read(0, len(CONTENT) + 1) == expected
        assert await image.read(0, len(CONTENT)) == expected
        for number in range(image.index.count):
            start, end = image.index.span(number)
            for offset, size in ((start, 1), (end - 1, 1), (max(0, start - 5), 10), (start, end - start)):
                assert image.read_cached(offset, size) == expected[offset : offset + size]
                assert handle.read_cached(offset, size) == expected[offset : offset + size]
                assert await image.read(offset, size) == expected[offset : offset + size]
        handle.close()
        assert zeroed.of(str(image)) == [
            Range(start, end - start) for start, end in (image.index.span(number) for number in bad)
        ]
    assert len(warnings_in(caplog)) == 3


@given(
    kinds=st.text("rt0s", min_size=1, max_size=8),
    tail=st.sampled_from([0, 1, 4096, CHUNK_SIZE - 1]),
    mode=st.sampled_from(CryptMode),
    name=st.sampled_from([NAME, STREAM]),
    bad=st.dictionaries(st.integers(0, 9), st.sampled_from(KINDS)),
    reads=st.lists(st.tuples(st.integers(0, 9 * CHUNK_SIZE), st.integers(0, 4 * CHUNK_SIZE)), max_size=8),
)
def test_any_read_of_any_damaged_image_is_right_or_zero_where_it_is_damaged(
    kinds: str, tail: int, mode: CryptMode, name: str, bad: dict[int, str], reads: list[tuple[int, int]]
) -> None:
    # 's': a chunk that occurs again and again, and is damaged everywhere or nowhere
    pieces = [made.image(99 if kind == "s" else i, kind.replace("s", "r")) for i, kind in enumerate(kinds)]
    content = b"".join(pieces) + made.image(7, "", tail=tail)
    source, info = stored(content, name, mode)

    async def main() -> None:
        zeroed = ZeroedRanges()
        async with opened(source, info, name, zeroed=zeroed) as image:
            digests = {image.index.digest(n): kind for n, kind in bad.items() if n < image.index.count}
            key = made.KEY if mode is CryptMode.ENCRYPT else None
            for digest, kind in digests.items():
                spoil(source, digest, kind, key=key)
            gone = {
                number
                for number in range(image.index.count)
                if image.index.digest(number) in digests and not image.index.is_hole(number)
            }
            expected = with_zeros(content, image, gone)
            noted: set[int] = set()
            for offset, size in [*reads, (0, len(content))]:
                wanted = expected[offset : offset + size]
                assert image.read_cached(offset, size) in (None, wanted)
                assert await image.read(offset, size) == wanted
                assert image.read_cached(offset, size) == wanted
                noted |= {n for n in gone if _touches(image, n, offset, size)}
                spans = [image.index.span(number) for number in noted]
                assert zeroed.of(str(image)) == merged([Range(a, b - a) for a, b in spans])
                assert (zeroed.count, zeroed.size) == (len(noted), sum(b - a for a, b in spans))
            assert noted == gone

    with silent():
        run(main)


def _touches(image: Image, number: int, offset: int, size: int) -> bool:
    start, end = image.index.span(number)
    return max(start, offset) < min(end, offset + size)


@in_trio
async def test_a_plain_chunk_in_an_encrypted_image_is_not_shown_but_zeros(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, info = stored(mode=CryptMode.ENCRYPT)
    async with opened(source, info, zeroed=ZeroedRanges()) as image:
        source.chunks[image.index.digest(0)] = blob.encode(CONTENT[:CHUNK_SIZE])
        assert await image.read(0, CHUNK_SIZE) == bytes(CHUNK_SIZE)
    (line,) = warnings_in(caplog)
    assert "not encrypted" in line


# --- what is told


@in_trio
async def test_each_range_is_logged_once_with_image_offset_length_and_chunk(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, info = stored()
    async with opened(source, info, zeroed=ZeroedRanges()) as image:
        damage_chunks(source, image, {2: "flip", 7: "cut"})
        for _ in range(3):
            await image.read(0, len(CONTENT))
            await image.handle().read(2 * CHUNK_SIZE + 5, 1)
            image.read_cached(2 * CHUNK_SIZE, CHUNK_SIZE)
        lines = warnings_in(caplog)
        assert len(lines) == 2
        for line, number in zip(lines, (2, 7), strict=True):
            start, end = image.index.span(number)
            assert line.startswith(f"{SHOWN}: bytes {start} to {end - 1}: chunk ")
            assert line.count(image.index.digest(number).hex()) == 1
            assert line.endswith(f"; these {end - start} bytes are shown as zeros")


@in_trio
async def test_two_who_read_it_at_once_are_told_of_it_once(caplog: pytest.LogCaptureFixture) -> None:
    source, info = stored()
    zeroed = ZeroedRanges()
    gate = source.hold("fetch_chunk")
    async with opened(source, info, zeroed=zeroed) as image, trio.open_nursery() as nursery:
        damage_chunks(source, image, {0: "flip"})
        for _ in range(2):
            nursery.start_soon(image.read, 0, 10)
        await wait_all_tasks_blocked()
        gate.set()
    assert zeroed.count == len(warnings_in(caplog)) == 1


@in_trio
async def test_a_chunk_that_occurs_twice_is_two_ranges(caplog: pytest.LogCaptureFixture) -> None:
    content = made.image(1, "r") + made.image(2, "r") + made.image(1, "r")
    source, info = stored(content)
    zeroed = ZeroedRanges()
    async with opened(source, info, zeroed=zeroed) as image:
        damage_chunks(source, image, {0: "flip"})
        await image.read(0, len(content))
        assert zeroed.text_of(str(image)) == f"0+{CHUNK_SIZE},{2 * CHUNK_SIZE}+{CHUNK_SIZE}"
    assert zeroed.count == len(warnings_in(caplog)) == 2


@in_trio
async def test_what_is_fetched_ahead_and_never_read_is_not_told_of() -> None:
    content = made.image(1, "r" * 8)
    source, info = stored(content)
    zeroed = ZeroedRanges()
    async with opened(source, info, zeroed=zeroed, limits=SMALL) as image:
        damage_chunks(source, image, {4: "flip"})
        handle = image.handle()
        for offset in range(0, 3 * CHUNK_SIZE, 16 << 10):
            await handle.read(offset, 16 << 10)
        await wait_all_tasks_blocked()
        assert image.index.digest(4) in source.fetched
        handle.close()
    assert zeroed.count == 0  # and the log is empty, as in every test that does not say otherwise


SMALL = FetchLimits(reorder_distance=32 << 10, evidence=32 << 10, max_window=4 * CHUNK_SIZE)
"""Reading ahead begins at once, and goes some chunks of 64 KiB far."""


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=12))
def test_merged_ranges_cover_the_same_bytes_in_order_and_never_touch(parts: list[tuple[int, int]]) -> None:
    ranges = [Range(offset, length) for offset, length in parts]
    found = merged(ranges)
    covered = {byte for r in ranges for byte in range(r.offset, r.offset + r.length)}
    assert [byte for r in found for byte in range(r.offset, r.offset + r.length)] == sorted(covered)
    for left, right in pairwise(found):
        assert left.offset + left.length < right.offset


def test_neighbours_are_told_as_one_and_images_apart(caplog: pytest.LogCaptureFixture) -> None:
    zeroed = ZeroedRanges()
    zeroed.add("b", Range(8, 4), "why")
    zeroed.add("a", Range(0, 4), "why")
    zeroed.add("a", Range(4, 4), "why")
    zeroed.add("a", Range(100, 1), "why")
    zeroed.add("a", Range(4, 4), "another reason")
    assert (zeroed.count, zeroed.size) == (4, 13)
    assert (zeroed.text_of("a"), zeroed.text_of("b"), zeroed.text_of("c")) == ("0+8,100+1", "8+4", "")
    assert len(warnings_in(caplog)) == 4


def test_all_that_was_shown_as_zeros_is_told_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    zeroed = ZeroedRanges()
    zeroed.log_all()
    assert warnings_in(caplog) == []
    zeroed.add("vm/1/x.img", Range(0, 4), "why")
    zeroed.add("vm/2/y.img", Range(9, 1), "why")
    caplog.clear()
    zeroed.log_all()
    assert warnings_in(caplog) == [
        "2 damaged ranges, 5 bytes in all, were shown as zeros:",
        "vm/1/x.img: 0+4",
        "vm/2/y.img: 9+1",
    ]


def test_what_is_told_and_remembered_has_an_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damage, "MAX_LISTED", 2)
    monkeypatch.setattr(damage, "MAX_REMEMBERED", 3)
    zeroed = ZeroedRanges()
    for number in range(5):
        zeroed.add("a", Range(10 * number, 1), "why")
    assert (zeroed.count, zeroed.size) == (5, 5)
    assert zeroed.of("a") == [Range(0, 1), Range(10, 1), Range(20, 1)]
    assert zeroed.text_of("a") == "0+1,10+1,…"
    assert len(warnings_in(caplog)) == 5


# --- what zeros never stand for


async def check_no_zeros(
    source: MemorySource, info: SnapshotInfo, error: type[PbsfsError], keys: Mapping[str, Key] = KEYS
) -> str:
    """Opening or reading the image fails; gives why."""
    zeroed = ZeroedRanges()
    with pytest.raises(error) as caught:
        async with opened(source, info, zeroed=zeroed, keys=keys) as image:
            await image.read(0, 10)
    assert zeroed.count == 0
    return str(caught.value)


@pytest.mark.parametrize("keys", [{}, KEYS], ids=["no-keys", "keys"])
@in_trio
async def test_a_damaged_index_is_an_error_and_never_zeros(keys: dict[str, Key]) -> None:
    for change in (lambda raw: raw[:-1], lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), lambda _raw: b""):
        source, info = stored()
        archive = Archive(NAME)
        source.files[SNAPSHOT, archive] = change(source.files[SNAPSHOT, archive])
        assert NAME in await check_no_zeros(source, info, DamageError, keys)
        del source.files[SNAPSHOT, archive]
        assert "missing" in await check_no_zeros(source, info, DamageError, keys)


@in_trio
async def test_a_missing_or_wrong_key_is_an_error_and_never_zeros() -> None:
    source, info = stored(mode=CryptMode.ENCRYPT)
    for keys in ({}, {made.OTHER_KEY.fingerprint: made.OTHER_KEY}):
        assert made.KEY.fingerprint in await check_no_zeros(source, info, KeyRequiredError, keys)
    mistaken = {made.KEY.fingerprint: made.OTHER_KEY}
    assert "signature" in await check_no_zeros(source, info, DamageError, mistaken)


@pytest.mark.parametrize("mode", [CryptMode.ENCRYPT, CryptMode.SIGN_ONLY])
@in_trio
async def test_a_failed_signature_is_an_error_and_never_zeros(mode: CryptMode) -> None:
    source, info = stored(mode=mode)
    source.set_manifest(SNAPSHOT, info.files, made.OTHER_KEY)
    forged = blob.decode(source.files[SNAPSHOT, MANIFEST], max_size=1 << 20)
    forged = forged.replace(made.OTHER_KEY.fingerprint.encode(), made.KEY.fingerprint.encode())
    source.files[SNAPSHOT, MANIFEST] = blob.encode(forged)
    assert "signature does not match" in await check_no_zeros(source, info, DamageError)


@pytest.mark.parametrize("retryable", [True, False])
@in_trio
async def test_a_source_that_fails_is_an_error_and_never_zeros(retryable: bool) -> None:
    source, info = stored()
    zeroed = ZeroedRanges()
    async with opened(source, info, zeroed=zeroed) as image:
        source.fail("fetch_chunk", SourceError("no answer", retryable=retryable))
        with pytest.raises(SourceError, match="no answer") as caught:
            await image.read(0, 10)
        assert caught.value.retryable is retryable
        assert await image.read(0, 10) == CONTENT[:10]
    assert zeroed.count == 0


# --- lengths that lie


def lying(ends: list[int], name: str = STREAM) -> tuple[MemorySource, SnapshotInfo, bytes]:
    """A stream whose index names one chunk of 700 bytes again and again, with other lengths too."""
    source = MemorySource()
    data = made.image(1, "r")[:700]
    digest = source.add_chunk(data)
    raw, csum = index.encode_dynamic([(end, digest) for end in ends], ctime=0)
    archive = Archive(name)
    source.files[SNAPSHOT, archive] = raw
    info = SnapshotInfo(SNAPSHOT, (FileInfo(archive, ends[-1], CryptMode.NONE, csum),))
    source.set_manifest(SNAPSHOT, info.files, None)
    return source, info, data


@pytest.mark.parametrize("first", [0, 1])
@in_trio
async def test_where_an_index_lies_about_a_length_only_the_lie_is_zeros(
    caplog: pytest.LogCaptureFixture, first: int
) -> None:
    source, info, data = lying([700, 1100])
    expected = data + bytes(400)
    zeroed = ZeroedRanges()
    async with opened(source, info, STREAM, zeroed=zeroed) as image:
        reads = [(0, 700), (700, 400)]
        for offset, size in (reads[first], reads[1 - first], (650, 100), (0, 1100)):
            assert await image.read(offset, size) == expected[offset : offset + size]
            assert image.read_cached(offset, size) == expected[offset : offset + size]
        assert zeroed.of(str(image)) == [Range(700, 400)]
    (line,) = warnings_in(caplog)
    assert "bytes 700 to 1099: chunk" in line


# --- how long it is remembered


@in_trio
async def test_damage_is_shown_as_zeros_for_a_while_and_then_tried_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    source, info = stored()
    whole = dict(source.chunks)
    zeroed = ZeroedRanges()
    async with opened(source, info, zeroed=zeroed) as image:
        damage_chunks(source, image, {0: "flip"})
        for _ in range(3):
            assert await image.read(0, 10) == bytes(10)
        assert source.fetched == [image.index.digest(0)]
        now += ZEROS_LAST
        for _ in range(3):
            assert await image.read(0, 10) == bytes(10)
        assert source.fetched == [image.index.digest(0)] * 2
        source.chunks |= whole
        assert not image.forget_zeros()
        assert await image.read(0, 10) == bytes(10)
        now += ZEROS_LAST
        assert image.read_cached(0, 10) is None
        assert image.forget_zeros()
        assert await image.read(0, 10) == CONTENT[:10]
        assert not image.forget_zeros()
    assert len(warnings_in(caplog)) == 1
    assert zeroed.count == 1


@in_trio
async def test_what_another_reader_has_got_meanwhile_is_shown_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, info = stored()
    whole = dict(source.chunks)
    async with opened(source, info, zeroed=ZeroedRanges()) as image:
        damage_chunks(source, image, {0: "flip"})
        assert await image.read(0, 10) == bytes(10)
        source.chunks |= whole
        await image.store.request(image.chunk(0)).wait()
        assert image.read_cached(0, 10) == CONTENT[:10]
    assert len(warnings_in(caplog)) == 1


@in_trio
async def test_a_source_that_has_doubts_is_asked_again_before_it_is_damage() -> None:
    source, info = stored()
    whole = dict(source.chunks)
    source.doubts = (0.0, 0.0)
    zeroed = ZeroedRanges()
    async with opened(source, info, zeroed=zeroed) as image:
        digest = image.index.digest(0)
        source.fail("fetch_chunk", DamageError("the server can't read it"), DamageError("nor now"))
        assert await image.read(0, 10) == CONTENT[:10]
        assert source.fetched.count(digest) == 3
    async with opened(source, info, zeroed=None) as image:
        damage_chunks(source, image, {0: "flip"})
        with pytest.raises(DamageError):
            await image.read(0, 10)
        assert source.fetched.count(digest) == 6
    source.chunks |= whole
    assert zeroed.count == 0


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What goes, goes because nobody holds it any more."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def read_anew(reader: Reader, info: SnapshotInfo) -> bytes:
    image = await reader.open_image(info, file_of(info, NAME))
    return bytes(await image.read(0, len(CONTENT)))


@pytest.mark.usefixtures("no_collector")
@in_trio
async def test_a_chunk_that_was_repaired_is_seen_when_the_image_is_opened_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, info = stored()
    whole = dict(source.chunks)
    zeroed = ZeroedRanges()
    async with open_reader(source, zeroed=zeroed) as reader:
        image = await reader.open_image(info, file_of(info, NAME))
        damage_chunks(source, image, {2: "flip"})
        expected = with_zeros(CONTENT, image, {2})
        assert await read_anew(reader, info) == expected
        source.chunks |= whole
        assert await read_anew(reader, info) == expected  # `image` is the same, and still open
        del image
        assert await read_anew(reader, info) == CONTENT
        assert zeroed.text_of(SHOWN) == f"{2 * CHUNK_SIZE}+{CHUNK_SIZE}"  # it was shown, once
    assert len(warnings_in(caplog)) == 1


@pytest.mark.usefixtures("no_collector")
@in_trio
async def test_an_image_that_met_damage_is_let_go_as_any_other() -> None:
    source, info = stored()
    async with open_reader(source) as reader:
        image = await reader.open_image(info, file_of(info, NAME))
        damage_chunks(source, image, {2: "flip"})
        del image
        failed = False
        try:  # pytest.raises would hold on to the error, and that to the frames of those who read
            await read_anew(reader, info)
        except DamageError:
            failed = True
        assert failed
        assert len(reader._opened._images) == 0


@pytest.mark.usefixtures("no_collector")
@in_trio
async def test_damage_that_is_met_again_is_not_logged_again(caplog: pytest.LogCaptureFixture) -> None:
    source, info = stored()
    zeroed = ZeroedRanges()
    async with open_reader(source, zeroed=zeroed) as reader:
        image = await reader.open_image(info, file_of(info, NAME))
        damage_chunks(source, image, {2: "flip"})
        digest = image.index.digest(2)
        del image
        for _ in range(3):
            await read_anew(reader, info)
    assert source.fetched.count(digest) == 3
    assert zeroed.count == len(warnings_in(caplog)) == 1
