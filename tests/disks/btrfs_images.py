"""btrfs images for tests: made by mkfs.btrfs, with a few files that it copies, or on loop devices."""

from __future__ import annotations

import hashlib
import os
import random
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pbsfs.disks.btrfs.superblock import PLACES, SIZE
from pbsfs.disks.crc32c import crc32c
from tests.support.disks import FileDisk, image_from

TEXT = b"".join(b"line %d of a text that is not random\n" % number for number in range(9000))


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def fill(top: Path) -> None:
    """Files of all the forms in which data is stored, and one of each other type that anyone may make."""
    noise = random.Random(1)
    (top / "deep/er").mkdir(parents=True)
    for size in (0, 1, 100, 2000, 4096, 5000, 131072, 131073, 300_001):
        (top / f"text-{size}").write_bytes(TEXT[:size])
        (top / f"noise-{size}").write_bytes(noise.randbytes(size))
    for number in range(200):
        (top / "deep/er" / f"{number}-{'n' * number}").write_bytes(b"%d" % number)
    with (top / "sparse").open("wb") as file:
        file.seek(1 << 20)
        file.write(TEXT)
        file.truncate(9_000_000)
    (top / "link").symlink_to("deep/er")
    os.link(top / "text-100", top / "deep/hard")
    os.mkfifo(top / "fifo")
    os.setxattr(top / "text-100", "user.note", b"\0value")
    os.utime(top / "text-1", ns=(0, -1_500_000_000))


def made(path: Path, *options: str, size: int = 120 << 20) -> Path:
    """An image with the files of `fill`, which mkfs.btrfs copies."""
    source = path.with_name(path.name + ".files")
    source.mkdir()
    fill(source)
    run("mkfs.btrfs", "-q", "--rootdir", source, *options, image_from(path, size))
    return path


@contextmanager
def mounted(images: Sequence[Path], where: Path, options: str) -> Iterator[Path]:
    """The kernel's view of a file system."""
    where.mkdir(exist_ok=True)
    loops: list[str] = []
    try:
        for image in images:
            loops.append(run("losetup", "--find", "--show", image).strip())  # noqa: PERF401 - all are detached
        devices = [f"device={loop}" for loop in loops]
        run("mount", "-t", "btrfs", "-o", ",".join(["subvolid=5", options, *devices]), loops[0], where)
        try:
            yield where
        finally:
            run("umount", where)
    finally:
        for loop in loops:
            subprocess.run(["btrfs", "device", "scan", "--forget", loop], capture_output=True, check=False)
            run("losetup", "--detach", loop)


def formatted(paths: Sequence[Path], *options: str, size: int = 400 << 20) -> list[Path]:
    """An empty file system over several images."""
    loops: list[str] = []
    try:
        for path in paths:
            loops.append(run("losetup", "--find", "--show", image_from(path, size)).strip())  # noqa: PERF401
        run("mkfs.btrfs", "-q", *options, *loops)
    finally:
        for loop in loops:
            run("losetup", "--detach", loop)
    return list(paths)


def truth_of(top: Path) -> dict[bytes, dict[str, Any]]:
    """What the system shows below a directory, as `lines_of` has it."""
    found: dict[bytes, dict[str, Any]] = {}
    for directory, names, files in os.walk(os.fsencode(top)):
        below = os.path.relpath(directory, os.fsencode(top))
        for name in [b"", *files, *(name for name in names if os.path.islink(os.path.join(directory, name)))]:
            path = os.path.join(directory, name) if name else directory
            relative = os.path.normpath(os.path.join(below, name))
            found[b"" if relative == b"." else relative] = _line(path)
    return found


def _line(path: bytes) -> dict[str, Any]:
    info = os.lstat(path)
    kind = stat.S_IFMT(info.st_mode)
    line: dict[str, Any] = {"t": kind, "m": stat.S_IMODE(info.st_mode), "u": info.st_uid, "g": info.st_gid}
    line |= {"mt": info.st_mtime_ns, "s": info.st_size, "n": info.st_nlink}
    names = os.listxattr(path, follow_symlinks=False)
    line["x"] = {
        os.fsencode(name).hex(): os.getxattr(path, name, follow_symlinks=False).hex() for name in names
    }
    if kind == stat.S_IFREG:
        line["h"] = hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).hexdigest()
    elif kind == stat.S_IFLNK:
        line["l"] = os.readlink(path).hex()
    elif kind in {stat.S_IFCHR, stat.S_IFBLK}:
        line["d"] = [os.major(info.st_rdev), os.minor(info.st_rdev)]
    return line


class Patched:
    """A disk image with some bytes changed."""

    def __init__(self, path: Path) -> None:
        self._disk = FileDisk(path)
        self.size = self._disk.size
        self.changes: dict[int, bytes] = {}

    def pread(self, offset: int, size: int) -> bytes:
        data = bytearray(self._disk.pread(offset, size))
        for at, change in self.changes.items():
            first, last = max(at, offset), min(at + len(change), offset + len(data))
            if first < last:
                data[first - offset : last - offset] = change[first - at : last - at]
        return bytes(data)

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        pass

    def sealed(self, at: int, block: bytes) -> None:
        """Changes a node or superblock, with a checksum that is right."""
        self.changes[at] = crc32c(block[32:]).to_bytes(4, "little") + block[4:]


def nodes_in(path: Path, uuid: bytes, size: int) -> list[int]:
    """Where the nodes of a file system's trees are in an image, without those that lie in no chunk."""
    data = path.read_bytes()
    found: list[int] = []
    at = data.find(uuid)
    while at >= 0:
        start = at - 32
        block = data[start : start + size]
        sum_is_right = crc32c(block[32:]).to_bytes(4, "little") == block[:4]
        if start % 4096 == 0 and start not in PLACES and len(block) >= SIZE and sum_is_right:
            found.append(start)
        at = data.find(uuid, at + 1)
    return found
