"""`pbsfs demo`: mounts a small datastore made for it, and reads it with ordinary tools.

Every step is a command as a user types it. The demo shows and runs it, and compares the result with the
original. It fails if anything differs, and removes everything that it made.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import click

from pbsfs.base.errors import MountError, OutputError, UsageError
from pbsfs.base.text import one_line
from pbsfs.fuse.mountpoint import mounted_at, unmount
from pbsfs.tasks.image.refusals import refusal
from pbsfs.testing.demo import (
    DISK_SIZE,
    GREETING,
    PATH,
    DemoError,
    make_datastore,
    make_disks,
    run,
)

_PBSFS = [sys.executable, "-P", "-m", "pbsfs"]


@click.command("demo")
@click.option("--keep", is_flag=True, help="Keep the datastore, and print its directory.")
def command(keep: bool) -> None:
    """Try everything on a small datastore made for it.

    Makes a disk with a partition and an ext4 file system, stores three backups of it and of a host's files
    as a Proxmox Backup Server does, mounts them, copies the disk with cp and dd and compares it, shows its
    holes, reads a file of its file system, looks into the host's archive, compares, restores, and unmounts.

    \b
    Examples:
      pbsfs demo
      pbsfs demo --keep
    """
    if shutil.which("mke2fs", path=PATH) is None:
        raise UsageError("the demo needs mke2fs; install the package e2fsprogs")
    try:
        base = Path(tempfile.mkdtemp(prefix="pbsfs-demo-"))
    except OSError as error:
        raise OutputError(
            f"no directory for temporary files: {error.strerror}; set TMPDIR to one that you may write"
        ) from None
    with ExitStack() as stack:
        if keep:
            click.echo(f"The datastore stays in {base / 'datastore'}; remove {base} when done.")
        else:
            stack.callback(shutil.rmtree, base, ignore_errors=True)
        try:
            disks = _make(base)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(refusal(error.filename or str(base), error)) from None
        try:
            _show(base, disks, stack)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise DemoError(f"{error.filename or base}: {error.strerror}") from None
    click.secho("Everything came back as it was stored.", bold=True)


def _make(base: Path) -> list[Path]:
    _say("Making a disk with an ext4 file system, and two later states of it")
    disks = make_disks(base)
    _say("Storing three backups of it, and of a host's files, as a Proxmox Backup Server keeps them")
    stored = make_datastore(base / "datastore", disks)
    total = len(disks) * DISK_SIZE
    click.echo(
        f"{len(disks)} disks of {DISK_SIZE >> 20} MiB ({total >> 20} MiB) in {stored / (1 << 20):.1f} MiB"
    )
    return disks


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

    _say("The files on its disk are there too, without root and without restoring anything")
    volume = mountpoint / "files" / "vm" / "100" / "latest" / "scsi0-p1"
    _run(["ls", "-l", str(volume)])
    _expect_greeting(_run(["cat", str(volume / "hello.txt")]))

    _say("So are those of a host: its archive is a directory")
    root = mountpoint / "files" / "host" / "web1" / "latest" / "root"
    _run(["ls", "-l", str(root / "etc")])
    _expect_greeting(_run(["cat", str(root / "srv" / "hello.txt")]))
    _say("What changed since yesterday, and the versions of a file")
    source = ["--datastore-dir", str(base / "datastore")]
    nights = sorted(str(night.name) for night in (mountpoint / "host" / "web1").iterdir())
    _run([*_PBSFS, "diff", *source, f"host/web1/{nights[-3]}", "host/web1/latest"])
    _run([*_PBSFS, "versions", *source, "files/host/web1/latest/root/etc/hosts"])
    _say("Restoring a directory of it")
    _run([*_PBSFS, "export", *source, "files/host/web1/latest/root/srv", str(base / "restored")])
    _expect_greeting(_run(["cat", str(base / "restored" / "hello.txt")]))

    _say("Unmounting")
    _run([*_PBSFS, "umount", str(mountpoint)])


def _expect_greeting(text: str) -> None:
    if not text.startswith(GREETING):
        raise DemoError(f"the file in the backup reads {text[:100]!r}, which differs from the original")


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
    done = run(arguments)
    if done.returncode != 0:
        name = _as_typed(arguments)[0]
        raise DemoError(f"{name} ended with status {done.returncode}: {one_line(done.stderr)}")
    return done.stdout


def _as_typed(arguments: list[str]) -> list[str]:
    """A command as a user would type it."""
    return ["pbsfs", *arguments[4:]] if arguments[:4] == _PBSFS else arguments


def _unmount_quietly(mountpoint: Path) -> None:
    """Unmounts after a step that failed; after the last step nothing is mounted."""
    if mounted_at(mountpoint) is not None:
        try:
            unmount(mountpoint, lazy=True)
        except MountError as error:  # the failed step's error is the one to report
            click.echo(f"{mountpoint} stays mounted ({error}); run: pbsfs umount {mountpoint}", err=True)
