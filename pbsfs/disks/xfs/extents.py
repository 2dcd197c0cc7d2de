"""The extents of a fork: a list in the inode, or a tree of blocks. Of one thread; for the other modules."""

from __future__ import annotations

import bisect
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.disks.xfs.blocks import EXTENTS, Blocks
from pbsfs.disks.xfs.inode import LIST, TREE, Fork

MOST = 1 << 18
"""Extents of a fork: as many as fit into the parser's memory."""

_MOST_LEVELS = 16
_RECORD = struct.Struct(">QQ")
_HEAD = struct.Struct(">HH")


class Extent(NamedTuple):
    """`length` blocks of a fork from `first` on lie in the blocks of the file system from `start` on, at byte
    `offset`; `unwritten`: they are zeros."""

    first: int
    start: int
    length: int
    unwritten: bool
    offset: int


def extents(blocks: Blocks, fork: Fork) -> Iterator[Extent]:
    """The extents of a fork in rising order, checked. Raises DamageError."""
    if fork.extents > MOST:
        raise UnsupportedError(f"a file of more than {MOST} extents is not supported")
    if fork.format == LIST:
        if fork.extents * _RECORD.size > len(fork.data):
            raise DamageError("its extents do not fit into it")
        records = _records(blocks, fork.data, 0, fork.extents)
    elif fork.format == TREE:
        records = _tree(blocks, fork.data)
    else:
        raise DamageError(f"a fork has the unknown format {fork.format}")
    end = seen = 0
    for extent in records:
        if extent.first < end:
            raise DamageError("its extents overlap")
        end = extent.first + extent.length
        seen += 1
        yield extent
    if seen != fork.extents:
        raise DamageError(f"it has {seen} extents, not {fork.extents}")


def _records(blocks: Blocks, data: bytes, at: int, count: int) -> Iterator[Extent]:
    offset_of = blocks.superblock.offset_of
    for position in range(at, at + count * _RECORD.size, _RECORD.size):
        high, low = _RECORD.unpack_from(data, position)
        length = low & 0x1FFFFF
        start = (high & 511) << 43 | low >> 21
        yield Extent(high >> 9 & ((1 << 54) - 1), start, length, bool(high >> 63), offset_of(start, length))


def _tree(blocks: Blocks, root: bytes) -> Iterator[Extent]:
    if len(root) < _HEAD.size:
        raise DamageError("the root of its extents does not fit into it")
    level, count = _HEAD.unpack_from(root)
    most = (len(root) - 4) // 16
    if not 0 < level <= _MOST_LEVELS or not 0 < count <= most:
        raise DamageError("the root of its extents is wrong")
    pointers = struct.unpack_from(f">{count}Q", root, 4 + 8 * most)
    yield from _below(blocks, pointers, level - 1, set())


def _below(blocks: Blocks, pointers: Sequence[int], level: int, seen: set[int]) -> Iterator[Extent]:
    superblock = blocks.superblock
    head = 72 if superblock.has_checksums else 24
    magic = b"BMA3" if superblock.has_checksums else b"BMAP"
    most = (superblock.block_size - head) // 16
    for pointer in pointers:
        if pointer in seen or len(seen) > MOST:
            raise DamageError("the blocks of its extents form a loop")
        seen.add(pointer)
        offset = superblock.offset_of(pointer)
        data = blocks.block([(offset, superblock.block_size)], EXTENTS, None)
        found, count = _HEAD.unpack_from(data, 4)
        if data[:4] != magic or found != level or not 0 < count <= most:
            raise DamageError(f"the block of extents at byte {offset} is wrong")
        if level:
            below = struct.unpack_from(f">{count}Q", data, head + 8 * most)
            yield from _below(blocks, below, level - 1, seen)
        else:
            yield from _records(blocks, data, head, count)


class Map:
    """The extents of a small fork, for reading ranges of it."""

    def __init__(self, blocks: Blocks, fork: Fork) -> None:
        """Raises DamageError."""
        self.extents = list(extents(blocks, fork))
        self._firsts = [extent.first for extent in self.extents]
        self._size = blocks.superblock.block_size

    def parts(self, first: int, count: int) -> list[tuple[int, int]]:
        """Where `count` blocks of the fork from `first` on are: offsets and sizes in bytes.

        Raises DamageError where they are not all stored.
        """
        found: list[tuple[int, int]] = []
        while count:
            number = bisect.bisect_right(self._firsts, first) - 1
            extent = self.extents[number] if number >= 0 else None
            if extent is None or first >= extent.first + extent.length or extent.unwritten:
                raise DamageError(f"block {first} of it is stored nowhere")
            length = min(count, extent.first + extent.length - first)
            offset = extent.offset + (first - extent.first) * self._size
            if found and sum(found[-1]) == offset:
                found[-1] = (found[-1][0], found[-1][1] + length * self._size)
            else:
                found.append((offset, length * self._size))
            first += length
            count -= length
        return found
