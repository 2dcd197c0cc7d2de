"""The checksums of btrfs: of superblocks, of nodes of trees, and of sectors of data. Pure functions."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass

from pbsfs.base.errors import UnsupportedError
from pbsfs.disks.crc32c import crc32c

_MASK = (1 << 64) - 1
_PRIMES = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)
_LANES = struct.Struct("<4Q")


def xxhash64(data: bytes) -> int:
    """XXH64 with the seed 0, as doc/xxhash_spec.md of xxHash defines it."""
    one, two, three, four, five = _PRIMES
    length = len(data)
    end = length - length % 32
    if end:
        a, b, c, d = one + two & _MASK, two, 0, -one & _MASK
        for w, x, y, z in _LANES.iter_unpack(memoryview(data)[:end]):
            a = a + w * two & _MASK
            a = (a << 31 | a >> 33) * one & _MASK
            b = b + x * two & _MASK
            b = (b << 31 | b >> 33) * one & _MASK
            c = c + y * two & _MASK
            c = (c << 31 | c >> 33) * one & _MASK
            d = d + z * two & _MASK
            d = (d << 31 | d >> 33) * one & _MASK
        value = _left(a, 1) + _left(b, 7) + _left(c, 12) + _left(d, 18) & _MASK
        for lane in (a, b, c, d):
            value ^= _left(lane * two & _MASK, 31) * one & _MASK
            value = value * one + four & _MASK
    else:
        value = five
    value = value + length & _MASK
    at = end
    while at + 8 <= length:
        lane = int.from_bytes(data[at : at + 8], "little") * two & _MASK
        value ^= _left(lane, 31) * one & _MASK
        value = _left(value, 27) * one + four & _MASK
        at += 8
    if at + 4 <= length:
        value ^= int.from_bytes(data[at : at + 4], "little") * one & _MASK
        value = _left(value, 23) * two + three & _MASK
        at += 4
    for byte in data[at:]:
        value ^= byte * five & _MASK
        value = _left(value, 11) * one & _MASK
    value = (value ^ value >> 33) * two & _MASK
    value = (value ^ value >> 29) * three & _MASK
    return value ^ value >> 32


def _left(value: int, bits: int) -> int:
    return (value << bits | value >> 64 - bits) & _MASK


@dataclass(frozen=True, slots=True)
class Checksum:
    """A kind of checksum: its name, and how many bytes it has where it is stored."""

    name: str
    size: int
    of: Callable[[bytes], bytes]


_KINDS = {
    0: Checksum("crc32c", 4, lambda data: crc32c(data).to_bytes(4, "little")),
    1: Checksum("xxhash64", 8, lambda data: xxhash64(data).to_bytes(8, "little")),
    2: Checksum("sha256", 32, lambda data: hashlib.sha256(data).digest()),
    3: Checksum("blake2b", 32, lambda data: hashlib.blake2b(data, digest_size=32).digest()),
}


def checksum_of(kind: int) -> Checksum:
    """The kind of checksum that a superblock names. Raises UnsupportedError."""
    found = _KINDS.get(kind)
    if found is None:
        raise UnsupportedError(f"btrfs with checksums of kind {kind} is not supported")
    return found
