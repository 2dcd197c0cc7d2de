"""Blocks of LZ4: a compression of squashfs. Pure.

Format: lz4_Block_format.md of the LZ4 project.
"""

from __future__ import annotations

from pbsfs.base.errors import DamageError

_LEAST_MATCH = 4


def decompress(data: bytes, most: int) -> bytes:
    """What a block holds: at most `most` bytes. Raises DamageError."""
    try:
        return _decompress(data, most)
    except IndexError:
        raise DamageError("LZ4 data ends early") from None


def _decompress(data: bytes, most: int) -> bytes:
    out = bytearray()
    at = 0
    while True:
        token = data[at]
        count, at = _length(data, at + 1, token >> 4)
        if at + count > len(data):
            raise DamageError("LZ4 data ends early")
        if len(out) + count > most:
            raise DamageError("LZ4 data holds more than it should")
        out += data[at : at + count]
        at += count
        if at == len(data):
            return bytes(out)
        distance = data[at] | data[at + 1] << 8
        count, at = _length(data, at + 2, token & 15)
        count += _LEAST_MATCH
        start = len(out) - distance
        if not distance or start < 0:
            raise DamageError("LZ4 data refers to what is before its begin")
        if len(out) + count > most:
            raise DamageError("LZ4 data holds more than it should")
        part = bytes(out[start : start + count])
        out += part if distance >= count else (part * (count // distance + 1))[:count]


def _length(data: bytes, at: int, count: int) -> tuple[int, int]:
    """A length, which may continue in further bytes, and where those end."""
    if count == 15:
        while data[at] == 255:
            count += 255
            at += 1
        count += data[at]
        at += 1
    return count, at
