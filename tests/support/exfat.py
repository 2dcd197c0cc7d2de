"""A writer of exFAT volumes for tests, which puts what it writes where the test wants it: no program makes
such volumes without root. After Microsoft's "exFAT file system specification"."""

from __future__ import annotations

import struct

SECTOR = 512
TABLE = 24 * SECTOR


def set_checksum(data: bytes) -> int:
    total = 0
    for at, byte in enumerate(data):
        if at not in (2, 3):
            total = ((total << 15 | total >> 1) + byte) & 0xFFFF
    return total


def boot_checksum(data: bytes | bytearray) -> int:
    total = 0
    for at, byte in enumerate(data):
        if at not in (106, 107, 112):
            total = ((total << 31 | total >> 1) + byte) & 0xFFFFFFFF
    return total


def file_set(
    name: str | bytes,
    *,
    first: int = 0,
    size: int = 0,
    valid: int | None = None,
    chain: bool = True,
    attributes: int = 0x20,
    time: int = 0x5D79A491,
    hundredths: int = 0,
    zone: int = 0x80,
    more: bytes = b"",
) -> bytes:
    """The directory entries of a file. `name`: text, or UTF-16. `chain`: whether its clusters have one.
    `more`: further entries."""
    units = name.encode("utf-16-le") if isinstance(name, str) else name
    flags = (1 if size else 0) | (0 if chain else 2)
    stream = struct.pack(
        "<BBBBHHQIIQ", 0xC0, flags, 0, len(units) // 2, 0, 0, size if valid is None else valid, 0, first, size
    )
    names = [b"\xc1\0" + units[at : at + 30].ljust(30, b"\0") for at in range(0, len(units), 30)]
    rest = stream + b"".join(names) + more
    head = struct.pack("<BBHHH", 0x85, len(rest) // 32, 0, attributes, 0) + struct.pack("<III", 0, time, 0)
    head += bytes([0, hundredths, 0, zone, 0]) + bytes(7)
    return head[:2] + set_checksum(head + rest).to_bytes(2, "little") + head[4:] + rest


class ExFatImage:
    """A volume of `count` clusters of `size` bytes, with its root at cluster 4 and nothing in it."""

    def __init__(self, *, size: int = 512, count: int = 2000, serial: int = 0x12345678) -> None:
        self.size = size
        table_length = -(-(count + 2) * 4 // SECTOR)
        self.start = TABLE + table_length * SECTOR
        self.data = bytearray(self.start + count * size)
        boot = bytearray(512 * 12)
        struct.pack_into(
            "<3s8s53sQQIIIIIIHHBBBBB",
            boot,
            0,
            b"\xeb\x76\x90",
            b"EXFAT   ",
            bytes(53),
            0,
            len(self.data) // SECTOR,
            TABLE // SECTOR,
            table_length,
            self.start // SECTOR,
            count,
            4,
            serial,
            0x100,
            0,
            9,
            (size // SECTOR).bit_length() - 1,
            1,
            0x80,
            0xFF,
        )
        boot[510:512] = b"\x55\xaa"
        self._boot = boot
        self.seal()
        self.link(0, 0xFFFFFFF8)
        self.link(1, 0xFFFFFFFF)
        self.link(4, 0xFFFFFFFF)

    def seal(self, **fields: int) -> None:
        """Writes both boot regions, with their checksum. `fields`: flags."""
        if "flags" in fields:
            struct.pack_into("<H", self._boot, 106, fields["flags"])
        self._boot[11 * 512 :] = boot_checksum(self._boot[: 11 * 512]).to_bytes(4, "little") * 128
        self.data[: 12 * 512] = self._boot
        self.data[12 * 512 : 24 * 512] = self._boot

    def link(self, cluster: int, following: int) -> None:
        struct.pack_into("<I", self.data, TABLE + cluster * 4, following)

    def chain(self, *clusters: int) -> None:
        for cluster, following in zip(clusters, (*clusters[1:], 0xFFFFFFFF), strict=True):
            self.link(cluster, following)

    def at(self, cluster: int) -> int:
        return self.start + (cluster - 2) * self.size

    def put(self, data: bytes, *clusters: int) -> None:
        """Writes data into clusters."""
        for number, cluster in enumerate(clusters):
            part = data[number * self.size : (number + 1) * self.size]
            self.data[self.at(cluster) : self.at(cluster) + len(part)] = part
