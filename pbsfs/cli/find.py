"""`pbsfs find`: searches the files in archives."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat as stat_bits
import sys
import time
from datetime import datetime, timedelta
from typing import Any

import click

from pbsfs.access.options import SourceOptions
from pbsfs.access.sizes import parse_size
from pbsfs.base.errors import NotFoundError, UsageError, exit_status_of
from pbsfs.base.text import counted, one_line, printable, quoted
from pbsfs.cli.inside import find, from_mounts
from pbsfs.cli.options import logging_options, source_options
from pbsfs.cli.progress import Status
from pbsfs.cli.running import run_on_tree
from pbsfs.runtime.logs import LogOptions, set_up_logging
from pbsfs.tasks.find import TYPES, Condition, Match, Search
from pbsfs.tasks.patterns import name_pattern
from pbsfs.tree import Tree
from pbsfs.tree.namespaces import FILES

_AGES = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

_LARGEST = 1 << 63


class _Size(click.ParamType):  # type: ignore[type-arg]  # older clicks take none
    """`+10M`: more; `-10M`: less; `10M`: that. Gives the least and the most bytes."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        size = parse_size(value.lstrip("+-") if value[:2] not in ("+-", "-+") else value)
        if value.startswith("+"):
            return size + 1, _LARGEST
        return (0, size - 1) if value.startswith("-") else (size, size)


class _Time(click.ParamType):  # type: ignore[type-arg]
    """`2024-11-01`, `2024-11-01 12:30`, `2024-11-01T12:30:00Z`, or `7d` ago. Gives nanoseconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        age = re.fullmatch(r"(\d{1,5})([mhdw])", value)
        try:
            if age:
                seconds = time.time() - timedelta(**{_AGES[age[2]]: int(age[1])}).total_seconds()
            else:
                seconds = datetime.fromisoformat(value).timestamp()
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is not a time; write 2024-11-01, 2024-11-01T12:30 or 7d (ago)", param, ctx)
        return int(seconds * 1_000_000_000)


def _types(_context: click.Context, _parameter: click.Parameter, value: str | None) -> frozenset[int]:
    letters = [letter for letter in (value or "").split(",") if value]
    if unknown := [letter for letter in letters if letter not in TYPES]:
        raise click.BadParameter(f"{unknown[0]!r} is not a type; use {', '.join(TYPES)}")
    return frozenset(TYPES[letter] for letter in letters)


@click.command("find")
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.option(
    "--name", "names", metavar="PATTERN", multiple=True, help="Match the name with a shell pattern."
)
@click.option("--iname", "inames", metavar="PATTERN", multiple=True, help="Like --name, in any case.")
@click.option("--regex", metavar="REGEX", help="Match the whole path, as it is shown.")
@click.option(
    "--type",
    "types",
    metavar="TYPE[,TYPE]",
    callback=_types,
    help="Match these types: f, d, l, b, c, p, s, as find(1).",
)
@click.option(
    "--size",
    "sizes",
    metavar="[+-]SIZE",
    type=_Size(),
    multiple=True,
    help="Match more (+), less (-), or exactly SIZE.",
)
@click.option(
    "--newer", metavar="TIME", type=_Time(), help="Match times after TIME: a date, or an age as 7d."
)
@click.option("--older", metavar="TIME", type=_Time(), help="Match times before TIME.")
@click.option("--latest", is_flag=True, help="Search only the newest snapshot of each group.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@click.option("-0", "--print0", is_flag=True, help="End each path with a NUL instead of a line break.")
@click.option("--progress/--no-progress", default=None, help="Show the progress (default: on a terminal).")
@source_options
@logging_options
def command(
    paths: tuple[str, ...],
    names: tuple[str, ...],
    inames: tuple[str, ...],
    regex: str | None,
    types: frozenset[int],
    sizes: tuple[tuple[int, int], ...],
    newer: int | None,
    older: int | None,
    latest: bool,
    as_json: bool,
    print0: bool,
    progress: bool | None,
    log: LogOptions,
    source: SourceOptions,
) -> None:
    """Search the files in archives below each PATH (default: all of them, or in a mount, where you are).

    Several --name and --iname: one of them has to match. Everything else has to match too. Exit status 6:
    damage hid a part; 5: the key of an archive is missing; what could be read was searched.

    \b
    Examples:
      pbsfs find --name '*.conf' --newer 7d
      pbsfs find files/host/web1 --latest --size +100M --type f
      pbsfs find files/ct/210/latest/root/etc --iname 'host*' --json
    """
    set_up_logging(log)
    if sys.stdout is None:
        raise UsageError("standard output is closed; redirect it to a file or program")
    source, places = from_mounts(source, paths or ("",))
    places = [place if place.strip("/") else "files" for place in places]
    try:
        pattern = None if regex is None else re.compile(os.fsencode(regex))
    except re.error as error:
        raise click.BadParameter(f"--regex {regex!r}: {error}") from None
    patterns = [name_pattern(os.fsencode(name)) for name in names]
    patterns += [name_pattern(os.fsencode(name), ignore_case=True) for name in inames]
    condition = Condition(tuple(patterns), pattern, types, sizes, newer, older)
    status = Status(progress)
    search = Search(condition, latest=latest)

    async def work(tree: Tree) -> None:
        nodes = []
        for path in places:
            try:
                nodes.append(await find(tree, path, source))
            except NotFoundError as error:
                if "/" in path:
                    raise
                # Other programs take the pattern as an argument.
                raise NotFoundError(f"{error}; for a name, write --name {shlex.quote(path)}") from None
        for node in nodes:
            if node.path.split(b"/")[0] != FILES:
                inside = os.fsdecode(FILES + b"/" + node.path)
                raise UsageError(f"{node}: find searches below files; name {quoted(inside)}")
        with _Printer(status, as_json=as_json, end=b"\0" if print0 else b"\n") as printer:
            search.searched = lambda: status.show(
                f"{counted(search.archives, 'archive')}, {counted(printer.count, 'match')}"
            )
            search.searched()
            await search.run(nodes, printer.print)

    run_on_tree(work, first=places[0], reads_much=True, source=source)
    for path, failure in search.failed:
        click.echo(f"pbsfs: {one_line(f'{os.fsdecode(path)}: {failure}')}", err=True)
    if search.failed:
        raise click.exceptions.Exit(max(exit_status_of(failure) for _path, failure in search.failed))


class _Printer:
    """Prints matches as they come: as lines, or as one JSON list.

    `count`: how many it printed. `status` is cleared before, and at the end.
    """

    def __init__(self, status: Status, *, as_json: bool, end: bytes) -> None:
        self._status = status
        self._as_json = as_json
        self._end = end
        self._out = sys.stdout.buffer
        self._to_terminal = sys.stdout.isatty()
        self.count = 0

    def __enter__(self) -> _Printer:
        return self

    def __exit__(self, *_failure: object) -> None:
        self._status.clear()
        if self._as_json:
            self._out.write(b"\n]\n" if self.count else b"[]\n")
        self._out.flush()

    def print(self, matches: list[Match]) -> None:
        """Prints some matches."""
        if self._to_terminal:
            self._status.clear()
        if self._as_json:
            for match in matches:
                self._out.write((b",\n  " if self.count else b"[\n  ") + json.dumps(_row(match)).encode())
                self.count += 1
            return
        self.count += len(matches)
        if self._to_terminal and self._end == b"\n":
            lines = (printable(os.fsdecode(match.path)) for match in matches)
            self._out.write("".join(f"{line}\n" for line in lines).encode(errors="replace"))
            self._out.flush()
        else:
            self._out.write(b"".join(match.path + self._end for match in matches))


def _row(match: Match) -> dict[str, Any]:
    stat = match.stat
    kind = next((letter for letter, bits in TYPES.items() if bits == stat_bits.S_IFMT(stat.mode)), "f")
    row: dict[str, Any] = {"path": os.fsdecode(match.path), "type": kind, "size": stat.size}
    row["mode"] = f"{stat_bits.S_IMODE(stat.mode):04o}"
    if stat.uid is not None:
        row |= {"uid": stat.uid, "gid": stat.gid}
    if stat.mtime_ns is not None:
        row["mtime_ns"] = stat.mtime_ns
    if stat.target is not None:
        row["target"] = os.fsdecode(stat.target)
    return row
