"""The chunks that a run of verify has read already: an exact set with a bound on its memory.

`Verification` asks it for each chunk, from one task of the trio loop. An entry is the whole identity of a
chunk: its digest, its length, and its key. Nothing is shortened or hashed to less, so pbsfs never takes a
chunk that it has not read for one that it has. What the set forgets at its bound is only read again.
"""

from __future__ import annotations

import logging

from pbsfs.chunks.store import Chunk
from pbsfs.formats.blob import DIGEST_SIZE
from pbsfs.formats.keys import Key
from pbsfs.runtime.memory import Memory

log = logging.getLogger(__name__)

ENTRY_SIZE = DIGEST_SIZE + 8
"""Bytes of an entry: the digest, the length (4 bytes) and the number of the key (4 bytes, from 1 on)."""

TABLES = 1 << 10
"""Tables that the entries are spread over. Each grows alone, so that no step takes longer than some
milliseconds."""

FIRST_SLOTS = 8
"""Entries that a new table has space for. At most three quarters are used."""

EMPTY = bytes(ENTRY_SIZE)
"""Not an entry: there is no key 0."""

HOLDER = "verified chunks"
"""What an error calls the bytes that are charged here."""


class KnownChunks:
    """Chunks, up to `capacity` bytes of memory; then the half that was used longest ago is forgotten."""

    def __init__(self, memory: Memory, capacity: int, *, tables: int = TABLES) -> None:
        self._half = capacity // 2
        self._tables = tables
        self._charge = memory.charge(HOLDER, 0)
        self._keys: dict[Key | None, int] = {}
        self._newer = _Entries(tables)
        self._older = _Entries(tables)
        self._reported = False

    def add(self, chunk: Chunk) -> bool:
        """Adds a chunk. Returns whether it is new, or was forgotten."""
        key = self._keys.setdefault(chunk.key, len(self._keys) + 1)
        entry = chunk.digest + chunk.length.to_bytes(4) + key.to_bytes(4)
        size = self._newer.size
        if not self._newer.add(entry):
            return False
        new = entry not in self._older
        if self._newer.size != size:
            if self._newer.size > self._half:
                self._forget()
            self._charge.resize(self._newer.size + self._older.size)
        return new

    def _forget(self) -> None:
        if len(self._older) and not self._reported:
            log.info("more chunks than fit in memory: some that several images share may be read again")
            self._reported = True
        self._newer, self._older = _Entries(self._tables), self._newer


class _Entries:
    """A set of entries in open hash tables. `size`: the bytes of the tables."""

    def __init__(self, tables: int) -> None:
        self.size = tables * FIRST_SLOTS * ENTRY_SIZE
        self._tables = [bytearray(FIRST_SLOTS * ENTRY_SIZE) for _ in range(tables)]
        self._counts = [0] * tables

    def __len__(self) -> int:
        return sum(self._counts)

    def __contains__(self, entry: bytes) -> bool:
        number, place = self._find(entry)
        return self._tables[number][place : place + ENTRY_SIZE] == entry

    def add(self, entry: bytes) -> bool:
        """Whether it was not there before."""
        number, place = self._find(entry)
        table = self._tables[number]
        if table[place : place + ENTRY_SIZE] == entry:
            return False
        table[place : place + ENTRY_SIZE] = entry
        self._counts[number] += 1
        if 4 * self._counts[number] * ENTRY_SIZE > 3 * len(table):
            self._grow(number)
        return True

    def _find(self, entry: bytes) -> tuple[int, int]:
        """The number of the entry's table, and where it is there, or where it has to go."""
        # Python's hash of bytes has a secret start: nobody can make digests that all fall on one place.
        place, number = divmod(hash(entry), len(self._tables))
        table = self._tables[number]
        place = place * ENTRY_SIZE % len(table)
        while table[place : place + ENTRY_SIZE] not in (entry, EMPTY):
            place = (place + ENTRY_SIZE) % len(table)
        return number, place

    def _grow(self, number: int) -> None:
        old = self._tables[number]
        self._tables[number] = table = bytearray(2 * len(old))
        self.size += len(old)
        for start in range(0, len(old), ENTRY_SIZE):
            entry = bytes(old[start : start + ENTRY_SIZE])
            if entry != EMPTY:
                place = self._find(entry)[1]
                table[place : place + ENTRY_SIZE] = entry
