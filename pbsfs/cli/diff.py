"""`pbsfs diff`: compares two snapshots, images, or places in archives."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from pbsfs.access.options import SourceOptions
from pbsfs.base.errors import exit_status_of
from pbsfs.base.text import counted, one_line, printable
from pbsfs.cli.inside import find, from_mounts
from pbsfs.cli.options import logging_options, source_options
from pbsfs.cli.running import run_on_tree
from pbsfs.runtime.logs import LogOptions, set_up_logging
from pbsfs.tasks.attributes import mode_text, time_text, type_text
from pbsfs.tasks.diff import ADDED, CHANGED, REMOVED, TYPE_CHANGED, Change, Comparison
from pbsfs.tree import Directory, Tree

_MARKS = {ADDED: "+", REMOVED: "-", CHANGED: "M", TYPE_CHANGED: "T"}
_COLOURS = {ADDED: "green", REMOVED: "red", CHANGED: "yellow", TYPE_CHANGED: "magenta"}

MOST_RANGES = 8
"""Ranges of an image that a line names; --json has all."""


@click.command("diff")
@click.argument("old")
@click.argument("new")
@click.option("--content", is_flag=True, help="Compare also the bytes of files that look the same.")
@click.option("--stat", "only_counts", is_flag=True, help="Print only how many entries and bytes changed.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@source_options
@logging_options
def command(
    old: str,
    new: str,
    content: bool,
    only_counts: bool,
    as_json: bool,
    log: LogOptions,
    source: SourceOptions,
) -> None:
    """List what changed from OLD to NEW: two snapshots, two images, or two places in archives.

    Each line starts with + (added), - (removed), M (changed) or T (another type). Of images, the ranges that
    changed are listed, from the indexes alone. Exit status 0 also means that there are differences; 6: damage
    hid a part.

    \b
    Examples:
      pbsfs diff ct/210/2024-11-07T17:20:00Z ct/210/latest
      pbsfs diff files/host/web1/2024-11-07T17:20:00Z/root/etc \\
          files/host/web1/latest/root/etc
      pbsfs diff --stat vm/100/2024-11-07T17:20:00Z vm/100/latest
    """
    set_up_logging(log)
    source, (old, new) = from_mounts(source, [old, new])
    rows: list[dict[str, Any]] = []
    compared = "."
    in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def emit(changes: list[Change]) -> None:
        if as_json:
            rows.extend(map(_row, changes))
        elif not only_counts:
            for change in changes:
                line = printable(f"{_MARKS[change.kind]} {_words(change, compared)}")
                click.echo(click.style(line, fg=_COLOURS[change.kind]) if in_colour else line)

    async def work(tree: Tree) -> Comparison:
        nonlocal compared
        comparison = Comparison(tree, content)
        before, after = await find(tree, old, source), await find(tree, new, source)
        if not isinstance(after, Directory):
            compared = os.fsdecode(after.name)
        await comparison.run(before, after, emit)
        return comparison

    comparison = run_on_tree(work, first=old, reads_much=True, source=source)
    counts = {kind: {"count": comparison.counts[kind], "bytes": comparison.sizes[kind]} for kind in _MARKS}
    if as_json:
        click.echo(json.dumps({"counts": counts} | ({} if only_counts else {"changes": rows}), indent=2))
    elif only_counts:
        for kind, found in counts.items():
            click.echo(f"{kind}: {counted(found['count'], 'entry')}, {counted(found['bytes'], 'byte')}")
    for path, failure in comparison.failed:
        where = f"{os.fsdecode(path)}: " if path else ""
        click.echo(f"pbsfs: {one_line(f'{where}{failure}')}", err=True)
    if comparison.failed:
        raise click.exceptions.Exit(max(exit_status_of(failure) for _path, failure in comparison.failed))


def _words(change: Change, compared: str) -> str:
    """A change in a line. `compared`: what to call a change of the very thing that is compared."""
    path = os.fsdecode(change.path) or compared
    entry = change.new or change.old
    if entry is not None and entry.is_directory:
        path += "/"
    if change.ranges:
        total = sum(found.length for found in change.ranges)
        shown = ", ".join(map(str, change.ranges[:MOST_RANGES]))
        more = ", …" if len(change.ranges) > MOST_RANGES else ""
        return f"{path} ({counted(total, 'byte')} in {counted(len(change.ranges), 'range')}: {shown}{more})"
    if change.kind == TYPE_CHANGED and change.old is not None and change.new is not None:
        return f"{path} ({type_text(change.old.mode)} → {type_text(change.new.mode)})"
    if change.kind != CHANGED:
        return path
    return f"{path} ({', '.join(_field(name, change) for name in change.fields)})"


def _field(name: str, change: Change) -> str:
    old, new = change.old, change.new
    if name == "size":
        return f"size {change.old_size} → {change.new_size}"
    if old is None or new is None:
        return name
    values = {
        "mtime": _times(old.mtime_ns, new.mtime_ns),
        "mode": (mode_text(old.mode), mode_text(new.mode)),
        "owner": (f"{old.uid}:{old.gid}", f"{new.uid}:{new.gid}"),
        "link": (os.fsdecode(old.target or b""), os.fsdecode(new.target or b"")),
    }
    return f"{name} {values[name][0]} → {values[name][1]}" if name in values else name


def _times(old: int, new: int) -> tuple[str, str]:
    """Two times that differ, with the fractions of seconds where only these do."""
    whole = old // 1_000_000_000 != new // 1_000_000_000
    return time_text(old, whole_seconds=whole), time_text(new, whole_seconds=whole)


def _row(change: Change) -> dict[str, Any]:
    row: dict[str, Any] = {"path": os.fsdecode(change.path), "change": change.kind}
    if change.fields:
        row["fields"] = list(change.fields)
    for side, entry in (("old", change.old), ("new", change.new)):
        if entry is not None:
            row[side] = {
                "type": type_text(entry.mode),
                "size": entry.size,
                "mtime_ns": entry.mtime_ns,
                "mode": mode_text(entry.mode),
                "uid": entry.uid,
                "gid": entry.gid,
            } | ({} if entry.target is None else {"target": os.fsdecode(entry.target)})
    if change.ranges:
        row["ranges"] = [{"offset": found.offset, "length": found.length} for found in change.ranges]
    if change.old is None and change.new is None:
        row |= {"old_size": change.old_size, "new_size": change.new_size}
    return row
