"""`pbsfs export`: copies an image (or any file of a snapshot) out of the backups."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from pbsfs.cli.options import logging_options, run_on_tree, set_up_logging, source_options
from pbsfs.copy import copy_blob, copy_image, open_target
from pbsfs.errors import UsageError
from pbsfs.tree import BlobFile, Directory, ImageFile, Tree


@click.command("export")
@click.argument("path")
@click.argument("dest", type=click.Path(path_type=Path, allow_dash=True))
@click.option(
    "--force", is_flag=True, help="Overwrite DEST: an existing file, or the whole of a block device."
)
@click.option("--progress/--no-progress", default=None, help="Show the progress (default: on a terminal).")
@source_options
@logging_options
def command(
    path: str,
    dest: Path,
    force: bool,
    progress: bool | None,
    log_level: str,
    log_file: Path | None,
    **source: Any,
) -> None:
    """Copy the image at PATH to DEST: a file, a directory, a block device, or - for standard output.

    A file is written as DEST.part and gets its name when it is complete; holes stay holes. What is
    left of an export that was killed is never continued.

    \b
    Examples:
      pbsfs export --datastore-dir /srv/store1 vm/100/latest/drive-scsi0.img disk.img
      pbsfs export --datastore-dir /srv/store1 --force vm/100/latest/drive-scsi0.img /dev/vg0/restored
      pbsfs export --datastore-dir /srv/store1 ct/200/latest/root.pxar - | pxar list
    """
    set_up_logging(log_level, log_file)

    async def work(tree: Tree) -> None:
        node = await tree.find(path)
        if isinstance(node, ImageFile):
            image = await node.open()
            with (
                open_target(dest, node.name, image.size, force=force) as target,
                _shown(progress, node.name, image.size) as advance,
            ):
                await copy_image(image, target, advance)
        elif isinstance(node, BlobFile):
            data = await node.read()
            with open_target(dest, node.name, len(data), force=force) as target:
                await copy_blob(data, target)
        elif isinstance(node, Directory):
            raise UsageError(f"{node} is a directory; name one of its files: {_names(await node.children())}")

    run_on_tree(work, **source)


def _names(children: dict[str, Any]) -> str:
    names = list(children)
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "it is empty"


@contextmanager
def _shown(progress: bool | None, name: str, size: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; gives the function that takes the bytes done."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield lambda _count: None
        return
    from rich.console import Console  # noqa: PLC0415 - slow to import, and seldom needed
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(name, total=size)
        yield lambda count: bar.advance(task, count)
