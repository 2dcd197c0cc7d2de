"""LZNT1, the compression of NTFS, decoded.

Chunks of up to 4096 bytes, each with its own length; a chunk that is shorter is filled with zeros, and zeros
follow the last one. Layout: [MS-XCA] 2.5. Pure functions.
"""

from __future__ import annotations

from pbsfs.base.errors import DamageError

CHUNK = 4096
"""Bytes that one chunk holds."""


def decompress(data: bytes, size: int) -> bytes:
    """`size` bytes, a multiple of CHUNK. Raises DamageError where `data` is not what a compressor makes."""
    out = bytearray()
    at = 0
    while len(out) < size and at + 2 <= len(data):
        header = data[at] | data[at + 1] << 8
        if not header:
            break
        end = at + 3 + (header & 0xFFF)
        if header & 0x7000 != 0x3000 or end > len(data):
            raise DamageError("compressed data is damaged")
        chunk = _chunk(data[at + 2 : end]) if header & 0x8000 else data[at + 2 : end]
        out += chunk
        out += bytes(CHUNK - len(chunk))
        at = end
    if not out:
        raise DamageError("compressed data is missing")  # zeros are stored as a hole
    return bytes(out) + bytes(size - len(out))


def _chunk(data: bytes) -> bytearray:
    out = bytearray()
    at, end = 0, len(data)
    while at < end:
        flags = data[at]
        at += 1
        if not flags:
            out += data[at : at + 8]
            at += 8
            continue
        for bit in range(8):
            if at >= end:
                break
            if not flags >> bit & 1:
                out.append(data[at])
                at += 1
                continue
            if at + 2 > end or not out:
                raise DamageError("compressed data is damaged")
            token = data[at] | data[at + 1] << 8
            at += 2
            shift = 16 - max((len(out) - 1).bit_length(), 4)  # bits of the length: the fewer, the more is out
            distance, length = (token >> shift) + 1, (token & (1 << shift) - 1) + 3
            start = len(out) - distance
            if start < 0 or len(out) + length > CHUNK:
                raise DamageError("compressed data is damaged")
            if distance >= length:
                out += out[start : start + length]
            else:
                found = bytes(out[start:])
                out += (found * (length // distance + 1))[:length]
    if len(out) > CHUNK:
        raise DamageError("compressed data is damaged")
    return out
