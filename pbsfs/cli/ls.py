"""`pbsfs ls`: lists the tree without a mount."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import click

from pbsfs.access.options import SourceOptions
from pbsfs.base.errors import PbsfsError, exit_status_of
from pbsfs.base.text import one_line, printable
from pbsfs.cli.inside import find, from_mounts
from pbsfs.cli.options import logging_options, run_on_tree, source_options
from pbsfs.runtime.logs import set_up_logging
from pbsfs.tasks.listing import Lister, Row
from pbsfs.tree import Tree


@click.command("ls")
@click.argument("path", default="", metavar="[PATH]")
@click.option(
    "-l", "--long", is_flag=True, help="Show mode, owner, group, size, size without holes, and time too."
)
@click.option("-R", "--recursive", is_flag=True, help="List all below PATH too, but not files/.")
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
    """List what is at PATH, as a mount shows it.

    Modes and owners are those of the backup for entries of archives. Exit status 6: damage hid a part; 5: the
    key of an archive is missing. The rest is listed all the same.

    \b
    Examples:
      pbsfs ls --datastore-dir /srv/store1
      pbsfs ls --datastore-dir /srv/store1 -l vm/100/latest
      pbsfs ls --datastore-dir /srv/store1 --ns prod -R --json
    """
    set_up_logging(log_level, log_file)
    source, (path,) = from_mounts(source, [path])

    status = 0

    def report(error: PbsfsError) -> None:
        nonlocal status
        status = max(status, exit_status_of(error))
        click.echo(f"pbsfs: {one_line(str(error))}", err=True)

    async def work(tree: Tree) -> None:
        with _Printer(as_json=as_json) as emit:
            lister = Lister(emit, report, full=long or as_json, recursive=recursive)
            await lister.list(await find(tree, path, source))

    run_on_tree(work, source=source)
    if status:
        raise click.exceptions.Exit(status)


class _Printer:
    """Prints rows as they come: as lines, or as one JSON list."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._count = 0
        self._out = sys.stdout or io.StringIO()  # None if it is closed
        self._to_terminal = self._out.isatty()
        out = self._out
        if isinstance(out, io.TextIOWrapper) and out.encoding.lower() == "utf-8" and not self._to_terminal:
            out.reconfigure(errors="surrogateescape")  # a program gets the bytes of names that are not text

    def __enter__(self) -> Callable[[Row], None]:
        return self._print

    def __exit__(self, *_failure: object) -> None:
        if self._as_json:
            self._out.write("\n]\n" if self._count else "[]\n")

    def _print(self, row: Row) -> None:
        if self._as_json:
            self._out.write((",\n  " if self._count else "[\n  ") + json.dumps(row.as_json()))
            self._count += 1
        else:
            line = row.as_line()
            # Not click.echo, which removes escape codes from names.
            self._out.write((printable(line) if self._to_terminal else line) + "\n")
