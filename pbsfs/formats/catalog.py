"""The catalog of a snapshot's archives (`catalog.pcat1`): names and types, sizes and times of files.

The vendor's client writes it beside version 1 archives, where names lie between the data. It is a hint: what
an archive itself says is true. Format: proxmox-backup, pbs-datastore/src/catalog.rs. No I/O: bytes come from
a callable. Immutable, for any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pbsfs.base.errors import DamageError

MAGIC = bytes((145, 253, 96, 249, 196, 103, 88, 213))

DIRECTORY, FILE, SYMLINK, HARDLINK, BLOCK, CHARACTER, FIFO, SOCKET = b"dflhbcps"

MAX_TABLE = 64 << 20
"""Bytes of a directory's table, at most: of a million names of 60 bytes."""

MAX_NAME = 4095

_TYPES = frozenset(b"dflhbcps")
_GUESS = 64 << 10
"""Bytes that are read at a block's start: most blocks in whole."""


class CatalogEntry(NamedTuple):
    """`type`: one of the constants. `size` (bytes) and `mtime` (seconds): of files. `block`: where a
    directory's own table is; 0 for all else."""

    type: int
    name: bytes
    size: int
    mtime: int
    block: int


class Catalog:
    """A catalog of `size` bytes, which `pread(offset, size)` returns."""

    def __init__(self, pread: Callable[[int, int], bytes], size: int) -> None:
        """Raises DamageError, and what `pread` raises."""
        self._pread = pread
        self.size = size
        if size < len(MAGIC) + 2 + 8 or pread(0, len(MAGIC)) != MAGIC:
            raise DamageError("not a catalog: wrong magic number")
        self.root = int.from_bytes(pread(size - 8, 8), "little")
        """The block whose directories are the archives, named as they are stored (`root.pxar.didx`)."""

    def table(self, block: int) -> list[CatalogEntry]:
        """The entries of the directory whose table is at `block`.

        Raises DamageError, and what `pread` raises.
        """
        end = self.size - 8
        if not len(MAGIC) <= block < end:
            raise DamageError(f"the catalog has no table at byte {block}")
        raw = self._pread(block, min(_GUESS, end - block))
        try:
            length, at = _varint(raw, 0)
            if length > min(MAX_TABLE, end - block - at):
                raise DamageError(f"the catalog's table at byte {block} is too long ({length} bytes)")
            if at + length > len(raw):
                raw = self._pread(block, at + length)
            return _parse(raw[: at + length], at, block)
        except IndexError:
            raise DamageError(f"the catalog's table at byte {block} is cut short") from None


def _parse(raw: bytes, at: int, block: int) -> list[CatalogEntry]:
    """The table at `at` in `raw`, whose block starts at `block`. Raises IndexError where it is cut short."""
    count, at = _varint(raw, at)
    if count > (len(raw) - at) // 3:
        raise DamageError(f"the catalog's table at byte {block} has an impossible count ({count})")
    entries = []
    for _ in range(count):
        kind = raw[at]
        if kind not in _TYPES:
            raise DamageError(f"the catalog's table at byte {block} has an entry of an unknown type")
        length, at = _varint(raw, at + 1)
        name = raw[at : at + length]
        at += length
        if not 0 < length <= MAX_NAME or at > len(raw):
            raise DamageError(f"the catalog's table at byte {block} has a name of {length} bytes")
        size = mtime = child = 0
        if kind == DIRECTORY:
            back, at = _varint(raw, at)
            child = block - back
            if back == 0 or child < len(MAGIC):
                raise DamageError(f"the catalog's table at byte {block} has a directory outside the catalog")
        elif kind == FILE:
            size, at = _varint(raw, at)
            mtime, at = _signed_varint(raw, at)
        entries.append(CatalogEntry(kind, name, size, mtime, child))
    if at != len(raw):
        raise DamageError(f"the catalog's table at byte {block} is longer than its entries")
    return entries


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, 7 bits a byte and the lowest first, and where it ends."""
    byte = raw[at]
    if byte < 128:
        return byte, at + 1
    value = shift = 0
    for place in range(at, at + 10):
        byte = raw[place]
        value |= (byte & 127) << shift
        if byte < 128:
            if value >> 64:
                break
            return value, place + 1
        shift += 7
    raise DamageError("the catalog has a number that is too large")


def _signed_varint(raw: bytes, at: int) -> tuple[int, int]:
    """As `_varint`; a negative number has the high bit in all bytes, and a 0 behind them."""
    value = shift = 0
    for place in range(at, at + 11):
        byte = raw[place]
        if byte < 128:
            value = -value if byte == 0 else value | byte << shift
            if not -(1 << 63) <= value < 1 << 63:
                break
            return value, place + 1
        value |= (byte & 127) << shift
        shift += 7
    raise DamageError("the catalog has a number that is too large")
