"""`pbsfs demo`: the main job on a small datastore that is made for it, with the ordinary tools.

Every step is a command as a user would type it; it is shown, run, and what it did is compared with
the original. The demo fails loudly where anything differs, and leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import click

from pbsfs.base.errors import MountError, PbsfsError, UsageError
from pbsfs.base.names import ROOT_NAMESPACE, Group
from pbsfs.fuse.mountpoint import mounted_at, unmount
from pbsfs.testing.writer import DatastoreWriter

DISK_SIZE = 96 << 20
PARTITION_START = 1 << 20  # sector 2048, where partitioning tools put the first one
FIRST_BACKUP = 1_700_000_000  # 2023-11-14T22:13:20Z
DAY = 86_400
GREETING = "Hello from inside the backup.\n"

_PBSFS = [sys.executable, "-P", "-m", "pbsfs"]

_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
"""Where programs are looked for: mke2fs and debugfs are not on the PATH of a Debian user."""

_CONFIGURATION = b"""\
name: demo
memory: 2048
cores: 2
boot: order=scsi0
scsi0: local-lvm:vm-100-disk-0,size=96M
"""


class DemoError(PbsfsError):
    """A step of the demo went wrong, or what it read is not what was written."""


@click.command("demo")
@click.option("--keep", is_flag=True, help="Keep the datastore that was made, and say where it is.")
def command(keep: bool) -> None:
    """Try everything on a small datastore made for it.

    Makes a disk with a partition and an ext4 file system, stores three backups of it the way a
    Proxmox Backup Server does, mounts them, copies the disk with cp and dd, compares, looks at the
    holes, looks into the file system, and unmounts.

    \b
    Examples:
      pbsfs demo
      pbsfs demo --keep
    """
    if shutil.which("mke2fs", path=_PATH) is None:
        raise UsageError("the demo needs mke2fs; install the package e2fsprogs")
    base = Path(tempfile.mkdtemp(prefix="pbsfs-demo-"))
    with ExitStack() as stack:
        if keep:
            click.echo(f"The datastore stays in {base / 'datastore'}; remove {base} when done.")
        else:
            stack.callback(shutil.rmtree, base, ignore_errors=True)
        disks = _make_disks(base)
        _make_datastore(base / "datastore", disks)
        _show(base, disks, stack)
    click.secho("All of it came back as it was stored.", bold=True)


def _make_disks(base: Path) -> list[Path]:
    """Three states of one disk, each with a change to the one before."""
    _say("Making a disk: one partition with an ext4 file system, and a later state of it twice")
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
        _output_of(["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(content), "-E", partition, str(disk), size])
        disks.append(disk)
    return disks


def _partition_table() -> bytes:
    """A master boot record with one Linux partition, from `PARTITION_START` to the end."""
    sectors = (DISK_SIZE - PARTITION_START) // 512
    entry = b"\0\xfe\xff\xff\x83\xfe\xff\xff"
    entry += (PARTITION_START // 512).to_bytes(4, "little") + sectors.to_bytes(4, "little")
    return bytes(446) + entry.ljust(64, b"\0") + b"\x55\xaa"


def _make_datastore(path: Path, disks: list[Path]) -> None:
    _say("Storing three backups of it, as a Proxmox Backup Server keeps them")
    writer = DatastoreWriter(path)
    group = Group(ROOT_NAMESPACE, "vm", "100")
    for day, disk in enumerate(disks):
        writer.add_snapshot(
            group.snapshot(FIRST_BACKUP + day * DAY),
            {"drive-scsi0.img.fidx": disk, "qemu-server.conf.blob": _CONFIGURATION},
            notes=f"day {day + 1}",
            verify_state="ok",
        )
    stored = sum(file.stat().st_size for file in (path / ".chunks").glob("*/*"))
    total = len(disks) * DISK_SIZE
    click.echo(
        f"{len(disks)} disks of {DISK_SIZE >> 20} MiB ({total >> 20} MiB) in {stored / (1 << 20):.1f} MiB"
    )


def _show(base: Path, disks: list[Path], stack: ExitStack) -> None:
    mountpoint = base / "mnt"
    mountpoint.mkdir()
    _say("Mounting")
    _run([*_PBSFS, "mount", "--datastore-dir", str(base / "datastore"), str(mountpoint)])
    stack.callback(_unmount_quietly, mountpoint)
    _run(["ls", "-l", str(mountpoint / "vm" / "100"), f"{mountpoint}/vm/100/latest/"])

    group = mountpoint / "vm" / "100"
    latest = group / "latest" / "drive-scsi0.img"
    _say("Copying the newest state with cp, the oldest with dd")
    newest_copy, oldest_copy = base / "newest.img", base / "oldest.img"
    _run(["cp", "--sparse=auto", str(latest), str(newest_copy)])
    _compare(newest_copy, disks[-1])
    oldest = min(group.iterdir()) / "drive-scsi0.img"
    _run(["dd", "bs=1M", "status=none", f"if={oldest}", f"of={oldest_copy}"])
    _compare(oldest_copy, disks[0])

    _say("Holes are holes")
    _run(["du", "--apparent-size", "-h", str(latest)])
    _run(["du", "-h", str(latest)])
    for start, end in _data_ranges(latest):
        click.echo(f"data from {start >> 20:4} to {end >> 20:4} MiB")

    _say("Looking into the file system, still without restoring anything")
    _look_inside(latest, base, stack)

    _say("Unmounting")
    _run([*_PBSFS, "umount", str(mountpoint)])


def _look_inside(image: Path, base: Path, stack: ExitStack) -> None:
    inside = base / "inside"
    inside.mkdir()
    options = f"ro,loop,offset={PARTITION_START},noload"
    if os.geteuid() == 0 and _may(["mount", "-t", "ext4", "-o", options, str(image), str(inside)]):
        stack.callback(_may, ["umount", str(inside)])
        _run(["ls", "-l", str(inside)])
        _expect_greeting(_run(["cat", str(inside / "hello.txt")]))
        _run(["umount", str(inside)])
    else:
        click.echo(
            "(mounting it needs root and a loop device, which you do not have here; debugfs needs neither)"
        )
        _expect_greeting(_run(["debugfs", "-R", "cat /hello.txt", f"{image}?offset={PARTITION_START}"]))


def _expect_greeting(text: str) -> None:
    if not text.startswith(GREETING):
        raise DemoError(f"the file inside reads {text!r}, not what was stored")


def _data_ranges(path: Path) -> Iterator[tuple[int, int]]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        end = 0
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                return
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, end


def _compare(copy: Path, original: Path) -> None:
    sums = []
    for path in (copy, original):
        with path.open("rb") as file:
            sums.append(hashlib.file_digest(file, "sha256").hexdigest())
    if sums[0] != sums[1]:
        raise DemoError(f"the copy has the SHA-256 {sums[0]}, the original {sums[1]}")
    click.echo(f"SHA-256 {sums[0]}: equal to the original")


def _say(text: str) -> None:
    click.secho(f"\n{text}", bold=True)


def _run(arguments: list[str]) -> str:
    """Shows a command, runs it, and shows and returns what it prints."""
    click.secho(f"$ {shlex.join(_as_typed(arguments))}", fg="cyan")
    output = _output_of(arguments)
    click.echo(output, nl=False)
    return output


def _output_of(arguments: list[str]) -> str:
    """What a command prints. Raises DemoError where it fails."""
    done = _ended(arguments)
    if done.returncode != 0:
        name = _as_typed(arguments)[0]
        raise DemoError(f"{name} ended with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _as_typed(arguments: list[str]) -> list[str]:
    """A command as a user would type it."""
    return ["pbsfs", *arguments[4:]] if arguments[:4] == _PBSFS else arguments


def _may(arguments: list[str]) -> bool:
    """Runs a command that may fail; whether it did not."""
    return _ended(arguments).returncode == 0


def _ended(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": _PATH},
    )


def _unmount_quietly(mountpoint: Path) -> None:
    """Clears up after a step that failed; after a good end there is nothing to do."""
    if mounted_at(mountpoint) is not None:
        try:
            unmount(mountpoint, lazy=True)
        except MountError as error:  # what failed before is the error that ends the demo
            click.echo(f"{mountpoint} stays mounted ({error}); run: pbsfs umount {mountpoint}", err=True)
