"""`pbsfs umount`: ends a mount."""

from __future__ import annotations

from pathlib import Path

import click

from pbsfs.cli.parameters import FilePath
from pbsfs.fuse.mountpoint import unmount


@click.command("umount")
@click.argument("mountpoint", type=FilePath())
@click.option("-l", "--lazy", is_flag=True, help="Detach now; exit when the last open file is closed.")
def command(mountpoint: Path, lazy: bool) -> None:
    """End the mount at MOUNTPOINT, also if its process has died.

    \b
    Example:
      pbsfs umount /mnt/pbs
    """
    unmount(mountpoint, lazy=lazy)
