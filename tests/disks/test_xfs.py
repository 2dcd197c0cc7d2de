"""XFS: golden disks, disks that mkfs.xfs and the kernel made, and damaged ones."""

from __future__ import annotations

import functools
import hashlib
import random
import stat
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.contents.base import Entry, Stream
from pbsfs.disks.volume import Disk, Volume, part_of
from pbsfs.disks.xfs.blocks import Blocks
from pbsfs.disks.xfs.changes import BufferChange, changed_inode, with_change
from pbsfs.disks.xfs.extents import extents
from pbsfs.disks.xfs.inode import decoded
from pbsfs.disks.xfs.inode_item import InodeItem, converted
from pbsfs.disks.xfs.overlay import Overlay
from pbsfs.disks.xfs.reader import Xfs
from pbsfs.disks.xfs.superblock import Superblock
from tests.disks.xfs_logs import Written, parts
from tests.support.disks import (
    FileDisk,
    GoldenDisk,
    MemoryDisk,
    Patched,
    differences,
    fields_of,
    image_from,
    lines_of,
)
from tests.support.hostile import counts, limited, mutate
from tests.support.needs import need

VAR = 253_755_392
"""Where the logical volume `var` begins on its disk, in one piece."""

VAR_SIZE = 320 << 20


@pytest.mark.golden
def test_a_disk_copied_while_mounted_is_as_the_kernel_recovers_it() -> None:
    disk = GoldenDisk(322, "drive-virtio2")
    xfs = Xfs(Disk(disk))
    assert xfs.facts()["journal"] == "replayed: 237 transactions"
    assert differences(xfs, [disk], lines_of("xfs-open.whole")) == []


@pytest.mark.golden
def test_a_volume_that_was_unmounted_is_as_the_kernel_shows_it() -> None:
    disk = GoldenDisk(320, "drive-scsi0")
    xfs = Xfs(part_of(Disk(disk), VAR, VAR_SIZE))
    assert xfs.facts()["journal"] == "clean"
    assert differences(xfs, [disk], lines_of("server.var")) == []


@pytest.mark.parametrize("size", [0, 3, 4, 511, 512, 70_000])
def test_what_is_not_xfs_is_not_recognised(size: int) -> None:
    volume: Volume = Disk(MemoryDisk(bytes(size)))
    assert not Xfs.recognise(volume)


# --- disks that mkfs.xfs makes

FORMS = {
    "version 5": (),
    "small blocks": ("-b", "size=1024", "-m", "rmapbt=1", "-i", "nrext64=1"),
    "large directory blocks": ("-n", "size=65536"),
    "large inodes": ("-i", "size=2048", "-m", "bigtime=0,reflink=0"),
    "version 4": ("-m", "crc=0"),
    "version 4 without types": ("-m", "crc=0", "-n", "ftype=0", "-i", "size=256", "-b", "size=1024"),
    "version 4, smallest": ("-m", "crc=0", "-b", "size=512", "-i", "size=256", "-n", "size=4096"),
}


def prototype(place: Path, longest: int) -> tuple[str, dict[bytes, dict[str, Any]]]:
    """What mkfs.xfs is to make, in its own language (mkfs.xfs(8), -p), and as the truth about that.

    `longest`: of the targets of links.
    """
    some = random.Random(7)
    truth: dict[bytes, dict[str, Any]] = {}
    lines = ["/none", "0 0", "d--755 0 0"]

    def add(path: str, kind: int, mode: int, **more: Any) -> None:
        fields = {"t": kind, "m": mode, "u": 5, "g": 6, "x": {}}
        if kind != stat.S_IFDIR:
            fields |= {"s": 0, "n": 1}
        truth[path.encode()] = fields | more

    def file(path: str, data: bytes) -> None:
        source = place / hashlib.sha256(data).hexdigest()
        source.write_bytes(data)
        lines.append(f"{path.rpartition('/')[2]} -u-640 5 6 {source}")
        add(path, stat.S_IFREG, 0o4640, s=len(data), h=source.name)

    add("", stat.S_IFDIR, 0o755, u=0, g=0)
    for size in (0, 1, 511, 4096, 70_000, 1_000_000):
        file(f"file-{size}", some.randbytes(size))
    for size in (1, 50, 155, 156, 330, longest):
        lines.append(f"link-{size} l--777 5 6 {'t' * size}")
        add(f"link-{size}", stat.S_IFLNK, 0o777, s=size, l=(b"t" * size).hex())
    for name, letter, kind, number in (("tty", "c", stat.S_IFCHR, 4), ("disk", "b", stat.S_IFBLK, 259)):
        lines.append(f"{name} {letter}--600 5 6 {number} 70000")
        add(name, kind, 0o600, d=[number, 70000])
    lines.append("pipe p--600 5 6")
    add("pipe", stat.S_IFIFO, 0o600)
    for count in (0, 3, 9, 60, 400):
        lines.append(f"names-{count} d-g750 5 6")
        add(f"names-{count}", stat.S_IFDIR, 0o2750)
        for number in range(count):
            file(f"names-{count}/{number:03d}-{'n' * some.randrange(100)}", b"")
        lines.append("$")
    return "\n".join([*lines, "$", "$"]) + "\n", truth


@pytest.fixture(scope="module", params=FORMS)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[bytes, dict[str, Any]]]:
    """An image of each form, and what is in it."""
    need("mkfs.xfs")
    place = tmp_path_factory.mktemp("xfs")
    options = FORMS[request.param]
    # mkfs.xfs 6.1 leaves out the headers of long links in version 5: the kernel does not read them either.
    text, truth = prototype(place, 1023 if "size=2048" in options or "crc=0" in options else 331)
    (place / "prototype").write_text(text)
    image = image_from(place / "image", 320 << 20)
    subprocess.run(
        ["mkfs.xfs", "-q", *options, "-p", str(place / "prototype"), str(image)],
        check=True,
        capture_output=True,
    )
    add_attributes(image, truth)
    return image, truth


def add_attributes(image: Path, truth: dict[bytes, dict[str, Any]]) -> None:
    """Attributes in the inode, in a block, and in a tree with values in blocks of their own."""
    need("xfs_db")
    sizes = {
        "names-9": [1],
        "file-511": [10, 200, 200, 200],
        "file-1": [1, 60_000, *[700] * 40, 5000, 65_536],
    }
    spaces = {"-u": "user.", "-r": "trusted.", "-s": "security."}
    commands: list[str] = []
    for path, values in sizes.items():
        commands += ["-c", f"path /{path}"]
        for number, size in enumerate(values):
            flag = list(spaces)[number % 3]
            commands += ["-c", f"attr_set {flag} n{number} -v {size}"]
            name = f"{spaces[flag]}n{number}".encode().hex()
            truth[path.encode()]["x"] |= {name: (b"v" * size).hex()}
    done = subprocess.run(["xfs_db", "-x", *commands, str(image)], check=True, capture_output=True)
    assert b"failed" not in done.stderr


def test_what_mkfs_makes_is_read_in_every_form(made: tuple[Path, dict[bytes, dict[str, Any]]]) -> None:
    image, truth = made
    disk = FileDisk(image)
    xfs = Xfs(Disk(disk))
    assert xfs.facts()["journal"] == "clean"
    assert differences(xfs, [disk], truth, but="mt") == []


# --- the log


class Logged:
    """A made image of version 4, with a log to write into."""

    def __init__(self, image: Path) -> None:
        self.disk = Patched(FileDisk(image))
        head = self.disk.pread(0, 512)
        superblock = Superblock.of(head)
        self.superblock = superblock
        self._start = superblock.offset_of(superblock.log_start)
        count = superblock.log_blocks * superblock.block_size // 512
        self.written = Written(at=700, cycle=3, count=count, uuid=superblock.uuid, checksums=False)
        self._tail = self.written.lsn
        self.clean = Xfs(Disk(self.disk))
        self._numbers = 0

    def add(self, *items: Sequence[bytes]) -> None:
        self._numbers += 1
        self.written.add(
            parts(self._numbers, *(region for item in items for region in item)), tail=self._tail
        )

    def opened(self) -> Xfs:
        self.disk.changes = {self._start: bytes(self.written.data)}
        return Xfs(Disk(self.disk))

    def mode(self, path: bytes, mode: int) -> list[bytes]:
        """The change of a file's mode."""
        found = self.clean.child(self.clean.root, path)
        assert found is not None
        superblock = self.superblock
        offset = superblock.inode_offset(found.inode)
        raw = self.disk.pread(offset, superblock.inode_size)
        values = struct.unpack_from(">2sHBBHIIIHH6sHIIIIIIQQIIHBBIHHI", raw)
        core = struct.pack("<2sHBBHIIIHH6sHIIIIIIQQIIHBBIHHI", b"NI", mode, *values[2:])
        start = offset & ~0x3FFF
        form = "<HHIHH4xQ16sQII"
        head = struct.pack(form, 0x123B, 2, 1, 0, 0, found.inode, bytes(16), start // 512, 32, offset - start)
        return [head, core]

    def target(self) -> int:
        """Where the target of the longest link is."""
        found = self.clean.child(self.clean.root, b"link-1023")
        assert found is not None
        inode = decoded(found.inode, self.disk.pread(self.superblock.inode_offset(found.inode), 256))
        blocks = Blocks(Overlay(Disk(self.disk), self.superblock), self.superblock, self.disk.size)
        return next(extents(blocks, inode.data)).offset

    @staticmethod
    def buffer(offset: int, data: bytes, *, flags: int = 0, sectors: int = 2) -> list[bytes]:
        """The change of the first bytes of a buffer."""
        head = struct.pack("<HHHHQII", 0x123C, 2 if data else 1, flags, sectors, offset // 512, 1, bool(data))
        return [head, data] if data else [head]


@pytest.fixture
def logged(tmp_path_factory: pytest.TempPathFactory) -> Logged:
    need("mkfs.xfs")
    place = tmp_path_factory.mktemp("logged")
    (place / "prototype").write_text(prototype(place, 1023)[0])
    image = image_from(place / "image", 320 << 20)
    options = ["-q", "-m", "crc=0", "-i", "size=256", "-b", "size=1024", "-p", str(place / "prototype")]
    subprocess.run(["mkfs.xfs", *options, str(image)], check=True, capture_output=True)
    return Logged(image)


def mode_of(xfs: Xfs, path: bytes) -> int:
    found = xfs.child(xfs.root, path)
    assert found is not None
    return found.mode


def target_of(xfs: Xfs) -> bytes | None:
    found = xfs.child(xfs.root, b"link-1023")
    assert found is not None
    return found.target


REGULAR = stat.S_IFREG
OTHER = b"other" * 20 + bytes(28)


def test_the_last_change_of_an_inode_counts(logged: Logged) -> None:
    logged.add(logged.mode(b"file-1", REGULAR | 0o600))
    logged.add(logged.mode(b"file-1", REGULAR | 0o611), logged.mode(b"file-511", REGULAR | 0o622))
    xfs = logged.opened()
    assert xfs.facts()["journal"] == "replayed: 2 transactions"
    assert (mode_of(xfs, b"file-1"), mode_of(xfs, b"file-511")) == (REGULAR | 0o611, REGULAR | 0o622)


def test_a_buffer_is_changed_unless_it_was_cancelled_after_that(logged: Logged) -> None:
    place = logged.target()
    logged.add(logged.buffer(place, b"u" * 128))
    assert target_of(logged.opened()) == b"u" * 128 + b"t" * (1023 - 128)
    logged.add(logged.buffer(place, b"", flags=2))
    assert target_of(logged.opened()) == b"t" * 1023
    logged.add(logged.buffer(place, b"w" * 128))
    assert target_of(logged.opened()) == b"w" * 128 + b"t" * (1023 - 128)


def test_a_cancelled_buffer_of_another_length_cancels_nothing(logged: Logged) -> None:
    place = logged.target()
    logged.add(logged.buffer(place, b"u" * 128))
    logged.add(logged.buffer(place, b"", flags=2, sectors=4))
    assert target_of(logged.opened()) == b"u" * 128 + b"t" * (1023 - 128)


@pytest.mark.parametrize("flags", [1, 4, 1 << 11, 5 << 11, 12 << 11])
def test_buffers_of_what_is_not_read_are_left_out(logged: Logged, flags: int) -> None:
    logged.add(logged.buffer(logged.target(), b"u" * 128, flags=flags))
    assert target_of(logged.opened()) == b"t" * 1023


def test_a_cancelled_buffer_cancels_the_inodes_in_it(logged: Logged) -> None:
    change = logged.mode(b"file-1", REGULAR | 0o600)
    place = struct.unpack_from("<Q", change[0], 40)[0] * 512
    logged.add(change)
    logged.add(logged.buffer(place, b"", flags=3, sectors=32))
    assert mode_of(logged.opened(), b"file-1") == REGULAR | 0o4640


def test_new_inodes_are_free_until_they_are_changed(logged: Logged) -> None:
    superblock = logged.superblock
    change = logged.mode(b"file-1", REGULAR | 0o600)
    block = (struct.unpack_from("<Q", change[0], 40)[0] * 512) // superblock.block_size
    block += struct.unpack_from("<I", change[0], 52)[0] // superblock.block_size
    create = struct.pack("<HH", 0x123F, 1) + struct.pack(">6I", 0, block, 4, 256, 1, 9)
    logged.add([create])
    free = logged.opened()
    with pytest.raises(DamageError, match=r"^inode \d+: it is free$"):
        free.child(free.root, b"file-1")
    logged.add(change)
    assert mode_of(logged.opened(), b"file-1") == REGULAR | 0o600


@pytest.mark.parametrize(
    ("items", "journal"),
    [
        (
            [struct.pack("<HHIQ", 0x1236, 1, 0, 7)],
            "replayed: 1 transactions; 1 unfinished changes of free space",
        ),
        (
            [struct.pack("<HHIQ", 0x1244, 1, 0, 7)],
            "not replayed: 1 changes of maps of files; all else is replayed",
        ),
        ([struct.pack("<HHIQ", 0x1246, 1, 0, 7)], "not replayed: 1 changes of extended attributes"),
        (
            [struct.pack("<HHIQ", 0x1244, 1, 0, 7), struct.pack("<HHIQ", 0x1245, 1, 0, 7)],
            "replayed: 1 transactions",
        ),
        ([struct.pack("<HHIQ", 0x1299, 1, 0, 7)], "not replayed: items of type 0x1299; all else is replayed"),
        ([struct.pack("<HHIQ", 0x123C, 3, 0, 7)], "not replayed: an item is cut off"),
        ([struct.pack("<HH", 0x123B, 1)], "not replayed: an item of an inode is wrong"),
    ],
)
def test_what_is_not_replayed_is_reported(logged: Logged, items: list[bytes], journal: str) -> None:
    logged.add(items)
    xfs = logged.opened()
    assert xfs.facts()["journal"].startswith(journal)
    assert target_of(xfs) == b"t" * 1023


def test_a_log_that_is_damaged_changes_nothing(logged: Logged) -> None:
    logged.add(logged.mode(b"file-1", REGULAR | 0o600))
    logged.add(logged.buffer(logged.target(), b"u" * 100))
    xfs = logged.opened()
    assert xfs.facts()["journal"] == "not replayed: a buffer's regions are wrong"
    assert mode_of(xfs, b"file-1") == REGULAR | 0o4640


def test_changes_that_do_not_fit_into_memory_are_reported(
    logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pbsfs.disks.xfs.overlay.MOST_BYTES", 300)
    logged.add(logged.mode(b"file-1", REGULAR | 0o600), logged.buffer(logged.target(), b"u" * 128))
    xfs = logged.opened()
    assert xfs.facts()["journal"].startswith("not replayed: its changes take more than")
    assert mode_of(xfs, b"file-1") == REGULAR | 0o4640


class Noting(Patched):
    """Remembers the sectors that are read."""

    def __init__(self, disk: Patched) -> None:
        super().__init__(disk)
        self.read: set[int] = set()

    def pread(self, offset: int, size: int) -> bytes:
        self.read.update(range(offset // 512, -(-(offset + size) // 512)))
        return super().pread(offset, size)


def test_what_the_log_changes_is_read_when_it_is_wanted(logged: Logged) -> None:
    place = logged.target()
    logged.add(logged.mode(b"file-1", REGULAR | 0o600), logged.buffer(place, b"u" * 128))
    logged.opened()
    disk = Noting(logged.disk)
    xfs = Xfs(Disk(disk))
    assert xfs.facts()["journal"] == "replayed: 1 transactions"
    assert place // 512 not in disk.read
    assert target_of(xfs) == b"u" * 128 + b"t" * (1023 - 128)
    assert place // 512 in disk.read


def test_of_the_changes_of_an_inode_each_part_of_it_keeps_its_last() -> None:
    """Attributes that were changed before the data, and of version 4 by the counts of writes."""
    core = bytearray(range(176))
    core[:2], core[2:4], core[4], core[82] = b"NI", (REGULAR | 0o600).to_bytes(2, "little"), 3, 15
    core[120:132], core[160:176] = bytes(12), bytes(range(16))
    stored = (b"IN" + bytes(2) + b"\3").ljust(512, b"\0")

    def change(fields: int, *forks: bytes) -> InodeItem:
        return InodeItem(fields, 133, bytes(4), 64, 32, 0, [b"", bytes(core), *forks])

    changes = b""
    for lsn, item in (
        (10, change(0x41, b"attributes")),
        (11, change(3, b"old")),
        (12, change(3, b"new")),
    ):
        changes = with_change(changes, item, lsn, has_checksums=True)
    assert b"old" not in changes
    found = changed_inode(changes, stored, 133, bytes(range(16)))
    assert found is not None
    assert found == converted(change(3, b"new"), found, 12, has_checksums=True)
    assert (found[176:179], found[296:306]) == (b"new", b"attributes")
    later = stored[:112] + (11).to_bytes(8, "big") + stored[120:]
    found = changed_inode(changes, later, 133, bytes(16))
    assert found is not None
    assert (found[176:179], found[296:306]) == (b"new", bytes(10))
    newer = stored[:112] + (13).to_bytes(8, "big") + stored[120:]
    assert changed_inode(changes, newer, 133, bytes(16)) is None


def test_of_a_buffer_what_the_disk_has_already_is_dropped() -> None:
    buffer = BufferChange(8, 8)
    buffer.add(5, 0, b"a" * 512)
    buffer.add(7, 2, b"b" * 128)
    buffer.add(6, 30, b"c" * 256)
    buffer.settle(5)
    assert [buffer.touches(4096 + at * 128, 128) for at in (0, 1, 2, 3, 30, 31)] == [0, 0, 1, 0, 1, 1]
    page = bytearray(4000)
    buffer.apply(page, 4100)
    assert page[:252] == bytes(252)
    assert page[252:380] == b"b" * 128
    assert page[380:3836] == bytes(3456)
    assert page[3836:] == b"c" * 164


# --- damaged and hostile disks


@pytest.mark.parametrize("options", [(), ("-i", "size=1024", "-b", "size=2048")])
def test_the_checksum_of_each_of_many_inodes_counts(tmp_path: Path, options: tuple[str, ...]) -> None:
    """In a directory so large that they are verified side by side: every byte, and none but the damaged."""
    need("mkfs.xfs")
    (tmp_path / "empty").touch()
    files = "".join(f"{number:03d} ---644 5 6 {tmp_path / 'empty'}\n" for number in range(300))
    (tmp_path / "prototype").write_text(f"/none\n0 0\nd--755 0 0\n{files}$\n$\n")
    image = image_from(tmp_path / "image", 320 << 20)
    words = ["mkfs.xfs", "-q", *options, "-p", str(tmp_path / "prototype"), str(image)]
    subprocess.run(words, check=True, capture_output=True)
    disk = Disk(FileDisk(image))
    xfs = Xfs(disk)
    superblock = Superblock.of(disk.read(0, 512))
    bad: set[bytes] = set()
    with image.open("r+b") as file:
        for number, entry in enumerate(xfs.children(xfs.root).entries):
            if number % 2:
                at = superblock.inode_offset(entry.inode) + number * 53 % superblock.inode_size
                file.seek(at)
                old = file.read(1)[0]
                file.seek(at)
                file.write(bytes([old ^ 1 << number % 8]))
                bad.add(entry.name)
    xfs = Xfs(Disk(FileDisk(image)))
    listed = xfs.children(xfs.root)
    assert len(bad) == 150
    assert {b"%03d" % number for number in range(300)} - {entry.name for entry in listed.entries} == bad
    assert listed.damage is not None
    for name in bad:
        with pytest.raises(DamageError, match=r"wrong checksum|no inode"):
            xfs.child(xfs.root, name)


def everything(xfs: Xfs, disk: Stream) -> Iterator[tuple[bytes, dict[str, Any] | DamageError]]:
    """All that a file system gives, or why not."""
    for path, entry in xfs.walk(xfs.root):
        if isinstance(entry, DamageError):
            yield path, entry
            continue
        try:
            if entry.is_file:
                pieces = xfs.data(entry)
                assert sum(piece.length for piece in pieces) == entry.size
                if entry.size > 16 << 20:
                    continue  # a hole, that nobody wants to hash
            yield path, fields_of(xfs, [disk], entry)
        except DamageError as error:
            yield path, error


def metadata_of(disk: Patched) -> list[int]:
    """The sectors that are read to list everything, without those of the log."""
    noting = Noting(disk)
    xfs = Xfs(Disk(noting))
    for _, entry in xfs.walk(xfs.root):
        if isinstance(entry, Entry):
            xfs.xattrs(entry)
            if entry.is_file:
                xfs.data(entry)
    superblock = Superblock.of(disk.pread(0, 512))
    start = superblock.offset_of(superblock.log_start) // 512
    log = range(start, start + superblock.log_blocks * superblock.block_size // 512)
    return [
        sector for sector in sorted(noting.read) if sector not in log and any(disk.pread(sector * 512, 512))
    ]


def mutate_sectors(disk: Patched, sectors: Sequence[int], some: random.Random) -> None:
    mutate(disk, lambda: some.choice(sectors) * 512 + some.randrange(some.choice((120, 512))), some)


@pytest.mark.parametrize("count", counts(30, 260))
def test_mutated_disks_raise_nothing_but_damage(
    count: int, made: tuple[Path, dict[bytes, dict[str, Any]]]
) -> None:
    """Where there are checksums, nothing wrong is shown either."""
    image, truth = made
    plain = FileDisk(image)
    disk = Patched(plain)
    sectors = metadata_of(disk)
    has_checksums = Superblock.of(disk.pread(0, 512)).has_checksums
    some = random.Random(count)
    opened = 0
    for _ in range(count):
        mutate_sectors(disk, sectors, some)
        with limited():
            try:
                xfs = Xfs(Disk(disk))
            except DamageError:
                continue
            opened += 1
            for path, found in everything(xfs, plain):
                if has_checksums and isinstance(found, dict):
                    assert {**found, "mt": 0} == {**truth[path], "mt": 0}
    assert opened > count // 2


@pytest.mark.parametrize("count", counts(50, 1000))
def test_mutated_changes_in_a_log_raise_nothing_but_damage(count: int, logged: Logged) -> None:
    """A log without checksums, so that all that is changed in it counts."""
    place = logged.target()
    first = logged.written.at
    for number in range(8):
        logged.add(logged.mode(b"file-1", REGULAR | number), logged.buffer(place, bytes([number]) * 128))
        logged.add(logged.mode(b"file-70000", REGULAR | number))
    logged.add(logged.buffer(place, b"", flags=2), logged.mode(b"names-60", stat.S_IFDIR | 0o700))
    logged.opened()
    disk = Patched(logged.disk)
    start = logged.superblock.offset_of(logged.superblock.log_start) // 512
    some = random.Random(count)
    replayed = 0
    for _ in range(count):
        mutate_sectors(disk, range(start + first, start + logged.written.at), some)
        with limited():
            xfs = Xfs(Disk(disk))
            replayed += xfs.facts()["journal"].startswith("replayed")
            for _ in everything(xfs, disk):
                pass
    assert 0 < replayed < count


@pytest.mark.golden
@pytest.mark.parametrize("count", [150])
def test_mutated_logs_raise_nothing_but_damage(count: int) -> None:
    golden = GoldenDisk(322, "drive-virtio2")

    class Kept(Patched):
        @functools.lru_cache(8192)  # noqa: B019 - it is one
        def pread(self, offset: int, size: int) -> bytes:
            return super().pread(offset, size)

    disk = Patched(Kept(golden))
    superblock = Superblock.of(disk.pread(0, 512))
    start = superblock.offset_of(superblock.log_start) // 512
    some = random.Random(13)
    for _ in range(count):
        mutate_sectors(disk, range(start, start + 2400), some)
        with limited():
            xfs = Xfs(Disk(disk))
            assert xfs.facts()["journal"]
            for _ in xfs.walk(xfs.root):
                pass


def test_a_disk_that_is_cut_off_is_damaged_where_it_is_cut(
    made: tuple[Path, dict[bytes, dict[str, Any]]],
) -> None:
    image, truth = made

    class Cut(Patched):
        def __init__(self, size: int) -> None:
            super().__init__(FileDisk(image))
            self.size = size

    whole = FileDisk(image)
    xfs = Xfs(Disk(whole))
    largest = xfs.child(xfs.root, b"file-1000000")
    assert largest is not None
    last = xfs.data(largest)[-1]
    disk = Cut(last.offset + last.length - 512)
    found = dict(everything(Xfs(Disk(disk)), disk))
    assert any(isinstance(fields, DamageError) for fields in found.values())
    for path, fields in found.items():
        if isinstance(fields, dict):
            assert {**fields, "mt": 0} == {**truth[path], "mt": 0}
    with pytest.raises(DamageError):
        Xfs(Disk(Cut(600)))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (101, 0x03, "XFS of version 3 is not supported"),
        (100, 0x94, "XFS with directories of version 1 is not supported"),
        (123, 9, "the superblock has wrong sizes"),
        (84, 255, "the superblock has wrong sizes of allocation groups"),
    ],
)
def test_a_superblock_that_is_not_read_says_why(logged: Logged, place: int, value: int, message: str) -> None:
    logged.disk.changes = {place: bytes([value])}
    with pytest.raises(DamageError, match=message):
        Xfs(Disk(logged.disk))


def test_a_log_on_another_device_is_reported(logged: Logged) -> None:
    logged.disk.changes = {48: bytes(8)}
    assert Xfs(Disk(logged.disk)).facts()["journal"] == "not replayed: the log is on a device of its own"


def test_data_on_a_realtime_device_is_not_read(logged: Logged) -> None:
    found = logged.clean.child(logged.clean.root, b"file-70000")
    assert found is not None
    place = logged.superblock.inode_offset(found.inode) + 91
    logged.disk.changes = {place: b"\1"}
    xfs = Xfs(Disk(logged.disk))
    with pytest.raises(UnsupportedError, match=r"^inode \d+: data on a realtime device is not supported$"):
        xfs.data(found)
