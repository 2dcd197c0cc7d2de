"""The names in a directory: the index $I30, a tree in the attributes INDEX_ROOT and INDEX_ALLOCATION.

Nodes are blocks with fixups; a bitmap says which are in use. The tree is read level by level, each level in
the order of its blocks. Layout: "NTFS Documentation" of the Linux-NTFS project, "Index Root", "Index Record".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from pbsfs.base.errors import DamageError
from pbsfs.disks.ntfs.boot import MOST_RECORD, Geometry
from pbsfs.disks.ntfs.mft import Inode
from pbsfs.disks.ntfs.records import BITMAP, INDEX_ALLOCATION, INDEX_ROOT, STRIDE, without_fixups

I30 = "$I30".encode("utf-16-le")

MOST_BITMAP = 8 << 20
"""Bytes of the bitmap: blocks for far more names than a directory may have."""

DOS = 2
"""The namespace of names in the form 8.3, each beside a long one."""

_ROOT = struct.Struct("<IIIB3x")
_HEADER = struct.Struct("<IIIB")
_BLOCK = struct.Struct("<16xQ")
_ENTRY = struct.Struct("<QHHH2x")
_KEY = struct.Struct("<QHHH2xQ48xIIBB")
_BELOW = struct.Struct("<Q")
_HAS_BELOW = 1
_LAST = 2
_WINDOW = 64 << 10


class Name(NamedTuple):
    """`record`: a reference. `name`: as UTF-16. `flags`: of the file, with those of the index; `tag`: of its
    reparse point. `space`: the namespace."""

    record: int
    name: bytes
    flags: int
    tag: int
    space: int


def read_names(directory: Inode, geometry: Geometry) -> Iterator[Name]:
    """All names, those in the form 8.3 too.

    Raises DamageError after those that can be read, KeyRequiredError, SourceError.
    """
    root = directory.first(INDEX_ROOT, I30)
    if root is None or not root.resident or len(root.value) < _ROOT.size + 16:
        raise DamageError("it has no index")
    _kind, _order, size, _clusters = _ROOT.unpack_from(root.value)
    if not STRIDE <= size <= MOST_RECORD or size & (size - 1):
        raise DamageError(f"its index has blocks of {size} bytes")
    parent = directory.base.reference
    below: list[int] = []
    yield from _node(root.value, _ROOT.size, parent, below)
    blocks: _Blocks | None = None
    seen: set[int] = set()
    fault: DamageError | None = None
    while below:
        if blocks is None:
            blocks = _Blocks(directory, geometry, size)
        level, below = sorted(below), []
        for number in level:
            try:
                if number in seen:
                    raise DamageError(f"index block {number} is in its tree twice")
                seen.add(number)
                yield from _node(blocks.read(number), 24, parent, below)
            except DamageError as error:
                fault = fault or error
    if fault is not None:
        raise fault
    if blocks is not None:
        blocks.check(seen)


def _node(data: bytes, header: int, parent: int, below: list[int]) -> Iterator[Name]:
    """The names of one node. `header`: where its header is. `below`: blocks under it are added."""
    first, used, _allocated, _flags = _HEADER.unpack_from(data, header)
    at, end = header + first, header + used
    if first < 16 or end > len(data):
        raise DamageError("a node of its index is damaged")
    while at + 16 <= end:
        record, length, key, flags = _ENTRY.unpack_from(data, at)
        if length < 16 or length & 7 or at + length > end:
            break
        if flags & _HAS_BELOW:
            if length < 24:
                break
            below.append(_BELOW.unpack_from(data, at + length - 8)[0])
        if flags & _LAST:
            return
        if length < _KEY.size or key > length - 16:
            break
        _record, _length, _size, _flags, inside, kind, tag, letters, space = _KEY.unpack_from(data, at)
        if 66 + 2 * letters > key:
            break
        if inside != parent:
            raise DamageError("a name in its index belongs to another directory")
        name = data[at + _KEY.size : at + _KEY.size + 2 * letters]
        yield Name(record, name, kind, tag, space)
        at += length
    raise DamageError("an entry of its index is damaged")


class _Blocks:
    """The blocks of one index, by the numbers that its nodes have for them."""

    def __init__(self, directory: Inode, geometry: Geometry, size: int) -> None:
        stream = directory.stream(INDEX_ALLOCATION, I30)
        used = directory.stream(BITMAP, I30)
        if stream is None or used is None:
            raise DamageError("its index has no blocks")
        self._size = size
        self._step = geometry.cluster if geometry.cluster <= size else STRIDE
        self._stream = stream
        self._count = min(stream.initialized, stream.size) // size
        if used.size > MOST_BITMAP:
            raise DamageError(f"the bitmap of its index has {used.size} bytes")
        self._used = used.read(0, min(used.size, -(-self._count // 8)))
        self._window = (-1, b"")

    def read(self, number: int) -> bytes:
        place = number * self._step
        index, rest = divmod(place, self._size)
        if rest or index >= self._count:
            raise DamageError(f"index block {number} lies beyond its index")
        if index >> 3 >= len(self._used) or not self._used[index >> 3] >> (index & 7) & 1:
            raise DamageError(f"index block {number} is not in use")
        try:
            data = without_fixups(self._raw(place), b"INDX")
        except DamageError as error:
            raise DamageError(f"index block {number}: {error}") from None
        if _BLOCK.unpack_from(data)[0] != number:
            raise DamageError(f"index block {number} is that of another place")
        return data

    def _raw(self, place: int) -> bytes:
        start = place - place % _WINDOW
        if self._window[0] != start:
            size = min(_WINDOW, self._count * self._size - start)
            try:
                self._window = (start, self._stream.read(start, size))
            except DamageError:  # what is damaged may be another part of the window
                return self._stream.read(place, self._size)
        return self._window[1][place - start : place - start + self._size]

    def check(self, seen: set[int]) -> None:
        """Raises DamageError where there are blocks in use that are not in the tree."""
        used = int.from_bytes(self._used, "little") & (1 << self._count) - 1
        if used.bit_count() != len(seen):
            raise DamageError(f"its index has {used.bit_count()} blocks, and {len(seen)} are in its tree")
