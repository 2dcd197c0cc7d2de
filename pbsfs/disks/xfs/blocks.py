"""Metadata blocks of XFS, verified: checksum, place, owner. Of one thread; used by the other modules here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from pbsfs.base.errors import DamageError
from pbsfs.disks.crc32c import crc32c, side_by_side
from pbsfs.disks.xfs.overlay import Overlay
from pbsfs.disks.xfs.superblock import Superblock

WINDOW = 64 << 10
"""Bytes of inodes that are read together."""

_WINDOWS = 96
_VERIFIED = 16_384  # windows of which it is known whose checksums are right: up to 256 bytes each
_CHECKSUM = range(100, 104)  # of an inode
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
        # By window: for each inode in it, 0 where its checksum is right.
        self._wrong: OrderedDict[int, bytes] = OrderedDict()
        self._kept: OrderedDict[tuple[int, ...], bytes] = OrderedDict()
        self._held = 0

    def read(self, offset: int, size: int) -> bytes:
        return self._overlay.read(offset, size)

    def window(self, offset: int) -> tuple[int, int]:
        """The range that is read for an inode at `offset`: where, and how much."""
        start = offset & ~(WINDOW - 1)
        return start, min(WINDOW, self._size - start)

    def verify_inodes(self, starts: Iterable[int]) -> None:
        """Verifies the checksums of all inodes in the windows that begin at `starts`, side by side, which is
        faster than one by one. `raw_inode` raises what is wrong."""
        if not self.superblock.has_checksums:
            return
        for start in starts:
            if start not in self._wrong:
                try:
                    wrong = self._checked(self._window(start))
                except DamageError:  # `raw_inode` raises it
                    wrong = b""
                if len(self._wrong) >= _VERIFIED:
                    self._wrong.popitem(last=False)
                self._wrong[start] = wrong

    def _checked(self, window: bytes) -> bytes:
        """For each of the inodes that may be in `window`, 0 where its checksum is right."""
        size = self.superblock.inode_size
        count = len(window) // size
        window = window[: count * size]
        columns = [window[place::size] for place in range(size)]
        columns[_CHECKSUM.start : _CHECKSUM.stop] = [bytes(count)] * len(_CHECKSUM)
        wrong = 0
        for part, place in zip(side_by_side(columns), _CHECKSUM, strict=True):
            wrong |= int.from_bytes(part, "little") ^ int.from_bytes(window[place::size], "little")
        return wrong.to_bytes(count, "little")

    def _window(self, start: int) -> bytes:
        window = self._windows.get(start)
        if window is None:
            window = self._overlay.read(*self.window(start))
            if len(self._windows) >= _WINDOWS:
                self._windows.popitem(last=False)
            self._windows[start] = window
        else:
            self._windows.move_to_end(start)
        return window

    def raw_inode(self, number: int) -> bytes:
        """The bytes of an inode, with its checksum verified. Raises DamageError."""
        superblock = self.superblock
        offset = superblock.inode_offset(number)
        start, _size = self.window(offset)
        at = offset - start
        raw = self._window(start)[at : at + superblock.inode_size]
        changed = self._overlay.inode(number, offset, raw)
        raw = changed or raw
        if len(raw) != superblock.inode_size or raw[:2] != b"IN":
            raise DamageError(f"there is no inode at byte {offset}")
        if superblock.has_checksums and changed is None:
            wrong, place = self._wrong.get(start, b""), at // superblock.inode_size
            if (place >= len(wrong) or wrong[place]) and not _is_right(raw):
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


def _is_right(raw: bytes) -> bool:
    """Whether the checksum of an inode is."""
    return crc32c(raw[:100] + bytes(4) + raw[104:]) == int.from_bytes(raw[100:104], "little")
