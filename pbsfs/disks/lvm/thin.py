"""Thin pools: which blocks of a pool a thin volume has (drivers/md/dm-thin-metadata.c, persistent-data/).

The B-trees are read as they are needed, one path for each range. Synchronous; of one thread.
"""

from __future__ import annotations

import bisect
import functools
import struct
from collections.abc import Iterator, Sequence

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import Piece
from pbsfs.disks.crc32c import crc32c
from pbsfs.disks.volume import MOST_READ, Volume

_BLOCK = 4096
"""Bytes of a block of metadata."""

_CACHED = 256
"""Nodes of B-trees that are kept, each some 16 KiB."""

_DEEPEST = 12
"""Levels of a B-tree: enough for 2^64 keys."""

_MAGIC = 27022010
_SUPERBLOCK = struct.Struct("<IIQ16sQII")
_ROOTS = struct.Struct("<QQII")
_ROOTS_AT = 320
_NODE = struct.Struct("<IIQIIII")
_SECTOR = 512

Node = tuple[bool, tuple[int, ...], tuple[int, ...]]
"""Whether it is a leaf; its keys; its values, or its children."""


class Pool:
    """A thin pool. `metadata`, `data`: its logical volumes. `chunk`: bytes of a block of data."""

    def __init__(self, metadata: Volume, data: Volume, chunk: int) -> None:
        """Raises DamageError, SourceError."""
        self.data = data
        self.chunk = chunk
        self._metadata = metadata
        raw = metadata.read(0, _BLOCK)
        checksum, _flags, place, _uuid, magic, version, _time = _SUPERBLOCK.unpack_from(raw)
        if magic != _MAGIC or place:
            raise DamageError("the thin pool has no superblock")
        if checksum != _checksum(raw, 160774):
            raise DamageError("the superblock of the thin pool has a wrong checksum")
        self._mappings, _details, chunk_sectors, block_sectors = _ROOTS.unpack_from(raw, _ROOTS_AT)
        if version not in (1, 2) or block_sectors * _SECTOR != _BLOCK:
            raise DamageError(f"the thin pool has version {version} and blocks of {block_sectors} sectors")
        if chunk_sectors * _SECTOR != chunk or not chunk:
            raise DamageError(
                f"the thin pool has chunks of {chunk_sectors} sectors, and its group says {chunk}"
            )
        self._node = functools.lru_cache(_CACHED)(self._read_node)

    def root(self, device: int) -> int:
        """Where the B-tree of a thin device begins. Raises DamageError."""
        for key, value in self.entries(self._mappings, device, device + 1):
            if key == device:
                return value
        raise DamageError(f"the thin pool does not have the device {device}")

    def entries(self, root: int, first: int, end: int) -> Iterator[tuple[int, int]]:
        """The keys from `first` to before `end`, in order, with their values. Raises DamageError."""
        key: int | None = first
        while key is not None and key < end:
            keys, values, following = self._leaf(root, key)
            for at in range(bisect.bisect_left(keys, key), bisect.bisect_left(keys, end)):
                yield keys[at], values[at]
            key = following

    def _leaf(self, root: int, key: int) -> tuple[tuple[int, ...], tuple[int, ...], int | None]:
        """The leaf that has `key` if one has it: its keys, its values, and the first key of the next one."""
        low, high, place = 0, None, root
        for _depth in range(_DEEPEST):
            is_leaf, keys, values = self._node(place)
            if keys and (keys[0] < low or (high is not None and keys[-1] >= high)):
                raise DamageError(f"block {place} of the thin pool has keys that belong elsewhere")
            if is_leaf:
                return keys, values, high
            if not keys:
                raise DamageError(f"block {place} of the thin pool has no children")
            at = max(bisect.bisect_right(keys, key) - 1, 0)
            low, place = keys[at], values[at]
            high = keys[at + 1] if at + 1 < len(keys) else high
        raise DamageError("a B-tree of the thin pool is too deep")

    def _read_node(self, place: int) -> Node:
        raw = self._metadata.read(place * _BLOCK, _BLOCK)
        checksum, flags, own, count, most, value_size, _pad = _NODE.unpack_from(raw)
        if checksum != _checksum(raw, 121107) or own != place:
            raise DamageError(f"block {place} of the thin pool has a wrong checksum or place")
        if flags not in (1, 2) or value_size != 8 or count > most or most > (_BLOCK - _NODE.size) // 16:
            raise DamageError(f"block {place} of the thin pool is not a node with values of 8 bytes")
        keys = struct.unpack_from(f"<{count}Q", raw, _NODE.size)
        values = struct.unpack_from(f"<{count}Q", raw, _NODE.size + 8 * most)
        if any(map(int.__ge__, keys, keys[1:])):
            raise DamageError(f"block {place} of the thin pool has keys out of order")
        return flags == 2, keys, values


class Thin(Volume):
    """A thin volume of `size` bytes: the device `device` of `pool`. `origin`: what is read where it has no
    blocks; else zeros."""

    def __init__(self, pool: Pool, device: int, size: int, origin: Volume | None = None) -> None:
        """Raises DamageError, SourceError."""
        self.size = size
        self._pool = pool
        self._origin = origin
        self._root = pool.root(device)

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        for volume, start, part in self._parts(offset, length):
            if volume is None:
                yield Piece(None, 0, part)
            else:
                yield from volume.pieces(start, part)

    def read(self, offset: int, size: int) -> bytes:
        if size > MOST_READ:
            raise DamageError(f"{size} bytes are too many to read at once")
        parts = [
            bytes(part) if volume is None else volume.read(start, part)
            for volume, start, part in self._parts(offset, size)
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        below: dict[int, tuple[Volume, list[tuple[int, int]]]] = {}
        for offset, size in ranges:
            for volume, start, part in self._parts(offset, size):
                if volume is not None:
                    below.setdefault(id(volume), (volume, []))[1].append((start, part))
        for volume, wanted in below.values():
            volume.prefetch(wanted)

    def _parts(self, offset: int, length: int) -> Iterator[tuple[Volume | None, int, int]]:
        """Where a range is: ranges of volumes; None for zeros."""
        self.check(offset, length)
        end = offset + length
        for first, count, block in self._runs(offset, end):
            start, stop = max(first * self._pool.chunk, offset), min((first + count) * self._pool.chunk, end)
            if start > offset:
                yield from self._hole(offset, start)
            yield self._pool.data, block * self._pool.chunk + start - first * self._pool.chunk, stop - start
            offset = stop
        if offset < end:
            yield from self._hole(offset, end)

    def _hole(self, start: int, end: int) -> Iterator[tuple[Volume | None, int, int]]:
        if self._origin is not None and start < self._origin.size:
            middle = min(end, self._origin.size)
            yield self._origin, start, middle - start
            start = middle
        if start < end:
            yield None, 0, end - start

    def _runs(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The blocks of a range that the device has, neighbours together: first, how many, where."""
        chunk = self._pool.chunk
        first = count = block = 0
        for key, value in self._pool.entries(self._root, offset // chunk, -(-end // chunk)):
            place = value >> 24  # below it is a time, for snapshots
            if count and key == first + count and place == block + count:
                count += 1
                continue
            if count:
                yield first, count, block
            first, count, block = key, 1, place
        if count:
            yield first, count, block


def _checksum(block: bytes, salt: int) -> int:
    return crc32c(block[4:]) ^ 0xFFFFFFFF ^ salt
