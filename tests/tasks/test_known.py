"""The chunks that verify has read: exact, whatever their digests are, and within their memory."""

from __future__ import annotations

import random

import pytest

from pbsfs.base.names import Archive
from pbsfs.chunks.store import Chunk
from pbsfs.formats.keys import Key
from pbsfs.runtime.memory import Memory
from pbsfs.tasks.known import ENTRY_SIZE, FIRST_SLOTS, HOLDER, TABLES, KnownChunks
from tests.support import made

LEAST = TABLES * FIRST_SLOTS * ENTRY_SIZE
"""Bytes of the tables of a new half."""


def chunk_of(digest: bytes, length: int = 4096, key: Key | None = None) -> Chunk:
    return Chunk(made.snapshot(), Archive("a.img.fidx"), digest, length, key is not None, key)


def digests(count: int) -> list[bytes]:
    source = random.Random(1)
    return [source.randbytes(32) for _ in range(count)]


def test_a_chunk_is_new_once() -> None:
    known = KnownChunks(Memory(), 1 << 30)
    names = digests(30_000)
    assert all(known.add(chunk_of(name)) for name in names)
    assert not any(known.add(chunk_of(name)) for name in names)


def test_every_bit_of_a_digest_the_length_and_the_key_count() -> None:
    known = KnownChunks(Memory(), 1 << 30)
    base = bytes(32)
    assert known.add(chunk_of(base))
    for bit in range(256):
        assert known.add(chunk_of((1 << bit).to_bytes(32)))
    assert known.add(chunk_of(base, 4097))
    assert known.add(chunk_of(base, 1 << 24))
    assert known.add(chunk_of(base, key=made.KEY))
    assert not known.add(chunk_of(base))
    assert not known.add(chunk_of(base, key=made.KEY))


def test_at_the_bound_it_forgets_the_older_half_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory()
    capacity = 8 * LEAST
    known = KnownChunks(memory, capacity)
    names = digests(100_000)
    peak = 0
    with caplog.at_level("INFO"):
        for name in names:
            assert known.add(chunk_of(name))
            peak = max(peak, memory.charged(HOLDER))
    assert capacity // 2 < peak <= capacity + 2 * LEAST
    assert len(caplog.messages) == 1
    assert not known.add(chunk_of(names[-1]))
    assert [known.add(chunk_of(name)) for name in names[-5000:]] == [False] * 5000
    assert known.add(chunk_of(names[0]))  # forgotten
    del known
    assert memory.charged() == 0


def test_what_is_met_again_and_again_is_not_forgotten() -> None:
    known = KnownChunks(Memory(), 8 * LEAST)
    often = chunk_of(b"z" * 32)
    assert known.add(often)
    for number, name in enumerate(digests(100_000)):
        known.add(chunk_of(name))
        if number % 1000 == 0:
            assert not known.add(often)
