"""`pbsfs ls`: lists the tree without a mount."""

from __future__ import annotations

import io
import json
import os
import sys
from itertools import zip_longest

import click

from pbsfs.access.options import SourceOptions
from pbsfs.base.errors import PbsfsError, UsageError, exit_status_of
from pbsfs.base.text import one_line, printable
from pbsfs.cli.inside import find, from_mounts
from pbsfs.cli.options import logging_options, source_options
from pbsfs.cli.parameters import Whole
from pbsfs.cli.running import run_on_tree
from pbsfs.runtime.logs import LogOptions, set_up_logging
from pbsfs.tasks.listing import COLUMNS, HIDDEN, WIDTHS, Lister, Row, line_of
from pbsfs.tree import Directory, Tree

BATCH = 200
"""Rows that a terminal gets with columns as wide as they require."""


@click.command("ls", context_settings={"help_option_names": ["--help"]})
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.option(
    "-l", "--long", is_flag=True, help="Show mode, owner, group, size, size without holes, and time too."
)
@click.option("-h", "--human-readable", "human", is_flag=True, help="With -l, show sizes in KiB, MiB, GiB.")
@click.option("-R", "--recursive", is_flag=True, help="List all below PATH too, but not files/.")
@click.option("--tree", "as_tree", is_flag=True, help="Draw all below PATH as a tree, but not files/.")
@click.option(
    "-L",
    "--level",
    "depth",
    metavar="NUMBER",
    type=Whole(1, 1 << 20),
    help="With -R or --tree, list at most this many levels (default: all).",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@source_options
@logging_options
def command(
    paths: tuple[str, ...],
    long: bool,
    human: bool,
    recursive: bool,
    as_tree: bool,
    depth: int | None,
    as_json: bool,
    log: LogOptions,
    source: SourceOptions,
) -> None:
    """List what is at each PATH, as a mount shows it.

    Modes and owners are those of the backup for entries of archives. Everything else has the mode that a
    mount gives it by default, and the owner of the mount, shown as -. Exit status 6: damage hid a part; 5:
    the key of an archive is missing. The rest is listed all the same.

    \b
    Examples:
      pbsfs ls --datastore-dir /srv/store1
      pbsfs ls --datastore-dir /srv/store1 -lh vm/100/latest ct/200/latest
      pbsfs ls --datastore-dir /srv/store1 --tree -L 2 vm
      pbsfs ls --datastore-dir /srv/store1 --ns prod -R --json
    """
    set_up_logging(log)
    recursive = recursive or as_tree
    if depth is not None and not recursive:
        raise UsageError("-L goes with -R or --tree; add one of them")
    source, places = from_mounts(source, paths or ("",))

    status = 0

    def report(error: PbsfsError) -> None:
        nonlocal status
        status = max(status, exit_status_of(error))
        printer.flush()
        click.echo(f"pbsfs: {one_line(str(error))}", err=True)

    printer = _Printer(as_json=as_json, long=long, human=human, as_tree=as_tree)

    async def work(tree: Tree) -> None:
        with printer:
            for place in places:
                lister = Lister(printer.print, report, full=long or as_json, recursive=recursive, depth=depth)
                try:
                    node = await find(tree, place, source)
                    printer.begin(place, several=len(places) > 1 and isinstance(node, Directory))
                    await lister.list(node)
                except HIDDEN as error:  # the others are listed all the same
                    if len(places) == 1:
                        raise
                    report(error)

    run_on_tree(work, first=places[0], source=source)
    if status:
        raise click.exceptions.Exit(status)


class _Printer:
    """Prints rows as they come: as lines, or as one JSON list.

    A terminal gets a header, and columns that are as wide as the rows require; it gets rows in batches.
    """

    def __init__(self, *, as_json: bool, long: bool, human: bool, as_tree: bool) -> None:
        self._as_json = as_json
        self._long = long
        self._human = human
        self._as_tree = as_tree
        self._count = 0
        self._out = sys.stdout or io.StringIO()  # None if it is closed
        self._to_terminal = self._out.isatty()
        self._waiting: list[tuple[str, ...]] = []
        self._widths: list[int] = []
        out = self._out
        if isinstance(out, io.TextIOWrapper) and out.encoding.lower() == "utf-8" and not self._to_terminal:
            out.reconfigure(errors="surrogateescape")  # a program gets the bytes of names that are not text
        is_unicode = (getattr(out, "encoding", None) or "").lower() == "utf-8"
        self._strokes = ("│   ", "├── ", "└── ") if is_unicode else ("|   ", "|-- ", "`-- ")

    def __enter__(self) -> _Printer:
        return self

    def __exit__(self, *_failure: object) -> None:
        self.flush()
        if self._as_json:
            self._out.write("\n]\n" if self._count else "[]\n")

    def begin(self, place: str, *, several: bool) -> None:
        """Before the rows of `place`. `several`: whether there are those of other directories."""
        if self._as_json:
            return
        self.flush()
        if several and not self._as_tree:
            if self._count:
                self._out.write("\n")
            self._write(f"{place}:")
        if self._long and self._to_terminal:
            self._widths = []
            self._waiting.append(COLUMNS)
        if self._as_tree:
            name = place.strip("/") or "/"
            self._waiting.append((*[""] * (len(COLUMNS) - 1), name) if self._long else (name,))
        self._count += 1

    def print(self, row: Row) -> None:
        """Prints a row, soon."""
        if self._as_json:
            self._out.write((",\n  " if self._count else "[\n  ") + json.dumps(row.as_json()))
            self._count += 1
            return
        *cells, name = row.as_cells(human=self._human)
        if self._as_tree and row.branches:
            more, one, last = self._strokes
            inner = name.removeprefix(os.fsdecode(row.name[: row.name.rfind(b"/") + 1]))
            drawn = "".join(more if goes_on else "    " for goes_on in row.branches[:-1])
            name = drawn + (one if row.branches[-1] else last) + inner
        self._waiting.append((*cells, name))
        if len(self._waiting) >= (BATCH if self._to_terminal else 1):
            self.flush()

    def flush(self) -> None:
        """Prints the rows that wait."""
        rows, self._waiting = self._waiting, []
        if self._to_terminal:
            for cells in rows:
                lengths = [len(cell) for cell in cells[:-1]]
                self._widths = [max(pair) for pair in zip_longest(self._widths, lengths, fillvalue=0)]
        for cells in rows:
            self._write(line_of(cells, self._widths if self._to_terminal else WIDTHS))

    def _write(self, line: str) -> None:
        # Not click.echo, which removes escape codes from names.
        self._out.write((printable(line) if self._to_terminal else line) + "\n")
