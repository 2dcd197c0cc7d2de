"""The inodes of an ext file system: their bytes, with their checksums verified for many at once.

Of one thread. One checksum after the other takes longer than all else that an inode needs.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from pbsfs.base.errors import DamageError
from pbsfs.disks.crc32c import side_by_side
from pbsfs.disks.ext.blocks import WINDOW, Blocks
from pbsfs.disks.ext.groups import Groups
from pbsfs.disks.ext.inode import CHECKSUM, GENERATION, Inode, parse_inode
from pbsfs.disks.ext.superblock import Superblock

PREFETCHED: Final = 64
"""Windows that are requested side by side."""

STRETCHES: Final = 16_384
"""Stretches of which it is known whether their checksums are right: 256 bytes each, or less."""

_FEW: Final = 4
"""Inodes of a directory for which it takes longer to verify all those around them."""


class Inodes:
    """Reads the inodes of one file system. A stretch of them is what a group has in a window of `Blocks`."""

    def __init__(self, superblock: Superblock, blocks: Blocks, groups: Groups) -> None:
        self._superblock = superblock
        self._blocks = blocks
        self._groups = groups
        self._size = superblock.inode_size
        # By group and window: the number of the first inode, and for each one 0 where its checksum is right.
        self._wrong: OrderedDict[tuple[int, int], tuple[int, bytes]] = OrderedDict()

    def read(self, number: int) -> Inode:
        """Raises DamageError."""
        block, offset = self._groups.place(number)
        raw = self._blocks.read(block)[offset : offset + self._size]
        stretch = self._wrong.get(self._stretch(number, block))
        verified = stretch is not None and not stretch[1][number - stretch[0]]
        return parse_inode(self._superblock, number, raw, verified=verified)

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Requests what `read` needs for each of `numbers`, side by side, and verifies checksums."""
        stretches: dict[tuple[int, int], None] = {}
        for number in numbers:
            try:
                stretches[self._stretch(number, self._groups.place(number)[0])] = None
            except DamageError:
                continue  # `read` raises it
        windows = sorted({window for _group, window in stretches})
        volume = self._blocks.volume
        if len(windows) > 1:
            ranges = [
                (window * WINDOW, min(WINDOW, volume.size - window * WINDOW))
                for window in windows
                if window * WINDOW < volume.size
            ]
            for at in range(0, len(ranges), PREFETCHED):
                volume.prefetch(ranges[at : at + PREFETCHED])
        if self._superblock.checksums and self._size > CHECKSUM[-1] and len(numbers) > _FEW:
            for group, window in stretches:
                if (group, window) not in self._wrong:
                    self._verify(group, window)

    def _stretch(self, number: int, block: int) -> tuple[int, int]:
        return (number - 1) // self._superblock.inodes_per_group, block * self._blocks.size // WINDOW

    def _verify(self, group: int, window: int) -> None:
        """Finds out which inodes of a stretch have a right checksum. Those that cannot be read have none."""
        size = self._blocks.size
        in_group = self._superblock.inodes_per_group
        first = group * in_group + 1
        table = self._groups.place(first)[0]
        start = max(table, window * WINDOW // size)
        end = min(table + in_group * self._size // size, (window + 1) * WINDOW // size)
        first += (start - table) * size // self._size
        try:
            raw = b"".join(map(self._blocks.read, range(start, end)))
        except DamageError:  # `read` says for which
            wrong = b"\1" * ((end - start) * size // self._size)
        else:
            wrong = _checked(self._superblock, first, raw)
        if len(self._wrong) >= STRETCHES:
            self._wrong.popitem(last=False)
        self._wrong[group, window] = first, wrong


def _checked(superblock: Superblock, first: int, raw: bytes) -> bytes:
    """For each of the inodes in `raw`, the first of which has the number `first`: 0 where its checksum is
    right. As `inode.parse_inode` verifies one, if its fields include both halves of the checksum."""
    size = superblock.inode_size
    count = len(raw) // size
    numbers = struct.pack(f"<{count}I", *range(first, first + count))
    columns = [numbers[place::4] for place in range(4)]
    columns += [raw[place::size] for place in range(GENERATION, GENERATION + 4)]
    columns += [raw[place::size] for place in range(size)]
    for place in CHECKSUM:
        columns[8 + place] = bytes(count)
    # The kernel's form of the checksum is inverted.
    found = side_by_side(columns, superblock.seed ^ 0xFFFFFFFF)
    wrong = 0
    for part, place in zip(found, CHECKSUM, strict=True):
        stored = int.from_bytes(raw[place::size], "little")
        wrong |= int.from_bytes(part, "little") ^ stored ^ int.from_bytes(b"\xff" * count, "little")
    return wrong.to_bytes(count, "little")
