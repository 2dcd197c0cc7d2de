"""The log of XFS as records: where it begins and ends, and the transactions in it. Used by `recovery`.

The log is a ring of blocks of 512 bytes. The first word of each is the number of the cycle in which it was
written, so that the head is where the number falls. Only the part between tail and head is read, with some
blocks to find it. As the kernel does it (fs/xfs/xfs_log_recover.c).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from pbsfs.base.errors import DamageError
from pbsfs.disks.crc32c import crc32c
from pbsfs.disks.volume import Volume

BLOCK = 512
MAGIC = b"\xfe\xed\xba\xbe"

_CYCLES = 32 << 10
"""Bytes of data whose first words one block of a record's header holds."""

_MOST_RECORD = 1 << 20
_UNFINISHED = 8
"""Records that may be written at the same time: a torn one among the last of them was not yet finished."""

_MOST_DISTANCE = _UNFINISHED * (256 << 10) // BLOCK + _UNFINISHED * 9
_HEADER = struct.Struct(">4sIIIQQ4s4xI")
_OPERATION = struct.Struct(">4sIBBH")
_START, _COMMIT, _CONTINUED, _END, _UNMOUNT = 1, 2, 8, 16, 32
_CLIENTS = {0x69, 0xAA}
_SPAN = 128
"""Blocks that are read together."""

_MOST_BLOCKS = (2 << 30) // BLOCK
_AHEAD = (64 << 20) // BLOCK
"""Blocks that are requested ahead of reading."""


class TornError(DamageError):
    """A record of the log is not whole."""


class Operation(NamedTuple):
    """A part of a transaction. `lsn`: of the record it is in."""

    transaction: bytes
    flags: int
    data: bytes
    lsn: int

    @property
    def is_start(self) -> bool:
        return bool(self.flags & _START)

    @property
    def is_commit(self) -> bool:
        return bool(self.flags & _COMMIT)

    @property
    def is_unmount(self) -> bool:
        return bool(self.flags & _UNMOUNT)

    @property
    def continues(self) -> bool:
        return bool(self.flags & _CONTINUED)


class _Record(NamedTuple):
    block: int
    headers: int
    length: int
    lsn: int
    tail: int
    operations: int
    checksum: bytes
    raw: bytes

    @property
    def blocks(self) -> int:
        return self.headers + -(-self.length // BLOCK)


class Log:
    """The log of a file system. Raises DamageError, KeyRequiredError and SourceError, in every method."""

    def __init__(self, volume: Volume, *, uuid: bytes, is_v2: bool, has_checksums: bool) -> None:
        """`volume`: the log."""
        self._volume = volume
        self._count = blocks = volume.size // BLOCK
        self._uuid = uuid
        self._is_v2 = is_v2
        self._has_checksums = has_checksums
        self.is_clean = True
        self._tail = self._head = 0
        if not _SPAN <= blocks <= _MOST_BLOCKS:
            raise DamageError("it has a wrong size")
        self._find()

    # --- where it begins and ends

    def _find(self) -> None:
        head = self._find_head()
        if head is None:
            return
        for _ in range(_UNFINISHED + 1):
            last = self._before(head)
            if last is None:
                raise DamageError("it has no records")
            if (last.block + last.blocks - head) % self._count:
                head = last.block  # this one was not finished
                continue
            if self._is_unmount(last):
                return
            self._tail, self._head = last.tail & 0xFFFFFFFF, head
            if self._tail >= self._count:
                raise DamageError("its tail lies beyond it")
            self._request()
            torn = self._first_torn(_UNFINISHED * last.headers * _CYCLES // BLOCK)
            if torn is None:
                self.is_clean = self._tail == self._head
                return
            head = torn
        raise DamageError("its last records are damaged")

    def _find_head(self) -> int | None:
        """The block after the last record; None where the log was never written to."""
        count = self._count
        first, last = self._cycles(0, 1)[0], self._cycles(count - 1, 1)[0]
        if not first:
            return None
        if first == last:
            head, stop = count, last - 1
        else:
            low, high = 0, count - 1  # the first block of the last block's cycle
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if self._cycles(middle, 1)[0] == last else (middle, high)
            head, stop = high, last
        # Blocks before it that were not written yet: records are written side by side.
        distance = min(_MOST_DISTANCE, count)
        found: int | None = None
        if head < distance and last:
            found = self._cycle_in(count - (distance - head), count, stop - 1)
        if found is None:
            found = self._cycle_in(max(0, head - distance), head, stop)
        return (head if found is None else found) % count

    def _cycle_in(self, start: int, end: int, cycle: int) -> int | None:
        for at in range(start, end, _SPAN):
            cycles = self._cycles(at, min(_SPAN, end - at))
            if cycle in cycles:
                return at + cycles.index(cycle)
        return None

    def _cycles(self, start: int, count: int) -> list[int]:
        data = self._volume.read(start * BLOCK, count * BLOCK)
        found = []
        for at in range(0, len(data), BLOCK):
            at += 4 if data[at : at + 4] == MAGIC else 0  # noqa: PLW2901
            found.append(int.from_bytes(data[at : at + 4], "big"))
        return found

    def _before(self, head: int) -> _Record | None:
        """The last record that starts before `head`."""
        block = self._starts_before(head, 1)
        return self._record(block[0]) if block else None

    def _starts_before(self, head: int, most: int, distance: int | None = None) -> list[int]:
        """The last blocks, at most `most`, that start a record in the `distance` blocks before `head`."""
        left = self._count if distance is None else distance
        end = head or self._count
        found: list[int] = []
        while left > 0:
            start = max(0, end - min(_SPAN, left))
            data = self._volume.read(start * BLOCK, (end - start) * BLOCK)
            for block in range(end - start - 1, -1, -1):
                if data[block * BLOCK : block * BLOCK + 4] == MAGIC:
                    found.append(start + block)
                    if len(found) == most:
                        return found
            left -= end - start
            end = start or self._count
        return found

    def _first_torn(self, distance: int) -> int | None:
        """The block of the first record that is not whole, among those that may not have been finished.

        Where writes that were not finished went over the tail, up to `distance` blocks behind the head, the
        tail moves to the first record after them.
        """
        block = self._tail
        while left := (self._head - block) % self._count:
            try:
                record = self._record(block)
                if record.blocks > left:
                    raise TornError(f"the record at block {block} is too long")
                self._data(record, verify=True)
            except TornError:
                starts = self._starts_before(self._head, _UNFINISHED + 1, left)
                if len(starts) <= _UNFINISHED and block != self._tail:
                    return block
                if (block - self._head) % self._count >= distance:
                    raise
                self._tail = block = self._start_after(block)
                continue
            block = (block + record.blocks) % self._count
        return None

    def _start_after(self, block: int) -> int:
        """The first block after `block` that starts a record."""
        for step in range(1, min(_MOST_DISTANCE, (self._head - block) % self._count)):
            found = (block + step) % self._count
            if self._ring(found, 1)[:4] == MAGIC:
                return found
        raise TornError(f"the record at block {block} is not whole")

    def _request(self) -> None:
        left = min((self._head - self._tail) % self._count, _AHEAD)
        first = min(left, self._count - self._tail)
        ranges = [(self._tail, first), (0, left - first)]
        self._volume.prefetch([(block * BLOCK, count * BLOCK) for block, count in ranges if count])

    # --- records

    def _ring(self, block: int, count: int) -> bytes:
        block %= self._count
        first = min(count, self._count - block)
        data = self._volume.read(block * BLOCK, first * BLOCK)
        return data if first == count else data + self._volume.read(0, (count - first) * BLOCK)

    def _record(self, block: int) -> _Record:
        raw = self._ring(block, 1)
        magic, _, version, length, lsn, tail, checksum, operations = _HEADER.unpack_from(raw)
        size = int.from_bytes(raw[320:324], "big")
        if (
            magic != MAGIC
            or not version
            or version > 3
            or not 0 < length <= _MOST_RECORD
            or size > _MOST_RECORD
            or lsn & 0xFFFFFFFF != block
            or operations > length // _OPERATION.size
        ):
            raise TornError(f"there is no record at block {block}")
        if raw[300:304] != b"\0\0\0\1" or raw[304:320] != self._uuid:
            raise TornError(f"the record at block {block} is of another system")
        headers = max(1, -(-size // _CYCLES)) if self._is_v2 and version & 2 else 1
        if length > headers * _CYCLES and operations != 1:
            raise TornError(f"the record at block {block} is too long")
        if headers + -(-length // BLOCK) > self._count:
            raise TornError(f"the record at block {block} is longer than the log")
        return _Record(block, headers, length, lsn, tail, operations, checksum, raw)

    def _data(self, record: _Record, *, verify: bool) -> bytes:
        """The bytes of a record, with the words that the cycles took the place of."""
        more = self._ring(record.block + 1, record.headers - 1) if record.headers > 1 else b""
        blocks = -(-record.length // BLOCK)
        stored = bytearray(self._ring(record.block + record.headers, blocks))
        if verify and (self._has_checksums or record.checksum != bytes(4)):
            self._verify(record, more, stored)
        words = [record.raw[44:300]]
        words += [more[at + 4 : at + 260] for at in range(0, len(more), BLOCK)]
        for number, at in enumerate(range(0, min(blocks, 64 * len(words)) * BLOCK, BLOCK)):
            word = number % 64 * 4
            stored[at : at + 4] = words[number // 64][word : word + 4]
        return bytes(stored[: record.length])

    def _verify(self, record: _Record, more: bytes, stored: bytearray) -> None:
        needed = min(-(-record.length // _CYCLES), record.headers) if self._is_v2 else 1
        rest = b"".join(more[at : at + 260] for at in range(0, (needed - 1) * BLOCK, BLOCK))
        rest += stored[: record.length]
        for size in (328, 324):  # what 64-bit and 32-bit x86 make of the header
            checksum = crc32c(record.raw[:32] + bytes(4) + record.raw[36:size] + rest)
            if checksum.to_bytes(4, "little") == record.checksum:
                return
        raise TornError(f"the record at block {record.block} has a wrong checksum")

    def _is_unmount(self, record: _Record) -> bool:
        if record.operations != 1:
            return False
        flags = self._ring(record.block + record.headers, 1)[9]
        return bool(flags & _UNMOUNT)

    def operations(self) -> Iterator[Operation]:
        """What the records between tail and head hold, in order."""
        if self.is_clean:
            return
        block = self._tail
        left = (self._head - self._tail) % self._count
        while left > 0:
            record = self._record(block)
            data = self._data(record, verify=False)
            at = 0
            for _ in range(record.operations):
                if at + _OPERATION.size > len(data):
                    raise DamageError(f"the record at block {block} is cut off")
                transaction, length, client, flags, _ = _OPERATION.unpack_from(data, at)
                at += _OPERATION.size
                if client not in _CLIENTS or at + length > len(data):
                    raise DamageError(f"the record at block {block} is wrong")
                yield Operation(transaction, flags & ~_END, data[at : at + length], record.lsn)
                at += length
            left -= record.blocks
            block = (block + record.blocks) % self._count
