"""ext2, ext3 and ext4 as mke2fs and debugfs make them: forms, journals, and damage."""

from __future__ import annotations

import os
import random
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.contents.base import DECODED, Entry
from pbsfs.disks.crc32c import crc32c
from pbsfs.disks.ext.inode import ROOT
from pbsfs.disks.ext.reader import Ext
from pbsfs.disks.ext.superblock import kernel_crc, parse_superblock
from pbsfs.disks.volume import Disk
from tests.disks.ext_images import MAGIC, Journaled, debugfs, made, walked
from tests.support.disks import FileDisk, MemoryDisk, Patched, content_of, fields_of
from tests.support.hostile import counts, limited

SIZES = (0, 1, 59, 60, 61, 150, 1000, 5000, 100_000)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What goes into the images: sizes, holes, links, and a directory of many names."""
    root = tmp_path_factory.mktemp("tree")
    some = random.Random(5)
    for size in SIZES:
        (root / f"file-{size}").write_bytes(some.randbytes(size))
    for target in ("t" * 59, "t" * 60, "t" * 200):
        (root / f"link-{len(target)}").symlink_to(target)
    (root / "many").mkdir()
    for number in range(400):
        (root / "many" / f"{number:04d}{'n' * (number % 90)}").write_bytes(b"")
    (root / "small" / "below").mkdir(parents=True)
    (root / "small" / "below" / "file").write_bytes(b"below")
    os.link(root / "file-5000", root / "hard")
    os.mkfifo(root / "fifo")
    with (root / "holes").open("wb") as file:
        for offset in (3 << 10, 200 << 10, 1 << 20, 70 << 20):
            file.seek(offset)
            file.write(some.randbytes(2500))
        file.truncate(100 << 20)
    with (root / "parts").open("wb") as file:
        for number in range(700):
            file.seek(number * 8192)
            file.write(b"%1000d" % number)
    os.utime(root / "file-1", ns=(1, -1_234_567_890))
    (root / "small").chmod(0o2751)
    return root


@pytest.mark.parametrize(
    "options",
    [
        "-t ext4",
        "-t ext4 -b 1024 -O inline_data,ea_inode,large_dir,metadata_csum_seed",
        "-t ext4 -b 2048 -I 1024 -O inline_data",
        "-t ext4 -b 1024 -O ^metadata_csum,uninit_bg,^64bit,^flex_bg -g 1024",
        "-t ext4 -b 1024 -O meta_bg,^resize_inode -g 512",
        "-t ext4 -b 1024 -O meta_bg,^resize_inode,^64bit,^sparse_super -g 512",
        "-t ext4 -b 1024 -O sparse_super2,^resize_inode",
        "-t ext4 -b 1024 -O bigalloc -C 8192",
        "-t ext4 -b 16384",
        "-t ext4 -b 65536 -O ^has_journal",
        "-t ext4 -O casefold",
        "-t ext4 -O orphan_file,quota,project -I 512",
        "-t ext3",
        "-t ext2 -b 1024",
        "-t ext2 -b 1024 -I 128 -O ^filetype",
    ],
)
def test_every_form_is_read_as_it_was_made(options: str, tree: Path, tmp_path: Path) -> None:
    disk = made(tmp_path / "image", *options.split(), tree=tree)
    # mke2fs forgets a hole at the end of a file where data may lie in inodes
    debugfs(tmp_path / "image", f"set_inode_field /holes size {100 << 20}")
    found = Ext(Disk(disk))
    assert found.kind == options.split()[1]
    entries = walked(found)
    paths = {os.fsencode(path.relative_to(tree)) for path in tree.rglob("*")}
    assert entries.keys() - paths == {b"lost+found"}
    assert not paths - entries.keys()
    inodes: dict[int, int] = {}
    for path in paths:
        entry, status = entries[path], os.lstat(os.path.join(os.fsencode(tree), path))
        second = 1_000_000_000  # mke2fs keeps no more
        assert entry.mode == status.st_mode
        assert entry.mtime_ns // second == status.st_mtime_ns // second
        assert (entry.uid, entry.gid) == (status.st_uid, status.st_gid)
        assert inodes.setdefault(status.st_ino, entry.inode) == entry.inode
        if entry.is_link:
            target = os.readlink(os.path.join(os.fsencode(tree), path))
            assert (entry.target, entry.size) == (target, len(target))
        if entry.is_file:
            assert (entry.size, entry.links) == (status.st_size, status.st_nlink)
            assert sum(piece.length for piece in found.data(entry)) == entry.size
            with (tree / os.fsdecode(path)).open("rb") as file:
                for part in content_of(found, [disk], entry):
                    assert part == file.read(len(part))


def test_holes_and_parts_that_were_not_written_read_as_zeros(tree: Path, tmp_path: Path) -> None:
    disk = made(tmp_path / "image", "-t", "ext4", "-b", "1024", tree=tree)
    debugfs(tmp_path / "image", "fallocate /file-5000 5 20", "set_inode_field /file-5000 size 15000")
    found = Ext(Disk(disk))
    pieces = found.data(walked(found)[b"file-5000"])
    assert [(piece.stream, piece.length) for piece in pieces] == [(0, 5120), (None, 15000 - 5120)]
    holes = found.data(walked(found)[b"holes"])
    assert sum(piece.length for piece in holes if piece.stream is None) > 99 << 20
    assert len(holes) < 20


@pytest.mark.parametrize("features", ["metadata_csum,ea_inode", "^metadata_csum,inline_data"])
def test_extended_attributes_and_devices(features: str, tree: Path, tmp_path: Path) -> None:
    disk = made(tmp_path / "image", "-t", "ext4", "-O", features, tree=tree)
    (tmp_path / "large").write_bytes(b"v" * 700)
    debugfs(
        tmp_path / "image",
        "ea_set /file-60 user.one 1",
        "ea_set /file-60 security.two 22",
        "ea_set /file-60 trusted.empty ''",
        f"ea_set -f {tmp_path / 'large'} /file-60 user.large",
        "mknod b b 259 7",
        "mknod c c 4 64",
    )
    found = Ext(Disk(disk))
    entries = walked(found)
    values = found.xattrs(entries[b"file-60"])
    assert values[b"user.one"] == b"1"
    assert values[b"security.two"] == b"22"
    assert values[b"user.large"] == b"v" * 700
    assert entries[b"file-60"].has_xattrs
    assert not entries[b"file-61"].has_xattrs
    assert found.xattrs(entries[b"file-61"]) == {}
    assert entries[b"c"].rdev == os.makedev(4, 64)
    assert entries[b"b"].rdev == os.makedev(259, 7)
    assert stat.S_ISBLK(entries[b"b"].mode)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    disk = made(tmp_path / "image", "-t", "ext4", "-O", "encrypt,^metadata_csum", size=8 << 20)
    debugfs(tmp_path / "image", "mkdir secret", "set_inode_field secret flags 0x80800")
    found = Ext(Disk(disk))
    secret = walked_or_not(found)[b"secret"]
    assert isinstance(secret, UnsupportedError)
    assert str(secret).endswith(": an encrypted directory is not supported")
    data = bytearray((tmp_path / "image").read_bytes())
    data[1024 + 98] |= 0x40
    with pytest.raises(UnsupportedError, match=r"the ext4 feature 0x400000 is not supported"):
        Ext(Disk(MemoryDisk(data)))


def walked_or_not(found: Ext) -> dict[bytes, Entry | DamageError]:
    return dict(found.walk(found.root))


# --- journals


@pytest.mark.parametrize("checksums", [True, False])
def test_complete_transactions_are_replayed(checksums: bool, tmp_path: Path) -> None:
    disk = Journaled(tmp_path)
    escaped = MAGIC + b"e" * 1020
    disk.write(
        ({0: b"a" * 1024, 1: b"b" * 1024, 3: b"d" * 1024}, []),
        ({1: escaped}, []),
        ({}, [0, 3]),
        ({3: b"x" * 1024}, []),
        checksums=checksums,
    )
    assert disk.open().facts()["journal"] == "replayed: 2 blocks of 4 transactions"
    assert disk.content() == b"A" * 1024 + escaped + b"C" * 1024 + b"x" * 1024
    streams = [(piece.stream, piece.length) for piece in disk.pieces()]
    assert streams == [(0, 1024), (DECODED, 1024), (0, 1024), (DECODED, 1024)]


def test_a_transaction_without_its_end_is_left_out(tmp_path: Path) -> None:
    disk = Journaled(tmp_path)
    disk.write(({0: b"a" * 1024}, []), ({0: b"b" * 1024}, []), checksums=True)
    disk.change(disk.block(2, 1), bytes(1024))
    assert disk.open().facts()["journal"] == "replayed: 1 blocks of 1 transactions"
    assert disk.content()[:1024] == b"a" * 1024


@pytest.mark.parametrize(("kind", "offset"), [(1, 700), (2, 20)])
def test_a_wrong_checksum_ends_the_replay_and_is_said(kind: int, offset: int, tmp_path: Path) -> None:
    disk = Journaled(tmp_path)
    disk.write(({0: b"a" * 1024}, []), ({1: b"b" * 1024}, []), ({2: b"c" * 1024}, []), checksums=True)
    disk.change(disk.block(kind, 1) + offset, b"x")
    journal = disk.open().facts()["journal"]
    assert journal.startswith("not replayed: transaction ")
    assert journal.endswith("has a wrong checksum; before it, replayed: 1 blocks of 1 transactions")
    assert disk.content() == b"a" * 1024 + b"".join(bytes([letter]) * 1024 for letter in b"BCD")


def test_a_damaged_copy_is_not_given(tmp_path: Path) -> None:
    disk = Journaled(tmp_path)
    disk.write(({0: b"a" * 1024, 1: b"b" * 1024}, []), checksums=True)
    disk.change(disk.block(1) + 1024 + 5, b"x")
    assert disk.open().facts()["journal"] == "replayed: 2 blocks of 1 transactions"
    with pytest.raises(DamageError, match=r"its copy in the journal has a wrong checksum"):
        disk.content()


def test_fast_commits_are_said_not_to_be_replayed(tmp_path: Path) -> None:
    disk = Journaled(tmp_path, "-O", "fast_commit,^metadata_csum", journal=4)
    disk.write(({0: b"a" * 1024}, []), checksums=False)
    journal = disk.journal()[1]
    assert disk.open().facts()["journal"] == "replayed: 1 blocks of 1 transactions"
    disk.change(40, struct.pack(">I", int.from_bytes(journal[40:44], "big") | 0x20))
    count = int.from_bytes(journal[84:88], "big") or 256
    after = int.from_bytes(journal[24:28], "big") + 1
    place = int.from_bytes(journal[16:20], "big") - count + 1
    disk.change(place * 1024, struct.pack("<HHII", 9, 8, 0, after))
    assert disk.open().facts()["journal"] == (
        "not replayed: fast commits after the last transaction: reading them is not supported"
        "; before it, replayed: 1 blocks of 1 transactions"
    )


def test_a_journal_that_cannot_be_read_is_said_not_to_be_replayed(tmp_path: Path) -> None:
    disk = Journaled(tmp_path)
    disk.write(({0: b"a" * 1024}, []), checksums=True)
    disk.change(20, b"\xff")
    assert disk.open().facts()["journal"].startswith("not replayed: the superblock of the journal")
    assert disk.content()[:1024] == b"A" * 1024


# --- damage


def original(found: Ext) -> dict[bytes, dict[str, Any]]:
    return {path: without_data(found, entry) for path, entry in walked(found).items()}


def without_data(found: Ext, entry: Entry) -> dict[str, Any]:
    pieces = (
        [(piece.stream, piece.offset, piece.length) for piece in found.data(entry)] if entry.is_file else []
    )
    fields = fields_of(found, [], entry) if not entry.is_file else {"x": found.xattrs(entry)}
    return fields | {"p": pieces, "m": entry.mode, "s": entry.size, "mt": entry.mtime_ns, "i": entry.inode}


def small(path: Path, *options: str) -> bytes:
    """A small image with all kinds of metadata."""
    made(path / "image", "-b", "1024", *options, size=3 << 20)
    (path / "some").write_bytes(bytes(range(256)) * 10)
    (path / "value").write_bytes(b"v" * 600)
    debugfs(
        path / "image",
        *(f"write {path / 'some'} file-{number}-{'n' * 60}" for number in range(30)),
        "mkdir directory",
        f"ea_set -f {path / 'value'} directory user.large",
        f"symlink link {'t' * 100}",
        f"write {path / 'some'} directory/below",
        f"ea_set directory/below user.small {'s' * 20}",
    )
    return (path / "image").read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_with_checksums_nothing_wrong_is_shown(seed: int, tmp_path: Path) -> None:
    """Bits that are flipped: what is listed without an error is as it was, and what lacks is told."""
    data = small(tmp_path, "-t", "ext4", "-O", "metadata_csum,inline_data,^has_journal", "-U", "clear")
    truth = original(Ext(Disk(MemoryDisk(data))))
    used = [at for at in range(0, len(data), 1024) if any(data[at : at + 1024])]
    chance = random.Random(seed)
    hurt = 0
    for _ in range(60):
        image = bytearray(data)
        for _ in range(chance.choice((1, 1, 3, 30))):
            image[chance.choice(used) + chance.randrange(1024)] ^= 1 << chance.randrange(8)
        try:
            found = Ext(Disk(MemoryDisk(image)))
        except DamageError:
            hurt += 1
            continue
        there = walked_or_not(found)
        damaged = {path for path, entry in there.items() if isinstance(entry, DamageError)}
        for path in truth:
            entry = there.get(path)
            if entry is None:  # its directory, or one above it, says that it is damaged
                assert any(path.startswith(above) for above in damaged)
            elif isinstance(entry, Entry):
                try:
                    assert without_data(found, entry) == truth[path]
                except DamageError:
                    hurt += 1
        assert not there.keys() - truth.keys() - damaged
        hurt += len(damaged)
    assert hurt > 10


def test_the_checksum_of_each_of_many_inodes_counts(tmp_path: Path) -> None:
    """In a directory so large that they are verified side by side: every byte of an inode, both lengths of
    the checksum, and no inode but the damaged ones."""
    (tree := tmp_path / "tree").mkdir()
    for number in range(300):
        (tree / f"{number:03d}").touch()
    os.utime(tree / "000", (0, 0x55AABBCC))
    made(tmp_path / "image", "-t", "ext4", "-O", "metadata_csum,^has_journal", tree=tree)
    image = bytearray((tmp_path / "image").read_bytes())
    names = sorted(
        Ext(Disk(MemoryDisk(image))).children(Entry(b"", stat.S_IFDIR, inode=ROOT)).entries,
        key=lambda entry: entry.name,
    )[:300]
    first = image.index(struct.pack("<I", 0x55AABBCC)) - 16
    seed = parse_superblock(bytes(image[1024:2048])).seed
    bad: set[bytes] = set()
    for number, entry in enumerate(names):
        at = first + (entry.inode - names[0].inode) * 256
        if number % 5 == 4:  # a checksum of 16 bits: the fields end in front of its other half
            image[at + 124 : at + 126] = bytes(2)
            image[at + 128 : at + 132] = bytes(4)
            own = kernel_crc(seed, struct.pack("<I", entry.inode) + image[at + 100 : at + 104])
            image[at + 124 : at + 126] = kernel_crc(own, bytes(image[at : at + 256])).to_bytes(4, "little")[
                :2
            ]
        if number % 5 in {1, 3} or number % 10 == 9:
            image[at + (number * 37) % 256] ^= 1 << number % 8
            bad.add(entry.name)
    found = Ext(Disk(MemoryDisk(image)))
    listed = found.children(found.root)
    assert {entry.name for entry in names} - {entry.name for entry in listed.entries} == bad
    assert listed.damage is not None
    assert len(bad) == 150
    for name in bad:
        with pytest.raises(DamageError, match=r"wrong checksum|longer than it is"):
            found.child(found.root, name)


@pytest.mark.parametrize("count", counts(150, 700))
@pytest.mark.parametrize(
    "form",
    [
        "-t ext2",
        "-t ext3 -J size=1",
        "-t ext4 -O ^metadata_csum,inline_data,^has_journal",
        "-t ext4 -O ^metadata_csum,bigalloc,ea_inode,^has_journal -C 4096",
        "-t ext4 -O ^metadata_csum,meta_bg,^resize_inode,large_dir,^has_journal -g 256",
    ],
)
def test_hostile_images_raise_nothing_but_damage(form: str, count: int, tmp_path: Path) -> None:
    data = small(tmp_path, *form.split())
    used = [at for at in range(0, len(data), 1024) if any(data[at : at + 1024])]
    chance = random.Random(f"{form} {count}")
    opened = 0
    for number in range(count):
        image = bytearray(data)
        if number % 15 == 0:
            del image[chance.randrange(len(image)) :]
        for _ in range(chance.choice((1, 4, 20))):
            at = chance.choice(used[: chance.choice((4, 20, len(used)))]) + 4 * chance.randrange(256)
            value = chance.choice((bytes(4), b"\xff" * 4, b"\1\0\0\0", b"\0\0\0\x80", chance.randbytes(4)))
            if at + 4 <= len(image):
                image[at : at + 4] = value
        with limited(), suppress(DamageError):
            look(Ext(Disk(MemoryDisk(image))))
            opened += 1
    assert opened > count // 4


def look(found: Ext) -> None:
    for entry in walked_or_not(found).values():
        if isinstance(entry, Entry):
            with suppress(DamageError):
                found.xattrs(entry)
                if entry.is_file:
                    assert sum(piece.length for piece in found.data(entry)) == entry.size


@pytest.mark.parametrize("count", counts(60, 1000))
@pytest.mark.parametrize("features", ["metadata_csum", "^metadata_csum,^64bit"])
def test_hostile_journals_raise_nothing_but_damage(features: str, count: int, tmp_path: Path) -> None:
    made = Journaled(tmp_path, "-O", features)
    for number in range(4):
        made.write(
            ({0: bytes([number]) * 1024, 1: MAGIC + bytes(1020)}, []),
            ({}, [number]),
            ({2: b"c" * 1024}, [1]),
            checksums=features == "metadata_csum",
        )
    start, journal = made.journal()
    used = [at for at in range(0, len(journal), 1024) if any(journal[at : at + 1024])]
    disk = Patched(FileDisk(made.image))
    chance = random.Random(count)
    states: set[str] = set()
    for _ in range(count):
        disk.changes = {}
        for _ in range(chance.choice((1, 1, 4, 20))):
            place = start + chance.choice(used) + chance.randrange(chance.choice((16, 100, 1020)))
            value = chance.choice((bytes(4), b"\xff" * 4, b"\0\0\0\1", b"\0", chance.randbytes(1)))
            disk.changes[place] = value
        with limited(), suppress(DamageError):  # what is replayed may be a broken superblock
            found = Ext(Disk(disk))
            states.add(found.facts()["journal"])
            look(found)
            content = content_of(found, [disk], walked(found)[b"file"])
            assert sum(map(len, content)) == 4096
    assert len(states) > 5


def test_the_checksum_of_the_superblock_counts(tmp_path: Path) -> None:
    made(tmp_path / "image", "-t", "ext4", size=8 << 20)
    data = bytearray((tmp_path / "image").read_bytes())
    data[1024 + 120] ^= 1
    with pytest.raises(DamageError, match=r"the superblock has a wrong checksum"):
        Ext(Disk(MemoryDisk(data)))
    data[2044:2048] = struct.pack("<I", crc32c(bytes(data[1024:2044])) ^ 0xFFFFFFFF)
    assert Ext(Disk(MemoryDisk(data))).facts()["label"] == "\x01"
