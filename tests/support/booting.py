"""Disks that boot, and tell on the serial port what they read: a boot sector, and a small Linux."""

from __future__ import annotations

import lzma
import random
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard

from tests.support.needs import need
from tests.support.program import output_of

SECTOR = 512

_START = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc none /proc
mount -t devtmpfs none /dev
"""

_SOURCE = Path(__file__).with_name("boot.s")
_FIRST = 8  # the first sector that boot.s reads, as there
_STEP = 64  # sectors that it reads at once, as there

NO_SCREEN = ("-display", "none", "-serial", "stdio", "-no-reboot")
"""QEMU's options for what runs in a test: the guest's serial port is standard output."""


@dataclass(frozen=True, slots=True)
class BootDisk:
    """A disk with a boot sector that reads all of it. `checksum`: what it has to print of that."""

    data: bytes
    checksum: str

    def found(self, count: int) -> str:
        """The line that is printed on the boot number `count` of a disk that is kept."""
        return f"found {count:08X} {self.checksum}"


def boot_disk(folder: Path, *, seed: int = 1, mebibytes: int = 3) -> BootDisk:
    """A disk of random data and holes that boots. Assembled in `folder`, which is made."""
    need("as", "ld")
    folder.mkdir(exist_ok=True)
    last = _FIRST + mebibytes * (1 << 20) // SECTOR // _STEP * _STEP
    object_file, program = folder / "boot.o", folder / "boot.bin"
    output_of("as", "--32", "--defsym", f"LAST={last}", _SOURCE, "-o", object_file)
    output_of(
        *("ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary"), object_file, "-o", program
    )
    code = program.read_bytes()
    assert len(code) == SECTOR
    source = random.Random(seed)
    rest = b"".join(
        bytes(1 << 20) if number % 3 == 2 else source.randbytes(1 << 20) for number in range(mebibytes)
    )
    data = code + bytes((_FIRST - 1) * SECTOR) + rest
    return BootDisk(data, _checksum(data[_FIRST * SECTOR : last * SECTOR]))


def _checksum(data: bytes) -> str:
    total = 0
    for (word,) in struct.iter_unpack("<I", data):
        total = ((total << 1 | total >> 31) + word) & 0xFFFFFFFF
    return f"{total:08X}"


# --- Linux


@dataclass(frozen=True, slots=True)
class Linux:
    """A kernel of this machine's distribution."""

    kernel: Path
    modules: Path


def find_linux() -> Linux:
    """One that is at hand, whichever; the test is skipped where there is none that can be read."""
    for kernel in sorted(Path("/boot").glob("vmlinuz-*"), reverse=True):
        modules = Path("/lib/modules") / kernel.name.removeprefix("vmlinuz-")
        if (modules / "modules.dep").exists() and _is_readable(kernel):
            return Linux(kernel, modules)
    pytest.skip("there is no kernel in /boot, with its modules, to boot")


def _is_readable(path: Path) -> bool:
    try:
        with path.open("rb"):
            return True
    except PermissionError:
        return False


def initramfs(linux: Linux, modules: tuple[str, ...], script: str) -> bytes:
    """The first file system of a machine that loads kernel modules and runs a script of busybox's shell.

    `modules`: those that the kernel has built in, or has not at all, are left out.
    """
    files = _module_files(linux.modules, modules)
    loading = "".join(f"insmod /modules/{name}\n" for name in files)
    init = f"{_START}{loading}{script}"
    archive = _Archive()
    for folder in ("bin", "dev", "mnt", "modules", "proc"):
        archive.add(folder, stat.S_IFDIR | 0o755)
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("bin/busybox", stat.S_IFREG | 0o755, Path("/bin/busybox").read_bytes())
    archive.add("init", stat.S_IFREG | 0o755, init.encode())
    for name, content in files.items():
        archive.add(f"modules/{name}", stat.S_IFREG | 0o644, content)
    return archive.end()


def _module_files(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """The modules and those that they need, in the order in which they are to be loaded."""
    needed: dict[str, list[str]] = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        path, _colon, others = line.partition(":")
        needed[path] = others.split()
    paths = {_name_of(path): path for path in needed}
    ordered: dict[str, None] = {}

    def add(path: str) -> None:
        for other in needed[path]:
            if other not in ordered:
                add(other)
        ordered[path] = None

    for name in names:
        if name in paths:
            add(paths[name])
    return {f"{_name_of(path)}.ko": _decompressed(folder / path) for path in ordered}


def _name_of(path: str) -> str:
    return path.rpartition("/")[2].partition(".ko")[0]


def _decompressed(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data


class _Archive:
    """A cpio archive, as Linux's Documentation/driver-api/early-userspace/buffer-format.rst has it."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._count = 0

    def add(self, path: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._count += 1
        name = path.encode() + b"\0"
        fields = (self._count, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name), 0)
        self._data += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        self._data += bytes(-len(self._data) % 4) + content
        self._data += bytes(-len(self._data) % 4)

    def end(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return bytes(self._data)
