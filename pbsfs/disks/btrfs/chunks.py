"""The chunks of btrfs: where on which devices the bytes at a logical address are.

A chunk is a range of logical addresses with a profile: in one place (single), in several (DUP, RAID1,
RAID1C3, RAID1C4), in stripes (RAID0, RAID5, RAID6) or both (RAID10). Synchronous; of one thread.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.contents.base import Piece
from pbsfs.disks.btrfs.superblock import Superblock, read_superblock
from pbsfs.disks.volume import Volume

HEADER = struct.Struct("<QQQQIIIHH")
STRIPE = struct.Struct("<QQ16s")

_RAID0, _RAID1, _DUP, _RAID10, _RAID5, _RAID6, _RAID1C3, _RAID1C4 = (1 << bit for bit in range(3, 11))
_PROFILES = (1 << 11) - (1 << 3)
_COPIES = {0: 1, _DUP: 2, _RAID1: 2, _RAID1C3: 3, _RAID1C4: 4}
_PARITY = {_RAID5: 1, _RAID6: 2}

CHUNK_ITEM = 228

_MOST_CHUNKS = 1 << 20
_MOST_STRIPES = 256


class Devices:
    """The devices of a file system that are there, by number and UUID."""

    def __init__(self, volume: Volume, others: Sequence[Volume]) -> None:
        """`others`: volumes among which the other devices are; those of other file systems are ignored.
        Raises DamageError, UnsupportedError where `volume` is not one that is read."""
        first = read_superblock(volume)
        found = [(first, volume)]
        for other in others:
            try:
                block = read_superblock(other)
            except DamageError:
                continue
            if block.uuid == first.uuid and block.node_uuid == first.node_uuid:
                found.append((block, other))
        # A commit writes one device after the other. A device that lags by more was away, and is stale.
        self.superblock = max(
            (block for block, _volume in found),
            key=lambda block: (block.generation, block.first, block.log is not None),
        )
        self._volumes: dict[tuple[int, bytes], tuple[int, Volume]] = {}
        for block, device in found:
            if block.generation + 1 >= self.superblock.generation:
                self._volumes.setdefault((block.device_id, block.device_uuid), (block.generation, device))

    @property
    def count(self) -> int:
        return len(self._volumes)

    def find(self, number: int, uuid: bytes) -> tuple[int, Volume] | None:
        """A device with the generation of its superblock; None where it is not there, or stale."""
        return self._volumes.get((number, uuid))


@dataclass(frozen=True, slots=True)
class Chunk:
    """`columns`: over which stripes go in turn; each has the places where it is: a volume and the offset in
    it, the best first. An empty column is on devices that are missing: on `missing`. `parity`: how many of
    a row hold parity."""

    start: int
    length: int
    stripe: int
    columns: tuple[tuple[tuple[Volume, int], ...], ...]
    parity: int
    missing: str


class Chunks:
    """All chunks of a file system, by logical address."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._sector = devices.superblock.sector_size
        self._starts: list[int] = []
        self._chunks: list[Chunk] = []

    def add_system(self, superblock: Superblock) -> None:
        """The chunks in the superblock, which hold the chunk tree. Raises DamageError."""
        data, at = superblock.chunks, 0
        while at < len(data):
            if at + 17 + HEADER.size > len(data) or data[at + 8] != CHUNK_ITEM:
                raise DamageError("the list of chunks in the superblock ends early")
            (start,) = struct.unpack_from("<Q", data, at + 9)
            stripes = HEADER.unpack_from(data, at + 17)[7]
            size = HEADER.size + stripes * STRIPE.size
            self.add(start, data[at + 17 : at + 17 + size])
            at += 17 + size

    def add(self, start: int, item: bytes) -> None:
        """A chunk item. Raises DamageError, UnsupportedError."""
        if len(item) < HEADER.size:
            raise DamageError(f"chunk {start} is too short")
        length, _owner, stripe, kind, _align, _width, _sector, count, sub = HEADER.unpack_from(item)
        if len(item) != HEADER.size + count * STRIPE.size or not 0 < count <= _MOST_STRIPES:
            raise DamageError(f"chunk {start} has an impossible number of stripes")
        if not length or start + length >= 1 << 64 or start % self._sector or length % self._sector:
            raise DamageError(f"chunk {start} has an impossible length")
        profile = kind & _PROFILES
        stripes = list(STRIPE.iter_unpack(item[HEADER.size :]))
        if profile in _COPIES:
            if count != _COPIES[profile]:
                raise DamageError(f"chunk {start} has an impossible number of stripes")
            groups = [stripes]
        elif profile == _RAID0 or profile in _PARITY:
            groups = [[place] for place in stripes]
        elif profile == _RAID10 and sub == 2 and count % sub == 0:
            groups = [stripes[at : at + sub] for at in range(0, count, sub)]
        else:
            raise UnsupportedError(f"btrfs with the profile {profile:#x} of a chunk is not supported")
        parity = _PARITY.get(profile, 0)
        if len(groups) <= parity or (
            len(groups) > 1 and (not 4096 <= stripe <= 1 << 30 or stripe & stripe - 1)
        ):
            raise DamageError(f"chunk {start} has impossible stripes")
        missing: list[str] = []
        columns = []
        for group in groups:
            places = []
            for number, offset, uuid in group:
                device = self._devices.find(number, uuid)
                if device is None:
                    missing.append(str(number))
                else:
                    places.append((device[0], device[1], offset))
            places.sort(key=lambda place: -place[0])
            columns.append(tuple((volume, offset) for _generation, volume, offset in places))
        at = bisect.bisect_right(self._starts, start)
        chunk = Chunk(start, length, stripe, tuple(columns), parity, ", ".join(missing))
        if at and self._chunks[at - 1].start == start:
            if self._chunks[at - 1] != chunk:
                raise DamageError(f"chunk {start} is there twice")
            return
        if (at and self._chunks[at - 1].start + self._chunks[at - 1].length > start) or (
            at < len(self._starts) and start + length > self._starts[at]
        ):
            raise DamageError(f"chunk {start} overlaps another one")
        if len(self._chunks) >= _MOST_CHUNKS:
            raise DamageError(f"there are more than {_MOST_CHUNKS} chunks")
        self._starts.insert(at, start)
        self._chunks.insert(at, chunk)

    def copies(self, address: int) -> int:
        """How many copies of the byte at a logical address can be read; at least 1. Raises DamageError."""
        return max(1, min(map(len, self._at(address).columns)))

    def striped(self, address: int) -> bool:
        """Whether what is at a logical address lies in stripes. Raises DamageError."""
        return len(self._at(address).columns) > 1

    def read(self, address: int, size: int, copy: int = 0) -> bytes:
        """Raises DamageError, KeyRequiredError, SourceError."""
        parts = [volume.read(offset, length) for volume, offset, length in self._parts(address, size, copy)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def pieces(self, address: int, size: int, copy: int = 0) -> Iterator[Piece]:
        """Where the bytes are on the disks. Raises DamageError."""
        for volume, offset, length in self._parts(address, size, copy):
            yield from volume.pieces(offset, length)

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Requests ranges of logical addresses, each with a size, side by side. Raises DamageError."""
        wanted: dict[int, tuple[Volume, list[tuple[int, int]]]] = {}
        for address, size in ranges:
            for volume, offset, length in self._parts(address, size, 0):
                wanted.setdefault(id(volume), (volume, []))[1].append((offset, length))
        for volume, places in wanted.values():
            volume.prefetch(places)

    def _at(self, address: int) -> Chunk:
        at = bisect.bisect_right(self._starts, address) - 1
        if at >= 0:
            chunk = self._chunks[at]
            if address < chunk.start + chunk.length:
                return chunk
        raise DamageError(f"no chunk holds the address {address}")

    def _parts(self, address: int, size: int, copy: int) -> Iterator[tuple[Volume, int, int]]:
        while size > 0:
            chunk = self._at(address)
            within = address - chunk.start
            columns = chunk.columns
            if len(columns) == 1:
                column, offset, length = 0, within, chunk.length - within
            else:
                number, inside = divmod(within, chunk.stripe)
                row, column = divmod(number, len(columns) - chunk.parity)
                if chunk.parity:
                    column = (column + row) % len(columns)
                offset, length = row * chunk.stripe + inside, chunk.stripe - inside
            places = columns[column]
            if not places:
                raise DamageError(
                    f"the address {address} is on device {chunk.missing} of the file system, "
                    "which is missing in this snapshot, or out of date"
                )
            volume, start = places[min(copy, len(places) - 1)]
            length = min(length, size)
            yield volume, start + offset, length
            address += length
            size -= length
