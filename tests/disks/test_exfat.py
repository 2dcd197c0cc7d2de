"""exFAT: volumes written byte by byte, what mkfs.exfat makes, and hostile ones."""

from __future__ import annotations

import random
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import Entry, Piece
from pbsfs.disks.fat.exfat import ExFat
from pbsfs.disks.volume import Disk
from tests.support.disks import FileDisk, MemoryDisk, content_of, image_from
from tests.support.exfat import ExFatImage, file_set
from tests.support.hostile import counts, limited
from tests.support.needs import need


def opened(image: ExFatImage) -> ExFat:
    return ExFat(Disk(MemoryDisk(image.data)))


def content(image: ExFatImage, fs: ExFat, name: bytes) -> bytes:
    found = fs.child(fs.root, name)
    assert found is not None
    return b"".join(content_of(fs, [MemoryDisk(image.data)], found))


def problem(fs: ExFat) -> str:
    return str(fs.children(fs.root).damage)


def test_an_empty_volume_of_mkfs(tmp_path: Path) -> None:
    need("mkfs.exfat")
    path = image_from(tmp_path / "image", 16 << 20)
    subprocess.run(["mkfs.exfat", "-L", "LABEL", path], check=True, capture_output=True)
    disk = Disk(FileDisk(path))
    assert ExFat.recognise(disk)
    fs = ExFat(disk)
    assert fs.facts()["label"] == "LABEL"
    assert fs.facts()["state"] == "clean"
    assert (fs.children(fs.root).entries, fs.children(fs.root).damage) == ([], None)


def test_other_content_is_not_recognised() -> None:
    for data in (b"", bytes(512), bytes(100), b"\xeb\x58\x90mkfs.fat" + bytes(600)):
        volume = Disk(MemoryDisk(data))
        assert not ExFat.recognise(volume)
        with pytest.raises(DamageError):
            ExFat(volume)


def test_fields_of_entries() -> None:
    image = ExFatImage()
    image.put(
        file_set("naïve 🎉", time=0x5D79A491, hundredths=150, zone=0x80 | (4 & 0x7F))
        + file_set(b"\x00\xd8x\x00", attributes=0x21, zone=0)
        + file_set("d", attributes=0x11, zone=0x80 | (-8 & 0x7F)),
        4,
    )
    fs = opened(image)
    first, second, third = fs.children(fs.root).entries
    assert (first.name, first.mode, first.size, first.links) == ("naïve 🎉".encode(), 0o100644, 0, 1)
    assert (
        first.mtime_ns == int(datetime(2026, 11, 25, 19, 36, 35, tzinfo=UTC).timestamp()) * 10**9 + 5 * 10**8
    )
    assert (second.name, second.mode) == (b"\xed\xa0\x80x", 0o100444)
    assert (third.name, third.mode) == (b"d", 0o040555)
    hour = 3600 * 10**9
    assert first.mtime_ns - second.mtime_ns == 1_500_000_000 - hour
    assert third.mtime_ns - second.mtime_ns == 2 * hour


def test_the_longest_name() -> None:
    name = "".join(chr(0x4E00 + number) for number in range(255))
    image = ExFatImage(size=1024)
    image.put(file_set(name), 4)
    fs = opened(image)
    assert [entry.name for entry in fs.children(fs.root).entries] == [name.encode()]


def test_a_chain_and_clusters_side_by_side() -> None:
    image = ExFatImage()
    data = random.Random(1).randbytes(1300)
    image.put(data, 20, 21, 30)
    image.put(data[:600], 40, 41)
    image.chain(20, 21, 30)
    image.put(file_set("chain", first=20, size=1300) + file_set("none", first=40, size=600, chain=False), 4)
    fs = opened(image)
    assert content(image, fs, b"chain") == data
    assert content(image, fs, b"none") == data[:600]
    file = fs.child(fs.root, b"chain")
    assert file is not None
    assert fs.data(file) == [Piece(0, image.at(20), 1024), Piece(0, image.at(30), 276)]


@pytest.mark.parametrize("valid", [0, 1, 512, 700, 1299, 1300])
def test_what_was_never_written_reads_as_zeros(valid: int) -> None:
    image = ExFatImage()
    data = random.Random(1).randbytes(1536)
    image.put(data, 20, 21, 22)
    image.put(file_set("f", first=20, size=1300, valid=valid, chain=False), 4)
    assert content(image, opened(image), b"f") == data[:valid] + bytes(1300 - valid)


@pytest.mark.parametrize("chain", [True, False])
def test_entries_that_go_on_in_another_cluster(chain: bool) -> None:
    """Wherever the border between two clusters lies in a set; of a set as long as more than a cluster too."""
    names = [f"{number} " + "x" * (number * 7 % 200) for number in range(40)] + ["y" * 255]
    stored = b"".join(file_set(name, attributes=0x20 if name[0] != "y" else 0x21) for name in names)
    count = -(-len(stored) // 512)
    clusters = list(range(10, 10 + count)) if not chain else [100 - 3 * number for number in range(count)]
    image = ExFatImage()
    image.put(stored, *clusters)
    if chain:
        image.chain(*clusters)
    sub = file_set("sub", first=clusters[0], size=count * 512, chain=chain, attributes=0x10)
    image.put(sub, 4)
    fs = opened(image)
    directory = fs.child(fs.root, b"sub")
    assert directory is not None
    found = fs.children(directory)
    assert found.damage is None
    assert [entry.name.decode() for entry in found.entries] == names
    assert [oct(entry.mode) for entry in found.entries[-2:]] == ["0o100644", "0o100444"]


def test_other_kinds_of_entries_are_left_out() -> None:
    image = ExFatImage()
    deleted = bytearray(file_set("deleted"))
    for at in range(0, len(deleted), 32):
        deleted[at] &= 0x7F
    vendor = b"\xe0\0" + bytes(30)
    benign = b"\xa5\x01" + bytes(30) + b"\xc0" + bytes(31)
    image.put(
        b"\x83\x03a\0b\0c\0" + bytes(24) + b"\x81" + bytes(31) + b"\x82" + bytes(31) + bytes(deleted)
        + benign + file_set("kept", more=vendor) + bytes(32) + file_set("after the end"),
        4,
    )  # fmt: skip
    fs = opened(image)
    found = fs.children(fs.root)
    assert [entry.name for entry in found.entries] == [b"kept"]
    assert found.damage is None
    assert fs.facts()["label"] == "abc"


@pytest.mark.parametrize(
    ("stored", "text"),
    [
        (file_set("a")[:40] + b"!" + file_set("a")[41:], "checksum"),
        (file_set("a")[:64], "not whole"),
        (file_set("a")[32:], "belongs to no file"),
        (b"\x86" + bytes(31), "kind 134"),
        (file_set("a/b"), "contains '/'"),
        (file_set("a") * 2, "same name"),
        (file_set("a", first=20, size=100, valid=101), "do not belong together"),
        (file_set("a", size=100), "do not belong together"),
        (file_set("a", first=20, size=100, attributes=0x10), "cannot have"),
        (file_set("a", first=20, size=1 << 29, attributes=0x10), "cannot have"),
        (file_set("a", first=4, size=1024, attributes=0x10), "clusters of another"),
        (file_set("a", first=9999, size=1024, attributes=0x10), "does not exist"),
    ],
)
def test_damage_of_a_directory(stored: bytes, text: str) -> None:
    """Of one entry: the others are there."""
    image = ExFatImage(size=1024)
    image.chain(4, 6)
    image.put(file_set("before") + stored + file_set("behind"), 4, 6)
    fs = opened(image)
    found = fs.children(fs.root)
    assert {b"before", b"behind"} <= {entry.name for entry in found.entries}
    assert text in str(found.damage)


@pytest.mark.parametrize(
    ("chain", "size", "text"),
    [
        ((20, 21), 1300, "ends after 2 of 3"),
        ((20, 21, 30, 31), 1300, "longer than 3"),
        ((20, 21, 0), 1300, "a free cluster"),
        ((20, 0xFFFFFFF7), 1300, "a bad cluster"),
        ((20, 0xFFFFFFF8), 1300, "does not exist"),
        ((20, 2002), 1300, "does not exist"),
        ((20, 1), 1300, "does not exist"),
        ((20, 25, 20), 1 << 40, "a loop"),
        ((20, 21, 22, 23, 21), 1 << 40, "a loop"),
    ],
)
def test_damage_of_a_chain(chain: tuple[int, ...], size: int, text: str) -> None:
    image = ExFatImage()
    for cluster, following in zip(chain, (*chain[1:], 0xFFFFFFFF), strict=True):
        if 2 <= cluster < 2002 and not (cluster in chain[:-1] and following == 0xFFFFFFFF):
            image.link(cluster, following)
    image.put(file_set("bad", first=20, size=size) + file_set("good"), 4)
    fs = opened(image)
    bad, good = fs.children(fs.root).entries
    with pytest.raises(DamageError, match=text):
        fs.data(bad)
    assert fs.data(good) == []


def test_clusters_side_by_side_beyond_the_end() -> None:
    image = ExFatImage()
    image.put(file_set("bad", first=2000, size=1300, chain=False), 4)
    fs = opened(image)
    with pytest.raises(DamageError, match="there are no 3 clusters"):
        fs.data(fs.children(fs.root).entries[0])


def test_a_loop_of_the_root() -> None:
    image = ExFatImage()
    image.chain(4, 5, 6)
    image.link(6, 5)
    image.put(b"".join(file_set(f"{number:20}") for number in range(12)), 4, 5, 6)
    fs = opened(image)
    found = fs.children(fs.root)
    assert len(found.entries) == 12
    assert "directory 1: its chain of clusters is a loop" in problem(fs) or "cannot be read" in problem(fs)


def test_a_damaged_boot_region_has_a_backup() -> None:
    image = ExFatImage()
    image.put(file_set("here"), 4)
    image.data[2000] ^= 1
    fs = opened(image)
    assert "backup" in fs.facts()["boot"]
    assert [entry.name for entry in fs.children(fs.root).entries] == [b"here"]
    image.data[12 * 512 + 2000] ^= 1
    with pytest.raises(DamageError, match="checksum"):
        opened(image)


def test_a_volume_that_was_not_unmounted() -> None:
    image = ExFatImage()
    image.seal(flags=2)
    assert opened(image).facts()["state"] == "not cleanly unmounted"


def test_directories_below_each_other_have_an_end() -> None:
    """A directory that holds itself."""
    image = ExFatImage()
    image.put(file_set("a", first=10, size=512, attributes=0x10, chain=False), 4)
    image.put(file_set("b", first=10, size=512, attributes=0x10, chain=False), 10)
    fs = opened(image)
    walked = list(fs.walk(fs.root))
    assert [path for path, entry in walked if isinstance(entry, Entry)] == [b"a"]
    assert any("clusters of another" in str(entry) for _path, entry in walked)


@pytest.mark.parametrize("count", counts(300, 2000))
def test_mutations_raise_nothing_but_damage(count: int) -> None:
    image = ExFatImage()
    data = random.Random(7).randbytes(2000)
    image.put(data, 50, 51, 52, 60)
    image.chain(50, 51, 52, 60)
    image.put(b"".join(file_set(f"file {n}", first=50, size=2000 - n) for n in range(6)), 30, 40)
    image.chain(30, 40)
    image.put(file_set("sub", first=30, size=1024, attributes=0x10) + file_set("f", first=50, size=9), 4)
    whole = bytes(image.data)
    chance = random.Random(count)
    interesting = [*range(512), *range(24 * 512, 24 * 512 + 300), *range(image.at(4), image.at(4) + 300)]
    interesting += range(image.at(30), image.at(30) + 512)
    for _ in range(count):
        changed = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            changed[chance.choice(interesting)] = chance.randrange(256)
        if chance.random() < 0.2:
            del changed[chance.randrange(len(changed)) :]
        disk = MemoryDisk(changed)
        with limited(), suppress(DamageError):
            ExFat.recognise(Disk(disk))
            look(ExFat(Disk(disk)))


def look(fs: ExFat) -> None:
    fs.facts()
    for _path, entry in fs.walk(fs.root):
        if isinstance(entry, Entry) and entry.is_file:
            with suppress(DamageError):
                assert sum(piece.length for piece in fs.data(entry)) == entry.size
