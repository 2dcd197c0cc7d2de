"""A machine's disk with file systems on it: made once, deterministic, kept in a directory.

A physical volume of LVM with three logical volumes: `root`, an ext4 with many small files; `data`, an ext4
with large ones; and, where this user may mount a loop device, `var`, an XFS with the files of `root`, copied
while it is mounted and some files change, so that its log is open. Each stays beside the datastore as an
image of its own.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.data import CHUNK, TIME, check_room
from bench.measures import GIB, MIB, BenchError, run
from pbsfs.base.names import ROOT_NAMESPACE, Group, Snapshot
from pbsfs.formats.index import FixedIndex
from pbsfs.testing.writer import DatastoreWriter

VERSION = "2"
"""Of what is made: data of another version is made anew."""

SNAPSHOT = Snapshot(Group(ROOT_NAMESPACE, "vm", "300"), TIME)
INDEX = "drive-scsi0.img.fidx"

GROUP = "bench"
ROOT, DATA, XFS = "root", "data", "var"

SOME_FILE = "etc/passwd"
"""A file in `root` and `var`."""

_MAGIC = b" LVM2 x[5A%r0N*>"
_AREA = 4096, 64 << 10  # of the group's description: where it begins, and its size
_SECTOR = 512


@dataclass(frozen=True, slots=True)
class Volume:
    """A logical volume. `first`: the first of its `chunks` in the disk; `entries`: files, directories and
    links."""

    name: str
    first: int
    chunks: int
    entries: int

    @property
    def shown(self) -> str:
        """Its path in a mount."""
        return f"files/{SNAPSHOT}/{GROUP}-{self.name}"


@dataclass(frozen=True, slots=True)
class Machine:
    """What was made. `volumes`: by name; `var` may be missing."""

    directory: Path
    volumes: dict[str, Volume]

    @property
    def datastore(self) -> Path:
        return self.directory / "datastore"

    def raw(self, name: str) -> Path:
        """The image of a volume."""
        return self.directory / f"{name}.img"

    def chunks(self, name: str) -> dict[Path, tuple[bytes, int]]:
        """The stored chunks of a volume but those of zeros: each with its digest and length."""
        writer = DatastoreWriter(self.datastore)
        volume = self.volumes[name]
        index = FixedIndex((writer.snapshot_path(SNAPSHOT) / INDEX).read_bytes())
        found: dict[Path, tuple[bytes, int]] = {}
        for number in range(volume.first, volume.first + volume.chunks):
            if not index.is_hole(number):
                digest = index.digest(number)
                found[writer.chunk_path(digest)] = digest, CHUNK
        return found


def make(directory: Path, *, quick: bool) -> Machine:
    """The machine in `directory`, made if it is not there yet. Raises BenchError where there is no room."""
    place = directory / f"disks-{'quick' if quick else 'full'}-{VERSION}"
    note = place / "made.json"
    if not note.exists():
        if place.exists():  # what an interrupted run has left
            shutil.rmtree(place)
        place.mkdir(parents=True)
        check_room(place, (GIB if quick else 6 * GIB))
        _make(place, quick=quick)
    volumes = [Volume(*row) for row in json.loads(note.read_text())]
    return Machine(place, {volume.name: volume for volume in volumes})


def _make(place: Path, *, quick: bool) -> None:
    sizes = {ROOT: 64 * MIB if quick else GIB, DATA: 64 * MIB if quick else GIB}
    entries: dict[str, int] = {}
    for name in (ROOT, DATA):
        tree = place / "tree"
        if name == ROOT:
            entries[name] = _small_files(tree, directories=10 if quick else 400)
        else:
            entries[name] = _large_files(tree, count=8 if quick else 160)
        image = place / f"{name}.img"
        _file_of(image, sizes[name])
        run(["mke2fs", "-q", "-F", "-t", "ext4", "-N", str(2 * entries[ROOT] + 1000), "-d", tree, image])
        if name == ROOT and _make_xfs(place, tree, 320 * MIB if quick else 2 * GIB):
            sizes[XFS] = (place / f"{XFS}.img").stat().st_size
            entries[XFS] = entries[ROOT] - 1  # it has no lost+found
        shutil.rmtree(tree)
    volumes: list[Volume] = []
    at = 1  # the first chunk holds the description of the group
    for name, size in sizes.items():
        volumes.append(Volume(name, at, size // CHUNK, entries[name]))
        at += size // CHUNK
    disk = place / "disk.img"
    _file_of(disk, at * CHUNK)
    with disk.open("r+b") as file:
        file.write(_physical_volume(volumes, at * CHUNK))
        for volume in volumes:
            file.seek(volume.first * CHUNK)
            with (place / f"{volume.name}.img").open("rb") as source:
                while block := source.read(MIB):
                    if block.strip(b"\0"):
                        file.write(block)
                    else:
                        file.seek(len(block), 1)
    DatastoreWriter(place / "datastore").add_snapshot(SNAPSHOT, {INDEX: disk})
    disk.unlink()
    rows = [[volume.name, volume.first, volume.chunks, volume.entries] for volume in volumes]
    (place / "made.json").write_text(json.dumps(rows))


def _file_of(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def _small_files(tree: Path, *, directories: int) -> int:
    """200 entries in each directory: files of up to 4,000 bytes, and links. Returns how many in all."""
    source = random.Random(1)
    (tree / "etc").mkdir(parents=True)
    (tree / SOME_FILE).write_text("root:x:0:0:root:/root:/bin/bash\n")
    count = 3
    for number in range(directories):
        directory = tree / f"usr/share/{number // 20:02d}/{number % 20:02d}"
        count += 1 + (number % 20 == 0) + (2 if not number else 0)
        directory.mkdir(parents=True)
        for place in range(190):
            (directory / f"{place:03d}.conf").write_bytes(source.randbytes(source.randint(200, 1300)) * 3)
        for place in range(10):
            (directory / f"link{place}").symlink_to(f"{place:03d}.conf")
        count += 200
    return count + 1  # lost+found


def _large_files(tree: Path, *, count: int) -> int:
    source = random.Random(2)
    tree.mkdir()
    for number in range(count):
        block = b"".join(source.randbytes(64 << 10) * 3 for _ in range(16))
        (tree / f"{number:03d}.bin").write_bytes(block)
    return count + 2


def _make_xfs(place: Path, tree: Path, size: int) -> bool:
    """Whether `var.img` was made: it takes root, loop devices and mkfs.xfs."""
    if shutil.which("mkfs.xfs") is None:
        return False
    live, image = place / "live.img", place / f"{XFS}.img"
    _file_of(live, size)
    try:
        run(["mkfs.xfs", "-q", live])
        with _mounted(live) as inside:
            run(["cp", "-a", f"{tree}/.", inside])
        with _mounted(live) as inside:  # from here on, changes are in the log alone
            late = [inside / f"etc/late{number}" for number in range(200)]
            for path in late:
                with path.open("wb") as file:
                    file.write(b"late")
                    os.fsync(file)
            for path in late:
                path.unlink()
            run(["sync", "-f", inside])
            run(["cp", "--sparse=always", live, image])
    except BenchError:
        image.unlink(missing_ok=True)
        return False
    finally:
        live.unlink()
    return True


@contextmanager
def _mounted(image: Path) -> Iterator[Path]:
    inside = Path(tempfile.mkdtemp(prefix="live-", dir=image.parent))
    try:
        run(["mount", "-o", "loop", image, inside])
        try:
            yield inside
        finally:
            subprocess.run(["umount", inside], check=True, timeout=60)
    finally:
        inside.rmdir()


def _crc(data: bytes) -> int:
    """LVM's: a CRC-32 with another beginning, and not inverted."""
    return zlib.crc32(data, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def _physical_volume(volumes: Sequence[Volume], size: int) -> bytes:
    """What is in front of the extents: a label, and an area with the description of the group."""
    own = "b" * 32
    listed = "".join(
        f'{v.name} {{ id = "{v.name * 8:.32}" status = ["READ", "WRITE", "VISIBLE"] segment_count = 1\n'
        f'segment1 {{ start_extent = 0 extent_count = {v.chunks} type = "striped" stripe_count = 1\n'
        f'stripes = [ "pv0", {v.first - 1} ] }} }}\n'
        for v in volumes
    )
    sectors = CHUNK // _SECTOR
    text = (
        f'{GROUP} {{ id = "{"g" * 32}" seqno = 1 extent_size = {sectors} status = ["READ", "WRITE"]\n'
        f'physical_volumes {{ pv0 {{ id = "{own}" device = "/dev/sda" flags = []\n'
        f"pe_start = {sectors} pe_count = {size // CHUNK - 1} }} }}\n"
        f"logical_volumes {{ {listed} }} }}\n# end\n\0"
    ).encode()
    start, length = _AREA
    label = struct.pack("<I8s32sQ", 32, b"LVM2 001", own.encode(), size)
    label += struct.pack("<QQQQQQQQ", CHUNK, 0, 0, 0, start, length, 0, 0)
    label = label.ljust(_SECTOR - 20, b"\0")
    head = bytearray(start + length)
    head[_SECTOR : 2 * _SECTOR] = struct.pack("<8sQI", b"LABELONE", 1, _crc(label)) + label
    header = struct.pack("<16sIQQ", _MAGIC, 1, start, length)
    header += struct.pack("<QQII", _SECTOR, len(text), _crc(text), 0)
    header = header.ljust(_SECTOR - 4, b"\0")
    head[start : start + _SECTOR] = struct.pack("<I", _crc(header)) + header
    head[start + _SECTOR : start + _SECTOR + len(text)] = text
    return bytes(head)
