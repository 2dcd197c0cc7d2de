"""Arrays of md, from superblocks that are made here."""

from __future__ import annotations

import random
import struct

import pytest

from pbsfs.base.errors import DamageError
from pbsfs.disks.probe import Found, probe
from pbsfs.disks.volume import Disk
from tests.support.disks import MemoryDisk
from tests.support.hostile import counts, limited

MIB = 1 << 20
LUKS = b"LUKS\xba\xbe"
DONE = (1 << 64) - 1


def folded(data: bytes) -> int:
    total: int = sum(struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4]))
    total += int.from_bytes(data[len(data) // 4 * 4 :], "little")
    return (total & 0xFFFFFFFF) + (total >> 32)


def disk(
    role: int,
    *,
    place: int = 4096,
    level: int = 1,
    events: int = 9,
    features: int = 0,
    synced: int = DONE,
    roles: tuple[int, ...] = (0, 1),
    chunk: int = 0,
    size: int = 4 * MIB,
    mark: bytes = LUKS,
) -> bytearray:
    """A member whose superblock of version 1 is at `place`; its data begins with `mark`."""
    start = 0 if place > MIB else 1 * MIB
    sectors = (2 * MIB) // 512
    raw = struct.pack(
        "<4I16s32sQiIQII", 0xA92B4EFC, 1, features, 0, b"A" * 16, b"host:7", 0, level, 0, sectors, chunk, 2
    )
    raw = raw.ljust(128, b"\0") + struct.pack("<QQQQ", start // 512, sectors, place // 512, 0)
    raw = (raw + struct.pack("<I", role)).ljust(200, b"\0") + struct.pack(
        "<QQII", events, synced, 0, len(roles)
    )
    raw = raw.ljust(256, b"\0") + struct.pack(f"<{len(roles)}H", *roles)
    raw = raw[:216] + struct.pack("<I", folded(raw) & 0xFFFFFFFF) + raw[220:]
    made = bytearray(size)
    made[start : start + len(mark)] = mark
    made[place : place + len(raw)] = raw
    return made


def old_disk(role: int, *, level: int = 1, events: int = 9, state: int = 6) -> bytearray:
    words = [0] * 1024
    words[0:12] = [0xA92B4EFC, 0, 90, 0, 0, 5, 0, level & 0xFFFFFFFF, 1024, 2, 2, 3]
    words[39] = events
    words[992:997] = [role, 8, 1, role, state]
    words[38] = folded(struct.pack("<1024I", *words)) & 0xFFFFFFFF
    made = bytearray(4 * MIB)
    made[:6] = LUKS
    made[-65536 : -65536 + 4096] = struct.pack("<1024I", *words)
    return made


def found(*disks: bytearray) -> list[Found]:
    return probe([(f"d{number}", Disk(MemoryDisk(one), number)) for number, one in enumerate(disks)])


@pytest.mark.parametrize("place", [0, 4096, 4 * MIB - 8192])
def test_a_mirror_is_shown_once(place: int) -> None:
    (volume,) = found(disk(0, place=place), disk(1, place=place))
    assert (volume.name, volume.kind, volume.size) == ("md7", "luks", 2 * MIB)
    assert volume.volume is not None
    (piece,) = volume.volume.pieces(0, 512)
    assert (piece.stream, piece.offset) == (0, 0 if place > MIB else MIB)


def test_the_old_superblock() -> None:
    (volume,) = found(old_disk(0, events=8), old_disk(1))
    assert (volume.name, volume.kind, volume.size) == ("md3", "luks", MIB)
    assert volume.volume is not None
    assert next(volume.volume.pieces(0, 1)).stream == 1, "the first one does not know all changes"


@pytest.mark.parametrize(
    ("one", "two", "stream"),
    [
        (disk(0), disk(1, events=8), 0),
        (disk(0, events=8), disk(1), 1),
        (disk(0, features=2), disk(1), 1),
        (disk(0, features=8), disk(1), 1),
        (disk(0, roles=(0xFFFE, 1)), disk(1, roles=(0xFFFE, 1)), 1),
        (disk(0, roles=(1, 0)), disk(1, roles=(1, 0)), 1),
    ],
)
def test_the_member_that_has_all_data(one: bytearray, two: bytearray, stream: int) -> None:
    (volume,) = found(one, two)
    assert volume.volume is not None
    assert next(volume.volume.pieces(0, 1)).stream == stream


@pytest.mark.parametrize(
    ("disks", "problem"),
    [
        ([disk(0, features=2)], "no member of the RAID 1 is here and has all data; include all"),
        ([disk(1, synced=5)], "were being copied from is on no disk of this snapshot; include"),
        ([disk(0, level=5), disk(1, level=5)], "RAID level 5 is not supported; 'pbsfs nbd'"),
        ([disk(0, features=4)], "whose form is being changed is not supported; 'pbsfs nbd'"),
        ([disk(0, level=-1)], "member 1 of the linear array is on no disk of this snapshot; include"),
    ],
)
def test_arrays_that_cannot_be_read(disks: list[bytearray], problem: str) -> None:
    (volume,) = found(*disks)
    assert (volume.name, volume.kind) == ("md7", "md")
    assert problem in str(volume.problem)
    with pytest.raises(DamageError, match="md7: "):
        volume.open()


def test_a_linear_array() -> None:
    (volume,) = found(disk(1, level=-1, mark=b"x"), disk(0, level=-1))
    assert (volume.name, volume.kind, volume.size) == ("md7", "luks", 4 * MIB)
    assert volume.volume is not None
    assert [(p.stream, p.offset, p.length) for p in volume.volume.pieces(0, 4 * MIB)] == [
        (1, MIB, 2 * MIB),
        (0, MIB, 2 * MIB),
    ]


def test_a_linear_array_whose_members_are_rounded() -> None:
    (volume,) = found(disk(0, level=-1, chunk=3000), disk(1, level=-1, chunk=3000))
    assert volume.size == 2 * 3000 * 512


def test_a_wrong_checksum() -> None:
    made = disk(0)
    made[4096 + 90] ^= 1
    (volume,) = found(made)
    assert "the md superblock has a wrong checksum" in str(volume.problem)


@pytest.mark.parametrize("mutations", counts(300, 2000))
def test_mutated_superblocks(mutations: int) -> None:
    rng = random.Random(mutations)
    for number in range(mutations):
        place = (0, 4096, 4 * MIB - 8192)[number % 3]
        made = disk(0, place=place, level=(1, -1)[number % 2])
        for _ in range(rng.randint(1, 4)):
            made[place + rng.randrange(80, 260)] = rng.randrange(256)
        raw = bytes(made[place : place + 260])
        checksum = folded(raw[:216] + bytes(4) + raw[220:]) & 0xFFFFFFFF
        made[place + 216 : place + 220] = struct.pack("<I", checksum)
        other = disk(1, place=place, level=(1, -1)[number % 2])
        with limited():
            for volume in found(made, other):
                assert volume.problem is not None
