"""What the log changes in one place of a volume: in a buffer, or in an inode. Used by `overlay`; pure.

Only the last state of each part is kept, with the number of the record that it is from (LSN): what the disk
holds says up to which record it is new, and only what is later counts.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator

from pbsfs.base.errors import DamageError
from pbsfs.disks.xfs.inode_item import FORKS, InodeItem, converted
from pbsfs.disks.xfs.superblock import Superblock

CHUNK = 128
"""Bytes of a buffer that are logged together."""

_LSN_AND_UUID = {
    b"BMA3": (32, 40),
    b"XDB3": (16, 24),
    b"XDD3": (16, 24),
    b"XDF3": (16, 24),
    b"XSLM": (48, 16),
    b"XFSB": (240, 32),
}
_LSN_IN_TREE = {b"\x3d\xf1", b"\x3d\xff", b"\x3e\xbe", b"\x3b\xee"}
_NONE = {0, (1 << 64) - 1}

_PACKED = struct.Struct("<QI4s3H")
"""Of a change of an inode: LSN, fields, device, the sizes of its regions, which follow."""

FRESH = _PACKED.pack(0, 0, bytes(4), 0, 0, 0)
"""As a change: the inode is new, whatever the disk holds."""

_LEAST_CORE = 96
_CORE = 176
_UUID = slice(160, 176)
_KEPT = (slice(0, 96), slice(104, 112), slice(120, 132), slice(144, 152))
"""What is kept of the core of an inode: not what is the same in all of them, or set anew."""

_MOST_REGION = 1 << 15


class BufferChange:
    """The changed chunks of the buffer of `length` sectors from the sector `block` on."""

    __slots__ = ("_bitmap", "_data", "_lsns", "block", "length")

    def __init__(self, block: int, length: int) -> None:
        self.block = block
        self.length = length
        self.clear()

    def clear(self) -> None:
        self._bitmap = 0
        self._data = b""  # the chunks of which the bit is set, in order
        self._lsns = array("Q")  # of each of them; empty when they all count

    def __len__(self) -> int:
        """Bytes of memory, about."""
        return 250 + len(self._data) + 8 * len(self._lsns)

    def add(self, lsn: int, first: int, data: bytes) -> None:
        """Changes the chunks from `first` on to `data`."""
        count = len(data) // CHUNK
        start = self._place(first)
        end = self._place(first + count)
        self._data = b"".join((self._data[: start * CHUNK], data, self._data[end * CHUNK :]))
        self._lsns[start:end] = array("Q", [lsn]) * count
        self._bitmap |= ((1 << count) - 1) << first

    def _place(self, chunk: int) -> int:
        """How many chunks before `chunk` are changed."""
        return (self._bitmap & ((1 << chunk) - 1)).bit_count()

    def settle(self, newest: int | None) -> None:
        """Drops what is not later than the record `newest`, which the disk has; None: it has nothing."""
        lsns, self._lsns = self._lsns, array("Q")
        if newest is None or not lsns or min(lsns) > newest:
            return
        bitmap, kept = 0, []
        for place, chunk in enumerate(bits(self._bitmap)):
            if lsns[place] > newest:
                bitmap |= 1 << chunk
                kept.append(self._data[place * CHUNK : place * CHUNK + CHUNK])
        self._bitmap, self._data = bitmap, b"".join(kept)

    @property
    def is_settled(self) -> bool:
        return not self._lsns

    def touches(self, offset: int, size: int) -> bool:
        """Whether it changes anything in a range of the volume, in bytes."""
        start = self.block * 512
        first, end = max(0, offset - start) // CHUNK, max(0, -(-(offset + size - start) // CHUNK))
        return bool(self._bitmap >> first & ((1 << max(0, end - first)) - 1))

    def apply(self, target: bytearray, offset: int) -> None:
        """Changes `target`, the bytes of the volume from `offset` on."""
        for place, chunk in enumerate(bits(self._bitmap)):
            at = self.block * 512 + chunk * CHUNK - offset
            first, last = max(0, -at), min(CHUNK, len(target) - at)
            if first < last:
                target[at + first : at + last] = self._data[place * CHUNK + first : place * CHUNK + last]


def bits(number: int) -> Iterable[int]:
    """The places of the bits that are set, in rising order."""
    at = 0
    while number >> at:
        at += (number >> at & -(number >> at)).bit_length() - 1
        yield at
        at += 1


def newest(stored: bytes, superblock: Superblock) -> int | None:
    """The LSN up to which a buffer is new, by its first 512 bytes on the disk; None where it does not say."""
    if not superblock.has_checksums:
        return None
    uuid = superblock.meta_uuid
    if stored[:4] in _LSN_AND_UUID:
        at, uuid_at = _LSN_AND_UUID[stored[:4]]
        if stored[:4] == b"XFSB":
            uuid = superblock.uuid
    elif stored[8:10] in _LSN_IN_TREE:
        at, uuid_at = 24, 32
    else:
        return None
    found = int.from_bytes(stored[at : at + 8], "big")
    return found if stored[uuid_at : uuid_at + 16] == uuid and found not in _NONE else None


def with_change(changes: bytes, item: InodeItem, lsn: int, *, has_checksums: bool) -> bytes:
    """The changes of an inode with one more, without those that it replaces. Raises DamageError."""
    regions = [b"".join(item.regions[1][part] for part in _KEPT), *item.regions[2:]]
    least = _CORE if has_checksums else _LEAST_CORE
    if any(len(region) > _MOST_REGION for region in regions) or len(item.regions[1]) < least:
        raise DamageError(f"the log changes inode {item.number} in a form that is unknown")
    sizes = [len(region) for region in regions]
    packed = _PACKED.pack(lsn, item.fields, item.device, *sizes, *[0] * (3 - len(sizes)))
    kept: list[bytes] = []
    for change in _split(changes) if changes else ():
        fields, flushes = int.from_bytes(change[8:12], "little"), _flushes(change[_PACKED.size :])
        if (
            change == FRESH
            or _forks(fields) & ~_forks(item.fields)
            or (not has_checksums and flushes > _flushes(regions[0]))
        ):
            kept.append(change)
    return b"".join((*kept, packed, *regions))


def changed_inode(changes: bytes, stored: bytes, number: int, uuid: bytes | None) -> bytes | None:
    """The inode after its changes; None where `stored`, on the disk, is newer. `uuid`: of metadata of version
    5; None for version 4. Raises DamageError."""
    done = None
    has_checksums = uuid is not None
    for change in _split(changes):
        if change == FRESH:
            version = 3 if has_checksums else 2
            done = bytes((*b"IN", 0, 0, version)).ljust(len(stored), b"\0")
            continue
        before = done or stored
        if before[:2] != b"IN":
            raise DamageError(f"inode {number} is not where the log changes it")
        lsn, fields, device, *sizes = _PACKED.unpack_from(change)
        at, regions = _PACKED.size, []
        for size in sizes:
            regions.append(change[at : at + size])
            at += size
        regions[0] = _core(regions[0], uuid)
        item = InodeItem(fields, number, device, 0, 0, 0, [b"", *filter(None, regions)])
        done = converted(item, before, lsn, has_checksums=has_checksums) or done
    return done


def _core(kept: bytes, uuid: bytes | None) -> bytes:
    """The core of an inode of what is kept of it."""
    if uuid is None:
        return kept
    core = bytearray(_CORE)
    at = 0
    for part in _KEPT:
        size = part.stop - part.start
        core[part] = kept[at : at + size].ljust(size, b"\0")
        at += size
    core[_UUID] = uuid
    return bytes(core)


def _split(changes: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(changes):
        end = at + _PACKED.size + sum(_PACKED.unpack_from(changes, at)[3:])
        yield changes[at:end]
        at = end


def _flushes(core: bytes) -> int:
    """How often the inode of version 4 was written before the change."""
    return int.from_bytes(core[30:32], "little")


def _forks(fields: int) -> int:
    """The parts of the inode that a change replaces, a bit for each."""
    return sum(bool(fields & mask) << bit for bit, mask in enumerate(FORKS))
