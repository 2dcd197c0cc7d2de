"""Blobs: what is stored comes back, and what was damaged or made up is refused."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.base.errors import DamageError, KeyRequiredError
from pbsfs.chunks import decoder
from pbsfs.formats import blob
from pbsfs.formats.blob import BlobKind
from tests.support import byhand
from tests.support.made import KEY, OTHER_KEY

TEXT = b"scsi0: local:100/disk.raw,size=4G\n" * 20
SMALL = st.binary(max_size=300)
REPETITIVE = st.builds(lambda piece, count: piece * count, SMALL, st.integers(0, 300))
CONTENT = st.one_of(SMALL, REPETITIVE)

all_kinds = pytest.mark.parametrize("magic", byhand.KINDS)
sealed_kinds = pytest.mark.parametrize("magic", [byhand.ENCRYPTED, byhand.ENCRYPTED_COMPRESSED])
both_decoders = pytest.mark.parametrize(
    "decode_chunk", [blob.decode_chunk, decoder.decode_chunk], ids=["python", "extension"]
)
Decode = Callable[..., bytes]
open_kinds = pytest.mark.parametrize("magic", [byhand.PLAIN, byhand.COMPRESSED])


def decode(stored: bytes, max_size: int = 1 << 20) -> bytes:
    return blob.decode(stored, max_size=max_size, key=KEY)


# --- bytes that are known


def test_a_plain_blob_is_magic_and_crc_and_the_bytes() -> None:
    stored = bytes.fromhex("42ab3807be8370a1 2639f4cb") + b"123456789"  # the CRC-32 check value, cbf43926

    assert blob.decode(stored, max_size=9) == b"123456789"
    assert blob.encode(b"123456789") == stored


def test_a_compressed_blob_is_magic_and_crc_and_one_zstd_frame() -> None:
    # magic, window of 1 KiB, one last raw block of three bytes
    frame = bytes.fromhex("28b52ffd 0000 190000") + b"abc"
    assert blob.decode(byhand.unsealed(byhand.COMPRESSED, frame), max_size=3) == b"abc"


def test_an_encrypted_blob_is_sealed_under_an_iv_of_sixteen_bytes() -> None:
    # AES-256-GCM of "abc" under the key 00…1f
    crc, iv = "1bc88396", "6465666768696a6b6c6d6e6f70717273"
    stored = bytes.fromhex("7b6785be222d4cf0" + crc + iv + "596ad75fa609f6112d7f063fc831a808" + "b9d120")

    assert blob.decode(stored, max_size=3, key=KEY) == b"abc"
    assert byhand.blob(byhand.ENCRYPTED, b"abc") == stored


@all_kinds
def test_the_kind_is_told_by_the_magic_number(magic: str) -> None:
    kind = blob.kind_of(bytes.fromhex(magic))

    assert kind.encrypted == (magic in (byhand.ENCRYPTED, byhand.ENCRYPTED_COMPRESSED))
    assert kind.compressed == (magic in (byhand.COMPRESSED, byhand.ENCRYPTED_COMPRESSED))
    assert kind.header_size == (44 if kind.encrypted else 12)


# --- there and back


@given(data=CONTENT, magic=st.sampled_from(byhand.KINDS), announce=st.booleans())
def test_a_blob_of_any_kind_and_size_gives_its_content(data: bytes, magic: str, announce: bool) -> None:
    assert decode(byhand.blob(magic, data, announce=announce), len(data)) == data


@both_decoders
@given(data=CONTENT, encrypted=st.booleans(), compress=st.booleans())
def test_what_is_encoded_decodes_to_the_same(
    data: bytes, encrypted: bool, compress: bool, decode_chunk: Decode
) -> None:
    key = KEY if encrypted else None
    stored = blob.encode(data, key=key, compress=compress)
    kind = blob.kind_of(stored)

    assert kind.encrypted == encrypted
    assert compress or not kind.compressed
    assert len(stored) <= kind.header_size + len(data)
    assert blob.decode(stored, max_size=len(data), key=key, encrypted=encrypted) == data
    digest = hashlib.sha256(data).digest() if key is None else key.digest(data)
    assert decode_chunk(stored, digest=digest, length=len(data), encrypted=encrypted, key=key) == data


@both_decoders
@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("fill", [b"\0", b"text "])
def test_a_chunk_of_the_largest_size_goes_there_and_back(
    fill: bytes, encrypted: bool, decode_chunk: Decode
) -> None:
    data = (fill * blob.MAX_CHUNK_SIZE)[: blob.MAX_CHUNK_SIZE]
    key = KEY if encrypted else None
    stored = blob.encode(data, key=key)

    assert blob.kind_of(stored) is (BlobKind.ENCRYPTED_COMPRESSED if encrypted else BlobKind.COMPRESSED)
    digest = blob.chunk_digest(data, key)
    assert decode_chunk(stored, digest=digest, length=len(data), encrypted=encrypted, key=key) == data


def test_two_encodings_under_one_key_share_no_iv() -> None:
    assert blob.encode(TEXT, key=KEY)[12:28] != blob.encode(TEXT, key=KEY)[12:28]


@given(st.integers(0, 1 << 20))
def test_the_storage_limit_has_room_for_what_compression_adds(size: int) -> None:
    worst = zstandard.ZstdCompressor(level=1).compress(hashlib.shake_128(b"noise").digest(size))
    assert 44 + max(size, len(worst)) <= blob.stored_limit(size)


# --- every check


@pytest.mark.parametrize("stored", [b"", b"\0", b"\0" * 200, b"PBSB" * 20, bytes.fromhex(byhand.FIXED) * 9])
def test_what_begins_with_no_known_magic_is_refused(stored: bytes) -> None:
    with pytest.raises(DamageError, match="magic"):
        decode(stored)


@all_kinds
def test_a_blob_cut_short_anywhere_is_refused(magic: str) -> None:
    stored = byhand.blob(magic, TEXT)
    for length in range(len(stored)):
        with pytest.raises(DamageError):
            decode(stored[:length])


@all_kinds
def test_every_flipped_bit_of_a_header_is_noticed(magic: str) -> None:
    stored = byhand.blob(magic, TEXT)
    for bit in range(blob.kind_of(stored).header_size * 8):
        with pytest.raises(DamageError):
            decode(byhand.flipped(stored, bit))


@all_kinds
def test_a_flipped_bit_of_the_data_is_noticed(magic: str) -> None:
    stored = byhand.blob(magic, TEXT)
    for bit in range(blob.kind_of(stored).header_size * 8, len(stored) * 8, 3):
        with pytest.raises(DamageError, match="CRC"):
            decode(byhand.flipped(stored, bit))


@both_decoders
@all_kinds
def test_a_flipped_bit_whose_crc_was_made_to_fit_never_gives_other_bytes(
    magic: str, decode_chunk: Decode
) -> None:
    stored = byhand.blob(magic, TEXT)
    sealed = blob.kind_of(stored).encrypted
    digest = blob.chunk_digest(TEXT, KEY if sealed else None)
    for bit in range(blob.kind_of(stored).header_size * 8, len(stored) * 8, 3):
        damaged = byhand.with_crc(byhand.flipped(stored, bit))
        try:
            data = decode_chunk(damaged, digest=digest, length=len(TEXT), encrypted=sealed, key=KEY)
        except DamageError:
            continue
        assert data == TEXT  # zstd's frame header has bits that mean nothing here


@all_kinds
def test_bytes_behind_the_data_are_noticed(magic: str) -> None:
    with pytest.raises(DamageError):
        decode(byhand.blob(magic, TEXT) + b"x")


@pytest.mark.parametrize("announce", [False, True])
@pytest.mark.parametrize("content", [b"", b"abc", TEXT])
@pytest.mark.parametrize(
    "garbage", [b"\0", b"x" * 50, byhand.frame(b"more"), byhand.frame(b"", announce=True)]
)
def test_a_zstd_frame_with_anything_behind_it_is_refused(
    announce: bool, content: bytes, garbage: bytes
) -> None:
    stored = byhand.unsealed(byhand.COMPRESSED, byhand.frame(content, announce=announce) + garbage)
    with pytest.raises(DamageError):
        decode(stored)


@pytest.mark.parametrize("announce", [False, True])
@pytest.mark.parametrize("content", [b"", b"abc", TEXT, b"\0" * 300_000])
def test_a_zstd_frame_cut_short_anywhere_is_refused(announce: bool, content: bytes) -> None:
    frame = byhand.frame(content, announce=announce)
    for length in range(len(frame)):
        with pytest.raises(DamageError):
            decode(byhand.unsealed(byhand.COMPRESSED, frame[:length]))


def test_a_zstd_frame_with_a_checksum_is_read_and_its_checksum_checked() -> None:
    for announce in (False, True):
        compressor = zstandard.ZstdCompressor(write_checksum=True, write_content_size=announce)
        frame = compressor.compress(TEXT)
        assert decode(byhand.unsealed(byhand.COMPRESSED, frame)) == TEXT
        for damaged in (frame[:-4], frame[:-1], byhand.flipped(frame, len(frame) * 8 - 1)):
            with pytest.raises(DamageError):
                decode(byhand.unsealed(byhand.COMPRESSED, damaged))


@pytest.mark.parametrize("claim", [0, 1, 99, 101, 255])
def test_a_zstd_frame_that_lies_about_its_size_is_refused(claim: int) -> None:
    frame = bytearray(byhand.frame(b"a" * 100, announce=True))
    assert frame[4:6] == bytes([0x20, 100])  # one segment, content size in one byte
    frame[5] = claim
    with pytest.raises(DamageError):
        decode(byhand.unsealed(byhand.COMPRESSED, bytes(frame)))


def test_a_skippable_zstd_frame_is_no_content() -> None:
    skippable = bytes.fromhex("502a4d18 03000000") + b"abc"
    empty = bytes.fromhex("502a4d18 00000000")
    for frame in (skippable, empty, skippable + byhand.frame(b"abc"), empty + byhand.frame(b"abc")):
        with pytest.raises(DamageError):
            decode(byhand.unsealed(byhand.COMPRESSED, frame))


@pytest.mark.parametrize("announce", [False, True])
@pytest.mark.parametrize("magic", [byhand.COMPRESSED, byhand.ENCRYPTED_COMPRESSED])
def test_a_decompression_bomb_is_refused_before_it_takes_memory(magic: str, announce: bool) -> None:
    bomb = byhand.blob(magic, bytes(64 << 20), announce=announce)
    tracemalloc.start()
    try:
        with pytest.raises(DamageError):
            decode(bomb, 1 << 16)
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@given(data=CONTENT.filter(bool), magic=st.sampled_from(byhand.KINDS), announce=st.booleans())
def test_a_blob_that_holds_a_byte_too_many_is_refused(data: bytes, magic: str, announce: bool) -> None:
    with pytest.raises(DamageError):
        decode(byhand.blob(magic, data, announce=announce), len(data) - 1)


@both_decoders
@all_kinds
@pytest.mark.parametrize("length", [0, 1, len(TEXT) - 1, len(TEXT) + 1, 1 << 24])
def test_a_chunk_of_another_length_than_the_index_says_is_refused(
    magic: str, length: int, decode_chunk: Decode
) -> None:
    sealed = magic in (byhand.ENCRYPTED, byhand.ENCRYPTED_COMPRESSED)
    digest = blob.chunk_digest(TEXT, KEY if sealed else None)
    with pytest.raises(DamageError):
        decode_chunk(byhand.blob(magic, TEXT), digest=digest, length=length, encrypted=sealed, key=KEY)


@both_decoders
@all_kinds
def test_a_chunk_in_the_place_of_another_is_refused(magic: str, decode_chunk: Decode) -> None:
    sealed = magic in (byhand.ENCRYPTED, byhand.ENCRYPTED_COMPRESSED)
    other = blob.chunk_digest(TEXT[::-1], KEY if sealed else None)
    with pytest.raises(DamageError, match="digest mismatch"):
        decode_chunk(byhand.blob(magic, TEXT), digest=other, length=len(TEXT), encrypted=sealed, key=KEY)


@both_decoders
@open_kinds
def test_a_chunk_that_is_not_encrypted_is_refused_in_an_encrypted_archive(
    magic: str, decode_chunk: Decode
) -> None:
    for digest in (hashlib.sha256(TEXT).digest(), KEY.digest(TEXT)):
        with pytest.raises(DamageError, match="not encrypted"):
            decode_chunk(byhand.blob(magic, TEXT), digest=digest, length=len(TEXT), encrypted=True, key=KEY)


@both_decoders
@sealed_kinds
def test_an_encrypted_chunk_is_refused_in_an_archive_that_is_not(magic: str, decode_chunk: Decode) -> None:
    for digest in (hashlib.sha256(TEXT).digest(), KEY.digest(TEXT)):
        with pytest.raises(DamageError, match="is encrypted"):
            decode_chunk(byhand.blob(magic, TEXT), digest=digest, length=len(TEXT), encrypted=False, key=KEY)


@both_decoders
@open_kinds
def test_a_key_at_hand_changes_nothing_for_chunks_that_are_only_signed(
    magic: str, decode_chunk: Decode
) -> None:
    stored, digest = byhand.blob(magic, TEXT), hashlib.sha256(TEXT).digest()
    assert decode_chunk(stored, digest=digest, length=len(TEXT), encrypted=False, key=KEY) == TEXT
    with pytest.raises(DamageError, match="digest mismatch"):
        decode_chunk(stored, digest=KEY.digest(TEXT), length=len(TEXT), encrypted=False, key=KEY)


@both_decoders
@sealed_kinds
def test_the_plain_digest_does_not_do_for_an_encrypted_chunk(magic: str, decode_chunk: Decode) -> None:
    with pytest.raises(DamageError, match="digest mismatch"):
        decode_chunk(
            byhand.blob(magic, TEXT),
            digest=hashlib.sha256(TEXT).digest(),
            length=len(TEXT),
            encrypted=True,
            key=KEY,
        )


@sealed_kinds
def test_an_encrypted_blob_without_a_key_asks_for_one(magic: str) -> None:
    with pytest.raises(KeyRequiredError):
        blob.decode(byhand.blob(magic, TEXT), max_size=1 << 20)


@sealed_kinds
def test_damage_is_told_from_a_missing_key(magic: str) -> None:
    with pytest.raises(DamageError, match="CRC"):
        blob.decode(byhand.flipped(byhand.blob(magic, TEXT), 400), max_size=1 << 20)


@sealed_kinds
def test_a_wrong_key_gives_an_error_and_no_bytes(magic: str) -> None:
    with pytest.raises(DamageError, match="wrong key"):
        blob.decode(byhand.blob(magic, TEXT), max_size=1 << 20, key=OTHER_KEY)


@given(st.binary(max_size=200), st.sampled_from(["", *byhand.KINDS]))
def test_arbitrary_bytes_raise_nothing_but_damage(data: bytes, magic: str) -> None:
    stored = bytes.fromhex(magic) + data
    for candidate in (stored, byhand.with_crc(stored.ljust(12, b"\0"))):
        try:
            decode(candidate, 1 << 16)
        except DamageError:
            continue
        assert candidate[:8].hex() in byhand.KINDS


@given(st.binary(max_size=200))
def test_an_arbitrary_zstd_frame_raises_nothing_but_damage(data: bytes) -> None:
    for frame in (data, bytes.fromhex("28b52ffd") + data, bytes.fromhex("28b52ffd00") + data):
        try:
            assert len(decode(byhand.unsealed(byhand.COMPRESSED, frame), 1 << 16)) <= 1 << 16
        except DamageError:
            continue
