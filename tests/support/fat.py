"""A writer of FAT volumes for tests, which puts what it writes where the test wants it, wrong or right. After
Microsoft's "FAT File System Specification"."""

from __future__ import annotations

import struct

SECTOR = 512


def item(
    short: bytes,
    *,
    first: int = 0,
    size: int = 0,
    attributes: int = 0x20,
    small: int = 0,
    time: int = 0xA491,
    date: int = 0x5D79,
) -> bytes:
    """A directory entry. `short`: 11 bytes."""
    return struct.pack(
        "<11sBB7xHHHHI", short, attributes, small, first >> 16, time, date, first & 0xFFFF, size
    )


def short_checksum(short: bytes) -> int:
    total = 0
    for byte in short:
        total = ((total << 7 | total >> 1) + byte) & 0xFF
    return total


def long_items(name: str | bytes, short: bytes, *, checksum: int | None = None) -> list[bytes]:
    """The entries of a long name, in the order in which they are stored. `name`: text, or UTF-16."""
    units = name.encode("utf-16-le") if isinstance(name, str) else name
    if len(units) % 26:
        units = (units + b"\0\0").ljust(-(-(len(units) + 2) // 26) * 26, b"\xff")
        units = units[: -(-len(units) // 26) * 26]
    parts = [units[at : at + 26] for at in range(0, len(units), 26)]
    check = short_checksum(short) if checksum is None else checksum
    items = []
    for number, part in enumerate(parts, 1):
        last = 0x40 if number == len(parts) else 0
        items.append(
            struct.pack("<B10sBBB12sH4s", number | last, part[:10], 15, 0, check, part[10:22], 0, part[22:])
        )
    return items[::-1]


DOTS = item(b".          ", attributes=0x10) + item(b"..         ", attributes=0x10)


class FatImage:
    """A volume of `count` clusters of 512 bytes. FAT12 and FAT16 have a root of 64 entries, FAT32 one at
    cluster 2."""

    def __init__(self, bits: int, count: int = 3000, *, tables: int = 2, flags: int = 0) -> None:
        self.bits = bits
        width = {12: 12, 16: 16, 28: 32}[bits]
        length = -(-(count + 2) * width // 8 // SECTOR) + 1
        self.table = 4 * SECTOR
        self.table_size = length * SECTOR
        self.root = self.table + tables * self.table_size
        self.start = self.root + (0 if bits == 28 else 64 * 32)
        total = self.start // SECTOR + count
        self.data = bytearray(total * SECTOR)
        small = bits != 28
        struct.pack_into(
            "<3s8sHBHBHHBHHHII", self.data, 0, b"\xeb\x3c\x90", b"tests   ", SECTOR, 1, 4, tables,
            64 if small else 0, total if small else 0, 0xF8, length if small else 0, 0, 0, 0,
            0 if small else total,
        )  # fmt: skip
        if not small:
            struct.pack_into("<IHHIHH", self.data, 36, length, flags, 0, 2, 1, 0)
        struct.pack_into(
            "<BBBI11s", self.data, 36 if small else 64, 0x80, 0, 0x29, 0x1234ABCD, b"NO NAME    "
        )
        self.data[510:512] = b"\x55\xaa"
        self.link(0, 0xFFFFFF8)
        self.link(1, 0xFFFFFFF)
        if not small:
            self.link(2, 0xFFFFFFF)

    def link(self, cluster: int, following: int, *, table: int = 0) -> None:
        at = self.table + table * self.table_size
        if self.bits == 12:
            at += cluster * 3 // 2
            (old,) = struct.unpack_from("<H", self.data, at)
            value = following & 0xFFF
            new = old & 0xF | value << 4 if cluster & 1 else old & 0xF000 | value
            struct.pack_into("<H", self.data, at, new)
        elif self.bits == 16:
            struct.pack_into("<H", self.data, at + cluster * 2, following & 0xFFFF)
        else:  # the highest 4 bits mean nothing
            struct.pack_into("<I", self.data, at + cluster * 4, following & 0xFFFFFFF | 0xA0000000)

    def chain(self, *clusters: int) -> None:
        for cluster, following in zip(clusters, (*clusters[1:], 0xFFFFFFF), strict=True):
            self.link(cluster, following)

    def at(self, cluster: int) -> int:
        return self.start + (cluster - 2) * SECTOR

    def put(self, data: bytes, *clusters: int) -> None:
        for number, cluster in enumerate(clusters):
            part = data[number * SECTOR : (number + 1) * SECTOR]
            self.data[self.at(cluster) : self.at(cluster) + len(part)] = part

    def put_root(self, data: bytes) -> None:
        self.data[self.root : self.root + len(data)] = data
