"""The superblock of btrfs: where the trees are, and which device this is.

A device has up to three copies. All are written with each transaction, the first one also with each log tree.
Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.disks.btrfs.checksums import Checksum, checksum_of
from pbsfs.disks.volume import Volume

PLACES = (64 << 10, 64 << 20, 256 << 30)
SIZE = 4096
MAGIC = b"_BHRfS_M"
MAGIC_AT = 64

_FIELDS = struct.Struct("<32s16sQQ8s9QIIIIIQQQQHBBB")
_DEVICE = struct.Struct("<QQQIIIQQQIBB16s16s")
_DEVICE_AT, _LABEL_AT, _METADATA_UUID_AT, _CHUNKS_AT = 201, 299, 571, 811
_LABEL_SIZE, _CHUNKS_SIZE = 256, 2048

_METADATA_UUID, _ZONED, _TREE_V2, _STRIPE_TREE = 1 << 10, 1 << 12, 1 << 13, 1 << 14
_READABLE = 0xFFF | 1 << 16
"""Incompatible features from mixed back references (bit 0) to RAID1C3 and RAID1C4 (bit 11), and simple
quotas."""

_NAMES = {_ZONED: "zoned", _TREE_V2: "extent-tree-v2", _STRIPE_TREE: "raid-stripe-tree"}

HIGHEST_LEVEL = 7


@dataclass(frozen=True, slots=True)
class Root:
    """Where a tree begins: the logical address of its highest node, the level and generation of that."""

    address: int
    level: int
    generation: int


@dataclass(frozen=True, slots=True)
class Superblock:
    """`uuid`: of the file system; `node_uuid`: the one that nodes carry. `log`: None without a log tree.
    `first`: whether this is the first copy. `chunks`: the chunks of the chunk tree itself, not decoded."""

    uuid: bytes
    node_uuid: bytes
    generation: int
    root: Root
    chunk_root: Root
    log: Root | None
    devices: int
    sector_size: int
    node_size: int
    checksum: Checksum
    device_id: int
    device_uuid: bytes
    label: bytes
    chunks: bytes
    first: bool


def read_superblock(volume: Volume) -> Superblock:
    """The newest valid copy of the superblock. Raises DamageError, UnsupportedError."""
    found: list[Superblock] = []
    problem: DamageError | None = None
    for copy in _copies(volume):
        if isinstance(copy, DamageError):
            problem = problem or copy
        elif not found or copy.uuid == found[0].uuid:  # another one's is left from an older file system
            found.append(copy)
    if isinstance(problem, UnsupportedError) or not found:
        raise problem or DamageError("there is no superblock of btrfs")
    return max(found, key=lambda copy: copy.generation)  # of equals the first


def _copies(volume: Volume) -> Iterator[Superblock | DamageError]:
    for place in PLACES:
        if place + SIZE > volume.size:
            return
        try:
            yield _parsed(volume.read(place, SIZE), place)
        except DamageError as error:
            yield error


def _parsed(block: bytes, place: int) -> Superblock:
    (checksum, uuid, address, _flags, magic, generation, root, chunk_root, log, _log_generation, _total) = (
        fields := _FIELDS.unpack_from(block)
    )[:11]
    _used, _directory, devices, sector, node, _leaf, _stripe, chunks_size, chunk_generation = fields[11:20]
    _compatible, _read_only, features, kind, level, chunk_level, log_level = fields[20:]
    if magic != MAGIC:
        raise DamageError(f"there is no superblock of btrfs at byte {place}")
    of = checksum_of(kind)
    if of.of(block[32:]) != checksum[: of.size]:
        raise DamageError(f"the superblock at byte {place} has a wrong checksum")
    if address != place:
        raise DamageError(f"the superblock at byte {place} belongs elsewhere")
    unknown = features & ~_READABLE
    if unknown:
        names = [_NAMES.get(1 << bit, f"feature {bit}") for bit in range(64) if unknown >> bit & 1]
        raise UnsupportedError(f"btrfs with {', '.join(names)} is not supported")
    sizes = {1 << bit for bit in range(12, 17)}
    if sector not in sizes or node not in sizes or node < sector:
        raise DamageError(f"the superblock at byte {place} has impossible sizes of sectors or nodes")
    if chunks_size > _CHUNKS_SIZE or max(level, chunk_level, log_level) > HIGHEST_LEVEL:
        raise DamageError(f"the superblock at byte {place} has impossible sizes")
    device = _DEVICE.unpack_from(block, _DEVICE_AT)
    node_uuid = uuid
    if features & _METADATA_UUID:
        node_uuid = block[_METADATA_UUID_AT : _METADATA_UUID_AT + 16]
    return Superblock(
        uuid=uuid,
        node_uuid=node_uuid,
        generation=generation,
        root=Root(root, level, generation),
        chunk_root=Root(chunk_root, chunk_level, chunk_generation),
        log=Root(log, log_level, generation + 1) if log else None,
        devices=devices,
        sector_size=sector,
        node_size=node,
        checksum=of,
        device_id=device[0],
        device_uuid=device[12],
        label=block[_LABEL_AT : _LABEL_AT + _LABEL_SIZE].split(b"\0", 1)[0],
        chunks=block[_CHUNKS_AT : _CHUNKS_AT + chunks_size],
        first=place == PLACES[0],
    )
