"""The bytes of files of squashfs: where they are, and those that have to be decoded. Of one thread."""

from __future__ import annotations

import functools
import itertools
import struct
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import DECODED, Piece
from pbsfs.disks.pieces import append
from pbsfs.disks.squashfs.compression import decompress
from pbsfs.disks.squashfs.inode import Inode, block_sizes
from pbsfs.disks.squashfs.metadata import Metadata
from pbsfs.disks.squashfs.superblock import NOWHERE, Superblock
from pbsfs.disks.volume import Volume

_PLAIN = 1 << 24
_FRAGMENT = struct.Struct("<QI4x")
_KEPT = 8 << 20
"""Bytes of decoded blocks that are kept."""

_KEPT_FILES = 2


class _Block(NamedTuple):
    """`length` bytes of a file, from `skip` on of what is stored in `stored` bytes at `place`; zeros where
    these are 0. `is_plain`: it is not compressed. `is_fragment`: other files may have parts of it too."""

    place: int
    stored: int
    is_plain: bool
    length: int
    skip: int = 0
    is_fragment: bool = False


class Data:
    """The data of all files of a file system."""

    def __init__(self, volume: Volume, superblock: Superblock, metadata: Metadata) -> None:
        """Raises DamageError."""
        self._volume = volume
        self._metadata = metadata
        self._size = superblock.block_size
        self._compressor = superblock.compressor
        self._count = superblock.fragments
        self._fragments: list[int] = []
        if superblock.fragments and superblock.fragment_table != NOWHERE:
            self._fragments = metadata.places(superblock.fragment_table, superblock.fragments, _FRAGMENT.size)
        self._lists = functools.lru_cache(_KEPT_FILES)(self._list)
        self._decoded = functools.lru_cache(max(2, _KEPT // self._size))(self._decode)

    def _list(self, inode: Inode) -> tuple[array[int], array[int]]:
        """Where the blocks of a file are, and their sizes, as they are stored. Raises DamageError,
        UnsupportedError."""
        sizes = array("I", block_sizes(self._metadata, inode, self._size))
        stored = (size & ~_PLAIN for size in sizes)
        places = array("Q")
        for place in itertools.accumulate(stored, initial=inode.start):
            if place > self._volume.size:
                raise DamageError(f"the block at byte {place} lies beyond the file system")
            places.append(place)
        return places, sizes

    def _blocks(self, inode: Inode, first: int = 0, end: int | None = None) -> Iterator[_Block]:
        """The blocks of a file from the `first`th on, in order. Raises DamageError, UnsupportedError."""
        places, sizes = self._lists(inode)
        for number in range(first, len(sizes) if end is None else min(end, len(sizes))):
            stored, is_plain = sizes[number] & ~_PLAIN, bool(sizes[number] & _PLAIN)
            length = min(inode.size - number * self._size, self._size)
            if stored > self._size or (stored and is_plain and stored != length):
                raise DamageError(f"the block at byte {places[number]} has a wrong size")
            yield _Block(places[number], stored, is_plain, length)
        tail = inode.size - len(sizes) * self._size
        if tail > 0 and (end is None or end > len(sizes)):
            yield self._fragment(inode, tail)

    def _fragment(self, inode: Inode, length: int) -> _Block:
        if inode.fragment >= self._count:
            raise DamageError(f"there is no fragment {inode.fragment}")
        place, size = _FRAGMENT.unpack(self._metadata.entry(self._fragments, inode.fragment, _FRAGMENT.size))
        stored, is_plain = size & ~_PLAIN, bool(size & _PLAIN)
        most = stored if is_plain else self._size
        if not 0 < stored <= self._size or inode.offset + length > most:
            raise DamageError(f"fragment {inode.fragment} has a wrong size")
        self._volume.check(place, stored)
        return _Block(place, stored, is_plain, length, inode.offset, is_fragment=True)

    def pieces(self, inode: Inode) -> list[Piece]:
        """Where the bytes of a file are. Raises DamageError, UnsupportedError."""
        pieces: list[Piece] = []
        at = 0
        for block in self._blocks(inode):
            if not block.stored:
                append(pieces, Piece(None, 0, block.length))
            elif block.is_plain:
                for piece in self._volume.pieces(block.place + block.skip, block.length):
                    append(pieces, piece)
            else:
                append(pieces, Piece(DECODED, at, block.length))
            at += block.length
        return pieces

    def stored(self, inode: Inode) -> list[Piece]:
        """Where that is which `read` decodes. Raises DamageError, UnsupportedError."""
        pieces: list[Piece] = []
        for block in self._blocks(inode):
            if block.stored and not block.is_plain:
                for piece in self._volume.pieces(block.place, block.stored):
                    append(pieces, piece)
        return pieces

    def read(self, inode: Inode, offset: int, size: int) -> bytes:
        """`size` bytes of a file. Raises DamageError, UnsupportedError, KeyRequiredError, SourceError."""
        parts: list[bytes] = []
        for block, first, last in self._parts(inode, offset, size):
            if not block.stored:
                parts.append(bytes(last - first))
            elif block.is_plain:
                parts.append(self._volume.read(block.place + block.skip + first, last - first))
            else:
                data = self._decoded(block.place, block.stored)
                end = block.skip + block.length
                if len(data) < end or (not block.is_fragment and len(data) != end):
                    raise DamageError(f"the block at byte {block.place} holds a wrong number of bytes")
                parts.append(data[block.skip + first : block.skip + last])
        return b"".join(parts)

    def _parts(self, inode: Inode, offset: int, size: int) -> Iterator[tuple[_Block, int, int]]:
        """The blocks that hold a range, each with the part of it: its first byte, and the one behind it."""
        end = offset + size
        start = offset - offset % self._size
        for block in self._blocks(inode, start // self._size, -(-end // self._size)):
            yield block, max(0, offset - start), min(block.length, end - start)
            start += self._size

    def _decode(self, place: int, stored: int) -> bytes:
        try:
            return decompress(self._compressor, self._volume.read(place, stored), self._size)
        except DamageError as error:
            raise DamageError(f"the block at byte {place}: {error}") from None
