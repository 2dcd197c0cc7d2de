"""What is found on the disks of a machine: partitions, and what is in them."""

from __future__ import annotations

import random
import struct
import subprocess
import uuid
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest

from pbsfs.base.errors import DamageError
from pbsfs.disks.probe import Found, probe
from pbsfs.disks.volume import Disk
from tests.support.disks import FileDisk, GoldenDisk, MemoryDisk, differences, image_from, lines_of
from tests.support.hostile import counts, limited
from tests.support.needs import need

MIB = 1 << 20
LUKS = b"LUKS\xba\xbe"
LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
RESERVED = uuid.UUID("e3c9e316-0b5c-4db8-817d-f92df00215ae")


def gpt_disk(
    size: int, partitions: Iterable[tuple[int, int, uuid.UUID]], *, sector: int = 512, count: int = 128
) -> bytearray:
    """A disk with a GPT: partitions by first sector, number of sectors and type; each has LUKS's magic."""
    disk = bytearray(size)
    entries = bytearray(128 * count)
    last = size // sector - 1
    table_sectors = -(-len(entries) // sector)
    for number, (start, length, kind) in enumerate(partitions):
        own = uuid.UUID(int=number + 1)
        place = struct.pack("<16s16sQQ", kind.bytes_le, own.bytes_le, start, start + length - 1)
        entries[128 * number : 128 * number + 48] = place
        if start * sector < size:
            disk[start * sector : start * sector + 6] = LUKS
    disk[450] = 0xEE
    disk[454:462] = struct.pack("<II", 1, last)
    disk[510:512] = b"\x55\xaa"
    for own_place, other, table in ((1, last, 2), (last, 1, last - table_sectors)):
        header = gpt_header(own_place, other, table, count, 128, zlib.crc32(entries))
        disk[own_place * sector : own_place * sector + 92] = header
        disk[table * sector : table * sector + len(entries)] = entries
    return disk


def gpt_header(place: int, other: int, table: int, count: int, each: int, checksum: int) -> bytes:
    fields = [place, other, 34, 100, bytes(16), table, count, each, checksum]
    header = struct.pack("<8sIIII4Q16sQIII", b"EFI PART", 0x10000, 92, 0, 0, *fields)
    return header[:16] + struct.pack("<I", zlib.crc32(header)) + header[20:]


def found(data: bytes | bytearray, name: str = "d") -> list[Found]:
    return probe([(name, Disk(MemoryDisk(data)))])


def names(volumes: list[Found]) -> list[tuple[str, str]]:
    return [(volume.name, volume.kind) for volume in volumes]


def sfdisk(path: Path, size: int, script: str, *marks: int) -> list[Found]:
    """What is found on a disk that sfdisk partitioned, with LUKS's magic at `marks`."""
    need("sfdisk")
    image_from(path, size)
    subprocess.run(
        ["sfdisk", "-q", "--no-reread", str(path)], input=script, text=True, check=True, capture_output=True
    )
    with path.open("r+b") as file:
        for mark in marks:
            file.seek(mark)
            file.write(LUKS)
    return probe([("d", Disk(FileDisk(path)))])


# --- golden


@pytest.mark.golden
def test_a_windows_disk_with_an_extended_partition() -> None:
    volumes = probe([("sata0", Disk(GoldenDisk(321, "drive-sata0")))])
    assert [(v.name, v.kind, v.size, v.part_uuid) for v in volumes] == [
        ("sata0-p1", "ntfs", 98304 * 512, "f279220e-01"),
        ("sata0-p2", "ntfs", 286720 * 512, "f279220e-02"),
        ("sata0-p5", "vfat", 98304 * 512, "f279220e-05"),
        ("sata0-p6", "ext2", 98304 * 512, "f279220e-06"),
        ("sata0-p7", "luks", 81920 * 512, "f279220e-07"),
    ]
    assert volumes[4].problem is not None
    assert volumes[4].problem == (
        "encrypted with LUKS; 'pbsfs nbd' serves the disk, "
        "and cryptsetup-open of guestfish unlocks it (see docs/guides/luks.md)"
    )
    with pytest.raises(DamageError, match="sata0-p7: encrypted with LUKS"):
        volumes[4].open()


@pytest.mark.golden
def test_disks_without_partitions() -> None:
    disks = [(f"virtio{n}", Disk(GoldenDisk(322, f"drive-virtio{n}"), n)) for n in range(3)]
    assert names(probe(disks)) == [("virtio0", "btrfs"), ("virtio1", "ext4"), ("virtio2", "xfs")]


@pytest.mark.golden
def test_a_file_system_opens() -> None:
    disk = Disk(GoldenDisk(320, "drive-scsi0"))
    boot = probe([("scsi0", disk)])[1]
    assert not differences(boot.open(), [GoldenDisk(320, "drive-scsi0")], lines_of("server.boot"))


# --- GPT


@pytest.mark.parametrize("sector", [512, 4096])
def test_gpt(sector: int) -> None:
    disk = gpt_disk(8 * MIB, [(300, 10, LINUX), (400, 20, RESERVED), (500, 30, RESERVED)], sector=sector)
    disk[500 * sector : 500 * sector + 6] = bytes(6)
    volumes = found(disk)
    assert names(volumes) == [("d-p1", "luks"), ("d-p2", "luks")], "an empty reserved one is left out"
    assert volumes[1].part_uuid == str(uuid.UUID(int=2))
    assert [v.size for v in volumes] == [10 * sector, 20 * sector]
    assert volumes[0].volume is not None
    assert [(p.offset, p.length) for p in volumes[0].volume.pieces(0, 512)] == [(300 * sector, 512)]


@pytest.mark.parametrize("broken", ["header", "entries", "both sectors", "everything"])
@pytest.mark.parametrize("sector", [512, 4096])
def test_the_backup_table_stands_in(broken: str, sector: int) -> None:
    disk = gpt_disk(8 * MIB, [(300, 10, LINUX)], sector=sector)
    place = {"header": sector + 40, "entries": 2 * sector + 5, "both sectors": 0, "everything": 0}[broken]
    length = {"header": 1, "entries": 1, "both sectors": 2 * sector, "everything": 64 << 10}[broken]
    for at in range(place, place + length):
        disk[at] = disk[at] ^ 1 if length == 1 else 0
    assert names(found(disk)) == [("d-p1", "luks")]


def test_the_backup_table_of_a_disk_that_grew() -> None:
    disk = gpt_disk(8 * MIB, [(300, 10, LINUX)]) + bytearray(MIB)
    disk[1024] ^= 1
    assert names(found(disk)) == [("d-p1", "luks")]


def test_both_tables_broken() -> None:
    disk = gpt_disk(8 * MIB, [(300, 10, LINUX)])
    disk[1024] ^= 1
    disk[-512 - 5000] ^= 1
    (volume,) = found(disk)
    assert (volume.name, volume.kind) == ("d", "unknown")
    assert volume.problem is not None
    assert "GPT entries in sector 2 have a wrong checksum; 'pbsfs nbd'" in volume.problem


@pytest.mark.parametrize(
    "header",
    [
        gpt_header(1, 1, 2, 0xFFFFFFFF, 128, 0),
        gpt_header(1, 1, 2, 128, 0, 0),
        gpt_header(1, 1, 2, 128, 1 << 31, 0),
        gpt_header(1, 1, 1 << 63, 128, 128, 0),
        gpt_header(1, 1 << 63, 2, 128, 128, 0),
        gpt_header(2, 1, 2, 128, 128, 0),
    ],
)
def test_hostile_headers(header: bytes) -> None:
    disk = gpt_disk(MIB, [])
    disk[512 : 512 + 92] = header
    disk[-512:] = bytes(512)
    (volume,) = found(disk)
    assert volume.problem is not None


def test_partitions_beyond_the_disk() -> None:
    volumes = found(gpt_disk(8 * MIB, [(300, 1 << 40, LINUX), (1 << 40, 5, LINUX), (9, 0, LINUX)]))
    assert names(volumes) == [("d-p1", "luks"), ("d-p2", "unknown"), ("d-p3", "unknown")]
    assert volumes[0].size == 8 * MIB - 300 * 512, "cut, as the kernel does"
    assert "beyond the end of the disk" in str(volumes[1].problem)
    assert "no valid place" in str(volumes[2].problem)


def test_a_file_system_on_the_disk_and_an_old_table(tmp_path: Path) -> None:
    need("mke2fs")
    image = tmp_path / "disk"
    image.write_bytes(gpt_disk(8 * MIB, [(300, 10, LINUX)]))
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", image], check=True, capture_output=True)
    assert names(found(image.read_bytes())) == [("d", "ext4")]


@pytest.mark.parametrize("broken", [0, 512, 600])
def test_a_gpt_that_is_older_than_the_mbr(broken: int) -> None:
    """A disk of which the start was overwritten with the image of a disk with an MBR; the kernel reads no GPT
    without its entry in the MBR."""
    disk = gpt_disk(8 * MIB, [(300, 10, LINUX), (400, 20, LINUX)])
    disk[:512] = mbr_disk(512, (0, 0, 0x83, 1000, 2000))
    disk[1000 * 512 : 1000 * 512 + 6] = LUKS
    disk[broken] ^= 0xFF if broken else 0
    assert [(v.name, v.size) for v in found(disk)] == [("d-p1", 2000 * 512)]


def test_overlapping_partitions() -> None:
    assert len(found(gpt_disk(8 * MIB, [(300, 1000, LINUX)] * 128))) == 128


# --- MBR


def test_sfdisk_mbr(tmp_path: Path) -> None:
    script = "label: dos\nlabel-id: 0xabcdef01\n" + "".join(
        f"/dev/d{number} : start={start}, size={size}, type={kind}\n"
        for number, start, size, kind in (
            *[(1, 2048, 2048, 83), (2, 4096, 20000, 5), (5, 6144, 1000, 83)],
            *[(6, 10240, 1000, 82), (7, 14336, 1000, 7)],
        )
    )
    volumes = sfdisk(tmp_path / "d", 16 * MIB, script, MIB, 3 * MIB, 7 * MIB)
    assert names(volumes) == [("d-p1", "luks"), ("d-p5", "luks"), ("d-p7", "luks")]
    assert [v.part_uuid for v in volumes] == ["abcdef01-01", "abcdef01-05", "abcdef01-07"]


def test_sfdisk_gpt(tmp_path: Path) -> None:
    named = 'start=6144,size=100,uuid=C0FFEE00-0000-4000-8000-000000000001,name="dätä"'
    script = f"label: gpt\nstart=2048,size=2048\n{named}\n"
    volumes = sfdisk(tmp_path / "d", 16 * MIB, script, MIB, 3 * MIB)
    assert names(volumes) == [("d-p1", "luks"), ("d-p2", "luks")]
    assert volumes[1].part_uuid == "c0ffee00-0000-4000-8000-000000000001"
    assert [volume.part_label for volume in volumes] == [None, "dätä"]


def mbr_disk(size: int, *entries: tuple[int, int, int, int, int]) -> bytearray:
    """A disk with tables: for each entry the table's offset, the slot, type, first sector and how many."""
    disk = bytearray(size)
    for table, slot, kind, start, count in entries:
        at = table + 446 + 16 * slot
        disk[at : at + 16] = struct.pack("<B3xB3xII", 0, kind, start, count)
        disk[table + 510 : table + 512] = b"\x55\xaa"
    return disk


def test_mbr_of_a_disk_with_large_sectors() -> None:
    disk = mbr_disk(8 * MIB, (0, 0, 0x83, 300, 100), (0, 1, 0x05, 500, 1000), (500 * 4096, 0, 0x83, 10, 20))
    disk[300 * 4096 : 300 * 4096 + 6] = disk[510 * 4096 : 510 * 4096 + 6] = LUKS
    volumes = found(disk)
    assert [(v.name, v.size) for v in volumes] == [("d-p1", 100 * 4096), ("d-p5", 20 * 4096)]


def test_a_chain_of_logical_partitions_with_a_loop() -> None:
    disk = mbr_disk(
        8 * MIB,
        *[(0, 0, 0x05, 1000, 5000), (1000 * 512, 0, 0x83, 10, 20), (1000 * 512, 1, 0x05, 100, 100)],
        *[(1100 * 512, 0, 0x83, 10, 20), (1100 * 512, 1, 0x05, 0, 100)],
    )
    disk[1010 * 512 : 1010 * 512 + 6] = disk[1110 * 512 : 1110 * 512 + 6] = LUKS
    volumes = found(disk)
    assert names(volumes) == [("d-p1", "unknown"), ("d-p5", "luks"), ("d-p6", "luks")]
    assert "returns to sector 1000" in str(volumes[0].problem)


def test_a_chain_of_logical_partitions_that_is_broken_or_too_long() -> None:
    disk = mbr_disk(8 * MIB, (0, 0, 0x05, 1000, 5000))
    assert found(disk) == [], "an extended partition that was never used"
    disk[1000 * 512] = 1
    assert "sector 1000 is not a table" in str(found(disk)[0].problem)
    links = [(512 * n, 1, 0x05, n + 1 - 10, 1) for n in range(10, 1000)]
    parts = [(512 * n, 0, 0x83, 2000, 1) for n in range(10, 1000)]
    volumes = found(mbr_disk(8 * MIB, (0, 0, 0x05, 10, 5000), *links, *parts))
    assert names(volumes) == [("d-p1", "unknown")]
    assert "more than 256" in str(volumes[0].problem)


def test_swap_and_blank_partitions_are_left_out() -> None:
    disk = mbr_disk(8 * MIB, (0, 0, 0x83, 100, 100), (0, 1, 0x83, 300, 1000), (0, 2, 0x83, 2000, 1000))
    disk[100 * 512 + 4086 : 100 * 512 + 4096] = b"SWAPSPACE2"
    disk[2000 * 512 + 70000] = 1
    (volume,) = found(disk)
    assert (volume.name, volume.kind) == ("d-p3", "unknown")
    assert volume.problem == "no known file system; 'pbsfs nbd' serves the disk to programs that can read it"


@pytest.mark.parametrize("size", [0, 1, 511, 512, 1024, 4096, 70000])
def test_tiny_disks(size: int) -> None:
    assert found(bytes(size)) == []
    assert [v.kind for v in found(b"\xff" * size)] == (["unknown"] if size else [])


# --- hostile


@pytest.mark.parametrize("mutations", counts(300, 2000))
def test_mutated_tables(mutations: int) -> None:
    rng = random.Random(mutations)
    disks = [
        gpt_disk(2 * MIB, [(300, 10, LINUX), (400, 20, RESERVED)]),
        mbr_disk(2 * MIB, (0, 0, 0x05, 1000, 5000), (1000 * 512, 0, 0x83, 10, 20), (0, 2, 0x83, 5, 90)),
    ]
    for number in range(mutations):
        disk = bytearray(disks[number % 2])
        for _ in range(rng.randint(1, 12)):
            disk[rng.choice((rng.randrange(440, 640), 512000 + rng.randrange(446, 512)))] = rng.randrange(256)
        if rng.random() < 0.3:
            del disk[rng.randrange(len(disk)) :]
        with limited():
            for volume in found(disk):
                assert volume.problem is not None
