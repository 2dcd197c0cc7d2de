"""CRC-32C (Castagnoli), fast without compiled code: the checksum of ext4, XFS and btrfs.

The bytes are one polynomial over GF(2), in a large integer. A multiple of the generator that has few terms
reduces it with some shifts and XORs, until few bytes are left for a table: 16 KiB take some 60 µs, a table
alone 1,500 µs. Pure functions.
"""

from __future__ import annotations

from typing import Final

_GENERATOR: Final = 0x82F63B78
"""RFC 3720, in the order of bits in which bytes are sent: the lowest bit is the coefficient of x^31."""

_MULTIPLE: Final = (290, 136, 113, 107, 32, 0)
"""The exponents of a multiple of the generator. Doubled, they are those of its square, also a multiple."""

_DEGREE: Final = _MULTIPLE[0]

_FEW: Final = 64
"""Bytes for which the table alone is as fast."""


def _table() -> tuple[int, ...]:
    values = list(range(256))
    for _ in range(8):
        values = [value >> 1 ^ (_GENERATOR if value & 1 else 0) for value in values]
    return tuple(values)


_TABLE: Final = _table()


def crc32c(data: bytes | bytearray | memoryview, value: int = 0) -> int:
    """The checksum of `data`; of what `value` is the checksum of and then `data`, where it is given.

    Like zlib.crc32, inverted before and after. The kernel's `crc32c(seed, data)` is not inverted: it is
    `crc32c(data, seed ^ 0xFFFFFFFF) ^ 0xFFFFFFFF`.
    """
    state = value ^ 0xFFFFFFFF
    if len(data) > _FEW:
        data = _reduced(int.from_bytes(data, "little") ^ state, len(data) * 8)
        state = 0
    table = _TABLE
    for byte in data:
        state = table[(state ^ byte) & 0xFF] ^ state >> 8
    return state ^ 0xFFFFFFFF


def _reduced(number: int, bits: int) -> bytes:
    """Fewer bytes with the same remainder. `number`: `bits` coefficients, the highest power lowest."""
    scale = 1
    while _DEGREE * scale * 2 <= bits:
        scale *= 2
    while scale:
        # x^290 is x^136 + x^113 + x^107 + x^32 + 1: the highest coefficients move to where those are.
        while bits > _DEGREE * scale:
            count = min((_DEGREE - _MULTIPLE[1]) * scale, bits - _DEGREE * scale)
            highest = number & ((1 << count) - 1)
            number >>= count
            for exponent in _MULTIPLE[1:]:
                number ^= highest << ((_DEGREE - exponent) * scale - count)
            bits -= count
        scale //= 2
    return (number << -bits % 8).to_bytes((bits + 7) // 8, "little")
