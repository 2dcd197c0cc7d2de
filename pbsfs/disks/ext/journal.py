"""The journal of ext3 and ext4 (jbd2): which blocks its complete transactions change, and where they are.

Nothing is written: the copies that the journal holds are noted by number, and read when they are needed. What
ends the replay, and what a transaction changes, is as in the kernel's fs/jbd2/recovery.c.
"""

from __future__ import annotations

import bisect
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from pbsfs.base.errors import DamageError
from pbsfs.disks.ext.blocks import Blocks, Copy
from pbsfs.disks.ext.mapping import Run
from pbsfs.disks.ext.superblock import kernel_crc

MOST_COPIES: Final = 262_144
"""Blocks that the journal supplies: 1 GiB of 4 KiB. Some 50 MB of memory."""

_MAGIC: Final = 0xC03B3998
_DESCRIPTOR, _COMMIT, _SUPER_1, _SUPER_2, _REVOKE = 1, 2, 3, 4, 5

_CHECKSUM: Final = 0x1
"""Compatible: a CRC-32 of each transaction."""

_IS_64BIT: Final = 0x2
_ASYNC: Final = 0x4
_CSUM_2: Final = 0x8
_CSUM_3: Final = 0x10
_FAST: Final = 0x20
_KNOWN: Final = 0x1 | _IS_64BIT | _ASYNC | _CSUM_2 | _CSUM_3 | _FAST

_ESCAPED, _SAME_UUID, _LAST = 1, 2, 8

_FAST_BLOCKS: Final = 256
"""Blocks for fast commits where the journal does not say how many."""

_SMALLEST: Final = 1024
"""Blocks that a journal has at least, without those for fast commits."""

_REVERSED: Final = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(slots=True)
class Replay:
    """What the journal changes. `copies`: by number of the block. `transactions`: how many are complete.
    `problem`: why later ones, or any, are not replayed; None where all are."""

    copies: dict[int, Copy] = field(default_factory=dict)
    transactions: int = 0
    problem: str | None = None


@dataclass(slots=True)
class _Transaction:
    sequence: int
    tags: list[tuple[int, Copy]] = field(default_factory=list)
    revoked: list[int] = field(default_factory=list)
    crc: int = 0xFFFFFFFF


class Journal:
    """The journal in the blocks `runs` of `blocks`. Raises DamageError where it cannot be read at all."""

    def __init__(self, blocks: Blocks, runs: Sequence[Run]) -> None:
        self._blocks = blocks
        self._size = blocks.size
        self._runs = runs
        self._starts = [run.logical for run in runs]
        head = self._read(0)
        magic, kind, _, size, last, first, sequence, start = struct.unpack_from(">8I", head, 0)
        if magic != _MAGIC or kind not in {_SUPER_1, _SUPER_2} or size != self._size:
            raise DamageError("the superblock of the journal is damaged")
        compat, incompat = struct.unpack_from(">II", head, 36) if kind == _SUPER_2 else (0, 0)
        self._compat: int = compat
        self._features: int = incompat
        self._checked = bool(incompat & (_CSUM_2 | _CSUM_3))
        if self._checked:
            covered = head[:252] + bytes(4) + head[256:1024]
            if kernel_crc(0xFFFFFFFF, covered) != int.from_bytes(head[252:256], "big"):
                raise DamageError("the superblock of the journal has a wrong checksum")
        if incompat & ~_KNOWN:
            raise DamageError(f"the feature 0x{incompat & ~_KNOWN:x} of the journal is not supported")
        self._seed = kernel_crc(0xFFFFFFFF, head[48:64])
        self._fast_first = self._fast_last = 0
        if incompat & _FAST:
            count = int.from_bytes(head[84:88], "big") or _FAST_BLOCKS
            if last >= count + _SMALLEST:
                self._fast_last = last
                last -= count
                self._fast_first = last + 1
        if not 0 < first < last or (start and not first <= start < last):
            raise DamageError("the superblock of the journal is damaged")
        self._first, self._last, self._start, self._sequence = first, last, start, sequence
        self._tail = 4 if self._checked else 0
        self._tag = (
            16 if incompat & _CSUM_3 else 8 + 2 * bool(incompat & _CSUM_2) + 4 * bool(incompat & _IS_64BIT)
        )

    @property
    def is_open(self) -> bool:
        """Whether there may be something to replay."""
        return bool(self._start)

    def replay(self, most_blocks: int) -> Replay:
        """What the complete transactions change. `most_blocks`: how many blocks the volume has."""
        done = Replay()
        transactions: list[_Transaction] = []
        try:
            self._scan(transactions, most_blocks)
        except DamageError as error:
            done.problem = str(error)
        done.transactions = len(transactions)
        revoked: dict[int, int] = {}
        for number, transaction in enumerate(transactions):
            for block in transaction.revoked:
                revoked[block] = number
        for number, transaction in enumerate(transactions):
            for block, copy in transaction.tags:
                if revoked.get(block, -1) < number:
                    done.copies[block] = copy
        if done.problem is None and self._fast_first and self._fast_commits(len(transactions)):
            done.problem = "fast commits after the last transaction: reading them is not supported"
        return done

    def _scan(self, done: list[_Transaction], most_blocks: int) -> None:
        """Adds the complete transactions to `done`. Raises DamageError where the journal is damaged."""
        at = self._start
        left = self._last - self._first
        copies = 0
        current = _Transaction(self._sequence)
        suspect = False
        failed = False
        last_time = 0
        while left > 0:
            block = self._read(at)
            magic, kind, sequence = struct.unpack_from(">3I", block, 0)
            if magic != _MAGIC or sequence != current.sequence:
                return
            at = self._next(at)
            left -= 1
            if kind == _DESCRIPTOR:
                suspect = suspect or not self._is_intact(block)
                places = self._tags(current, block, at, left, most_blocks)
                if self._compat & _CHECKSUM and not suspect:
                    for part in (block, *map(self._read, places)):
                        current.crc = _crc32_be(current.crc, part)
                left -= len(places)
                at = self._next(at, len(places))
                copies += len(places)
                if copies > MOST_COPIES:
                    raise DamageError(f"the journal holds more than {MOST_COPIES} blocks")
            elif kind == _REVOKE:
                suspect = suspect or not self._is_intact(block)
                current.revoked.extend(self._revoked(block))
            elif kind == _COMMIT:
                time = int.from_bytes(block[48:56], "big")
                problem = DamageError(f"transaction {sequence} has a wrong checksum")
                intact = self._is_commit_intact(current, block)
                if (suspect or not intact) and time < last_time:
                    return  # of an earlier use of the journal
                if suspect or failed or (not intact and not self._features & _ASYNC):
                    raise problem
                if intact:
                    done.append(current)
                else:
                    failed = True  # interrupted, if no other follows
                last_time = time
                current = _Transaction((current.sequence + 1) & 0xFFFFFFFF)
            else:
                return

    def _tags(
        self, transaction: _Transaction, block: bytes, at: int, left: int, most_blocks: int
    ) -> Sequence[int]:
        """Adds the blocks that a descriptor announces to `transaction`. Returns their places in the journal.
        `left`: how many there can be at most."""
        places: list[int] = []
        offset = 12
        end = self._size - self._tail
        seed = kernel_crc(self._seed, struct.pack(">I", transaction.sequence)) if self._checked else 0
        while offset + self._tag <= end and len(places) < left:
            if self._features & _CSUM_3:
                number, flags, high, checksum = struct.unpack_from(">IIII", block, offset)
            else:
                number, checksum, flags = struct.unpack_from(">IHH", block, offset)
                high = int.from_bytes(block[offset + 8 : offset + 12], "big")
            if self._features & _IS_64BIT:
                number |= high << 32
            place = self._place(at)
            copy = Copy(place, bool(flags & _ESCAPED))
            if self._checked:
                bits = 32 if self._features & _CSUM_3 else 16
                copy = Copy(place, bool(flags & _ESCAPED), checksum, seed, bits)
            if number < most_blocks:
                transaction.tags.append((number, copy))
            places.append(at)
            at = self._next(at)
            offset += self._tag + (0 if flags & _SAME_UUID else 16)
            if flags & _LAST:
                break
        return places

    def _revoked(self, block: bytes) -> Sequence[int]:
        size = int.from_bytes(block[12:16], "big")
        if size > self._size - self._tail:
            raise DamageError("a list of revoked blocks in the journal is damaged")
        wide = self._features & _IS_64BIT
        count = max(size - 16, 0) // (8 if wide else 4)
        return struct.unpack_from(f">{count}{'Q' if wide else 'I'}", block, 16)

    def _is_intact(self, block: bytes) -> bool:
        """Whether a descriptor or a list of revoked blocks has the right checksum, if any."""
        if not self._checked:
            return True
        return kernel_crc(self._seed, block[:-4] + bytes(4)) == int.from_bytes(block[-4:], "big")

    def _is_commit_intact(self, transaction: _Transaction, block: bytes) -> bool:
        stored = int.from_bytes(block[16:20], "big")
        summed = self._compat & _CHECKSUM and block[12:14] + block[16:20] != bytes(6)
        if summed and (stored != transaction.crc or block[12:14] != b"\1\4"):
            return False
        if not self._checked:
            return True
        whole = block[:16] + bytes(4) + block[20:]
        if kernel_crc(self._seed, whole) == stored:
            return True
        return kernel_crc(self._seed, whole[:64] + bytes(self._size - 64)) == stored

    def _fast_commits(self, transactions: int) -> bool:
        """Whether fast commits follow the last of `transactions` (fs/ext4/fast_commit.h): they begin with a
        head of the transaction that would be next."""
        tag, length, _, sequence = struct.unpack_from("<HHII", self._read(self._fast_first), 0)
        return (tag, length, sequence) == (9, 8, (self._sequence + transactions) & 0xFFFFFFFF)

    # --- places

    def _next(self, at: int, count: int = 1) -> int:
        at += count
        return at if at < self._last else at - (self._last - self._first)

    def _place(self, at: int) -> int:
        """The block of the volume that holds block `at` of the journal. Raises DamageError."""
        number = bisect.bisect_right(self._starts, at) - 1
        run = self._runs[number] if number >= 0 else None
        if run is None or run.block is None or at >= run.logical + run.count:
            raise DamageError(f"block {at} of the journal is stored nowhere")
        return run.block + at - run.logical

    def _read(self, at: int) -> bytes:
        return self._blocks.read(self._place(at))


def _crc32_be(state: int, data: bytes) -> int:
    """The kernel's crc32_be: the polynomial of zlib, with the highest bit first."""
    mirrored = int(f"{state:032b}"[::-1], 2) ^ 0xFFFFFFFF
    value = zlib.crc32(data.translate(_REVERSED), mirrored) ^ 0xFFFFFFFF
    return int(f"{value:032b}"[::-1], 2)
