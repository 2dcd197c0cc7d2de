"""The compressions of squashfs, in memory that is bounded. Pure."""

from __future__ import annotations

import lzma
import zlib
from types import MappingProxyType

import zstandard

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.disks import lz4, lzo

NAMES = MappingProxyType({1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"})
"""By the number in the superblock."""

_GZIP, _LZO, _XZ, _LZ4, _ZSTD = 1, 3, 4, 5, 6
_READ = {_GZIP, _LZO, _XZ, _LZ4, _ZSTD}
_XZ_MEMORY = 64 << 20
_WINDOW = 1 << 20


def check(kind: int) -> None:
    """Raises UnsupportedError for a compression that is not read."""
    if kind not in _READ:
        name = NAMES.get(kind, f"of kind {kind}")
        raise UnsupportedError(f"squashfs with compression {name} is not supported")


def decompress(kind: int, data: bytes, most: int) -> bytes:
    """What a block holds. Raises DamageError, also where that is more than `most` bytes."""
    try:
        if kind == _GZIP:
            inflating = zlib.decompressobj()
            found = inflating.decompress(data, most + 1)
            is_whole = inflating.eof
        elif kind == _XZ:
            unpacking = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
            found = unpacking.decompress(data, most + 1)
            is_whole = unpacking.eof
        elif kind == _ZSTD:
            reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(data)
            found = reader.read(most + 1)
            is_whole = True
        else:
            found, is_whole = (lzo if kind == _LZO else lz4).decompress(data, most), True
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError) as error:
        raise DamageError(f"{NAMES[kind]} data is damaged: {error}") from None
    if len(found) > most:
        raise DamageError(f"{NAMES[kind]} data holds more than it should")
    if not is_whole:
        raise DamageError(f"{NAMES[kind]} data ends early")
    return found
