"""A volume with what its log changes, in memory. Of one thread; `recovery` fills it, `blocks` reads it.

A change is applied when its place is read, and the disk decides then whether it is new: what nobody reads
costs no reading of the disk.
"""

from __future__ import annotations

from pbsfs.base.errors import DamageError
from pbsfs.disks.volume import Volume
from pbsfs.disks.xfs.changes import FRESH, BufferChange, changed_inode, newest, with_change
from pbsfs.disks.xfs.inode_item import InodeItem
from pbsfs.disks.xfs.superblock import Superblock

SECTOR = 512

MOST_BYTES = 160 << 20
"""Memory for changes."""

_PAGE = 4096
_OVERHEAD = 150
"""Bytes that Python needs for an inode's change, about, beside its data."""


class TooLargeError(DamageError):
    """The log changes more than fits into memory."""


class Overlay:
    """A volume and its changes."""

    def __init__(self, volume: Volume, superblock: Superblock) -> None:
        self._volume = volume
        self._superblock = superblock
        self._buffers: dict[tuple[int, int], BufferChange] = {}
        self._pages: dict[int, tuple[BufferChange, ...]] = {}  # by the pages that they lie in
        self._inodes: dict[int, bytes] = {}  # by their places in the volume
        self._held = 0

    # --- reading

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes, without the changes of inodes. Raises DamageError, KeyRequiredError,
        SourceError."""
        data = self._volume.read(offset, size)
        buffers = self._buffers_in(offset, size)
        for buffer in buffers:
            if not buffer.is_settled:
                start = buffer.block * SECTOR
                stored = self._volume.read(start, min(SECTOR, buffer.length * SECTOR))
                buffer.settle(newest(stored, self._superblock))
        buffers = [buffer for buffer in buffers if buffer.touches(offset, size)]
        if not buffers:
            return data
        changed = bytearray(data)
        for buffer in buffers:
            buffer.apply(changed, offset)
        return bytes(changed)

    def changed(self, offset: int, size: int) -> bool:
        """Whether anything in a range that was read comes from the log."""
        return any(buffer.touches(offset, size) for buffer in self._buffers_in(offset, size))

    def inode(self, number: int, offset: int, stored: bytes) -> bytes | None:
        """The inode at `offset` after its changes, of `stored`, as `read` has it; None where there are none,
        or what is stored is newer. Raises DamageError."""
        changes = self._inodes.get(offset)
        if changes is None:
            return None
        superblock = self._superblock
        uuid = superblock.meta_uuid if superblock.has_checksums else None
        return changed_inode(changes, stored, number, uuid)

    def _buffers_in(self, offset: int, size: int) -> list[BufferChange]:
        found: dict[BufferChange, None] = {}
        if self._pages:
            for page in range(offset // _PAGE, -(-(offset + size) // _PAGE)):
                found |= dict.fromkeys(self._pages.get(page, ()))
        return list(found)

    # --- changing

    def change(self, block: int, length: int, lsn: int, first: int, data: bytes) -> None:
        """Changes a buffer of `length` sectors from the sector `block` on: in it, the chunks from `first` on.

        Raises TooLargeError; DamageError for what lies beyond the volume.
        """
        buffer = self._buffers.get((block, length))
        if buffer is None:
            self._volume.check(block * SECTOR, length * SECTOR)
            buffer = self._buffers[block, length] = BufferChange(block, length)
            self._hold(len(buffer))
            for page in range(block * SECTOR // _PAGE, -(-(block + length) * SECTOR // _PAGE)):
                self._pages[page] = (*self._pages.get(page, ()), buffer)
                self._hold(_OVERHEAD)
        before = len(buffer)
        buffer.add(lsn, first, data)
        self._hold(len(buffer) - before)

    def change_inode(self, item: InodeItem, lsn: int) -> None:
        """Changes an inode. Raises TooLargeError, DamageError."""
        offset = self._superblock.inode_offset(item.number)
        self._put(
            offset,
            with_change(
                self._inodes.get(offset, b""), item, lsn, has_checksums=self._superblock.has_checksums
            ),
        )

    def create(self, offset: int, count: int) -> None:
        """Makes `count` inodes from `offset` on new and free. Raises like `change`."""
        step = self._superblock.inode_size
        self._volume.check(offset, count * step)
        for at in range(offset, offset + count * step, step):
            self._put(at, FRESH)

    def cancel(self, block: int, length: int) -> None:
        """Drops all changes of a buffer, and of the inodes in it."""
        buffer = self._buffers.get((block, length))
        if buffer is not None:
            before = len(buffer)
            buffer.clear()
            self._hold(len(buffer) - before)
        step = self._superblock.inode_size
        start = block * SECTOR
        for at in range(start + -start % step, start + length * SECTOR, step):
            if at in self._inodes:
                self._hold(-_size(self._inodes.pop(at)))

    def clear(self) -> None:
        self._buffers.clear()
        self._pages.clear()
        self._inodes.clear()
        self._held = 0

    def _put(self, offset: int, changes: bytes) -> None:
        old = self._inodes.get(offset)
        self._inodes[offset] = changes
        self._hold(_size(changes) - (0 if old is None else _size(old)))

    def _hold(self, size: int) -> None:
        self._held += size
        if self._held > MOST_BYTES:
            raise TooLargeError(f"its changes take more than {MOST_BYTES >> 20} MiB")


def _size(changes: bytes) -> int:
    return _OVERHEAD + len(changes)
