"""Indexes: they find every byte and every hole, and believe no number that does not fit."""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_right
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.base.errors import DamageError, PbsfsError
from pbsfs.formats import blob
from pbsfs.formats.index import (
    DynamicIndex,
    FixedIndex,
    Index,
    TableDroppedError,
    encode_dynamic,
    encode_fixed,
)
from pbsfs.formats.keys import Key
from pbsfs.formats.zeros import ZeroDigests
from tests.support import byhand
from tests.support.made import KEY

CHUNK = 1 << 16
ZERO = hashlib.sha256(bytes(CHUNK)).digest()
DATA = bytes(range(32))

UUID = range(8 * 8, 24 * 8)
CTIME = range(24 * 8, 32 * 8)
UNCHECKED = [*UUID, *CTIME]  # no content depends on them, and no checksum covers them


def fixed(digests: list[bytes], tail: int = CHUNK, key: Key | None = None) -> FixedIndex:
    """An index of whole chunks, but for the last one of `tail` bytes."""
    return FixedIndex(byhand.fixed(digests, size=(len(digests) - 1) * CHUNK + tail, chunk_size=CHUNK), key)


def digest(seed: int) -> bytes:
    return hashlib.sha256(b"%d" % seed).digest()


# --- bytes that are known


def test_a_fixed_index_is_a_header_of_4096_bytes_and_its_digests() -> None:
    csum = hashlib.sha256(DATA + ZERO).digest()
    stored = bytes.fromhex(
        "2f7f41ed91fd0fcd"  # magic
        "000102030405060708090a0b0c0d0e0f"  # uuid
        "00f1536500000000"  # ctime
        f"{csum.hex()}"
        "0100010000000000"  # size: 64 KiB and a byte
        "0000010000000000"  # chunk size
    )
    stored = stored + bytes(4016) + DATA + ZERO
    index = FixedIndex(stored)

    assert (index.size, index.count, index.chunk_size, index.csum) == (CHUNK + 1, 2, CHUNK, csum)
    assert [index.digest(0), index.digest(1)] == [DATA, ZERO]
    assert [index.span(0), index.span(1)] == [(0, CHUNK), (CHUNK, CHUNK + 1)]
    assert [index.find(0), index.find(CHUNK - 1), index.find(CHUNK)] == [0, 0, 1]


def test_a_dynamic_index_is_a_header_of_4096_bytes_and_its_entries() -> None:
    body = bytes.fromhex("0500000000000000") + DATA + bytes.fromhex("0600000000000000") + ZERO
    csum = hashlib.sha256(body).digest()
    stored = bytes.fromhex("1c914ea519bab3cd") + bytes(16) + bytes(8) + csum + bytes(4032) + body
    index = DynamicIndex(stored)

    assert (index.size, index.count, index.chunk_size, index.csum) == (6, 2, None, csum)
    assert [index.digest(0), index.digest(1)] == [DATA, ZERO]
    assert [index.span(0), index.span(1)] == [(0, 5), (5, 6)]
    assert [index.find(0), index.find(4), index.find(5)] == [0, 0, 1]


def test_an_archive_may_be_empty() -> None:
    for index in (FixedIndex(byhand.fixed([], size=0, chunk_size=CHUNK)), DynamicIndex(byhand.dynamic([]))):
        assert (index.size, index.count) == (0, 0)


@pytest.mark.parametrize("power", range(16, 25))
def test_every_power_of_two_from_64_kib_to_16_mib_is_a_chunk_size(power: int) -> None:
    index = FixedIndex(byhand.fixed([DATA, DATA], size=(1 << power) + 1, chunk_size=1 << power))
    assert index.chunk_size == 1 << power
    assert index.span(1) == (1 << power, (1 << power) + 1)


# --- there and back, and against a naive model


@given(st.integers(0, 40), st.integers(1, CHUNK), st.integers())
def test_a_fixed_index_answers_like_a_list(count: int, tail: int, seed: int) -> None:
    digests = [digest(seed + n) for n in range(count)]
    size = (count - 1) * CHUNK + tail if count else 0
    encoded, csum = encode_fixed(digests, size=size, chunk_size=CHUNK, ctime=1_700_000_000)
    for index in (
        FixedIndex(encoded),
        FixedIndex(byhand.fixed(digests, size=size, chunk_size=CHUNK)),
    ):
        assert (index.size, index.count, index.csum) == (size, count, csum)
        spans = [(n * CHUNK, min((n + 1) * CHUNK, size)) for n in range(count)]
        check_against_lists(index, spans, digests)


@given(st.lists(st.integers(1, 16 << 20), max_size=40), st.integers())
def test_a_dynamic_index_answers_like_a_list(lengths: list[int], seed: int) -> None:
    ends = list(accumulate(lengths))
    digests = [digest(seed + n) for n in range(len(ends))]
    entries = list(zip(ends, digests, strict=True))
    encoded, csum = encode_dynamic(entries, ctime=1_700_000_000)
    for index in (DynamicIndex(encoded), DynamicIndex(byhand.dynamic(entries))):
        assert (index.size, index.count, index.csum) == (sum(lengths), len(ends), csum)
        check_against_lists(index, list(zip([0, *ends], ends, strict=False)), digests)


def check_against_lists(index: Index, spans: list[tuple[int, int]], digests: list[bytes]) -> None:
    assert [index.span(chunk) for chunk in range(index.count)] == spans
    assert [index.digest(chunk) for chunk in range(index.count)] == digests
    for chunk, (start, end) in enumerate(spans):
        for offset in {start, (start + end) // 2, end - 1}:
            assert index.find(offset) == chunk


@given(
    pattern=st.lists(st.sampled_from(["zero", "data", "left", "right"]), max_size=30),
    last=st.sampled_from(["zero", "data", "right", "zero of a whole chunk"]),
    tail=st.sampled_from([1, 512, CHUNK - 1, CHUNK]),
    key=st.sampled_from([None, KEY]),
)
def test_runs_of_holes_are_those_that_a_look_at_every_chunk_finds(
    pattern: list[str], last: str, tail: int, key: Key | None
) -> None:
    zero = blob.chunk_digest(bytes(CHUNK), key)
    words = {
        "zero": zero,
        "zero of a whole chunk": zero,
        "data": DATA,
        "left": DATA[:16] + zero[:16],  # followed by `right`, a zero digest lies across the two
        "right": zero[16:] + DATA[16:],
    }
    digests = [words[word] for word in pattern]
    digests.append(blob.chunk_digest(bytes(tail), key) if last == "zero" else words[last])
    holes = [word == "zero" for word in pattern]
    holes.append(last == "zero" or (last == "zero of a whole chunk" and tail == CHUNK))

    check_runs(fixed(digests, tail, key), holes, range(len(holes)), tail)


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 10_000)), min_size=1, max_size=5),
    st.sampled_from([1, CHUNK]),
)
def test_long_runs_of_holes_are_found_to_their_very_end(runs: list[tuple[bool, int]], tail: int) -> None:
    holes = [hole for hole, count in runs for _ in range(count)]
    digests = [ZERO if hole else DATA for hole in holes]
    digests[-1] = blob.chunk_digest(bytes(tail), None) if holes[-1] else DATA
    ends = list(accumulate(count for _hole, count in runs))
    near = {at for end in [0, *ends] for at in (end - 2, end - 1, end, end + 1) if 0 <= at < len(holes)}

    check_runs(fixed(digests, tail), holes, near, tail)


def check_runs(index: FixedIndex, holes: list[bool], chunks: range | set[int], tail: int) -> None:
    changes = [at for at in range(1, len(holes)) if holes[at] != holes[at - 1]] + [len(holes)]
    for chunk in chunks:
        change = changes[bisect_right(changes, chunk)]
        assert index.is_hole(chunk) == holes[chunk]
        assert index.run(chunk) == (holes[chunk], change)
        assert index.run(chunk, chunk) == (holes[chunk], chunk + 1)
        assert index.run(chunk, chunk + 7) == (holes[chunk], min(chunk + 7, change))
    data = [chunk for chunk, hole in enumerate(holes) if not hole]
    short = CHUNK - tail if data and data[-1] == len(holes) - 1 else 0
    assert index.data_size == len(data) * CHUNK - short


def test_a_zero_digest_across_two_digests_is_no_hole() -> None:
    index = fixed([DATA, DATA[:31] + ZERO[:1], ZERO[1:] + DATA[:1], ZERO, DATA])

    assert index.run(0) == (False, 3)
    assert index.run(3) == (True, 4)


def test_the_holes_of_an_encrypted_image_are_those_of_its_key() -> None:
    digests = [KEY.digest(bytes(CHUNK)), ZERO, DATA]
    plain, encrypted = fixed(digests), fixed(digests, key=KEY)

    assert encrypted.run(0) == (True, 1)
    assert plain.run(0) == (False, 1)
    assert plain.run(1) == (True, 2)
    assert encrypted.run(1) == (False, 3)


def test_holes_are_learned_once_and_never_asked_for_again() -> None:
    for count in (10, 100_000):
        zeros = CountingZeros()
        index = FixedIndex(
            byhand.fixed([ZERO, DATA] * (count // 2), size=(count - 1) * CHUNK + 9, chunk_size=CHUNK),
            KEY,
            zeros,
        )
        for chunk in range(0, count, 7):
            index.is_hole(chunk)
            index.run(chunk)
        assert zeros.asked == [CHUNK, 9]


class CountingZeros(ZeroDigests):
    """`asked`: the lengths of which a digest was asked for, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def digest(self, length: int, key: Key | None) -> bytes:
        self.asked.append(length)
        return super().digest(length, key)


# --- the table alone can be dropped


def test_what_needs_no_digests_is_known_without_the_table() -> None:
    plain = byhand.fixed([DATA, ZERO, DATA], size=2 * CHUNK + 5, chunk_size=CHUNK)
    stream = byhand.dynamic([(5, DATA), (6, ZERO)])
    for index, stored in ((FixedIndex(plain), plain), (DynamicIndex(stream), stream)):
        assert index.has_table()
        assert (index.stored_size, index.table_size) == (len(stored), len(stored) - 4096)
        before = answers(index)
        digests = [index.digest(chunk) for chunk in range(index.count)]
        index.drop_table()
        assert not index.has_table()
        assert answers(index) == before
        assert index.find_digest(0) is None
        with pytest.raises(TableDroppedError):
            index.digest(1)
        index.restore_table(stored)
        assert index.has_table()
        assert [index.digest(chunk) for chunk in range(index.count)] == digests


def answers(index: Index) -> list[object]:
    chunks = range(index.count)
    return [
        *(index.size, index.data_size, index.count, index.csum, index.chunk_size),
        *([index.span(chunk), index.is_hole(chunk), index.run(chunk)] for chunk in chunks),
        *(index.find(offset) for offset in range(0, index.size, 1000)),
    ]


def test_a_table_is_restored_from_the_same_index_only() -> None:
    plain = byhand.fixed([DATA, ZERO], size=2 * CHUNK, chunk_size=CHUNK)
    index = FixedIndex(plain)
    index.drop_table()
    for bit in range(4096 * 8, len(plain) * 8, 5):
        with pytest.raises(DamageError, match="checksum mismatch"):
            index.restore_table(byhand.flipped(plain, bit))
    other = byhand.fixed([ZERO, DATA], size=2 * CHUNK, chunk_size=CHUNK)
    for stored in (other, byhand.fixed([DATA], size=CHUNK, chunk_size=CHUNK)):
        with pytest.raises(DamageError, match="not the one that was opened; open the file again"):
            index.restore_table(stored)
    with pytest.raises(DamageError, match="cut short"):
        index.restore_table(plain[:100])
    assert not index.has_table()


def zero(length: int, key: Key | None = None) -> bytes:
    return blob.chunk_digest(bytes(length), key)


@pytest.mark.parametrize("key", [None, Key(bytes(range(32)))], ids=["plain", "encrypted"])
def test_holes_of_a_stream_are_chunks_of_zeros_that_follow_one_another(key: Key | None) -> None:
    odd = 99_999
    entries = [
        (odd, zero(odd, key)),
        (2 * odd, zero(odd, key)),
        (2 * odd + 1, DATA),
        (2 * odd + 2, DATA),  # the same one again, which is data
        (3 * odd + 2, zero(odd, key)),
        (3 * odd + 2 + CHUNK, zero(CHUNK, key)),  # of another length, and no two of them
        (3 * odd + 3 + CHUNK, DATA),
    ]
    index = DynamicIndex(byhand.dynamic(entries), key)
    assert [index.is_hole(number) for number in range(7)] == [True, True, False, False, True, False, False]
    assert [index.run(number) for number in (0, 1, 2, 4, 5)] == [
        (True, 2),
        (True, 2),
        (False, 4),
        (True, 5),
        (False, 7),
    ]
    assert index.run(0, 1) == (True, 1)
    assert index.data_size == index.size - 3 * odd
    assert not DynamicIndex(byhand.dynamic(entries[2:4])).is_hole(0)


def test_a_chunk_of_zeros_of_the_largest_size_is_a_hole() -> None:
    largest = blob.MAX_CHUNK_SIZE
    index = DynamicIndex(byhand.dynamic([(10, DATA), (10 + largest, zero(largest)), (20 + largest, DATA)]))
    assert [index.is_hole(number) for number in range(3)] == [False, True, False]
    assert index.data_size == 20


def test_many_lengths_hash_no_more_zeros_than_a_few() -> None:
    entries, end = [], 0
    for length in range(100, 200):
        for _ in range(2):
            end += length
            entries.append((end, DATA[:31] + bytes([length])))
    asked: list[int] = []

    class Counting(ZeroDigests):
        def digest(self, length: int, key: Key | None) -> bytes:
            asked.append(length)
            return super().digest(length, key)

    DynamicIndex(byhand.dynamic(entries), None, Counting())
    assert asked == [199, 198, 197, 196]


# --- every check


def test_an_index_of_the_other_kind_is_refused() -> None:
    with pytest.raises(DamageError, match="magic"):
        DynamicIndex(byhand.fixed([DATA], size=CHUNK, chunk_size=CHUNK))
    with pytest.raises(DamageError, match="magic"):
        FixedIndex(byhand.dynamic([(1, DATA)]))


@pytest.mark.parametrize("length", [0, 1, 8, 79, 80, 4095])
def test_less_than_a_header_is_refused(length: int) -> None:
    with pytest.raises(DamageError, match="cut short"):
        FixedIndex(byhand.fixed([], size=0, chunk_size=CHUNK)[:length])
    with pytest.raises(DamageError, match="cut short"):
        DynamicIndex(byhand.dynamic([])[:length])


@pytest.mark.parametrize("change", [-32, -31, -1, 1, 31, 32, 40])
def test_a_fixed_index_of_another_length_than_its_header_makes_it_is_refused(change: int) -> None:
    digests = [digest(n) for n in range(3)]
    stored = (byhand.fixed(digests, size=3 * CHUNK, chunk_size=CHUNK) + bytes(40))[: 4096 + 96 + change]
    with pytest.raises(DamageError, match="header makes it"):
        FixedIndex(stored)


@pytest.mark.parametrize("change", [-39, -1, 1, 8, 39])
def test_a_dynamic_index_with_part_of_an_entry_is_refused(change: int) -> None:
    stored = (byhand.dynamic([(1, DATA), (2, DATA)]) + bytes(40))[: 4096 + 80 + change]
    with pytest.raises(DamageError, match="whole number"):
        DynamicIndex(stored)


def test_a_whole_entry_too_few_or_too_many_does_not_pass_the_checksum() -> None:
    whole = byhand.dynamic([(1, DATA), (2, DATA)])
    for stored in (whole[:-40], whole + (3).to_bytes(8, "little") + DATA):
        with pytest.raises(DamageError, match="checksum"):
            DynamicIndex(stored)


def test_a_wrong_checksum_is_refused() -> None:
    with pytest.raises(DamageError, match="checksum"):
        FixedIndex(byhand.fixed([DATA], size=1, chunk_size=CHUNK, csum=bytes(32)))
    with pytest.raises(DamageError, match="checksum"):
        DynamicIndex(byhand.dynamic([(1, DATA)], csum=bytes(32)))


@pytest.mark.parametrize(
    "chunk_size", [0, 1, 512, 1 << 15, CHUNK - 1, CHUNK + 1, 3 * CHUNK, (4 << 20) + 512, 1 << 25, 1 << 63]
)
def test_an_impossible_chunk_size_is_refused(chunk_size: int) -> None:
    with pytest.raises(DamageError, match="chunk size"):
        FixedIndex(byhand.fixed([DATA], size=1, chunk_size=chunk_size))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "header makes it 4096"),
        (CHUNK + 1, "header makes it 4160"),
        ((1 << 63) - 1, "header makes it"),
        (1 << 63, "impossible size"),
        ((1 << 64) - 1, "impossible size"),
    ],
)
def test_a_size_that_the_digests_do_not_cover_is_refused(size: int, message: str) -> None:
    with pytest.raises(DamageError, match=message):
        FixedIndex(byhand.fixed([DATA], size=size, chunk_size=CHUNK))


@pytest.mark.parametrize(
    "ends",
    [
        [0],
        [5, 5],
        [5, 4],
        [1, 2, 3, 2, 3],
        [(16 << 20) + 1],
        [1, (16 << 20) + 2],
        [1 << 63],
        [(1 << 64) - 1],
        [(1 << 64) - 1, 1],
    ],
)
def test_ends_that_do_not_rise_or_rise_by_more_than_a_chunk_are_refused(ends: list[int]) -> None:
    with pytest.raises(DamageError, match="claims a chunk"):
        DynamicIndex(byhand.dynamic([(end, DATA) for end in ends]))


def test_a_chunk_of_exactly_16_mib_is_allowed() -> None:
    assert DynamicIndex(byhand.dynamic([(1, DATA), (1 + (16 << 20), DATA)])).count == 2


@given(st.binary(max_size=200), st.booleans())
def test_arbitrary_bytes_raise_nothing_but_damage(data: bytes, in_header: bool) -> None:
    for kind, magic in ((FixedIndex, byhand.FIXED), (DynamicIndex, byhand.DYNAMIC)):
        start = bytes.fromhex(magic)
        stored = (start + data).ljust(4096, b"\0") if in_header else start.ljust(4096, b"\0") + data
        with pytest.raises(DamageError):
            kind(stored)


# --- damage, bit by bit


class Archive:
    """Chunks of random bytes, text and holes, an index of each kind over them, and their reader."""

    def __init__(self) -> None:
        source = random.Random(1)
        pieces = [
            source.randbytes(CHUNK),
            bytes(CHUNK),
            b"text" * (CHUNK // 4),
            bytes(CHUNK),
            source.randbytes(700),
        ]
        self.content = b"".join(pieces)
        digests = [hashlib.sha256(piece).digest() for piece in pieces]
        self.chunks = {d: byhand.blob(byhand.PLAIN, p) for d, p in zip(digests, pieces, strict=True)}
        self.fixed = byhand.fixed(digests, size=len(self.content), chunk_size=CHUNK)
        ends = accumulate(map(len, pieces))
        self.dynamic = byhand.dynamic(list(zip(ends, digests, strict=True)))

    def read(self, index: Index) -> bytes:
        """All that the index says, as a reader has it: holes from a constant, chunks verified."""
        parts = []
        for chunk in range(index.count):
            start, end = index.span(chunk)
            assert index.find(start) == index.find(end - 1) == chunk
            if index.is_hole(chunk):
                parts.append(bytes(end - start))
            else:
                name = index.digest(chunk)
                parts.append(
                    blob.decode_chunk(self.chunks[name], digest=name, length=end - start, encrypted=False)
                )
        return b"".join(parts)


@pytest.fixture(scope="module")
def archive() -> Archive:
    return Archive()


def test_every_flipped_bit_of_a_fixed_header_is_noticed_or_changes_no_byte(archive: Archive) -> None:
    unused = [*UNCHECKED, *range(80 * 8, 96 * 8)]
    assert archive.read(FixedIndex(archive.fixed)) == archive.content
    for bit in range(96 * 8):
        check_flip(archive, FixedIndex, archive.fixed, bit, harmless=bit in unused)


def test_every_flipped_bit_of_a_dynamic_header_is_noticed_or_changes_no_byte(archive: Archive) -> None:
    unused = [*UNCHECKED, *range(64 * 8, 96 * 8)]
    assert archive.read(DynamicIndex(archive.dynamic)) == archive.content
    for bit in range(96 * 8):
        check_flip(archive, DynamicIndex, archive.dynamic, bit, harmless=bit in unused)


def check_flip(
    archive: Archive, kind: type[FixedIndex | DynamicIndex], stored: bytes, bit: int, *, harmless: bool
) -> None:
    damaged = byhand.flipped(stored, bit)
    if harmless:
        assert archive.read(kind(damaged)) == archive.content
    else:
        with pytest.raises(PbsfsError):
            archive.read(kind(damaged))


def test_every_flipped_bit_of_a_digest_or_an_end_is_noticed(archive: Archive) -> None:
    for kind, stored in ((FixedIndex, archive.fixed), (DynamicIndex, archive.dynamic)):
        for bit in range(4096 * 8, len(stored) * 8):
            with pytest.raises(DamageError, match="checksum"):
                kind(byhand.flipped(stored, bit))


def test_what_parsing_has_to_hash_is_known_before() -> None:
    zeros = ZeroDigests()
    raw = byhand.fixed([DATA, DATA], size=CHUNK + 513, chunk_size=CHUNK)
    assert FixedIndex.hashes(raw, zeros) == CHUNK + 513
    FixedIndex(raw, KEY, zeros)
    assert FixedIndex.hashes(raw, zeros) == 513, "only of whole chunks is the hash kept"
    large = byhand.fixed([DATA], size=1 << 24, chunk_size=1 << 24)
    assert FixedIndex.hashes(large, zeros) == 1 << 24
    short = byhand.fixed([DATA], size=1024, chunk_size=1 << 24)
    assert FixedIndex.hashes(short, zeros) == 1024, "no chunk has the full length"


@given(st.binary(max_size=64) | st.binary(min_size=4096, max_size=4160))
def test_what_is_not_an_index_needs_no_more_hashing_than_two_chunks(raw: bytes) -> None:
    assert 0 <= FixedIndex.hashes(raw, ZeroDigests()) <= 2 * blob.MAX_CHUNK_SIZE
