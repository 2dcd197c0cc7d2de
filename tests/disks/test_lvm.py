"""LVM2: the golden groups against the truth, and hostile metadata."""

from __future__ import annotations

import contextlib
import random
import struct
import subprocess
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import Piece
from pbsfs.disks.crc32c import crc32c
from pbsfs.disks.lvm.stripes import Striped
from pbsfs.disks.lvm.text import parse
from pbsfs.disks.lvm.thin import Pool, Thin
from pbsfs.disks.probe import Found, probe
from pbsfs.disks.volume import Disk, part_of
from tests.support.disks import FileDisk, GoldenDisk, MemoryDisk, differences, image_from, lines_of
from tests.support.hostile import counts, limited
from tests.support.needs import need

MIB = 1 << 20


def crc(data: bytes) -> int:
    return zlib.crc32(data, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def physical(
    uuid: str, text: bytes, *, size: int = 8 * MIB, at: int = 512, fill: bytes = b"", start: int = 4096
) -> bytearray:
    """A physical volume: label, one metadata area of 64 KiB with `text` from byte `at` of it on, extents of
    1 MiB from byte 1 MiB on, each filled with the byte of its number."""
    disk = bytearray(size)
    for extent in range(1, size // MIB):
        disk[extent * MIB : (extent + 1) * MIB] = bytes([extent]) * MIB
    disk[MIB : MIB + len(fill)] = fill
    label = struct.pack("<I8s32sQ", 32, b"LVM2 001", uuid.encode(), size)
    label += struct.pack("<QQQQQQQQ", MIB, 0, 0, 0, start, 65536, 0, 0)
    label = label.ljust(492, b"\0")
    disk[512:1024] = struct.pack("<8sQI", b"LABELONE", 1, crc(label)) + label
    header = struct.pack("<16sIQQ", b" LVM2 x[5A%r0N*>", 1, start, 65536)
    header += struct.pack("<QQII", at, len(text), crc(text), 0)
    header = header.ljust(508, b"\0")
    disk[start : start + 512] = struct.pack("<I", crc(header)) + header
    first = min(len(text), 65536 - at)
    disk[start + at : start + at + first] = text[:first]
    disk[start + 512 : start + 512 + len(text) - first] = text[first:]
    return disk


def group(
    logical: str, *members: str, name: str = "vg", uuid: str = "g" * 32, seqno: int = 1, flags: str = ""
) -> bytes:
    parts = "".join(
        f'pv{number} {{ id = "{member}"\ndevice = "/dev/sd{number}"\nflags = [{flags}]\npe_start = 2048\n'
        f"pe_count = 7 }}\n"
        for number, member in enumerate(members)
    )
    text = f'{name} {{ id = "{uuid}"\nseqno = {seqno}\nextent_size = 2048\nstatus = ["READ"]\n'
    return f"{text}physical_volumes {{ {parts} }}\nlogical_volumes {{ {logical} }} }}\n# end\n\0".encode()


def linear(name: str, *segments: str, status: str = '"READ", "VISIBLE"') -> str:
    listed = "".join(f"segment{n + 1} {{ {segment} }}\n" for n, segment in enumerate(segments))
    return f"{name} {{ status = [{status}]\nsegment_count = {len(segments)}\n{listed} }}\n"


def segment(start: int, count: int, *stripes: tuple[str, int], more: str = "") -> str:
    listed = ", ".join(f'"{name}", {extent}' for name, extent in stripes)
    return (
        f'start_extent = {start}\nextent_count = {count}\ntype = "striped"\nstripe_count = {len(stripes)}\n'
        f"stripe_size = 128\nstripes = [ {listed} ]\n{more}"
    )


def found(*disks: bytes | bytearray) -> dict[str, Found]:
    volumes = probe([(f"d{number}", Disk(MemoryDisk(disk), number)) for number, disk in enumerate(disks)])
    return {volume.name: volume for volume in volumes}


def pieces(volumes: Mapping[str, Found], name: str) -> list[tuple[int | None, int, int]]:
    volume = volumes[name].volume
    assert volume is not None
    return [(p.stream, p.offset, p.length) for p in volume.pieces(0, volume.size)]


A, B = "a" * 32, "b" * 32

# --- golden


@pytest.mark.golden
def test_a_group_on_two_disks() -> None:
    disks = [GoldenDisk(320, f"drive-scsi{number}") for number in range(2)]
    volumes = probe([(f"scsi{n}", Disk(disk, n)) for n, disk in enumerate(disks)])
    assert [(v.name, v.kind, v.problem) for v in volumes] == [
        ("scsi0-p1", "vfat", None),
        ("scsi0-p2", "ext4", None),
        ("vg--sys5-root", "ext4", None),
        ("vg--sys5-var", "xfs", None),
        ("vg--sys5-stripe", "ext4", None),
        ("vg--sys5-grown", "ext3", None),
    ], "swap_1 is empty"
    for volume in volumes[2:]:
        truth = lines_of(f"server.{volume.name.rpartition('-')[2]}")
        assert not differences(volume.open(), disks, truth), volume.name


@pytest.mark.golden
@pytest.mark.parametrize(("number", "whole"), [(0, {"root", "var"}), (1, set())])
def test_a_group_with_a_missing_disk(number: int, whole: set[str]) -> None:
    disk = GoldenDisk(320, f"drive-scsi{number}")
    volumes = [v for v in probe([("scsi", Disk(disk))]) if v.name.startswith("vg")]
    assert {v.name.rpartition("-")[2] for v in volumes if v.problem is None} == whole
    missing = "ix3pGgaKLXw2xl249Q6VNJXQJhaHZRne" if number == 0 else "CNy0szHTMS4nhZWHQkFClmUFjnRnADT3"
    for volume in volumes:
        if volume.problem is not None:
            assert f"the physical volume {missing} (last seen as '/dev/loop" in volume.problem
            assert volume.problem.endswith("is on no disk of this snapshot; include its disk in the backup")


@pytest.mark.golden
def test_a_thin_volume() -> None:
    disk = GoldenDisk(322, "drive-virtio3")
    (volume,) = probe([("virtio3", Disk(disk))])
    assert (volume.name, volume.kind, volume.size) == ("vgthin5-home", "ext4", 300 * MIB)
    assert not differences(volume.open(), [disk], lines_of("thin.home"))


# --- groups


def test_linear_and_striped() -> None:
    text = group(
        linear("a-b", segment(0, 2, ("pv0", 1)), segment(2, 1, ("pv1", 4)))
        + linear("s", segment(0, 2, ("pv0", 0), ("pv1", 0)))
        + linear("hidden", segment(0, 1, ("pv0", 0)), status='"READ"')
        + linear("x", segment(0, 1, ("a-b", 2))),
        A,
        B,
    )
    volumes = found(physical(A, text), physical(B, text))
    assert set(volumes) == {"vg-a--b", "vg-s", "vg-x"}
    assert pieces(volumes, "vg-a--b") == [(0, 2 * MIB, 2 * MIB), (1, 5 * MIB, MIB)]
    assert pieces(volumes, "vg-x") == [(1, 5 * MIB, MIB)]
    assert pieces(volumes, "vg-s")[:3] == [(0, MIB, 65536), (1, MIB, 65536), (0, MIB + 65536, 65536)]
    striped = volumes["vg-s"].volume
    assert striped is not None
    assert striped.size == 2 * MIB
    assert sum(p.length for p in striped.pieces(1000, MIB)) == MIB


def test_text_that_goes_on_at_the_start_of_its_area() -> None:
    text = group(linear("a", segment(0, 1, ("pv0", 0))), A)
    assert set(found(physical(A, text, at=65536 - 100))) == {"vg-a"}


def test_the_newest_text_counts() -> None:
    old = group(linear("a", segment(0, 1, ("pv0", 0))), A, B)
    new = group(linear("b", segment(0, 1, ("pv1", 0))), A, B, seqno=2)
    assert set(found(physical(A, old), physical(B, new))) == {"vg-b"}
    assert set(found(physical(A, new), physical(B, old))) == {"vg-b"}


def test_two_groups_of_one_name() -> None:
    one = group(linear("a", segment(0, 1, ("pv0", 0))), A)
    two = group(linear("a", segment(0, 1, ("pv0", 3))), B, uuid="h" * 32)
    volumes = found(physical(A, one), physical(B, two))
    assert pieces(volumes, "vg-a") == [(0, MIB, MIB)]
    assert pieces(volumes, "vg--hhhhhh-a") == [(1, 4 * MIB, MIB)]


def test_a_physical_volume_twice() -> None:
    text = group(linear("a", segment(0, 1, ("pv0", 0))), A)
    volumes = found(physical(A, text), physical(A, text))
    assert set(volumes) == {"vg-a", "d1"}
    assert "second copy of the physical volume d0" in str(volumes["d1"].problem)


def test_a_physical_volume_that_lvm_calls_missing() -> None:
    text = group(linear("a", segment(0, 1, ("pv0", 0))), A, flags='"MISSING"')
    assert "LVM marked the physical volume" in str(found(physical(A, text))["vg-a"].problem)


@pytest.mark.parametrize("kind", ["cache", "raid5", "vdo", "writecache", "raid10", "raid1+FLAG"])
def test_types_that_are_not_read(kind: str) -> None:
    text = group(linear("a", f'start_extent = 0\nextent_count = 1\ntype = "{kind}"'), A)
    (volume,) = found(physical(A, text)).values()
    assert volume.kind == f"lvm-{kind}"
    assert volume.problem is not None
    assert volume.problem.startswith(f"a logical volume of the type {kind} is not supported; 'pbsfs nbd'")
    with pytest.raises(DamageError, match="not supported"):
        volume.open()


def test_a_snapshot_and_its_origin() -> None:
    snapshot = 'start_extent = 0\nextent_count = 1\ntype = "snapshot"\norigin = "a"\ncow_store = "s"'
    logical = linear("a", segment(0, 1, ("pv0", 0))) + linear("s", segment(0, 1, ("pv0", 1)))
    volumes = found(physical(A, group(logical + linear("snapshot0", snapshot), A)))
    assert set(volumes) == {"vg-a", "vg-s"}
    assert volumes["vg-a"].volume is not None
    assert "a snapshot of 'a'" in str(volumes["vg-s"].problem)


def raid1(*superblocks: bytes) -> bytes:
    """A physical volume with a RAID 1 of two legs: extents 0 and 1 are metadata, 2 and 3 are legs."""
    raid = 'start_extent = 0\nextent_count = 1\ntype = "raid1"\nraids = ["m0", "l0", "m1", "l1"]'
    parts = [
        linear(name, segment(0, 1, ("pv0", at)), status="")
        for at, name in enumerate(("m0", "m1", "l0", "l1"))
    ]
    disk = physical(A, group(linear("r", raid) + "".join(parts), A))
    for number, superblock in enumerate(superblocks):
        disk[(1 + number) * MIB : (1 + number) * MIB + len(superblock)] = superblock
    return bytes(disk)


def raid_superblock(events: int, failed: int = 0, recovered: int = 2**64 - 1) -> bytes:
    return struct.pack("<4sIIIQQQQ", b"DmRd", 0, 2, 0, events, failed, recovered, 2**64 - 1)


@pytest.mark.parametrize(
    ("superblocks", "leg"),
    [
        ((raid_superblock(5), raid_superblock(5)), 2),
        ((raid_superblock(4), raid_superblock(5, 1)), 3),
        ((raid_superblock(5, 2), raid_superblock(4)), 2),
        ((raid_superblock(5, 0, 100), raid_superblock(5)), 3),
        ((raid_superblock(5, 1), raid_superblock(5, 2)), None),
    ],
)
def test_raid1_reads_a_leg_that_is_whole(superblocks: tuple[bytes, bytes], leg: int | None) -> None:
    volumes = found(raid1(*superblocks))
    if leg is None:
        assert "no leg of the RAID" in str(volumes["vg-r"].problem)
    else:
        assert pieces(volumes, "vg-r") == [(0, (leg + 1) * MIB, MIB)]


def test_a_volume_that_is_being_moved_is_read_where_it_is() -> None:
    """pvmove(8) makes each segment a mirror of its old and its new place; what is moved is in the new one."""
    mirror = 'start_extent = {}\nextent_count = {}\ntype = "mirror"\nmirrors = ["pv0", {}, "pv1", {}]'
    moves = (
        mirror.format(0, 2, 3, 0) + "\nextents_moved = 2",
        mirror.format(2, 1, 6, 5) + "\nextents_moved = 0",
        mirror.format(3, 1, 2, 6),
    )
    moved = linear("pvmove0", *moves, status='"PVMOVE"')
    shown = linear("a", segment(0, 2, ("pvmove0", 0)), segment(2, 2, ("pvmove0", 2)))
    text = group(shown + moved, A, B)
    volumes = found(physical(A, text), physical(B, text))
    assert pieces(volumes, "vg-a") == [(1, MIB, 2 * MIB), (0, 7 * MIB, MIB), (0, 3 * MIB, MIB)]


def test_a_volume_has_the_uuid_of_device_mapper() -> None:
    """Installers of Ubuntu write it into the fstab: /dev/disk/by-id/dm-uuid-LVM-…"""
    shown = linear("a", segment(0, 1, ("pv0", 0)), status='"READ", "VISIBLE"').replace(
        "{", '{ id = "LVMabc-WXYZ-0123-4567-89ab-cdef-ghijkl"\n', 1
    )
    text = group(shown, A, uuid="GLVMEu-1234-abcd-efgh-ijkl-mnop-qrstuv")
    (volume,) = found(physical(A, text)).values()
    assert volume.mapper_uuid == "LVM-GLVMEu1234abcdefghijklmnopqrstuvLVMabcWXYZ0123456789abcdefghijkl"


def test_a_volume_that_is_a_part_of_itself() -> None:
    text = group(linear("a", segment(0, 1, ("b", 0))) + linear("b", segment(0, 1, ("a", 0))), A)
    assert all("is a part of itself" in str(v.problem) for v in found(physical(A, text)).values())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ((520, b"\0"), "LVM label in sector 1 has a wrong checksum"),
        ((4120, b"x"), "the LVM metadata area at byte 4096 has a wrong checksum"),
        ((4096 + 600, b"x"), "the text of the LVM metadata area at byte 4096 has a wrong checksum"),
    ],
)
def test_damaged_metadata(change: tuple[int, bytes], problem: str) -> None:
    disk = physical(A, group(linear("a", segment(0, 1, ("pv0", 0))), A))
    disk[change[0]] ^= 0xFF
    assert problem in str(found(disk)["d0"].problem)


@pytest.mark.parametrize(
    "text",
    [
        b"vg {" * 50,
        b"a {" * 50000,
        b"a = " + b"[" * 50000,
        b'a = "' + b"\\a" * 10000,
        b" " * 60000 + b"@",
        b"a = 1 a = 2",
        b"a { } b { }",
        group(linear("../x", segment(0, 1, ("pv0", 0))), A),
        group(linear('"/x"', segment(0, 1, ("pv0", 0))), A),
        group("", A, name='".."'),
        group("", A, uuid="/"),
        group("x = 1", A),
        b"vg { id = 1 }",
        b"vg { physical_volumes { pv0 = 3 } }",
    ],
)
def test_hostile_text(text: bytes) -> None:
    (volume,) = found(physical(A, text[:64000])).values()
    assert volume.problem is not None


@pytest.mark.parametrize(
    "body",
    [
        segment(0, 1, ("pv0", 1 << 60)),
        segment(0, 1 << 60, ("pv0", 0)),
        segment(0, 99999999, ("pv0", 0)),
        segment(5, 1, ("pv0", 0)),
        segment(0, 1),
        segment(0, 3, ("pv0", 0), ("pv0", 4)).replace("128", "0"),
        segment(0, 1, ("nowhere", 0)),
        segment(0, 1, ("pv0", 0)).replace('"pv0", 0', "0, 0"),
        segment(0, 1, ("pv0", 0)).replace('"striped"', "9"),
        'start_extent = 0\nextent_count = 1\ntype = "thin"\nthin_pool = "a"\ndevice_id = 1',
        'start_extent = 0\nextent_count = 1\ntype = "raid1"\nraids = ["a"]',
        'start_extent = 0\nextent_count = 1\ntype = "mirror"\nmirrors = []',
    ],
)
def test_hostile_segments(body: str) -> None:
    (volume,) = found(physical(A, group(linear("a", body), A))).values()
    assert volume.problem is not None


def test_an_error_segment_is_damage_where_it_is() -> None:
    body = 'start_extent = 1\nextent_count = 1\ntype = "error"'
    volume = found(physical(A, group(linear("a", segment(0, 1, ("pv0", 0)), body), A)))["vg-a"].volume
    assert volume is not None
    assert volume.read(0, 512) == bytes([1]) * 512
    with pytest.raises(DamageError, match="stored nowhere"):
        volume.read(MIB, 1)


@pytest.mark.parametrize("mutations", counts(300, 2000))
def test_mutated_metadata(mutations: int) -> None:
    rng = random.Random(mutations)
    text = group(
        linear("a", segment(0, 2, ("pv0", 1)), segment(2, 1, ("pv0", 4)))
        + linear("s", segment(0, 2, ("pv0", 0), ("pv0", 2))),
        A,
    )
    for _ in range(mutations):
        changed = bytearray(text)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(changed))
            changed[at : at + rng.randint(0, 2)] = rng.choice((b"{", b"}", b'"', b"9", b"[", b"=", b"\xff"))
        disk = physical(A, bytes(changed), size=8 * MIB)
        with limited():
            for volume in found(disk).values():
                if volume.volume is not None:
                    with contextlib.suppress(DamageError):
                        assert volume.volume.read(0, volume.size)


def test_parsed_text() -> None:
    text = b'# c\na { b = "x\\"y" c = [1, "d", ]\n e { } }f=-1\n\0'
    assert parse(text) == {"a": {"b": 'x"y', "c": [1, "d"], "e": {}}, "f": "-1"}


# --- stripes


def test_a_stripe_of_odd_size_is_refused() -> None:
    disk = Disk(MemoryDisk(bytes(4096)))
    with pytest.raises(DamageError):
        Striped([part_of(disk, 0, 1000), part_of(disk, 1000, 1000)], 512)
    with pytest.raises(DamageError):
        Striped([part_of(disk, 0, 512), part_of(disk, 512, 1024)], 512)
    with pytest.raises(DamageError):
        Striped([disk], 0)


# --- thin pools


def node(place: int, leaf: bool, keys: list[int], values: list[int]) -> bytes:
    body = struct.pack("<IQIIII", 2 if leaf else 1, place, len(keys), 252, 8, 0)
    body += struct.pack(f"<{len(keys)}Q", *keys).ljust(252 * 8, b"\0") + struct.pack(
        f"<{len(values)}Q", *values
    )
    body = body.ljust(4092, b"\0")
    return struct.pack("<I", crc32c(body) ^ 0xFFFFFFFF ^ 121107) + body


def superblock(root: int, chunk: int = 128) -> bytes:
    body = struct.pack("<IQ16sQII", 0, 0, bytes(16), 27022010, 2, 0).ljust(316, b"\0")
    body = (body + struct.pack("<QQII", root, 0, chunk, 8)).ljust(4092, b"\0")
    return struct.pack("<I", crc32c(body) ^ 0xFFFFFFFF ^ 160774) + body


CHUNK = 65536
DEVICE = node(1, True, [7], [2])


def thin(*nodes: bytes, size: int = 40 * CHUNK, origin: bytes | None = None) -> Thin:
    """Device 7 of a pool, whose nodes are blocks 2 and so on; its data is on disk 1."""
    metadata = Disk(MemoryDisk(superblock(1) + DEVICE + b"".join(nodes)), 0)
    data = Disk(MemoryDisk(b"".join(bytes([n]) * CHUNK for n in range(20))), 1)
    return Thin(Pool(metadata, data, CHUNK), 7, size, Disk(MemoryDisk(origin), 2) if origin else None)


def at(block: int, time: int = 3) -> int:
    return block << 24 | time


TREE = (
    node(2, False, [0, 10], [3, 4]),
    node(3, True, [1, 2, 4], [at(5), at(6), at(7)]),
    node(4, True, [12, 13], [at(8), at(2)]),
)


def test_thin_pieces() -> None:
    volume = thin(*TREE)
    assert list(volume.pieces(0, volume.size)) == [
        Piece(None, 0, CHUNK),
        Piece(1, 5 * CHUNK, 2 * CHUNK),
        Piece(None, 0, CHUNK),
        Piece(1, 7 * CHUNK, CHUNK),
        Piece(None, 0, 7 * CHUNK),
        Piece(1, 8 * CHUNK, CHUNK),
        Piece(1, 2 * CHUNK, CHUNK),
        Piece(None, 0, 26 * CHUNK),
    ]
    assert list(volume.pieces(2 * CHUNK + 5, 10)) == [Piece(1, 6 * CHUNK + 5, 10)]
    assert volume.read(CHUNK - 2, 4) == b"\0\0\5\5"
    assert volume.read(13 * CHUNK - 1, 2) == b"\x08\x02"
    assert list(volume.pieces(5, 0)) == []


def test_a_thin_volume_with_an_origin() -> None:
    volume = thin(*TREE, origin=b"o" * (3 * CHUNK + 9))
    assert volume.read(CHUNK - 1, 2) == b"o\5"
    assert volume.read(3 * CHUNK + 8, 2) == b"o\0"
    assert list(volume.pieces(0, 1)) == [Piece(2, 0, 1)]


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        [node(2, False, [0, 10], [2, 2])],
        [node(2, False, [0], [3]), node(3, False, [0], [2])],
        [node(2, False, [0, 10], [3, 3]), node(3, True, [1, 2], [at(5), at(6)])],
        [node(2, False, [0, 10], [3, 4]), node(3, True, [1, 11], [at(5), at(6)]), TREE[2]],
        [node(2, False, [], [])],
        [node(2, True, [2, 1], [at(1), at(2)])],
        [node(2, True, [2, 2], [at(1), at(2)])],
        [node(3, True, [2], [at(1)])],
        [node(2, True, [0], [at(20)])],
        [node(2, True, [0], [(1 << 64) - 1])],
        [node(2, False, [0], [1 << 62])],
        [TREE[0][:100] + b"\xff" + TREE[0][101:]],
    ],
)
def test_hostile_trees(nodes: list[bytes]) -> None:
    with pytest.raises(DamageError):
        list(thin(*nodes).pieces(0, 40 * CHUNK))


@pytest.mark.parametrize("mutations", counts(300, 2000))
def test_mutated_trees(mutations: int) -> None:
    """With checksums that are right, as a hostile disk has them."""
    rng = random.Random(mutations)
    read = 0
    for _ in range(mutations):
        nodes = [bytearray(node) for node in TREE]
        for _ in range(rng.choice((1, 1, 3))):
            changed = rng.choice(nodes)
            start = rng.choice((4, 28, 28 + 252 * 8)) + rng.randrange(28)
            changed[start] = rng.choice((0, 1, 2, 4, 255, rng.randrange(256)))
            changed[:4] = struct.pack("<I", crc32c(bytes(changed[4:])) ^ 0xFFFFFFFF ^ 121107)
        with limited(), contextlib.suppress(DamageError):
            volume = thin(*map(bytes, nodes))
            assert sum(piece.length for piece in volume.pieces(0, volume.size)) == volume.size
            read += 1
    assert 0 < read < mutations


@pytest.mark.parametrize(
    "raw", [bytes(4096), superblock(1, 64), superblock(9), superblock(1)[:-1] + b"x", b""]
)
def test_hostile_superblocks(raw: bytes) -> None:
    disk = Disk(MemoryDisk(raw + DEVICE))
    with pytest.raises(DamageError):
        Thin(Pool(disk, disk, CHUNK), 7, CHUNK)


def test_a_device_that_the_pool_does_not_have() -> None:
    disk = Disk(MemoryDisk(superblock(1) + DEVICE))
    with pytest.raises(DamageError, match="does not have the device 8"):
        Thin(Pool(disk, disk, CHUNK), 8, CHUNK)


def test_the_trees_that_thin_restore_writes(tmp_path: Path) -> None:
    """Two devices with some thousand ranges, deep enough for inner nodes."""
    need("thin_restore")
    rng = random.Random(3)
    wanted: dict[int, list[tuple[int, int, int]]] = {}
    lines = ['<superblock uuid="" time="1" transaction="1" flags="0" version="2" data_block_size="128"']
    lines.append(' nr_data_blocks="100000">')
    for device in (1, 9):
        ranges, first, place = [], 0, 0
        for _ in range(4000):
            first, place, count = first + rng.randint(1, 9), place + rng.randint(1, 9), rng.randint(1, 9)
            ranges.append((first, count, place))
            first, place = first + count, place + count
        wanted[device] = ranges
        lines.append(
            f'<device dev_id="{device}" mapped_blocks="{sum(r[1] for r in ranges)}" transaction="0"'
            ' creation_time="0" snap_time="0">'
        )
        lines += [
            f'<range_mapping origin_begin="{first}" data_begin="{place}" length="{count}" time="0"/>'
            for first, count, place in ranges
        ]
        lines.append("</device>")
    (tmp_path / "xml").write_text("\n".join([*lines, "</superblock>"]))
    image_from(tmp_path / "meta", 16 * MIB)
    subprocess.run(
        ["thin_restore", "-q", "-i", str(tmp_path / "xml"), "-o", str(tmp_path / "meta")],
        check=True,
        capture_output=True,
    )
    pool = Pool(Disk(FileDisk(tmp_path / "meta")), Disk(Sparse(100000 * CHUNK), 1), CHUNK)
    for device, ranges in wanted.items():
        volume = Thin(pool, device, 100000 * CHUNK)
        mapped = [p for p in volume.pieces(0, volume.size) if p.stream is not None]
        assert [(p.offset, p.length) for p in mapped] == [(r[2] * CHUNK, r[1] * CHUNK) for r in ranges]
        for first, _count, place in rng.sample(ranges, 50):
            assert list(volume.pieces(first * CHUNK + 7, 9)) == [Piece(1, place * CHUNK + 7, 9)]
            assert list(volume.pieces((first - 1) * CHUNK, 9)) == [Piece(None, 0, 9)]


class Sparse(MemoryDisk):
    """A disk of zeros that takes no memory."""

    def __init__(self, size: int) -> None:
        self._size = size

    @property
    def size(self) -> int:
        return self._size
