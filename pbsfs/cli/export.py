"""`pbsfs export`: copies an image (or any file of a snapshot) out of the backups."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click

from pbsfs.access.options import SourceOptions
from pbsfs.base.errors import DamageError, OutputError, UsageError
from pbsfs.base.text import first_of
from pbsfs.cli.inside import find, from_mounts
from pbsfs.cli.options import (
    FilePath,
    damage_option,
    logging_options,
    run_on_tree,
    source_options,
)
from pbsfs.cli.progress import shown
from pbsfs.reader.damage import Range, ZeroedRanges
from pbsfs.runtime.logs import set_up_logging
from pbsfs.tasks.copy import check_map_file, copy_blob, copy_image, open_target, write_map
from pbsfs.tree import BlobFile, Directory, ImageFile, Tree


class _Destination(FilePath):
    """As cp has it, a name that ends with `/` is a directory; it would become a file of that name."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        if str(value).endswith("/") and not path.is_dir():
            raise OutputError(f"cannot write {value}: it is not a directory; make it with mkdir")
        return path


class _Mode(click.ParamType):  # type: ignore[type-arg]  # older clicks take none
    """A mode as chmod(1) has it in digits: 640, 0640."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if not re.fullmatch("0?[0-7]{3}", value):
            self.fail(f"{value!r} is not a mode; give three octal digits, as 640", param, ctx)
        return int(value, 8)


@click.command("export")
@click.argument("path")
@click.argument("dest", type=_Destination(allow_dash=True))
@click.option(
    "--force",
    is_flag=True,
    help="Overwrite DEST: an existing file (for a link, the file it points to), or all of a block device.",
)
@click.option(
    "--mode",
    metavar="OCTAL",
    type=_Mode(),
    help="Give a file this mode (default: 0600, or the mode of the file that is overwritten).",
)
@click.option("--progress/--no-progress", default=None, help="Show the progress (default: on a terminal).")
@damage_option
@click.option(
    "--map-file",
    metavar="FILE",
    type=FilePath(dir_okay=False),
    help="With --on-damage zero: where to write which ranges are zeros, as a map file of ddrescue. "
    "Default: DEST.map, where DEST is a file.",
)
@source_options
@logging_options
def command(
    path: str,
    dest: Path,
    force: bool,
    mode: int | None,
    progress: bool | None,
    on_damage: ZeroedRanges | None,
    map_file: Path | None,
    log_level: str,
    log_file: Path | None,
    source: SourceOptions,
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
    source, (path,) = from_mounts(source, [path])
    if map_file is not None and on_damage is None:
        raise UsageError("--map-file goes with --on-damage zero: without it there is nothing to map")

    async def work(tree: Tree) -> None:
        node = await find(tree, path, source)
        if isinstance(node, ImageFile):
            image = await node.open()
            with (
                open_target(dest, os.fsdecode(node.name), image.size, force=force, mode=mode) as target,
                shown(progress, os.fsdecode(node.name), image.size) as advance,
            ):
                place = (map_file or target.map_file) if on_damage is not None else None
                if place is not None:
                    check_map_file(place, target, force=force)
                await copy_image(image, target, advance)
            if on_damage is not None:
                _tell_damage(on_damage.of(str(image)), image.size, place, force=force)
        elif isinstance(node, BlobFile):
            data = await node.read()
            with open_target(dest, os.fsdecode(node.name), len(data), force=force, mode=mode) as target:
                await copy_blob(data, target)
        elif isinstance(node, Directory):
            names = first_of(map(os.fsdecode, await node.children())) or "it is empty"
            raise UsageError(f"{node} is a directory; name one of its files: {names}")

    run_on_tree(work, zeroed=on_damage, reads_much=True, source=source)


def _tell_damage(zeros: list[Range], size: int, map_file: Path | None, *, force: bool) -> None:
    """Writes the map, and raises DamageError where anything in the copy is not as it was."""
    if map_file is not None:
        write_map(map_file, size, zeros, force=force)
    if zeros:
        where = f"; {map_file} tells which" if map_file else f": {', '.join(map(str, zeros[:20]))}"
        raise DamageError(
            f"the copy is complete, but {sum(zero.length for zero in zeros)} bytes in {len(zeros)} ranges "
            f"are zeros in the place of damaged data{where}"
        )
