"""The compression of extents of btrfs: zlib, lzo and zstd, in memory that is bounded. Pure."""

from __future__ import annotations

import zlib

import zstandard

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.disks import lzo

MOST = 128 << 10
"""Bytes of an extent that is compressed, and of what it holds."""

_ZLIB, _LZO, _ZSTD = 1, 2, 3
_WINDOW = 128 << 10


def decompress(kind: int, data: bytes, size: int, sector: int) -> bytes:
    """The first `size` bytes that `data` holds, or less where it ends before. Raises DamageError and
    UnsupportedError."""
    if kind == _ZLIB:
        try:
            return zlib.decompressobj().decompress(data, size) if size else b""
        except zlib.error as error:
            raise DamageError(f"zlib data is damaged: {error}") from None
    if kind == _LZO:
        return _lzo(data, size, sector)
    if kind == _ZSTD:
        try:
            return zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(data).read(size)
        except zstandard.ZstdError as error:
            raise DamageError(f"zstd data is damaged: {error}") from None
    raise UnsupportedError(f"btrfs with compression of kind {kind} is not supported")


def _lzo(data: bytes, size: int, sector: int) -> bytes:
    """Each sector is compressed on its own: its length in four bytes, which lie in one sector, and the data.
    Before the first is the length of all."""
    end = int.from_bytes(data[:4], "little")
    if not 4 <= end <= len(data):
        raise DamageError("LZO data has an impossible length")
    parts: list[bytes] = []
    at, missing = 4, size
    while missing > 0 and at < end:
        if sector - at % sector < 4:
            at += sector - at % sector
        length = int.from_bytes(data[at : at + 4], "little")
        at += 4
        if not length or at + length > end:
            raise DamageError("LZO data has an impossible length")
        part = lzo.decompress(data[at : at + length], sector)
        if len(part) != sector and at + length < end and missing > len(part):
            raise DamageError("LZO data holds less than it should")
        parts.append(part)
        missing -= len(part)
        at += length
    return b"".join(parts)[:size]
