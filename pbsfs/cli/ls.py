"""`pbsfs ls`: the tree without a mount."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from pbsfs.access.options import SourceOptions
from pbsfs.base.errors import DamageError
from pbsfs.base.names import format_time
from pbsfs.base.text import one_line
from pbsfs.cli.inside import find, from_mounts
from pbsfs.cli.options import logging_options, run_on_tree, source_options
from pbsfs.runtime.logs import set_up_logging
from pbsfs.tree import Directory, FilesDirectory, Link, Node, Tree


@click.command("ls")
@click.argument("path", default="", metavar="[PATH]")
@click.option("-l", "--long", is_flag=True, help="Show size, size without holes, and time too.")
@click.option(
    "-R", "--recursive", is_flag=True, help="List directories below too (files/ only where PATH is in it)."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@source_options
@logging_options
def command(
    path: str,
    long: bool,
    recursive: bool,
    as_json: bool,
    log_level: str,
    log_file: Path | None,
    source: SourceOptions,
) -> None:
    """List what is at PATH, as a mount would show it.

    \b
    Examples:
      pbsfs ls --datastore-dir /srv/store1
      pbsfs ls --datastore-dir /srv/store1 -l vm/100/latest
      pbsfs ls --datastore-dir /srv/store1 --ns prod -R --json
    """
    set_up_logging(log_level, log_file)
    source, (path,) = from_mounts(source, [path])

    async def work(tree: Tree) -> None:
        node = await find(tree, path, source)
        rows: list[dict[str, Any]] = []
        if isinstance(node, Directory):
            await _collect(node, node.path_of(b""), recursive, rows, tree, long or as_json)
        else:
            rows.append(await _row(node, os.fsdecode(node.name), full=long or as_json))
        if as_json:
            click.echo(json.dumps(rows, indent=2))
            return
        for row in rows:
            click.echo(_line(row) if long else row["name"])

    run_on_tree(work, source=source)


async def _collect(
    directory: Directory, root: bytes, recursive: bool, rows: list[dict[str, Any]], tree: Tree, full: bool
) -> None:
    for node in (await directory.children()).values():
        rows.append(await _row(node, os.fsdecode(node.path.removeprefix(root)), full=full))
        if recursive and isinstance(node, Directory) and not isinstance(node, FilesDirectory):
            try:
                await _collect(node, root, recursive, rows, tree, full)
            except DamageError as error:  # its neighbours are listed all the same
                rows[-1]["error"] = str(error)
                click.echo(f"pbsfs: {one_line(str(error))}", err=True)


async def _row(node: Node, name: str, *, full: bool) -> dict[str, Any]:
    if not full:
        return {"name": name}
    stat = await node.stat()
    row: dict[str, Any] = {"name": name, "path": os.fsdecode(node.path)}
    if isinstance(node, Directory):
        row["type"] = "directory"
    elif isinstance(node, Link):
        row |= {"type": "link", "target": os.fsdecode(await node.target())}
    else:
        row |= {"type": "file", "size": stat.size, "data_size": stat.data_size}
    if stat.mtime_ns is not None:
        row["time"] = format_time(stat.mtime_ns // 1_000_000_000)
    return row


def _line(row: dict[str, Any]) -> str:
    size, data = str(row.get("size", "-")), str(row.get("data_size", "-"))
    name = row["name"] + ("/" if row["type"] == "directory" else "")
    if "target" in row:
        name += f" -> {row['target']}"
    return f"{size:>15} {data:>15} {row.get('time', '-'):>20} {name}"
