"""Logs of XFS, for tests of those that read them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from pbsfs.disks.crc32c import crc32c
from pbsfs.disks.volume import Disk
from pbsfs.disks.xfs.log import BLOCK, MAGIC, Log
from pbsfs.disks.xfs.transactions import committed
from tests.support.disks import MemoryDisk

UUID = bytes(range(16))
COUNT = 9000
START, COMMIT, CONTINUES, CONTINUED, UNMOUNT = 1, 2, 4, 8, 32
Part = tuple[int, int, bytes]
"""Of a record: a transaction, flags, data."""


def parts(number: int, *regions: bytes, lead: bool = True) -> list[Part]:
    """A transaction with one item a region."""
    head: list[Part] = [(number, START, b""), (number, 0, b"NART" + bytes(12))] if lead else []
    return [*head, *((number, 0, region) for region in regions), (number, COMMIT, b"")]


def item(text: bytes) -> bytes:
    return struct.pack("<HH", 0x123D, 1) + text


class Written:
    """A log in which records are written one after the other, round the ring. `count`: its blocks."""

    def __init__(
        self,
        *,
        at: int = 0,
        cycle: int = 1,
        version: int = 2,
        checksums: bool = True,
        count: int = COUNT,
        uuid: bytes = UUID,
    ) -> None:
        self.data = bytearray(count * BLOCK)
        self.count, self.uuid = count, uuid
        self.at, self.cycle = at, cycle
        self.version, self.checksums = version, checksums
        for block in range(count):  # what was there before
            self.data[block * BLOCK : block * BLOCK + 4] = (cycle - (block >= at)).to_bytes(4, "big")

    @property
    def lsn(self) -> int:
        return self.cycle << 32 | self.at

    def add(self, written: Sequence[Part], *, tail: int, size: int = 32 << 10, pad: int = 0) -> int:
        """Appends a record. Returns the block that it begins in."""
        data = b""
        for number, flags, part in written:
            client = 0xAA if flags == UNMOUNT else 0x69
            data += struct.pack(">IIBBH", number, len(part), client, flags, 0) + part
        data = data.ljust(pad, b"\0")
        blocks = -(-len(data) // BLOCK)
        headers = max(1, size // (32 << 10)) if self.version == 2 else 1
        total = headers + blocks
        cycles = [self.cycle + (self.at + block >= self.count) for block in range(total)]
        body = bytearray(data.ljust(blocks * BLOCK, b"\0"))
        words = [body[at : at + 4] for at in range(0, len(body), BLOCK)]
        for block in range(blocks):
            body[block * BLOCK : block * BLOCK + 4] = cycles[headers + block].to_bytes(4, "big")
        head = bytearray(headers * BLOCK)
        struct.pack_into(
            ">4sIIIQQIII",
            head,
            0,
            MAGIC,
            self.cycle,
            self.version,
            len(data),
            self.lsn,
            tail,
            0,
            0,
            len(written),
        )
        head[44:300] = b"".join(words[:64]).ljust(256, b"\0")
        head[300:304], head[304:320] = b"\0\0\0\1", self.uuid
        if self.version == 2:
            head[320:324] = size.to_bytes(4, "big")
        for number in range(1, headers):
            more = cycles[number].to_bytes(4, "big") + b"".join(words[64 * number : 64 * number + 64])
            head[number * BLOCK : number * BLOCK + len(more)] = more
        needed = -(-len(data) // (32 << 10)) if self.version == 2 else 1
        rest = b"".join(head[n * BLOCK : n * BLOCK + 260] for n in range(1, needed))
        if self.checksums:
            value = crc32c(bytes(head[:328]) + rest + bytes(body[: len(data)]))
            head[32:36] = value.to_bytes(4, "little")
        first = self.at
        for block in range(total):
            where = (first + block) % self.count * BLOCK
            self.data[where : where + BLOCK] = (head + body)[block * BLOCK : (block + 1) * BLOCK]
        self.cycle += first + total >= self.count
        self.at = (first + total) % self.count
        return first

    def log(self) -> Log:
        disk = Disk(MemoryDisk(self.data))
        return Log(disk, uuid=UUID, is_v2=self.version == 2, has_checksums=self.checksums)

    def texts(self) -> list[bytes]:
        return [item.regions[0][4:] for found in committed(self.log()) for item in found.items()]
