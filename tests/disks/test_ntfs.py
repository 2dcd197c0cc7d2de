"""NTFS: golden disks against the truth, volumes made by mkntfs, structures, and hostile disks."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

import pytest

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import DECODED, Entry, Stream
from pbsfs.disks.ntfs import reparse
from pbsfs.disks.ntfs.extents import HOLE, Extents
from pbsfs.disks.ntfs.lznt1 import decompress
from pbsfs.disks.ntfs.ntfs import Ntfs
from pbsfs.disks.ntfs.records import without_fixups
from pbsfs.disks.ntfs.special import read_special
from pbsfs.disks.volume import Disk, part_of
from tests.support.disks import (
    FileDisk,
    GoldenDisk,
    MemoryDisk,
    Patched,
    check_decoded_from,
    content_of,
    differences,
    image_from,
    lines_of,
)
from tests.support.hostile import limited
from tests.support.needs import need, need_fuse, need_root

NTFS_ZERO = -11_644_473_600 * 10**9
"""The first time of NTFS, of the year 1601, since 1970 in nanoseconds."""

PARTITIONS = {"windows.p1": (2048, 98304), "windows.p2": (100352, 286720)}


def golden(name: str) -> tuple[Ntfs, GoldenDisk]:
    disk = GoldenDisk(321, "drive-sata0")
    start, count = PARTITIONS[name]
    return Ntfs(part_of(Disk(disk), start * 512, count * 512)), disk


@pytest.mark.golden
@pytest.mark.parametrize("name", ["windows.p1", "windows.p2"])
def test_every_field_is_as_the_truth_says(name: str) -> None:
    contents, disk = golden(name)
    assert differences(contents, [disk], lines_of(name), but="m,u,g,n") == []


@pytest.mark.golden
def test_compressed_files_need_what_they_are_decoded_from() -> None:
    start, count = PARTITIONS["windows.p2"]
    disk = GoldenDisk(321, "drive-sata0")
    assert check_decoded_from(lambda disk: Ntfs(part_of(Disk(disk), start * 512, count * 512)), disk, most=3)


@pytest.mark.golden
def test_hard_links_facts_and_metadata_files() -> None:
    contents, _disk = golden("windows.p2")
    links = {
        path: entry for path, entry in contents.walk(contents.root) if not isinstance(entry, DamageError)
    }
    assert links[b"etc/fstab"].links == links[b"etc/hard"].links == 2
    assert links[b"etc/fstab"].inode == links[b"etc/hard"].inode
    assert not any(path.startswith(b"$") for path in links)
    assert contents.facts()["journal"] == "clean"
    assert contents.facts()["dirty"] == "no"


def small() -> bytes:
    """The structures of a golden volume, without most of the data: enough to damage it quickly."""
    disk = GoldenDisk(321, "drive-sata0")
    start, count = PARTITIONS["windows.p1"]
    return disk.pread(start * 512, count * 512)


def look(contents: Ntfs, disks: Sequence[Stream]) -> None:
    for _path, entry in contents.walk(contents.root):
        if isinstance(entry, DamageError):
            continue
        try:
            contents.xattrs(entry)
            if entry.is_file:
                assert sum(piece.length for piece in contents.data(entry)) == entry.size
                if entry.size < 20_000:
                    for _part in content_of(contents, disks, entry):
                        pass
        except DamageError:
            pass


@pytest.mark.golden
@pytest.mark.parametrize("count", [2000])
def test_damaged_volumes_raise_nothing_but_damage(count: int) -> None:
    whole = small()
    disk = Patched(MemoryDisk(whole))
    chance = random.Random(14)
    start = struct.unpack_from("<Q", whole, 48)[0] * 4096
    for _ in range(count):
        disk.changes = {}
        for _ in range(chance.choice([1, 4, 40])):
            place = chance.choice([0, start, start, start]) + chance.randrange(600 << 10)
            if place < 1024 or place >= start:
                flipped = whole[place] ^ 1 << chance.randrange(8)
                disk.changes[place] = bytes([chance.choice([0, 255, chance.randrange(256), flipped])])
        with limited(), suppress(DamageError):
            look(Ntfs(Disk(disk)), [disk])


@pytest.mark.golden
def test_a_broken_first_record_is_read_from_the_mirror_and_the_boot_sector_from_its_copy() -> None:
    data = bytearray(small())
    start = struct.unpack_from("<Q", data, 48)[0] * 4096
    data[start : start + 4] = b"BAAD"
    disk = MemoryDisk(data)
    assert len(Ntfs(Disk(disk)).children(Ntfs(Disk(disk)).root).entries) > 3
    data[13] = 3
    assert len(Ntfs(Disk(disk)).children(Ntfs(Disk(disk)).root).entries) > 3


def test_recognises_only_its_magic_number() -> None:
    for size in (0, 3, 511, 512, 4096):
        assert not Ntfs.recognise(Disk(MemoryDisk(bytes(size))))
    boot = bytearray(512)
    boot[3:11] = b"NTFS    "
    assert Ntfs.recognise(Disk(MemoryDisk(boot)))
    with pytest.raises(DamageError):
        Ntfs(Disk(MemoryDisk(boot)))
    boot[3:11] = b"-FVE-FS-"
    with pytest.raises(DamageError, match="BitLocker is not supported"):
        Ntfs(Disk(MemoryDisk(boot)))


def test_mapping_pairs() -> None:
    extents = Extents(1000)
    extents.add(bytes([0x11, 4, 100, 0x01, 6, 0x11, 2, 0xF6, 0]), 0, 11)
    assert list(extents.parts(0, 12)) == [(100, 4), (HOLE, 6), (90, 2)]
    assert list(extents.parts(2, 5)) == [(102, 2), (HOLE, 1)]
    for pairs, lowest, highest in [
        (bytes([0x11, 4, 100, 0]), 13, 16),
        (bytes([0x11, 4, 100, 0]), 12, 16),
        (bytes([0x21, 4, 0xE8, 3, 0]), 12, 15),
        (bytes([0x11, 0xFC, 100, 0]), 12, 15),
        (bytes([0x91, 1]), 12, 12),
        (bytes([0x11, 1]), 12, 12),
    ]:
        with pytest.raises(DamageError):
            extents.add(pairs, lowest, highest)


def test_lznt1() -> None:
    # [MS-XCA] 3.3: an example of compressed text.
    data = bytes.fromhex(
        "38b08846232000204720410010a24701a045204400084501507900c04520052413880"
        "5b4024a44ef0358028c091601484500be009e000401189000"
    )
    text = (
        b"F# F# G A A G F# E D D E F# F# E E F# F# G A A G F# E D D E F# E D D E E F# D E F# G F# D E F# G "
        b"F# E D E A F# F# G A A G F# E D D E F# E D D\0"
    )
    assert decompress(data, 4096) == text + bytes(4096 - len(text))
    assert decompress(struct.pack("<H", 0x3000 | 4095) + b"a" * 4096, 8192) == b"a" * 4096 + bytes(4096)
    for bad in (
        b"",
        b"\0\0",
        data[:20],
        struct.pack("<H", 0xB002) + b"\1\0\0",
        struct.pack("<H", 0x9000) + b"\0\0",
    ):
        with pytest.raises(DamageError):
            decompress(bad, 4096)


def test_fixups() -> None:
    raw = bytearray(1024)
    raw[:8] = b"FILE" + struct.pack("<HH", 48, 3)
    raw[48:54] = b"\1\0abcd"
    raw[510:512] = raw[1022:1024] = b"\1\0"
    fixed = without_fixups(bytes(raw), b"FILE")
    assert (fixed[510:512], fixed[1022:]) == (b"ab", b"cd")
    raw[1022] = 2
    with pytest.raises(DamageError, match="are damaged or older"):
        without_fixups(bytes(raw), b"FILE")


def symlink(tag: int, target: str) -> bytes:
    name = target.encode("utf-16-le")
    body = struct.pack("<HHHH", 0, len(name), 0, 0) + (bytes(4) if tag == reparse.SYMLINK else b"") + name
    return struct.pack("<IHH", tag, len(body), 0) + body


def test_targets_of_links() -> None:
    assert reparse.read_target(symlink(reparse.SYMLINK, "..\\a")) == b"../a"
    assert reparse.read_target(symlink(reparse.MOUNT_POINT, "\\??\\C:\\Users\\ä")) == "C:/Users/ä".encode()
    assert reparse.read_target(symlink(reparse.SYMLINK, "\\??\\UNC\\host\\share")) == b"//host/share"
    assert reparse.read_target(struct.pack("<IHHI", reparse.LX_SYMLINK, 8, 0, 2) + b"/etc") == b"/etc"
    assert reparse.utf8(b"\0\xd8a\0") == b"\xed\xa0\x80a"
    assert reparse.utf8("😀".encode("utf-16-le")) == "😀".encode()
    with pytest.raises(DamageError):
        reparse.read_target(symlink(reparse.SYMLINK, ""))


def test_special_files_of_linux() -> None:
    assert read_special(b"IntxLNK\1" + "a/ü".encode("utf-16-le")) == (0o120000, "a/ü".encode(), 0)
    assert read_special(b"IntxBLK\0" + struct.pack("<QQ", 8, 1)) == (0o060000, None, 0x801)
    assert read_special(b"IntxBLK\0" + struct.pack("<QQ", 1 << 40, 1)) is None
    assert read_special(b"ordinary") is None


@pytest.mark.root
def test_what_linux_wrote(tmp_path: Path) -> None:
    need("mkntfs", "ntfs-3g", "umount")
    need_root("mount with ntfs-3g")
    need_fuse()
    image, place = image_from(tmp_path / "disk", 32 << 20), tmp_path / "mount"
    place.mkdir()
    run(["mkntfs", "-F", "-Q", "-L", "Täst", image])
    run(["ntfs-3g", image, place, "-o", "streams_interface=xattr,compression"])
    chance = random.Random(3)
    expected: dict[bytes, bytes] = {}
    try:
        for number in range(700):
            expected[b"many file names in blocks of an index %d" % number] = chance.randbytes(number)
        expected[b"sparse"] = bytes(5 << 20) + b"end"
        for name, data in expected.items():
            with open(os.fsencode(place) + b"/" + name, "wb") as file:
                file.seek(len(data) - 3 if name == b"sparse" else 0)
                file.write(data[-3:] if name == b"sparse" else data)
        parts = [open(place / name, "wb", buffering=0) for name in ("a", "b")]  # noqa: SIM115
        for name in (b"a", b"b"):
            expected[name] = b""
        for number in range(200):  # in turns: each in many extents, with an attribute list
            for name, part in zip((b"a", b"b"), parts, strict=True):
                expected[name] += (data := bytes([number % 251]) * 4096)
                part.write(data)
                os.fsync(part.fileno())
        for part in parts:
            part.close()
        for number in range(40):
            os.link(place / "a", place / f"a link with a long name, so that there is a list {number}")
        os.symlink("../ä", place / "link")
        os.setxattr(place / "a", "user.small", b"stream")
        os.utime(place / "a", ns=(0, NTFS_ZERO))
        os.mkdir(place / "packed")
        os.setxattr(place / "packed", "system.ntfs_attrib", (0x810).to_bytes(4, "little"))
        expected[b"packed/text"] = b"".join(b"line %d, and again " % (number % 9) for number in range(20000))
        (place / "packed/text").write_bytes(expected[b"packed/text"])
    finally:
        run(["umount", place])
    disk = FileDisk(image)
    contents = Ntfs(Disk(disk))
    found = dict(contents.walk(contents.root))
    assert len(found) == len(expected) + 40 + 2
    for path, data in expected.items():
        entry = found[path]
        assert isinstance(entry, Entry)
        assert b"".join(content_of(contents, [disk], entry)) == data
    assert getattr(found[b"link"], "target", None) == "../ä".encode()
    assert isinstance(entry := found[b"a"], Entry)
    assert (entry.links, entry.mtime_ns) == (41, NTFS_ZERO)
    assert contents.xattrs(entry) == {b"user.small": b"stream"}
    assert any(piece.stream == DECODED for piece in contents.data(cast(Entry, found[b"packed/text"])))
    assert len(contents.data(cast(Entry, found[b"sparse"]))) <= 3
    assert contents.facts()["label"] == "Täst"


def run(command: Sequence[str | Path]) -> None:
    subprocess.run(command, check=True, capture_output=True)
