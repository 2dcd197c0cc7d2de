"""Where the blocks of a file are: its extents, or the block map of ext2 and ext3, as runs in order.

Generators over `Blocks`: a caller stops where it has enough. What a run says is checked before it is yielded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pbsfs.base.errors import DamageError
from pbsfs.disks.ext.blocks import Blocks
from pbsfs.disks.ext.inode import EXTENTS, Inode
from pbsfs.disks.ext.superblock import Superblock, kernel_crc

MOST_DEPTH: Final = 5
"""Levels of an extent tree below its root, as the kernel allows."""

_HEADER: Final = struct.Struct("<HHHHI")
_EXTENT: Final = struct.Struct("<IHHI")
_INDEX: Final = struct.Struct("<IIHH")

_LONGEST: Final = 0x8000
"""Blocks of an extent; a longer one says that they are allocated and not written."""


@dataclass(slots=True)
class Run:
    """`count` blocks of a file from `logical` on: those from `block` on, or zeros where it is None."""

    logical: int
    block: int | None
    count: int


class Mapping:
    """Reads where the blocks of the files of one file system are."""

    def __init__(self, superblock: Superblock, blocks: Blocks) -> None:
        self._superblock = superblock
        self._blocks = blocks

    def runs(self, inode: Inode) -> Iterator[Run]:
        """The runs of `inode`, in order, as long as possible; what lies between them is a hole. Raises
        DamageError after those that can be trusted."""
        found = self._extents(inode) if inode.flags & EXTENTS else self._mapped(inode)
        last: Run | None = None
        for run in found:
            if last is not None:
                end = last.logical + last.count
                if run.logical < end:
                    raise DamageError(f"inode {inode.number}: the places of its data overlap")
                follows = None if last.block is None else last.block + last.count
                if run.logical == end and run.block == follows:
                    last.count += run.count
                    continue
                yield last
            last = run
        if last is not None:
            yield last

    # --- extents

    def _extents(self, inode: Inode) -> Iterator[Run]:
        return self._node(inode, inode.map, None, 0, set())

    def _node(
        self, inode: Inode, node: bytes, depth: int | None, first: int, seen: set[int]
    ) -> Iterator[Run]:
        """The runs below a node. `depth`: what its parent says of it; `first`: the block it begins with."""
        magic, entries, most, level, _ = _HEADER.unpack_from(node, 0)
        room = (len(node) - 12) // 12
        if magic != 0xF30A or not entries <= most <= room or level > MOST_DEPTH:
            raise DamageError(f"inode {inode.number}: its tree of extents is damaged")
        if depth is not None and (level != depth or not entries):
            raise DamageError(f"inode {inode.number}: its tree of extents is damaged")
        for number in range(entries):
            if level == 0:
                logical, count, high, low = _EXTENT.unpack_from(node, 12 + 12 * number)
            else:
                logical, low, high, _ = _INDEX.unpack_from(node, 12 + 12 * number)
                count = 1
            block = low | high << 32
            if depth is not None and number == 0 and logical != first:
                raise DamageError(f"inode {inode.number}: its tree of extents is damaged")
            written = count <= _LONGEST
            if not written:
                count -= _LONGEST
            self._check(inode, block, count)
            if level == 0:
                yield Run(logical, block if written else None, count)
            else:
                if block in seen:
                    raise DamageError(f"inode {inode.number}: its tree of extents has a loop")
                seen.add(block)
                below = self._blocks.read(block)
                self._verify(inode, below)
                yield from self._node(inode, below, level - 1, logical, seen)

    def _verify(self, inode: Inode, node: bytes) -> None:
        if not self._superblock.checksums:
            return
        end = 12 + 12 * int.from_bytes(node[4:6], "little")
        if end + 4 > len(node) or kernel_crc(inode.seed, node[:end]) != int.from_bytes(
            node[end : end + 4], "little"
        ):
            raise DamageError(f"inode {inode.number}: its tree of extents has a wrong checksum")

    # --- the block map of ext2 and ext3

    def _mapped(self, inode: Inode) -> Iterator[Run]:
        numbers = struct.unpack("<15I", inode.map)
        per = self._blocks.size // 4
        seen: set[int] = set()
        end = -(-inode.size // self._blocks.size)
        if end > 12 + per + per**2 + per**3:
            raise DamageError(f"inode {inode.number}: it is larger than its map of blocks")
        yield from self._row(inode, numbers[:12], 0)
        first = 12
        for level in (1, 2, 3):
            if first >= end:
                return
            yield from self._indirect(inode, numbers[11 + level], level, first, end, seen)
            first += per**level

    def _indirect(
        self, inode: Inode, block: int, level: int, first: int, end: int, seen: set[int]
    ) -> Iterator[Run]:
        """The runs below an indirect block of `level` levels, whose first block of the file is `first`."""
        if not block:
            return
        self._check(inode, block, 1)
        if block in seen:
            raise DamageError(f"inode {inode.number}: its map of blocks has a loop")
        seen.add(block)
        data = self._blocks.read(block)
        if not any(data):
            return
        numbers = struct.unpack(f"<{len(data) // 4}I", data)
        if level == 1:
            yield from self._row(inode, numbers, first)
            return
        span = len(numbers) ** (level - 1)
        for index, number in enumerate(numbers):
            if first + index * span >= end:
                return
            yield from self._indirect(inode, number, level - 1, first + index * span, end, seen)

    def _row(self, inode: Inode, numbers: tuple[int, ...], first: int) -> Iterator[Run]:
        """The runs of blocks that stand side by side in a map."""
        start = 0
        while start < len(numbers):
            block = numbers[start]
            stop = start + 1
            if block:
                while stop < len(numbers) and numbers[stop] == block + stop - start:
                    stop += 1
                self._check(inode, block, stop - start)
                yield Run(first + start, block, stop - start)
            start = stop

    def _check(self, inode: Inode, block: int, count: int) -> None:
        if count == 0 or not self._superblock.first_block < block <= self._superblock.blocks - count:
            raise DamageError(f"inode {inode.number}: its data lies beyond the file system")
