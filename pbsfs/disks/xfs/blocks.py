"""Metadata blocks of XFS, verified: checksum, place, owner. Of one thread; used by the other modules here."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from pbsfs.base.errors import DamageError
from pbsfs.disks.crc32c import crc32c
from pbsfs.disks.xfs.overlay import Overlay
from pbsfs.disks.xfs.superblock import Superblock

WINDOW = 64 << 10
"""Bytes of inodes that are read together."""

_WINDOWS = 96
_KEPT = 4 << 20


class Header(NamedTuple):
    """Where the header of a kind of block has what verifies it."""

    checksum: int
    place: int
    uuid: int
    owner: int


DIRECTORY = Header(4, 8, 24, 40)
TREE = Header(12, 16, 32, 48)
"""Of nodes and leaves of attributes."""

EXTENTS = Header(64, 24, 40, 56)
REMOTE = Header(12, 40, 16, 32)
"""Of values of attributes and of symbolic links."""


class Blocks:
    """The metadata of a file system, as it is after log recovery."""

    def __init__(self, overlay: Overlay, superblock: Superblock, size: int) -> None:
        """`size`: of the volume, in bytes."""
        self._overlay = overlay
        self.superblock = superblock
        self._size = size
        self._windows: OrderedDict[int, bytes] = OrderedDict()
        self._kept: OrderedDict[tuple[int, ...], bytes] = OrderedDict()
        self._held = 0

    def read(self, offset: int, size: int) -> bytes:
        return self._overlay.read(offset, size)

    def window(self, offset: int) -> tuple[int, int]:
        """The range that is read for an inode at `offset`: where, and how much."""
        start = offset & ~(WINDOW - 1)
        return start, min(WINDOW, self._size - start)

    def raw_inode(self, number: int) -> bytes:
        """The bytes of an inode, with its checksum verified. Raises DamageError."""
        superblock = self.superblock
        offset = superblock.inode_offset(number)
        start, size = self.window(offset)
        window = self._windows.get(start)
        if window is None:
            window = self._overlay.read(start, size)
            if len(self._windows) >= _WINDOWS:
                self._windows.popitem(last=False)
            self._windows[start] = window
        else:
            self._windows.move_to_end(start)
        raw = window[offset - start : offset - start + superblock.inode_size]
        if len(raw) != superblock.inode_size or raw[:2] != b"IN":
            raise DamageError(f"there is no inode at byte {offset}")
        if superblock.has_checksums and not self._overlay.changed(offset, superblock.inode_size):
            if crc32c(raw[:100] + b"\0\0\0\0" + raw[104:]) != int.from_bytes(raw[100:104], "little"):
                raise DamageError(f"the inode at byte {offset} has a wrong checksum")
            if raw[4] != 3 or int.from_bytes(raw[152:160], "big") != number:
                raise DamageError(f"the inode at byte {offset} is another one")
            if raw[160:176] != superblock.meta_uuid:
                raise DamageError(f"the inode at byte {offset} belongs to another file system")
        return raw

    def block(self, parts: list[tuple[int, int]], header: Header, owner: int | None) -> bytes:
        """A block that lies in `parts`, each an offset and a size in bytes; verified in version 5.

        `owner`: the inode that it belongs to; None for no check. Raises DamageError.
        """
        key = (parts[0][0], sum(size for _, size in parts), len(parts), *header, owner or 0)
        kept = self._kept.get(key) if len(parts) == 1 else None
        if kept is not None:
            self._kept.move_to_end(key)
            return kept
        data = b"".join(self._overlay.read(offset, size) for offset, size in parts)
        if self.superblock.has_checksums:
            self._verify(data, parts, header, owner)
        if len(parts) == 1:
            self._kept[key] = data
            self._held += len(data)
            while self._held > _KEPT:
                self._held -= len(self._kept.popitem(last=False)[1])
        return data

    def _verify(self, data: bytes, parts: list[tuple[int, int]], header: Header, owner: int | None) -> None:
        offset = parts[0][0]
        at = header.checksum
        if not any(self._overlay.changed(*part) for part in parts) and crc32c(
            data[:at] + b"\0\0\0\0" + data[at + 4 :]
        ) != int.from_bytes(data[at : at + 4], "little"):
            raise DamageError(f"the block at byte {offset} has a wrong checksum")
        if (
            int.from_bytes(data[header.place : header.place + 8], "big") != offset >> 9
            or data[header.uuid : header.uuid + 16] != self.superblock.meta_uuid
        ):
            raise DamageError(f"the block at byte {offset} belongs elsewhere")
        if owner is not None and int.from_bytes(data[header.owner : header.owner + 8], "big") != owner:
            raise DamageError(f"the block at byte {offset} belongs to another inode")
