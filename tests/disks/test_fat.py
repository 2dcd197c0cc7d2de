"""FAT12, FAT16 and FAT32: golden volumes, volumes that mkfs.vfat and mtools made, and hostile ones."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import Entry
from pbsfs.disks.fat.fat import Fat
from pbsfs.disks.fat.names import dos_time, short_name
from pbsfs.disks.volume import Disk, part_of
from tests.support.disks import (
    FileDisk,
    GoldenDisk,
    MemoryDisk,
    content_of,
    differences,
    image_from,
    lines_of,
)
from tests.support.fat import DOTS, FatImage, item, long_items, short_checksum
from tests.support.hostile import counts, limited
from tests.support.needs import need

WRITTEN = {"names/🎉party": "names/\uf389party", "names/e\u0301.nfd": "names/e.nfd"}
"""Two names that mtools, which made the golden volumes, did not write as they were: it cut the first one's
letter to 16 bits, and left out the second one's accent."""


@pytest.mark.golden
@pytest.mark.parametrize(
    ("vm", "drive", "start", "sectors", "form", "truth"),
    [
        (320, "drive-scsi0", 2048, 98304, "FAT32", "server.efi"),
        (321, "drive-sata0", 389120, 98304, "FAT16", "windows.p5"),
    ],
)
def test_golden_volumes(vm: int, drive: str, start: int, sectors: int, form: str, truth: str) -> None:
    disk = GoldenDisk(vm, drive)
    volume = part_of(Disk(disk), start * 512, sectors * 512)
    assert Fat.recognise(volume)
    fat = Fat(volume)
    assert fat.facts()["form"] == form
    lines = {
        WRITTEN.get(path.decode(), path.decode()).encode(): line for path, line in lines_of(truth).items()
    }
    assert differences(fat, [disk], lines, but="m,mt,u,g") == []
    for path, entry in fat.walk(fat.root):
        assert isinstance(entry, Entry)
        assert abs(entry.mtime_ns - lines[path]["mt"]) <= 2_000_000_000, path


def opened(image: FatImage) -> Fat:
    return Fat(Disk(MemoryDisk(image.data)))


def names(fs: Fat) -> list[bytes]:
    found = fs.children(fs.root)
    assert found.damage is None
    return [entry.name for entry in found.entries]


@pytest.mark.parametrize(
    ("bits", "size", "sector", "cluster"),
    [
        ("12", 3, 512, 2),
        ("12", 4, 2048, 1),
        ("16", 20, 512, 1),
        ("16", 60, 4096, 1),
        ("32", 40, 512, 1),
        ("32", 300, 4096, 1),
    ],
)
def test_volumes_of_mkfs_and_mtools(tmp_path: Path, bits: str, size: int, sector: int, cluster: int) -> None:
    need("mkfs.vfat", "mcopy", "mdel")
    path = image_from(tmp_path / "image", size << 20)
    made = ["mkfs.vfat", "-F", bits, "-S", str(sector), "-s", str(cluster), "-i", "12345678", "-n", "A LABEL"]
    subprocess.run([*made, str(path)], check=True, capture_output=True)
    tree = tmp_path / "tree"
    chance = random.Random(size)
    truth: dict[bytes, bytes | None] = {b"t": None}
    for directory in ("sub", "sub/deeper", "many"):
        (tree / directory).mkdir(parents=True)
        truth[b"t/" + directory.encode()] = None
    for number in range(150):
        name = f"sub/{number}" if number % 5 else f"many/A long name with {number} and more x{'x' * number}"
        content = chance.randbytes(chance.randrange(4000))
        (tree / name).write_bytes(content)
        os.utime(tree / name, (0, 10**9 + number * 10**6))
        truth[b"t/" + name.encode()] = content
    environment = os.environ | {"TZ": "UTC", "MTOOLS_SKIP_CHECK": "1"}

    def run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, env=environment)

    run("mcopy", "-i", str(path), "-s", "-m", str(tree), "::t")
    run("mdel", "-i", str(path), "::t/sub/1", "::t/sub/7")
    del truth[b"t/sub/1"], truth[b"t/sub/7"]
    disk = FileDisk(path)
    assert Fat.recognise(Disk(disk))
    fs = Fat(Disk(disk))
    facts = {
        "form": f"FAT{bits}",
        "label": "A LABEL",
        "uuid": "1234-5678",
        "state": "clean",
        "journal": "none",
    }
    assert fs.facts() == facts
    found: dict[bytes, bytes | None] = {}
    for where, entry in fs.walk(fs.root):
        assert isinstance(entry, Entry)
        found[where] = None if entry.is_directory else b"".join(content_of(fs, [disk], entry))
        if entry.is_file:
            assert entry.mtime_ns // 10**9 == os.stat(tree / os.fsdecode(where[2:])).st_mtime_ns // 10**9 & ~1
    assert found == truth


@pytest.mark.parametrize(
    ("stored", "small", "name"),
    [
        (b"README  TXT", 0, "README.TXT"),
        (b"README  TXT", 0x08, "readme.TXT"),
        (b"README  TXT", 0x10, "README.txt"),
        (b"README  TXT", 0x18, "readme.txt"),
        (b"NOEXT      ", 0, "NOEXT"),
        (b"A B     C D", 0, "A B.C D"),
        (b"\x05A      \x8e  ", 0, "\u03c3A.Ä"),
        (b"\x8e\x99\x9a\xe4\xe2   \xa5  ", 0x18, "äöüσΓ.ñ"),
    ],
)
def test_short_names(stored: bytes, small: int, name: str) -> None:
    assert short_name(stored, small) == name.encode()


def test_long_names() -> None:
    short = b"LONG~1     "
    lost = b"\x00\xd8a\x00"
    image = FatImage(28)
    other = b"OTHER   TXT"
    image.chain(2, 10, 11, 12, 13)
    stored = [
        *long_items("a name", short), item(short),
        *long_items("thirteen unit", b"T          "), item(b"T          "),
        *long_items(lost, b"L          "), item(b"L          "),
        *long_items("🎉" * 100, b"P          "), item(b"P          "),
        *long_items("wrong checksum", other, checksum=short_checksum(other) ^ 1), item(other),
        *long_items("a part is missing from this name", b"M          ")[:-1], item(b"M          "),
        *long_items("the first is missing from this name", b"F          ")[1:], item(b"F          "),
        *long_items("of a deleted one", b"D          "), b"\xe5" + item(b"D          ")[1:],
        item(b"D          "),
        *long_items("x" * 255, b"X          "), item(b"X          "),
    ]  # fmt: skip
    image.put(b"".join(stored), 2, 10, 11, 12, 13)
    assert names(opened(image)) == [
        b"a name", b"thirteen unit", b"\xed\xa0\x80a", "🎉".encode() * 100, b"OTHER.TXT", b"M", b"F", b"D",
        b"x" * 255,
    ]  # fmt: skip


def test_what_is_not_a_file_is_left_out() -> None:
    image = FatImage(16)
    image.put_root(
        item(b"MY LABEL   ", attributes=0x08) + b"\xe5" + item(b"A          ")[1:]
        + item(b"KEPT       ") + bytes(32) + item(b"STALE      ")
    )  # fmt: skip
    fs = opened(image)
    assert names(fs) == [b"KEPT"]
    assert fs.facts()["label"] == "MY LABEL"


def test_fields_of_entries() -> None:
    image = FatImage(16)
    image.chain(5)
    image.put(DOTS, 5)
    image.put_root(
        item(b"F          ", attributes=0x21)
        + item(b"D          ", attributes=0x11, first=5, size=99)
        + item(b"T          ", time=0xBF7D, date=0x5A5D)
        + item(b"Z          ", time=0, date=0)
    )
    fs = opened(image)
    read_only, directory, last, zero = fs.children(fs.root).entries
    assert (read_only.mode, read_only.uid, read_only.gid, read_only.links) == (0o100444, 0, 0, 1)
    assert (directory.mode, directory.size) == (0o040555, 0)
    assert read_only.mtime_ns == int(datetime(2026, 11, 25, 20, 36, 34, tzinfo=UTC).timestamp()) * 10**9
    # February 29 of a year that has none: as Linux counts
    assert last.mtime_ns == int(datetime(2025, 3, 1, 23, 59, 58, tzinfo=UTC).timestamp()) * 10**9
    assert zero.mtime_ns == 315532800 * 10**9
    assert len({read_only.inode, directory.inode, last.inode, zero.inode, 1}) == 5


@pytest.mark.parametrize("year", range(1980, 2108))
def test_every_year(year: int) -> None:
    for month, day in ((1, 1), (2, 28), (3, 1), (12, 31)):
        date = year - 1980 << 9 | month << 5 | day
        assert dos_time(date, 0) == int(datetime(year, month, day, tzinfo=UTC).timestamp()) * 10**9


@pytest.mark.parametrize("bits", [12, 16, 28])
@pytest.mark.parametrize(
    ("chain", "size", "text"),
    [
        ((20, 21, 0xFFFFFFF), 1300, "ends after 2 of 3"),
        ((20, 21, 30, 31, 0xFFFFFFF), 1300, "longer than 3"),
        ((20, 0xFFFFFFF), 0, "longer than 0"),
        ((20, 21, 0), 1300, "a free cluster"),
        ((20, 0xFFFFFF7), 1300, "a bad cluster"),
        ((20, 4002), 1300, "does not exist"),
        ((20, 1), 1300, "does not exist"),
        ((20, 25, 20), 1 << 30, "a loop"),
        ((20, 21, 22, 23, 21), 1 << 30, "a loop"),
        ((0,), 100, "a free cluster"),
    ],
)
def test_damage_of_a_chain(bits: int, chain: tuple[int, ...], size: int, text: str) -> None:
    image = FatImage(bits, 4000)
    if bits == 16:
        image = FatImage(16, 5000)
        chain = tuple(5002 if cluster == 4002 else cluster for cluster in chain)
    for cluster, following in itertools.pairwise(chain):
        image.link(cluster, following)
    stored = item(b"BAD        ", first=chain[0], size=size) + item(b"GOOD       ")
    image.put_root(stored)
    fs = opened(image)
    assert fs.facts()["form"] == {12: "FAT12", 16: "FAT16", 28: "FAT32"}[bits]
    bad, good = fs.children(fs.root).entries
    with pytest.raises(DamageError, match=text):
        fs.data(bad)
    assert fs.data(good) == []


@pytest.mark.parametrize("bits", [12, 16, 28])
def test_a_chain_of_every_shape(bits: int) -> None:
    """Over the parts in which the table is read; as an oracle, the list of its clusters."""
    count = {12: 4000, 16: 60000, 28: 40000}[bits]
    image = FatImage(bits, count)
    chance = random.Random(bits)
    clusters: list[int] = []
    left = set(range(3, count + 2))
    while len(clusters) < 3500:
        start, length = chance.randrange(3, count), chance.choice((1, 2, 3, 200))
        run = [cluster for cluster in range(start, min(start + length, count + 2)) if cluster in left]
        clusters += run
        left -= set(run)
    image.chain(*clusters)
    image.put_root(item(b"F          ", first=clusters[0], size=len(clusters) * 512 - 5))
    fs = opened(image)
    file = fs.children(fs.root).entries[0]
    places = [at for piece in fs.data(file) for at in range(piece.offset, piece.offset + piece.length, 512)]
    assert places == [image.at(cluster) for cluster in clusters]


def test_the_table_that_counts() -> None:
    """Where FAT32's tables are not the same."""
    image = FatImage(28, flags=0x81)
    image.link(2, 0xFFFFFFF, table=1)
    image.link(20, 30, table=1)
    image.link(30, 0xFFFFFFF, table=1)
    image.put_root(item(b"F          ", first=20, size=1000))
    fs = opened(image)
    assert [piece.offset for piece in fs.data(fs.children(fs.root).entries[0])] == [
        image.at(20),
        image.at(30),
    ]
    with pytest.raises(DamageError, match="table 2 of 2"):
        opened(FatImage(28, flags=0x82))


def test_states() -> None:
    for bits, offset in ((16, 37), (28, 65)):
        image = FatImage(bits, 5000)
        assert opened(image).facts()["state"] == "clean"
        image.data[offset] = 1
        assert opened(image).facts()["state"] == "not cleanly unmounted"
        image.data[offset] = 0
        image.link(1, 0x7FFFFFF if bits == 28 else 0x7FFF)
        assert opened(image).facts()["state"] == "not cleanly unmounted"


@pytest.mark.parametrize(
    ("stored", "first", "text"),
    [
        (DOTS + item(b"SELF       ", attributes=0x10, first=5), 5, "clusters of another"),
        (b"garbage!" * 4, 5, "does not start with"),
        (DOTS, 0, "does not exist"),
        (DOTS, 9999, "does not exist"),
        (DOTS + item(b"A/B        "), 5, "contains '/'"),
        (DOTS + item(b"A          ") * 2, 5, "same name"),
    ],
)
def test_damage_of_a_directory(stored: bytes, first: int, text: str) -> None:
    image = FatImage(16, 5000)
    image.chain(5)
    image.put(stored, 5)
    image.put_root(item(b"D          ", attributes=0x10, first=first) + item(b"GOOD       "))
    fs = opened(image)
    walked = list(fs.walk(fs.root))
    assert any(path == b"GOOD" and isinstance(entry, Entry) for path, entry in walked)
    assert any(text in str(entry) for _path, entry in walked if isinstance(entry, DamageError))


def test_other_content_is_not_recognised() -> None:
    mbr = bytearray(512)
    mbr[0:3] = b"\xeb\x63\x90"
    mbr[510:] = b"\x55\xaa"
    for data in (b"", bytes(512), bytes(100), bytes(mbr), b"\xeb\x52\x90NTFS    " + bytes(501)):
        volume = Disk(MemoryDisk(data))
        assert not Fat.recognise(volume)
        with pytest.raises(DamageError):
            Fat(volume)


@pytest.mark.parametrize("bits", [12, 16, 28])
@pytest.mark.parametrize("count", counts(150, 700))
def test_mutations_raise_nothing_but_damage(bits: int, count: int) -> None:
    image = FatImage(bits, 3000 if bits == 12 else 5000)
    image.chain(50, 51, 52, 60)
    image.chain(30, 40)
    sub = [*long_items("sub " * 20, b"S          "), item(b"S          ", first=50, size=2000)]
    image.put(DOTS + b"".join(sub), 30, 40)
    image.put_root(
        item(b"D          ", first=30, attributes=0x10)
        + b"".join(item(b"F%d         " % number, first=50, size=2000 - number) for number in range(9))
    )
    whole = bytes(image.data)
    chance = random.Random(bits + count)
    places = [*range(90), *range(image.table, image.table + 250), *range(image.root, image.root + 320)]
    places += range(image.at(30), image.at(30) + 512)
    for _ in range(count):
        changed = bytearray(whole)
        for _ in range(chance.randint(1, 5)):
            changed[chance.choice(places)] = chance.randrange(256)
        if chance.random() < 0.2:
            del changed[chance.randrange(len(changed)) :]
        disk = MemoryDisk(changed)
        with limited(), suppress(DamageError):
            Fat.recognise(Disk(disk))
            look(Fat(Disk(disk)))


def look(fs: Fat) -> None:
    fs.facts()
    for _path, entry in fs.walk(fs.root):
        if isinstance(entry, Entry) and entry.is_file:
            with suppress(DamageError):
                assert sum(piece.length for piece in fs.data(entry)) == entry.size
