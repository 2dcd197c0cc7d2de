"""What commands share: options for the source and for logging, and how to run on a source."""

from __future__ import annotations

import logging
import logging.handlers
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import trio

from pbsfs.config import open_source
from pbsfs.errors import UsageError
from pbsfs.names import Namespace
from pbsfs.reader.reader import open_reader
from pbsfs.tree import Tree

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R")

_SYSLOG_SOCKET = Path("/dev/log")


def source_options(command: F) -> F:
    """`--repository`, `--datastore-dir` and `--ns`: the same for every command that reads."""
    for option in (
        click.option("--ns", "namespace", metavar="NAMESPACE", default="", help="Start at this namespace."),
        click.option(
            "--datastore-dir",
            metavar="DIR",
            type=click.Path(path_type=Path),
            help="Read the datastore in this directory (of a dead server, a copy, a disk at hand).",
        ),
        click.option(
            "--repository",
            metavar="REPOSITORY",
            help="Read from a server: [[user@realm@]host:]datastore (or PBS_REPOSITORY). Not yet possible.",
        ),
    ):
        command = option(command)
    return command


def logging_options(command: F) -> F:
    """`--log-level` and `--log-file`."""
    for option in (
        click.option(
            "--log-file",
            metavar="FILE",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Append the log to this file (default: standard error; a background mount: syslog).",
        ),
        click.option(
            "--log-level",
            type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
            default="warning",
            show_default=True,
            help="Log what is at least this important.",
        ),
    ):
        command = option(command)
    return command


def set_up_logging(level: str, file: Path | None, *, background: bool = False) -> None:
    """Sends the log where it belongs. Raises UsageError where `file` can't be written."""
    handler: logging.Handler
    if file is not None:
        try:
            handler = logging.FileHandler(file)
        except OSError as error:
            raise UsageError(f"cannot write the log file {file}: {error.strerror}") from None
    elif background:
        handler = _background_handler()
    else:
        handler = logging.StreamHandler(sys.stderr)
    if isinstance(handler, logging.handlers.SysLogHandler):
        handler.ident = f"pbsfs[{os.getpid()}]: "
        form = "%(levelname)s %(message)s"
    elif isinstance(handler, logging.FileHandler):
        form = "%(asctime)s %(levelname)s %(message)s"
    else:
        form = "pbsfs: %(levelname)s: %(message)s"
    logging.basicConfig(level=level.upper(), format=form, handlers=[handler], force=True)


def _background_handler() -> logging.Handler:
    """Syslog (which journald collects too), or where there is none a file of the user's."""
    if _SYSLOG_SOCKET.exists():
        try:
            return logging.handlers.SysLogHandler(
                str(_SYSLOG_SOCKET), facility=logging.handlers.SysLogHandler.LOG_DAEMON
            )
        except OSError:
            pass
    import platformdirs  # noqa: PLC0415 - only where it is needed

    return logging.FileHandler(platformdirs.user_log_path("pbsfs", ensure_exists=True) / "mount.log")


def run_on_tree(
    work: Callable[[Tree], Awaitable[R]],
    *,
    repository: str | None,
    datastore_dir: Path | None,
    namespace: str,
) -> R:
    """Opens the source that the options name, and runs `work` on its tree.

    SIGINT, SIGTERM and SIGHUP cancel `work`, so that it cleans up, and end in `click.exceptions.Exit`.
    """

    async def run() -> R:
        root = Namespace.parse(namespace)
        async with open_reader(open_source(repository, datastore_dir)) as reader:
            return await work(Tree(reader, root))

    return trio.run(_until_signalled, run)


async def _until_signalled(work: Callable[[], Awaitable[R]]) -> R:
    # As exceptions, signals would come up anywhere in trio's own code, and break it.
    stopped_by: int | None = None
    outcome: R | Exception | None = None
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def wait_for_signal() -> None:
                nonlocal stopped_by
                async for number in signals:
                    stopped_by = stopped_by or number
                    nursery.cancel_scope.cancel()

            nursery.start_soon(wait_for_signal)
            try:
                outcome = await work()
            except Exception as error:  # raised outside, so that the nursery does not wrap it in a group
                outcome = error
            nursery.cancel_scope.cancel()
    if stopped_by is not None:
        raise click.exceptions.Exit(128 + stopped_by)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def printable(text: str) -> str:
    """`text` without anything that a terminal would obey: notes and owners come from anywhere."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
