"""CRC-32C against its definition and known values."""

from __future__ import annotations

import random

import pytest

from pbsfs.disks.crc32c import crc32c, side_by_side


def slowly(data: bytes, value: int = 0) -> int:
    """Bit by bit, as RFC 3720 defines it."""
    value ^= 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_known_values(data: bytes, value: int) -> None:
    assert crc32c(data) == value


@pytest.mark.parametrize("size", [1, 3, 4, 63, 64, 65, 66, 72, 73, 100, 128, 255, 512, 1000, 4096, 16352])
def test_every_size_agrees_with_the_definition(size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert crc32c(data) == slowly(data)
    assert crc32c(memoryview(data), 0x12345678) == slowly(data, 0x12345678)


def test_parts_give_the_checksum_of_the_whole() -> None:
    data = random.Random(1).randbytes(5000)
    for at in (0, 1, 50, 64, 65, 1000, 4999, 5000):
        assert crc32c(data[at:], crc32c(data[:at])) == crc32c(data)


def test_every_bit_counts() -> None:
    data = bytearray(1024)
    found = {crc32c(data)}
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        found.add(crc32c(data))
        data[bit // 8] ^= 1 << bit % 8
    assert len(found) == 8 * len(data) + 1


@pytest.mark.parametrize(("count", "size"), [(1, 1), (3, 4), (256, 264), (128, 512), (2, 1000)])
@pytest.mark.parametrize("value", [0, 0x12345678])
def test_many_side_by_side_agree_with_one_by_one(count: int, size: int, value: int) -> None:
    source = random.Random(size)
    rows = [source.randbytes(size - size // 3) + bytes(size // 3) for _ in range(count)]
    rows[0] = bytes(size)
    found = side_by_side([bytes(row[place] for row in rows) for place in range(size)], value)
    checksums = [int.from_bytes(bytes(parts), "little") for parts in zip(*found, strict=True)]
    assert checksums == [crc32c(row, value) for row in rows]
