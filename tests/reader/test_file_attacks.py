"""Chunks, indexes and blobs that were changed or swapped below a genuine manifest: all are damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from pbsfs.base.errors import DamageError
from pbsfs.formats import blob
from pbsfs.formats.manifest import CryptMode
from tests.reader.sealed import (
    CHUNK,
    CONF,
    CSUM_DIFFERS,
    DISK,
    NEWER,
    OLDER,
    OTHER_DISK,
    STREAM,
    TINY,
    Attack,
    Target,
    check_others,
    contents,
    each_source,
    ring,
    seen_in,
    target,
)
from tests.support import byhand, damage
from tests.support.made import KEY, OTHER_KEY


def put_chunk(attacked: Target, raw: bytes) -> None:
    damage.replace(attacked.chunk_path(0), raw)


def chunk_of_disk(number: int = 0) -> bytes:
    return contents(1)[DISK][number * CHUNK :][:CHUNK]


def flip_in_chunk(bit: int) -> Attack:
    """Flips a bit of a chunk that is part of what GCM authenticates; its CRC is made to match."""
    return lambda t: put_chunk(t, byhand.with_crc(byhand.flipped(t.chunk_path(0).read_bytes(), bit)))


NOT_ENCRYPTED = "the blob is not encrypted, but must be"
UNDECRYPTABLE = "decryption failed"

ON_A_CHUNK: dict[str, tuple[CryptMode, Attack, str]] = {
    "plain, of the same content": (
        CryptMode.ENCRYPT,
        lambda t: put_chunk(t, blob.encode(chunk_of_disk())),
        NOT_ENCRYPTED,
    ),
    "plain and not compressed": (
        CryptMode.ENCRYPT,
        lambda t: put_chunk(t, blob.encode(chunk_of_disk(), compress=False)),
        NOT_ENCRYPTED,
    ),
    "plain, of other content": (
        CryptMode.ENCRYPT,
        lambda t: put_chunk(t, blob.encode(bytes(CHUNK))),
        NOT_ENCRYPTED,
    ),
    "encrypted with another key": (
        CryptMode.ENCRYPT,
        lambda t: put_chunk(t, blob.encode(chunk_of_disk(), key=OTHER_KEY)),
        UNDECRYPTABLE,
    ),
    "another chunk of the image": (
        CryptMode.ENCRYPT,
        lambda t: put_chunk(t, t.chunk_path(3).read_bytes()),
        "digest mismatch",
    ),
    "zeros that are encrypted with the key": (
        CryptMode.ENCRYPT,
        lambda t: put_chunk(t, t.chunk_path(1).read_bytes()),
        "digest mismatch",
    ),
    "a bit of the first byte of the IV": (CryptMode.ENCRYPT, flip_in_chunk(8 * 12), UNDECRYPTABLE),
    "a bit of the last byte of the IV": (CryptMode.ENCRYPT, flip_in_chunk(8 * 28 - 1), UNDECRYPTABLE),
    "a bit of the first byte of the tag": (CryptMode.ENCRYPT, flip_in_chunk(8 * 28), UNDECRYPTABLE),
    "a bit of the last byte of the tag": (CryptMode.ENCRYPT, flip_in_chunk(8 * 44 - 1), UNDECRYPTABLE),
    "a bit of the first byte of ciphertext": (CryptMode.ENCRYPT, flip_in_chunk(8 * 44), UNDECRYPTABLE),
    "a bit in the middle of ciphertext": (CryptMode.ENCRYPT, flip_in_chunk(8 * 30_000 + 3), UNDECRYPTABLE),
    "a bit of the CRC": (
        CryptMode.ENCRYPT,
        lambda t: put_chunk(t, byhand.flipped(t.chunk_path(0).read_bytes(), 8 * 8)),
        "CRC mismatch",
    ),
    "encrypted where it is only signed": (
        CryptMode.SIGN_ONLY,
        lambda t: put_chunk(t, blob.encode(chunk_of_disk(), key=KEY)),
        "the blob is encrypted, but must not be",
    ),
    "other content where it is only signed": (
        CryptMode.SIGN_ONLY,
        lambda t: put_chunk(t, blob.encode(chunk_of_disk(3))),
        "digest mismatch",
    ),
}


@each_source
@pytest.mark.parametrize("name", ON_A_CHUNK)
def test_a_chunk_that_was_changed_or_swapped_is_damage_and_nothing_of_it_comes_out(
    tmp_path: Path, kind: str, name: str
) -> None:
    mode, attack, reason = ON_A_CHUNK[name]
    attacked = target(tmp_path / "datastore", mode)
    attack(attacked)
    seen, others = seen_in(kind, attacked.writer.path, ring(KEY), NEWER, OLDER)
    assert set(seen.errors) == {DISK}
    assert type(seen.errors[DISK]) is DamageError
    assert reason in str(seen.errors[DISK])
    assert str(seen.errors[DISK]).startswith(f"{NEWER}/disk.img: bytes 0 to {CHUNK - 1}")
    assert attacked.chunk_path(0).name in str(seen.errors[DISK])
    assert seen.data[DISK] == contents(1)[DISK][CHUNK:]  # the chunks behind it, and no more
    check_others(others)


def put(attacked: Target, name: str, raw: bytes) -> None:
    damage.replace(attacked.place / name, raw)


def flip_in(name: str, *, byte: int) -> Attack:
    def flip(attacked: Target) -> None:
        raw = (attacked.place / name).read_bytes()
        put(attacked, name, byhand.flipped(raw, (byte if byte >= 0 else len(raw) + byte) * 8 + 2))

    return flip


ON_A_FILE: dict[str, tuple[str, Attack]] = {
    "the index of another image": (DISK, lambda t: put(t, DISK, (t.place / OTHER_DISK).read_bytes())),
    "the index of an older snapshot": (DISK, lambda t: t.take_from(OLDER, DISK)),
    "the index of an older stream": (STREAM, lambda t: t.take_from(OLDER, STREAM)),
    "the first digest": (DISK, flip_in(DISK, byte=4096)),
    "the last digest": (DISK, flip_in(DISK, byte=-1)),
    "the checksum in the index": (DISK, flip_in(DISK, byte=32)),
    "the size in the index": (DISK, flip_in(DISK, byte=64)),
    "the first end in a stream's index": (STREAM, flip_in(STREAM, byte=4097)),
    "the last digest of a stream": (STREAM, flip_in(STREAM, byte=-1)),
    "a configuration of an older snapshot": (CONF, lambda t: t.take_from(OLDER, CONF)),
    "one of an older snapshot that has the same length": (TINY, lambda t: t.take_from(OLDER, TINY)),
    "a plain configuration": (CONF, lambda t: put(t, CONF, blob.encode(contents(1)[CONF]))),
    "a configuration encrypted anew": (CONF, lambda t: put(t, CONF, blob.encode(contents(1)[CONF], key=KEY))),
    "the IV of a configuration": (TINY, flip_in(TINY, byte=12)),
    "the last byte of a configuration": (TINY, flip_in(TINY, byte=-1)),
}


@each_source
@pytest.mark.parametrize("name", ON_A_FILE)
def test_an_index_or_configuration_that_is_not_the_one_that_was_signed_is_damage(
    tmp_path: Path, kind: str, name: str
) -> None:
    victim, attack = ON_A_FILE[name]
    attacked = target(tmp_path / "datastore", CryptMode.ENCRYPT)
    attack(attacked)
    seen, others = seen_in(kind, attacked.writer.path, ring(KEY), NEWER, OLDER)
    assert set(seen.errors) == {victim}
    assert type(seen.errors[victim]) is DamageError
    assert victim not in seen.data
    assert {n: data for n, data in contents(1).items() if n != victim}.items() <= seen.data.items()
    check_others(others)


@pytest.mark.parametrize("name", ["the index of another image", "the index of an older snapshot"])
def test_a_valid_index_in_the_place_of_another_is_told_by_its_checksum(tmp_path: Path, name: str) -> None:
    attacked = target(tmp_path / "datastore", CryptMode.ENCRYPT)
    ON_A_FILE[name][1](attacked)
    (seen,) = seen_in("directory", attacked.writer.path, ring(KEY), NEWER)
    assert CSUM_DIFFERS in str(seen.errors[DISK])
