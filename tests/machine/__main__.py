"""Checks the Debian package in a virtual machine: `python -m tests.machine DEB`.

The machine runs systemd and a whole kernel, so it has what a container lacks: units, fstab and automounts,
nbd, device mapper, md, an NFS server, and a shutdown. See CONTRIBUTING.md.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from pbsfs.testing.demo import GREETING, make_datastore, make_disks
from tests.machine.base import MachineError, base_of, release_of
from tests.machine.machine import Result, run
from tests.support.server.server import ReferenceServer

GUEST = Path(__file__).parent / "guest"
USER, SECRET, STORE = "reader@pbs", "correct-horse-battery", "store1"
HOST = "10.0.2.2"
"""This computer, as QEMU's user network shows it to the guest."""


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pbsfs-machine"


@click.command()
@click.argument("package", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("patterns", nargs=-1)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=default_cache,
    help="Keep the machine's disk here (default: ~/.cache/pbsfs-machine).",
)
@click.option(
    "--golden",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Compare logical volumes of these golden disks (a directory with datastore/), too.",
)
@click.option(
    "--console",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write what the machine prints to this file (default: console.log in the cache).",
)
@click.option("--memory", default=1536, show_default=True, help="MiB of the machine.")
@click.option("--limit", default=3000.0, show_default=True, help="Seconds for all of it.")
def main(
    package: Path,
    patterns: tuple[str, ...],
    cache: Path,
    golden: Path | None,
    console: Path | None,
    memory: int,
    limit: float,
) -> None:
    """Run the checks whose names match PATTERNS (default: all) with the Debian package PACKAGE."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, with nothing left behind
    failed = total = 0
    try:
        for result in check(
            package,
            cache,
            golden=golden,
            console=console or cache / "console.log",
            patterns=patterns or ("*",),
            memory=memory,
            limit=limit,
        ):
            total += 1
            failed += not result.passed
            click.echo(f"{'ok    ' if result.passed else 'FAILED'} {result.name}  ({result.seconds:.0f} s)")
            for line in () if result.passed else result.lines:
                click.echo(f"       {line}")
    except MachineError as error:
        sys.exit(f"machine: {error}")
    click.echo(f"machine: {total} checks, {failed} failed")
    sys.exit(1 if failed else 0)


def check(
    package: Path,
    cache: Path,
    *,
    golden: Path | None,
    console: Path,
    patterns: Sequence[str],
    memory: int,
    limit: float,
) -> Iterator[Result]:
    """Yields the result of each check when it is known. Raises MachineError."""
    base = base_of(release_of(package), cache)
    with tempfile.TemporaryDirectory(prefix="run-", dir=cache) as work_name:
        work = Path(work_name)
        disks = make_disks(work)
        payload = work / "payload"
        make_datastore(payload / "datastore", disks)
        shutil.copy(package, payload)
        shutil.copytree(GUEST, payload, dirs_exist_ok=True)
        if golden is not None:
            shutil.copytree(golden / "datastore", payload / "golden/datastore")
        (payload / "patterns").write_text("".join(f"{pattern}\n" for pattern in patterns))
        (payload / "expected").write_text(hashlib.sha256(disks[-1].read_bytes()).hexdigest())
        (payload / "hello").write_text(f"{GREETING}This is day {len(disks)}.\n")
        (payload / "secret").write_text(f"{SECRET}\n")
        with ReferenceServer(payload / "datastore", store=STORE) as server:
            server.add_user(USER, SECRET)
            (payload / "config.toml").write_text(
                "[profiles.home]\n"
                f'repository = "{server.repository(USER, host=HOST)}"\n'
                f'fingerprint = "{server.fingerprint}"\n'
            )
            disk = _disk_of(payload)
            yield from run(base, work / "disk.qcow2", disk, console, memory=memory, limit=limit)


def _disk_of(payload: Path) -> Path:
    """A disk image, as ext4 with the label `payload`, with a copy of the directory, owned by root."""
    size = sum(path.stat().st_size for path in payload.rglob("*") if path.is_file())
    disk = payload.with_suffix(".img")
    blocks = f"{size * 5 // 4 // 1024 + 65536}k"
    options = ["-q", "-t", "ext4", "-L", "payload", "-E", "root_owner=0:0", "-d", str(payload), str(disk)]
    subprocess.run(["mke2fs", *options, blocks], check=True, stdout=subprocess.DEVNULL)
    return disk


if __name__ == "__main__":
    main()
