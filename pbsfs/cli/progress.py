"""The progress of commands that read much."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pbsfs.base.text import counted

INTERVAL = 0.1
"""Seconds between two changes of what is shown, where a command does many small steps."""


def is_shown(progress: bool | None) -> bool:
    """Whether to show the progress. `progress`: what the user wants; None for what suits standard error."""
    return sys.stderr.isatty() if progress is None else progress


@contextmanager
def shown(
    progress: bool | None, name: str, size: int, details: Callable[[], str] | None = None
) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; gives the function that takes the bytes done.

    `details`: gives what stands behind the bar now.
    """
    with shown_entries(progress, name, size, count_entries=False, details=details) as advance:
        yield lambda count: advance(count, 0)


@contextmanager
def shown_entries(
    progress: bool | None,
    name: str,
    size: int | None,
    *,
    count_entries: bool = True,
    details: Callable[[], str] | None = None,
) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error that counts files too.

    Gives the function that takes the bytes done since the last call, and all files done. `size`: in bytes,
    all of it, about; None where it is not known. `details`: as for `shown`.
    """
    if not is_shown(progress):
        yield lambda _count, _entries: None
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
    from rich.table import Column  # noqa: PLC0415

    files = [TextColumn("{task.fields[entries]}")] if count_entries else []
    more = [TextColumn("{task.fields[details]}")] if details is not None else []
    # A line of 80 characters has room for one of the two. Only the bar becomes shorter.
    speed = [TransferSpeedColumn(table_column=Column(no_wrap=True))] if details is None else []
    now = details or str
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *files,
        DownloadColumn(binary_units=True, table_column=Column(no_wrap=True)),
        *speed,
        TimeRemainingColumn(),
        *more,
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(name, total=size, entries=counted(0, "file"), details="")
        waiting = last = 0
        due = 0.0

        def advance(count: int, entries: int) -> None:
            nonlocal waiting, last, due
            waiting, last = waiting + count, entries
            if time.monotonic() >= due:
                bar.update(task, advance=waiting, entries=counted(last, "file"), details=now())
                waiting = 0
                due = time.monotonic() + INTERVAL

        yield advance
        # What was done, as opposed to what was expected.
        bar.update(task, advance=waiting, entries=counted(last, "file"), details=now())
        done = bar.tasks[0].completed
        bar.update(task, total=done if size is None or count_entries else size)


class Status:
    """A line on standard error that says how far a command is, for one whose total is not known.

    Shares a terminal with standard output: `clear` the line before writing there. One thread.
    """

    def __init__(self, progress: bool | None) -> None:
        """`progress`: what the user wants; None for what suits standard error."""
        self._shown = is_shown(progress)
        self._width = 0
        self._due = 0.0

    def show(self, text: str) -> None:
        """Shows `text`, printable and shorter than a line, unless the line was changed a moment ago."""
        if self._shown and time.monotonic() >= self._due:
            sys.stderr.write(f"\r{text:<{self._width}}")
            sys.stderr.flush()
            self._width = len(text)
            self._due = time.monotonic() + INTERVAL

    def clear(self) -> None:
        """Removes the line."""
        if self._width:
            sys.stderr.write(f"\r{'':{self._width}}\r")
            sys.stderr.flush()
            self._width = 0
