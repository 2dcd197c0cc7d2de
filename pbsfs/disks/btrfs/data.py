"""The bytes of files of btrfs: where they are, and those that have to be decoded.

Plain extents are pieces of the disks. Inline and compressed extents, and those in stripes, are decoded here
and verified with the checksums of data. Synchronous; of one thread.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import DECODED, Piece
from pbsfs.disks.btrfs.chunks import Chunks
from pbsfs.disks.btrfs.compression import MOST, decompress
from pbsfs.disks.btrfs.items import EXTENT_CSUM, EXTENT_DATA, Extent, extent_in
from pbsfs.disks.btrfs.superblock import Superblock
from pbsfs.disks.btrfs.trees import Tree
from pbsfs.disks.pieces import append

_CHECKSUMS = (1 << 64) - 10
"""The object that all checksums of data belong to."""

_KEPT = 16
"""Decoded extents, of up to 128 KiB, that are kept."""

_STEP = 1 << 20


class Data:
    """The data of all files of a file system."""

    def __init__(self, superblock: Superblock, chunks: Chunks, checksums: Tree) -> None:
        """`checksums`: the tree of them."""
        self._sector = superblock.sector_size
        self._checksum = superblock.checksum
        self._chunks = chunks
        self._checksums = checksums
        self._decoded = functools.lru_cache(_KEPT)(self._decode)

    def extents(self, tree: Tree, number: int, offset: int, end: int) -> Iterator[Extent]:
        """The extents of inode `number` from the one that may hold `offset` on, up to `end`, in order. What
        none of them holds is zeros. Raises DamageError, UnsupportedError."""
        before = 0
        low = tree.from_before((number, EXTENT_DATA, offset))
        for (_object, _kind, start), item in tree.items(low, (number, EXTENT_DATA, end)):
            extent = extent_in(start, item, self._sector, MOST)
            if start < before:
                raise DamageError(f"the extent at byte {start} overlaps another one")
            before = extent.end
            yield extent

    def pieces(self, tree: Tree, number: int, size: int) -> list[Piece]:
        """Where the first `size` bytes of inode `number` are. Raises DamageError, UnsupportedError."""
        pieces: list[Piece] = []
        at = 0
        for extent in self.extents(tree, number, 0, size):
            if extent.start > at:
                append(pieces, Piece(None, 0, extent.start - at))
            length = min(extent.end, size) - extent.start
            if extent.inline is not None or extent.compression:
                append(pieces, Piece(DECODED, extent.start, length))
            elif not extent.address:
                append(pieces, Piece(None, 0, length))
            elif self._chunks.striped(extent.address):
                append(pieces, Piece(DECODED, extent.start, length))
            else:
                for piece in self._chunks.pieces(extent.address + extent.skip, length):
                    append(pieces, piece)
            at = extent.start + length
        if at < size:
            append(pieces, Piece(None, 0, size - at))
        return pieces

    def stored(self, tree: Tree, number: int, size: int, *, checked: bool) -> list[Piece]:
        """Where all copies are of what `read` decodes of the first `size` bytes of inode `number`. Raises
        DamageError, also where their checksums cannot be read, and UnsupportedError."""
        pieces: list[Piece] = []
        for extent in self.extents(tree, number, 0, size):
            if extent.inline is not None or not extent.address:
                continue
            if extent.compression:
                address, length = extent.address, extent.stored
            elif self._chunks.striped(extent.address):
                address, length = extent.address + extent.skip, extent.end - extent.start
            else:
                continue
            if checked:
                self._sums(address, length)
            for copy in range(self._chunks.copies(address)):
                for piece in self._chunks.pieces(address, length, copy):
                    append(pieces, piece)
        return pieces

    def read(self, tree: Tree, number: int, offset: int, size: int, *, checked: bool) -> bytes:
        """`size` bytes of inode `number`. `checked`: whether its data has checksums. Raises DamageError,
        UnsupportedError, KeyRequiredError, SourceError."""
        parts: list[bytes] = []
        at, end = offset, offset + size
        for extent in self.extents(tree, number, offset, end):
            if extent.end <= at:
                continue
            if extent.start > at:
                parts.append(bytes(extent.start - at))
                at = extent.start
            length = min(extent.end, end) - at
            parts.append(self._part(extent, at - extent.start, length, checked=checked))
            at += length
        parts.append(bytes(end - at))
        return b"".join(parts)

    def _part(self, extent: Extent, offset: int, size: int, *, checked: bool) -> bytes:
        """`size` bytes from `offset` of the range that an extent is."""
        if extent.inline is not None and not extent.compression:
            return extent.inline[offset : offset + size]
        if extent.inline is not None:
            data = decompress(extent.compression, extent.inline, extent.decoded, self._sector)
            if len(data) != extent.decoded:
                raise DamageError("compressed data ends early")
            return data[offset : offset + size]
        if not extent.address:
            return bytes(size)
        offset += extent.skip
        if extent.compression:
            data = self._decoded(extent.address, extent.stored, extent.decoded, extent.compression, checked)
            return data[offset : offset + size]
        first = offset - offset % self._sector
        last = -(-(offset + size) // self._sector) * self._sector
        parts = [
            self._verified(extent.address + start, min(_STEP, last - start), checked=checked)
            for start in range(first, last, _STEP)
        ]
        return b"".join(parts)[offset - first : offset - first + size]

    def _decode(self, address: int, stored: int, size: int, compression: int, checked: bool) -> bytes:
        """All that a compressed extent decodes to."""
        data = decompress(compression, self._verified(address, stored, checked=checked), size, self._sector)
        # The last sector of a file is stored as far as the file goes.
        if size - len(data) >= self._sector:
            raise DamageError(f"compressed data at the address {address} ends early")
        return data.ljust(size, b"\0")

    def _verified(self, address: int, size: int, *, checked: bool) -> bytes:
        """What is stored at a logical address: the first copy whose checksums are right."""
        sums = self._sums(address, size) if checked else b""
        problem: DamageError | None = None
        for copy in range(self._chunks.copies(address)):
            try:
                data = self._chunks.read(address, size, copy)
            except DamageError as error:
                problem = problem or error
                continue
            of, width = self._checksum.of, self._checksum.size
            if not checked or all(
                of(data[at : at + self._sector]) == sums[number * width : (number + 1) * width]
                for number, at in enumerate(range(0, size, self._sector))
            ):
                return data
            problem = problem or DamageError(f"the data at the address {address} has a wrong checksum")
        raise problem or DamageError(f"the data at the address {address} cannot be read")

    def _sums(self, address: int, size: int) -> bytes:
        """The checksums of sectors."""
        width = self._checksum.size
        at, end = address, address + size
        parts: list[bytes] = []
        low = self._checksums.from_before((_CHECKSUMS, EXTENT_CSUM, address))
        for (_object, _kind, start), item in self._checksums.items(low, (_CHECKSUMS, EXTENT_CSUM, end)):
            stop = min(start + len(item) // width * self._sector, end)
            if stop <= at:
                continue
            if start > at:
                break
            first = (at - start) // self._sector
            parts.append(item[first * width : (stop - start) // self._sector * width])
            at = stop
        if at < end:
            raise DamageError(f"the data at the address {at} has no checksum")
        return b"".join(parts)
