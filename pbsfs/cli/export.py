"""`pbsfs export`: copies images and other files of snapshots, and restores files of archives."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pbsfs.access.options import SourceOptions
from pbsfs.base.errors import OutputError, UsageError
from pbsfs.base.text import first_of
from pbsfs.cli.export_destination import ARCHIVE_NAMES, COMPRESSED_NAMES, Destination, Mode, meant_by
from pbsfs.cli.export_image import Copying
from pbsfs.cli.inside import find, from_mounts
from pbsfs.cli.options import logging_options, source_options
from pbsfs.cli.parameters import FilePath
from pbsfs.cli.progress import is_shown, shown_entries
from pbsfs.cli.running import described, run_on_tree
from pbsfs.reader.damage import ZeroedRanges
from pbsfs.runtime.logs import LogOptions, set_up_logging
from pbsfs.tree import (
    BlobFile,
    ContentsDirectory,
    ContentsNode,
    Directory,
    ImageFile,
    Node,
    SnapshotDirectory,
    Tree,
)

if TYPE_CHECKING:
    from pbsfs.tasks.extract.run import Options


@click.command("export")
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.argument("dest", type=Destination(allow_dash=True, readable=False))
@click.option(
    "--force",
    is_flag=True,
    help="Overwrite DEST: an existing file (for a link, the file it points to), or all of a block device.",
)
@click.option(
    "--in-place",
    is_flag=True,
    help="Turn DEST, an existing file or block device, into the image: write only what differs.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue DEST.part if an interrupted export left it, and keep it if this export is interrupted.",
)
@click.option("--dry-run", is_flag=True, help="With --in-place, only report how much differs.")
@click.option(
    "--mode",
    metavar="OCTAL",
    type=Mode(),
    help="Give a file this mode (default: 0600, or the mode of the file that is overwritten).",
)
@click.option("--progress/--no-progress", default=None, help="Show the progress (default: on a terminal).")
@click.option(
    "--on-damage",
    type=click.Choice(["fail", "zero", "skip"]),
    default="fail",
    help="Stop at damaged data, or write zeros instead and report where; of files in an archive, also leave "
    "out what cannot be read (skip; default: fail).",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["tar", "zip", "qcow2"]),
    help="Write an image as a qcow2 file, or what is in an archive as a tar or zip archive (default for a "
    "directory to -: tar).",
)
@click.option("--zstd", is_flag=True, help="Compress the tar archive with zstd.")
@click.option(
    "--pattern",
    "patterns",
    metavar="PATTERN",
    multiple=True,
    help="Restore only what matches, and all below it; may be repeated.",
)
@click.option(
    "--exclude",
    "excludes",
    metavar="PATTERN",
    multiple=True,
    help="Leave out what matches, and all below it; may be repeated.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace files that exist in DEST; with --format, DEST itself."
)
@click.option("--allow-existing-dirs", is_flag=True, help="Restore into directories that exist in DEST.")
@click.option("--ignore-ownership", is_flag=True, help="Do not restore owners and groups.")
@click.option("--ignore-permissions", is_flag=True, help="Do not restore modes.")
@click.option("--ignore-acls", is_flag=True, help="Do not restore access control lists.")
@click.option("--ignore-xattrs", is_flag=True, help="Do not restore extended attributes.")
@click.option(
    "--map-file",
    metavar="FILE",
    type=FilePath(dir_okay=False),
    help="With --on-damage zero, write to FILE which ranges are zeros, as a map file of ddrescue (default: "
    "DEST.map if DEST is a file).",
)
@source_options
@logging_options
def command(
    paths: tuple[str, ...],
    dest: str,
    force: bool,
    in_place: bool,
    resume: bool,
    dry_run: bool,
    mode: int | None,
    progress: bool | None,
    on_damage: str,
    form: str | None,
    zstd: bool,
    patterns: tuple[str, ...],
    excludes: tuple[str, ...],
    overwrite: bool,
    allow_existing_dirs: bool,
    ignore_ownership: bool,
    ignore_permissions: bool,
    ignore_acls: bool,
    ignore_xattrs: bool,
    map_file: Path | None,
    log: LogOptions,
    source: SourceOptions,
) -> None:
    """Copy what is at each PATH to DEST.

    An image, or any file of a snapshot: to a file, a block device, into a directory, or - for standard
    output. pbsfs writes a file as DEST.part, and renames it when it is complete; holes stay holes. Ctrl-C
    or an error removes the part; with --resume it is kept, and the next export with --resume continues it.

    With --in-place, pbsfs reads the existing DEST, fetches only the chunks that differ, writes them there,
    and reads back what it wrote. It may be interrupted: run the same command again to finish.

    A snapshot, or several PATHs: all their files into the directory DEST, which pbsfs makes if needed.

    A directory of an archive (files/…): what is in it to the directory DEST, with owners, modes, times, ACLs
    and extended attributes as far as the user may; or as a tar or zip archive with --format.

    \b
    Examples:
      pbsfs export vm/100/latest/drive-scsi0.img disk.img
      pbsfs export --force vm/100/latest/drive-scsi0.img /dev/vg0/restored
      pbsfs export --in-place --dry-run vm/100/latest/drive-scsi0.img \\
          /dev/vg0/vm-100-disk-0
      pbsfs export vm/100/latest restored/
      pbsfs export --format qcow2 vm/100/latest/drive-scsi0.img disk.qcow2
      pbsfs export files/ct/200/latest/root/etc restored/
      pbsfs export --format tar --zstd files/ct/200/latest/root root.tar.zst
      pbsfs export ct/200/latest/root.pxar - | pxar list
    """
    set_up_logging(log)
    if not paths:
        raise click.UsageError("Missing argument 'DEST', the place to copy to", click.get_current_context())
    source, places = from_mounts(source, paths)
    zeroed = None if on_damage == "fail" else ZeroedRanges()

    def for_archives() -> Options:
        """How to restore files of archives. Raises UsageError."""
        # Slow to import, and images do without.
        from pbsfs.tasks.extract.attributes import Kept  # noqa: PLC0415
        from pbsfs.tasks.extract.extract import OnDamage  # noqa: PLC0415
        from pbsfs.tasks.extract.run import Options  # noqa: PLC0415
        from pbsfs.tasks.patterns import Selection  # noqa: PLC0415

        return Options(
            Kept(not ignore_ownership, not ignore_permissions, not ignore_acls, not ignore_xattrs),
            Selection.parse(map(os.fsencode, patterns), map(os.fsencode, excludes)),
            overwrite,
            allow_existing_dirs,
            OnDamage(zero=on_damage != "fail", skip=on_damage == "skip"),
        )

    if patterns or excludes:
        for_archives()  # a wrong pattern is reported before the source is asked
    if map_file is not None and zeroed is None:
        raise UsageError("--map-file requires --on-damage zero; give both or neither")

    copying = Copying(
        Path(dest),
        force,
        mode,
        progress,
        zeroed,
        map_file,
        in_place=in_place,
        dry_run=dry_run,
        resume=resume,
    )
    if form == "qcow2":
        others = {
            "--in-place": in_place,
            "--resume": resume,
            "--zstd": zstd,
            "--on-damage": zeroed is not None,
        }
        given = next((option for option, is_given in others.items() if is_given), None)
        if given is not None or len(places) != 1:
            raise UsageError(f"--format qcow2: takes one PATH, and not {given or 'several'}; leave it out")
        from pbsfs.cli.export_qcow2 import export_qcow2  # noqa: PLC0415 - slow to import, and few need it

        export_qcow2(
            described(source, reads_much=True),
            places[0],
            Path(dest),
            force=force,
            mode=mode,
            progress=progress,
            log_format=log.format,
        )
        return
    for_contents = {
        "--format": form is not None,
        "--zstd": zstd,
        "--pattern": bool(patterns),
        "--exclude": bool(excludes),
        "--overwrite": overwrite,
        "--allow-existing-dirs": allow_existing_dirs,
        "--ignore-ownership": ignore_ownership,
        "--ignore-permissions": ignore_permissions,
        "--ignore-acls": ignore_acls,
        "--ignore-xattrs": ignore_xattrs,
    }
    names_missing_directory = dest.endswith("/") and not os.path.isdir(dest)
    meant_form = None if os.path.isdir(dest) else meant_by(dest, ARCHIVE_NAMES)
    compressor = None if os.path.isdir(dest) else meant_by(dest, COMPRESSED_NAMES)

    async def work(tree: Tree) -> None:
        nodes = [await find(tree, place, source) for place in places]
        if len(nodes) > 1 or isinstance(nodes[0], SnapshotDirectory):
            files = await _files_of(nodes)
            _refuse_for_contents(nodes[0], for_contents)
            await copying.run_all(files)
            return
        node = nodes[0]
        is_restore = isinstance(node, ContentsDirectory) and form is None and dest != "-"
        if is_restore and compressor is not None:
            raise UsageError(
                f"{dest}: without --format, pbsfs makes a directory of this name; write the archive to - and "
                f"pipe it to {compressor}, or write {dest}/ for a directory"
            )
        if is_restore and meant_form is not None:
            raise UsageError(
                f"{dest}: without --format, pbsfs makes a directory of this name; "
                f"add --format {meant_form}, or write {dest}/ for a directory"
            )
        if names_missing_directory and not is_restore:
            # As cp has it, such a name is a directory; it would become a file of that name.
            raise OutputError(f"cannot write {dest}: it is not a directory; create it with mkdir")
        if isinstance(node, ImageFile | BlobFile):
            _refuse_for_contents(node, for_contents)
        for_images = {
            "--in-place": in_place,
            "--resume": resume,
        }
        if any(for_images.values()) and not isinstance(node, ImageFile):
            option = next(option for option, is_given in for_images.items() if is_given)
            raise UsageError(f"{node}: {option} is for images; leave it out")
        if isinstance(node, ImageFile | BlobFile):
            await copying.run(node)
        elif isinstance(node, ContentsNode):
            from pbsfs.cli.export_contents import export_contents  # noqa: PLC0415 - as in `for_archives`
            from pbsfs.tasks.extract.run import size_below  # noqa: PLC0415

            options = for_archives()
            size = await size_below(node, options.selection) if is_shown(progress) else None
            with shown_entries(progress, os.fsdecode(node.name), size) as advance:
                await export_contents(
                    node, Path(dest), form, options, advance, zstd=zstd, force=force, mode=mode
                )
        elif isinstance(node, Directory):
            names = first_of(map(os.fsdecode, await node.children())) or "it is empty"
            raise UsageError(f"{node} is a directory; name one of its files: {names}")

    run_on_tree(work, first=places[0], zeroed=zeroed, reads_much=True, source=source)


def _refuse_for_contents(node: Node, given: dict[str, bool]) -> None:
    """Raises UsageError if an option is `given` that is only for files in archives."""
    option = next((option for option, is_given in given.items() if is_given), None)
    if option is not None:
        raise UsageError(f"{node}: {option} is for files in archives (files/…); leave it out")


async def _files_of(nodes: Sequence[Node]) -> list[ImageFile | BlobFile]:
    """The files that `nodes` are, or that are in them where they are snapshots. Raises UsageError."""
    files: list[ImageFile | BlobFile] = []
    for node in nodes:
        if isinstance(node, SnapshotDirectory):
            children = (await node.children()).values()
            contents = [str(child) for child in children if isinstance(child, ContentsNode)]
            if contents:  # in `files`: without them, hardly anything would be restored
                raise UsageError(
                    f"{node}: pbsfs exports one archive or volume at a time; name one: {first_of(contents)}"
                )
            files += [child for child in children if isinstance(child, ImageFile | BlobFile)]
        elif isinstance(node, ImageFile | BlobFile):
            files.append(node)
        else:
            raise UsageError(f"{node}: of several PATHs, each has to be a snapshot or a file of one")
    return files
