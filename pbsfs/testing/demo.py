"""The data of `pbsfs demo`: a disk in three states and the files of a host, in a datastore.

Synchronous; runs mke2fs.
"""

from __future__ import annotations

import os
import random
import stat
import subprocess
from pathlib import Path

from pbsfs.base.errors import PbsfsError
from pbsfs.base.names import ROOT_NAMESPACE, Group
from pbsfs.testing.archives import Node, write
from pbsfs.testing.writer import DatastoreWriter

DISK_SIZE = 96 << 20
PARTITION_START = 1 << 20  # sector 2048, where partitioning tools put the first one
FIRST_BACKUP = 1_700_000_000  # 2023-11-14T22:13:20Z
DAY = 86_400
GREETING = "Hello from inside the backup.\n"

PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
"""The directories of programs: the PATH of a Debian user lacks those of mke2fs and debugfs."""

_CONFIGURATION = b"""\
name: demo
memory: 2048
cores: 2
boot: order=scsi0
scsi0: local-lvm:vm-100-disk-0,size=96M
"""


class DemoError(PbsfsError):
    """A step of the demo failed, or it read other data than was stored."""


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, with what it prints as text. Raises OSError."""
    return subprocess.run(
        arguments,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "PATH": PATH},
    )


def make_disks(base: Path) -> list[Path]:
    """Makes three states of one disk below `base`, each with a change to the one before.

    A disk has one partition with an ext4 file system. Raises OSError and DemoError.
    """
    content = base / "content"
    (content / "etc").mkdir(parents=True)
    (content / "etc" / "hostname").write_text("demo\n")
    (content / "random.bin").write_bytes(random.Random(1).randbytes(6 << 20))  # noqa: S311 - the same each time
    disks = []
    for day in range(3):
        (content / "hello.txt").write_text(GREETING + f"This is day {day + 1}.\n")
        disk = base / f"disk-{day}.img"
        with disk.open("wb") as file:
            file.truncate(DISK_SIZE)
            file.write(_partition_table())
        partition = f"offset={PARTITION_START}"
        size = f"{(DISK_SIZE - PARTITION_START) >> 10}k"
        done = run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(content), "-E", partition, str(disk), size])
        if done.returncode != 0:
            raise DemoError(f"mke2fs ended with status {done.returncode}: {done.stderr.strip()}")
        disks.append(disk)
    return disks


def _partition_table() -> bytes:
    """A master boot record with one Linux partition, from `PARTITION_START` to the end."""
    sectors = (DISK_SIZE - PARTITION_START) // 512
    entry = b"\0\xfe\xff\xff\x83\xfe\xff\xff"
    entry += (PARTITION_START // 512).to_bytes(4, "little") + sectors.to_bytes(4, "little")
    return bytes(446) + entry.ljust(64, b"\0") + b"\x55\xaa"


def _host(day: int) -> Node:
    """The files of a host, of which one changes each day."""
    file, link = stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777
    first, today = FIRST_BACKUP * 10**9, (FIRST_BACKUP + day * DAY) * 10**9
    hosts = b"127.0.0.1 localhost\n" + b"".join(b"10.0.0.%d db%d\n" % (n, n) for n in range(day + 1))
    etc = [
        Node(b"hosts", file, mtime_ns=today, data=hosts),
        Node(b"motd", link, mtime_ns=first, target=b"../srv/hello.txt"),
    ]
    srv = [Node(b"hello.txt", file, 1000, 1000, first, GREETING.encode(), xattrs={b"user.kept": b"yes"})]
    folders = [Node(b"etc", mtime_ns=first, children=etc), Node(b"srv", mtime_ns=first, children=srv)]
    return Node(b"", mtime_ns=first, children=folders)


def make_datastore(path: Path, disks: list[Path]) -> int:
    """Stores a backup of each disk, and as many of a host's files, in a new datastore at `path`.

    Returns the bytes of its chunks. Raises OSError.
    """
    writer = DatastoreWriter(path)
    group = Group(ROOT_NAMESPACE, "vm", "100")
    for day, disk in enumerate(disks):
        writer.add_snapshot(
            group.snapshot(FIRST_BACKUP + day * DAY),
            {"drive-scsi0.img.fidx": disk, "qemu-server.conf.blob": _CONFIGURATION},
            notes=f"day {day + 1}",
            verify_state="ok",
        )
    group = Group(ROOT_NAMESPACE, "host", "web1")
    for day in range(len(disks)):
        written = write(_host(day), split=True)
        files = {"root.mpxar.didx": written.main, "root.ppxar.didx": written.payload or b""}
        writer.add_snapshot(group.snapshot(FIRST_BACKUP + day * DAY), files)
    return sum(file.stat().st_size for file in (path / ".chunks").glob("*/*"))
