"""`pbsfs map`: draws which bytes of an image are data, holes, changed and damaged."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from pbsfs.access.options import SourceOptions
from pbsfs.base.errors import DamageError, OutputError, UsageError, exit_status_of
from pbsfs.base.text import counted, one_line, printable, size_text
from pbsfs.cli.inside import find, from_mounts
from pbsfs.cli.map_pictures import KINDS, Kind, cell_size, kind_of, png, svg
from pbsfs.cli.options import logging_options, source_options
from pbsfs.cli.parameters import FilePath
from pbsfs.cli.progress import shown
from pbsfs.cli.running import run_on_tree
from pbsfs.runtime.logs import LogOptions, set_up_logging
from pbsfs.tasks.facts import VERIFIED
from pbsfs.tasks.image.refusals import exists, refusal, refuse_existing
from pbsfs.tasks.mapping import ImageMap, MapExtent, image_in, image_in_previous, map_of
from pbsfs.tree import ImageFile, SnapshotDirectory, Tree

COLUMNS = 64
ROWS = 24
"""Characters of a line of the picture, and its lines at most: it fits on a screen of 80 columns."""

MOST_RANGES = 8
"""Damaged ranges that are listed below the picture; --json and --table have all."""

PREVIOUS = "previous"


STANDARD_OUTPUT = Path("-")


@click.command("map")
@click.argument("path", metavar="IMAGE")
@click.option(
    "--since",
    metavar="SNAPSHOT",
    help="Show what changed since this snapshot: the time of one of the same group, the path of any, or "
    f"{PREVIOUS} (default: none).",
)
@click.option("--check", is_flag=True, help="Read and check all data of the image to find any damage.")
@click.option("--table", "as_table", is_flag=True, help="Print a table of ranges.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of ranges, as qemu-img map does.")
@click.option(
    "--svg",
    "svg_file",
    metavar="FILE",
    type=FilePath(),
    help="Write the picture to an SVG file (-: to standard output).",
)
@click.option(
    "--png",
    "png_file",
    metavar="FILE",
    type=FilePath(),
    help="Write the picture to a PNG file (-: to standard output).",
)
@click.option("--force", is_flag=True, help="Overwrite the files of --svg and --png.")
@source_options
@logging_options
def command(
    path: str,
    since: str | None,
    check: bool,
    as_table: bool,
    as_json: bool,
    svg_file: Path | None,
    png_file: Path | None,
    force: bool,
    log: LogOptions,
    source: SourceOptions,
) -> None:
    """Draw which bytes of IMAGE are data, holes, changed since another snapshot, and damaged.

    IMAGE is an image or an archive as a stream (.img, .pxar). pbsfs reads indexes for that, and no data. In a
    datastore's directory, it also looks for files of chunks that are missing, for up to 10 seconds; --check
    finds all damage. Exit status 6: damage was found.

    \b
    Examples:
      pbsfs map --datastore-dir /srv/store1 vm/100/latest/drive-scsi0.img
      pbsfs map --since previous --svg night.svg vm/100/latest/drive-scsi0.img
      pbsfs map --check --json vm/100/latest/drive-scsi0.img
    """
    set_up_logging(log)
    if as_table + as_json + bool(svg_file or png_file) > 1:
        raise UsageError("--table, --json and pictures exclude each other; choose one of them")
    files = [file for file in (svg_file, png_file) if file is not None]
    if svg_file is not None and svg_file == png_file:
        raise UsageError(f"--svg and --png both name {svg_file}; name two files")
    for file in () if force else files:
        if file != STANDARD_OUTPUT:
            refuse_existing(file)
    paths = [path] if since is None or "/" not in since else [path, since]
    source, paths = from_mounts(source, paths)

    async def work(tree: Tree) -> tuple[ImageFile, ImageFile | None, ImageMap]:
        file = await _image_at(tree, paths[0], source)
        before = None
        if since == PREVIOUS:
            before = await image_in_previous(file)
        elif since is not None:
            node = await find(tree, paths[1] if len(paths) > 1 else f"{_group_of(file)}/{since}", source)
            if isinstance(node, SnapshotDirectory):
                node = await image_in(node, file)
            if not isinstance(node, ImageFile):
                raise UsageError(f"{node}: not a snapshot; name one of them, as in vm/100/latest")
            before = node
        total = (await file.stat()).data_size
        with shown(None if check else False, "check", total) as advance:
            return file, before, await map_of(file, before, check=check, advance=advance)

    image, before, found = run_on_tree(work, first=paths[0], reads_much=True, source=source)
    title = os.fsdecode(image.path)
    compared = None if before is None else os.fsdecode(before.path.split(b"/")[-2])
    if as_json:
        _print_json(found)
    elif as_table:
        _print_table(found)
    elif files:
        for target, draw in ((svg_file, svg), (png_file, png)):
            if target is not None:
                _write(target, draw(found, title, compared), force=force)
    else:
        _print_picture(found, title, compared)
        click.echo("\n".join(_about_damage(found, image.info.verify_state)))
    if found.totals.damaged:
        raise click.exceptions.Exit(exit_status_of(DamageError("")))


async def _image_at(tree: Tree, path: str, source: SourceOptions) -> ImageFile:
    node = await find(tree, path, source)
    if not isinstance(node, ImageFile):
        raise UsageError(f"{node}: not an image; name an .img, .pxar, .mpxar or .ppxar file of a snapshot")
    return node


def _group_of(file: ImageFile) -> str:
    return os.fsdecode(b"/".join(file.path.split(b"/")[:-2]))


def _print_json(found: ImageMap) -> None:
    """The fields of `qemu-img map --output=json` of the image in a mount (the manual of qemu-img, "map"), and
    `changed` and `damaged` as far as they are known."""
    lines = (json.dumps(_row(found, extent)) for extent in found.extents())
    click.echo("[" + next(lines, ""), nl=False)
    for line in lines:
        click.echo(",\n " + line, nl=False)
    click.echo("]")


def _row(found: ImageMap, extent: MapExtent) -> dict[str, Any]:
    row: dict[str, Any] = {
        "start": extent.offset,
        "length": extent.length,
        "depth": 0,
        "present": True,
        "zero": extent.hole,
        "data": not extent.hole,
        "offset": extent.offset,
    }
    if found.compared:
        row["changed"] = extent.changed
    if found.checked or extent.damaged:
        row["damaged"] = extent.damaged
    return row


def _print_table(found: ImageMap) -> None:
    click.echo(f"{'Offset':<15} {'Length':<15} Content")
    for extent in found.extents():
        words = ["hole" if extent.hole else "data"]
        words += ["changed"] * extent.changed + ["damaged"] * extent.damaged
        click.echo(f"{extent.offset:<#15x} {extent.length:<#15x} {', '.join(words)}")


def _print_picture(found: ImageMap, title: str, compared: str | None) -> None:
    out = sys.stdout or io.StringIO()  # None if it is closed
    is_unicode = (getattr(out, "encoding", None) or "").lower() == "utf-8"
    in_colour = out.isatty() and "NO_COLOR" not in os.environ
    size = cell_size(found, COLUMNS * ROWS)

    def mark(kind: Kind) -> str:
        return kind.character if is_unicode else kind.letter

    click.echo(printable(title))
    click.echo(f"{size_text(found.size)}; one character is {size_text(size)}\n")
    kinds = [kind_of(cell) for cell in found.cells(size)]
    for start in range(0, len(kinds), COLUMNS):
        drawn = [
            click.style(text, fg=kind.colour) if in_colour else text
            for kind, run in itertools.groupby(kinds[start : start + COLUMNS])
            for text in (mark(kind) * len(list(run)),)
        ]
        click.echo(f"{size_text(start * size):>9}  {''.join(drawn)}")
    click.echo()
    used = set(kinds)
    for kind in KINDS:
        if kind in used:
            text = mark(kind)
            shown_mark = click.style(text, fg=kind.colour) if in_colour else text
            click.echo(f"{shown_mark} {printable(kind.words(found.totals, compared))}")


def _about_damage(found: ImageMap, verify_state: str | None) -> Iterator[str]:
    """What is known of damage, and what pbsfs did not look at."""
    if found.totals.damaged:
        ranges = (s for s in found.extents() if s.damaged)
        named = [f"{s.offset}+{s.length}" for s in itertools.islice(ranges, MOST_RANGES)]
        more = ", …" if next(ranges, None) is not None else ""
        yield f"Damaged: {counted(found.totals.damaged, 'byte')}: {', '.join(named)}{more}"
    if found.checked:
        yield "pbsfs read and checked all data."
        return
    if found.unknown is not None:
        yield f"pbsfs could not look for damage: {one_line(found.unknown)}"
    elif not found.found:
        yield "pbsfs did not look for damage; --check reads all data."
    else:
        part = "all chunks" if found.found == found.size else f"chunks up to {size_text(found.found)}"
        yield f"pbsfs looked for the files of {part}, and did not read them; --check reads all data."
    state = verify_state or "none"
    yield f"Verify state: {one_line(state)}" + (f" ({VERIFIED[state]})" if state in VERIFIED else "")


def _write(path: Path, content: bytes, *, force: bool) -> None:
    if path == STANDARD_OUTPUT:
        click.echo(content, nl=False)
        return
    try:
        with open(path, "wb" if force else "xb") as file:
            try:
                file.write(content)
                file.flush()
            except OSError:
                if not force:  # it is new
                    path.unlink(missing_ok=True)
                raise
    except FileExistsError:
        raise OutputError(exists(path)) from None
    except OSError as error:
        raise OutputError(refusal(path, error)) from None
