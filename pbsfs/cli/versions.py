"""`pbsfs versions`: the versions of a file in archives."""

from __future__ import annotations

import json
import os
import stat as stat_bits
from typing import Any

import click

from pbsfs.access.options import SourceOptions
from pbsfs.base.errors import NotFoundError, exit_status_of
from pbsfs.base.names import format_time
from pbsfs.base.text import counted, one_line, printable
from pbsfs.cli.inside import explained, from_mounts
from pbsfs.cli.options import logging_options, source_options
from pbsfs.cli.progress import Status
from pbsfs.cli.running import run_on_tree
from pbsfs.runtime.logs import LogOptions, set_up_logging
from pbsfs.tasks.attributes import time_text
from pbsfs.tasks.versions import Version, Versions, versions_of
from pbsfs.tree import Tree


@click.command("versions")
@click.argument("path")
@click.option("--content", is_flag=True, help="Read the file too, and tell versions apart by its SHA-256.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@click.option("--progress/--no-progress", default=None, help="Show the progress (default: on a terminal).")
@source_options
@logging_options
def command(
    path: str,
    content: bool,
    as_json: bool,
    progress: bool | None,
    log: LogOptions,
    source: SourceOptions,
) -> None:
    """List the versions of the file at PATH, in an archive, over all snapshots of its group.

    PATH may lead through any of the snapshots, also one that does not have the file. Each line has the times
    of the first and the last snapshot with a version, how many there are, mode, owner, size and time of the
    file, and what changed. Versions differ in what is stored with the file, with --content also in its bytes.

    \b
    Examples:
      pbsfs versions files/host/web1/latest/root/etc/fstab
      pbsfs versions --content --json files/ct/210/latest/root/etc/hosts
    """
    set_up_logging(log)
    source, (path,) = from_mounts(source, [path])

    status = Status(progress)

    def looked(count: int, of: int) -> None:
        status.show(f"{count} of {counted(of, 'snapshot')}")

    async def work(tree: Tree) -> Versions:
        try:
            return await versions_of(tree, os.fsencode(path), content=content, looked=looked)
        except NotFoundError as error:
            raise await explained(error, path, source) from None
        finally:
            status.clear()

    found = run_on_tree(work, reads_much=True, source=source)
    if as_json:
        click.echo(json.dumps([_row(version) for version in found.versions], indent=2))
    else:
        for version in found.versions:
            click.echo(printable(_line(version)))
    for place, failure in found.failed:
        click.echo(f"pbsfs: {one_line(f'{os.fsdecode(place)}: {failure}')}", err=True)
    if found.failed:
        raise click.exceptions.Exit(max(exit_status_of(failure) for _place, failure in found.failed))


def _line(version: Version) -> str:
    when = f"{format_time(version.first)} to {format_time(version.last)} {version.snapshots:>4}"
    if version.state is None:
        return f"{when} does not exist"
    entry = version.state.entry
    words = [
        when,
        stat_bits.filemode(entry.mode),
        f"{entry.uid}:{entry.gid}",
        f"{entry.size:>12}",
        time_text(entry.mtime_ns, whole_seconds=True),
    ]
    if version.state.digest is not None:
        words.append(version.state.digest.hex())
    if entry.target is not None:
        words.append(f"-> {os.fsdecode(entry.target)}")
    if version.changes:
        words.append(f"({', '.join(version.changes)})")
    return " ".join(words)


def _row(version: Version) -> dict[str, Any]:
    row: dict[str, Any] = {
        "first": format_time(version.first),
        "last": format_time(version.last),
        "snapshots": version.snapshots,
        "exists": version.state is not None,
    }
    if version.state is not None:
        entry = version.state.entry
        row |= {
            "mode": f"{entry.mode:06o}",
            "uid": entry.uid,
            "gid": entry.gid,
            "size": entry.size,
            "mtime_ns": entry.mtime_ns,
            "changes": list(version.changes),
        }
        if entry.target is not None:
            row["target"] = os.fsdecode(entry.target)
        if version.state.digest is not None:
            row["sha256"] = version.state.digest.hex()
    return row
