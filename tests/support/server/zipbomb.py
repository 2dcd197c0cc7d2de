"""A zip bomb: a small stored chunk that unpacks to as much as one likes."""

from __future__ import annotations

import functools
import zlib

from pbsfs.formats.blob import BlobKind


@functools.lru_cache(maxsize=4)
def zip_bomb(size: int, *, announce: bool) -> bytes:
    """A stored chunk, compressed, that unpacks to `size` zero bytes: run-length blocks (RFC 8878, 3.1.1)."""
    block = 128 << 10
    count, rest = divmod(size, block)
    sizes = [block] * count + [rest]
    blocks = b"".join(
        (run << 3 | 1 << 1 | (number == count)).to_bytes(3, "little") + b"\0"
        for number, run in enumerate(sizes)
    )
    window = bytes([(20 - 10) << 3])  # 1 MiB
    header = b"\xc0" + window + size.to_bytes(8, "little") if announce else b"\x00" + window
    frame = b"\x28\xb5\x2f\xfd" + header + blocks
    return BlobKind.COMPRESSED.value + zlib.crc32(frame).to_bytes(4, "little") + frame
