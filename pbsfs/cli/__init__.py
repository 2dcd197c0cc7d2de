"""The command line: one module for each command, imported when it is used.

Only `main` turns errors into a line on standard error and an exit status.
"""

from __future__ import annotations

import difflib
import gc
import importlib
import io
import logging
import os
import select
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click

from pbsfs import __version__
from pbsfs.access.credentials import take_secrets
from pbsfs.base.errors import (
    ALLOW_TASKS,
    INTERRUPTED_EXIT_STATUS,
    OutputError,
    PbsfsError,
    SourceError,
    exit_status_of,
    with_action,
)
from pbsfs.base.text import escaped
from pbsfs.runtime import process
from pbsfs.runtime.logs import log_failure
from pbsfs.runtime.service import NOTIFY_SOCKET

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

log = logging.getLogger(__name__)

_COMMANDS = {
    "mount": "Show backups as files in a directory.",
    "umount": "End a mount.",
    "status": "List mounts and NBD servers, and whether they answer.",
    "stats": "Show what a mount did: reads, cache hits, errors.",
    "ls": "List the tree without mounting it.",
    "info": "Show what is known about a snapshot or file.",
    "map": "Draw the data, holes, changes and damage of an image.",
    "cat": "Write files to standard output.",
    "find": "Search the files in archives.",
    "versions": "List the versions of a file over all snapshots.",
    "diff": "Compare snapshots, images or files in archives.",
    "export": "Copy an image, or restore files of an archive.",
    "nbd": "Serve images as network block devices.",
    "boot": "Boot a backup in QEMU, without restoring it.",
    "verify": "Read and check everything; report what is damaged.",
    "cache": "Look at the cache on disk, prune it, or fill it ahead.",
    "key": "Look at key files; recover a key with a master key.",
    "login": "Keep a login at a server for two hours.",
    "logout": "Remove a login that is kept.",
    "config": "Check the configuration; write a first profile.",
    "demo": "Try everything on a small datastore made for it.",
    "completion": "Print the script for a shell's completion.",
}

_EPILOG = """\
\b
Exit status:
  0  done
  1  an unexpected failure
  2  wrong usage
  3  no such namespace, group, snapshot or file
  4  the source can't be read
  5  encrypted, and the required key is not available
  6  damaged data
  7  can't mount or unmount
  8  can't write the destination
  9  nbdkit or QEMU is missing, unsuitable, or failed
  10 the server does not accept the user, token, password or secret
  11 the server does not allow this user or token to do this
  12 the server's certificate is not trusted, or not the expected one
  13 the server's name does not resolve
  14 no connection to the server, or it was lost
  15 the server is not a Proxmox Backup Server
  16 no such datastore, or none that this user may see
  17 no such realm
  18 the password of a key is missing or wrong
  19 a key file can't be read, or is not a key file
  20 restored but for damaged data, with --on-damage zero or skip
  128+N  ended by signal N (130: Ctrl-C)
"""


_HABITS = {
    "help": "pbsfs --help",
    "version": "pbsfs --version",
    "unmount": "pbsfs umount",
    "list": "pbsfs ls",
    "snapshot": "pbsfs ls",
    "snapshots": "pbsfs ls",
    "check": "pbsfs verify",
    "restore": "pbsfs export",
    "extract": "pbsfs export",
    "dump": "pbsfs export",
    "show": "pbsfs info",
    "stat": "pbsfs info",
    "catalog": "pbsfs ls files, or pbsfs find",
    "tree": "pbsfs ls -R",
    "search": "pbsfs find",
    "locate": "pbsfs find",
    "grep": "pbsfs find",
    "copy": "pbsfs export",
    "cp": "pbsfs export",
    "tar": "pbsfs export --format tar",
    "zip": "pbsfs export --format zip",
}
"""Commands of other backup programs, and those of pbsfs that do the same."""


_READS_ONLY = "pbsfs only reads backups: {}"

_NOT_HERE = {
    "backup": _READS_ONLY.format("make them with proxmox-backup-client backup, or vzdump"),
    "upload": _READS_ONLY.format("make them with proxmox-backup-client backup, or vzdump"),
    "forget": _READS_ONLY.format("remove them with proxmox-backup-client snapshot forget"),
    "delete": _READS_ONLY.format("remove them with proxmox-backup-client snapshot forget"),
    "rm": _READS_ONLY.format("remove them with proxmox-backup-client snapshot forget"),
    "prune": _READS_ONLY.format("prune them on the server, or with proxmox-backup-client prune"),
    "gc": _READS_ONLY.format("collect garbage on the server"),
    "garbage-collect": _READS_ONLY.format("collect garbage on the server"),
    "sync": _READS_ONLY.format("synchronise datastores on the server"),
    "df": "run df on a mount of pbsfs",
    "du": "did you mean: pbsfs ls -l, or pbsfs info",
}
"""Commands of other programs that pbsfs does not have, and what to do instead."""


_OPTION_HABITS = {
    "--namespace": "--ns",
    "-r": "--repository",
    "-v": "--log-level debug",
    "--verbose": "--log-level debug",
    "-q": "--log-level error",
    "--quiet": "--log-level error",
    "--key": "--keyfile",
    "find -n": "--name",
    "find -i": "--iname",
    "find -t": "--type",
    "find -s": "--size",
    "find -r": "--regex",
    "find --path": "--regex",
    "find --mtime": "--newer, or --older",
    "find -m": "--newer, or --older",
    "export -f": "--force",
    "umount -f": "--lazy",
    "export --include": "--pattern",
}
"""Options of other programs, some after the one command, and those of pbsfs that do the same."""


class _LazyGroup(click.Group):
    """Imports the module of a command only to run it or to show its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        gc.disable()  # as in `__main__`
        try:
            command: click.Command = importlib.import_module(f"pbsfs.cli.{cmd_name}").command
        finally:
            gc.freeze()  # what was imported stays: no later look for garbage goes through it
            gc.enable()
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and name not in _COMMANDS:
            close = difflib.get_close_matches(name, _COMMANDS, n=1)
            meant = _HABITS.get(name) or (f"pbsfs {close[0]}" if close else "")
            advice = f"did you mean: {meant}" if meant else "pbsfs --help lists the commands"
            advice = _NOT_HERE.get(name, advice)
            raise click.UsageError(f"there is no command '{name}'; {advice}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # before click turns it into exit status 1
            raise click.exceptions.Exit(_reader_left()) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", message="pbsfs %(version)s")
def cli() -> None:
    """Show and read the backups in a Proxmox Backup Server datastore, read-only.

    \b
    Examples:
      PBS_REPOSITORY=reader@pbs@pbs.example.com:store1 pbsfs mount /mnt/pbs
      pbsfs mount --datastore-dir /mnt/datastore/store1 /mnt/pbs
      pbsfs ls --datastore-dir /mnt/datastore/store1 vm/100/latest
      pbsfs export --datastore-dir /mnt/datastore/store1 \\
          vm/100/latest/drive-scsi0.img disk.img
    """


def main(command: click.Command = cli) -> NoReturn:
    """Runs the command line, and ends the process with an exit status.

    `command`: that of another program than `pbsfs`.
    """
    process.use_one_arena()
    process.keep_memory_private()
    environment = take_secrets(os.environ)
    for variable in (NOTIFY_SOCKET, "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(variable, None)  # they are for this process, not for those that it starts
    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, _terminated)
    _take_standard_streams()
    try:
        name = "pbsfs" if command is cli else command.name
        status = command.main(prog_name=name, standalone_mode=False, obj=environment)
        if sys.stdout is not None:
            sys.stdout.flush()  # reports output that could not be written
    except click.exceptions.Exit as error:
        status = error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        status = error.exit_code
    except click.ClickException as error:
        usage = error.ctx.get_usage() if isinstance(error, click.UsageError) and error.ctx else ""
        message = _message(error)
        if usage and not message.endswith((".", "?")):
            message += "."
        text = " ".join(f"{message} {usage}".split())
        status = error.exit_code
        _tell(text, status)
    except (click.Abort, KeyboardInterrupt):
        status = INTERRUPTED_EXIT_STATUS
    except BrokenPipeError:
        status = _reader_left()
    except PbsfsError as error:
        status = exit_status_of(error)
        _tell(with_action(error), status)
    except BlockingIOError as error:  # of fork(2)
        status = SourceError.exit_status
        _tell(f"can't start a process: {error.strerror}; {ALLOW_TASKS}", status)
    except OSError as error:  # an unexpected one: no memory, no descriptors
        log.debug("failed", exc_info=True)
        what = f"{error.filename}: " if error.filename is not None else ""
        status = exit_status_of(error)
        _tell(f"{what}{error.strerror or error}; --log-level debug shows where", status)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is done: no traceback while the interpreter ends
    gc.freeze()  # otherwise the interpreter looks through all objects as it ends: a sixth of a short command
    sys.exit(status if isinstance(status, int) else 0)


def _message(error: click.ClickException) -> str:
    if not isinstance(error, click.NoSuchOption) or error.ctx is None:
        return error.format_message()
    option = error.option_name
    if error.ctx.command is cli:
        return f"No such option '{option}' before the command; write options after it."
    if error.ctx.info_name == "diff" and option in ("-r", "-R", "--recursive"):
        return f"No such option '{option}'; leave it out: diff always compares all that is below both paths."
    for habit in (f"{error.ctx.info_name} {option}", option):
        if meant := _OPTION_HABITS.get(habit):
            return f"No such option '{option}'; did you mean: {meant}?"
    return error.format_message()


def _tell(text: str, status: int) -> None:
    """Prints the line about a failure, or logs it if standard error gets JSON."""
    if not log_failure(text, status):
        click.echo(f"pbsfs: {escaped(text)}", err=True)


class _Output(io.FileIO):
    """Standard output, below its buffer and its text: a failed write raises OutputError.

    So no other OSError is reported as a failure of standard output.
    """

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            while (written := super().write(data)) is None:  # full, and another program has it not wait
                select.select((), (self,), ())
            return written
        except BrokenPipeError:
            raise
        except OSError as error:
            _drop_output()
            raise OutputError(f"cannot write standard output: {error.strerror}") from None


def _take_standard_streams() -> None:
    """Makes standard output and standard error accept any text, also if they are closed."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:  # closed: a file opened later must not get this number
            os.open(os.devnull, os.O_RDWR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        encoding, at_once = sys.stdout.encoding, sys.stdout.isatty()
        output = io.BufferedWriter(_Output(sys.stdout.detach().fileno(), "w", closefd=False))
        # Characters that the locale lacks are replaced.
        sys.stdout = io.TextIOWrapper(output, encoding=encoding, errors="replace", line_buffering=at_once)
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")


def _reader_left() -> int:
    """The exit status if the reader of standard output closed it, which is not an error."""
    _drop_output()
    return 128 + signal.SIGPIPE


def _drop_output() -> None:
    """Discards what is not yet written, so that the flush at the end does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _terminated(number: int, _frame: object) -> NoReturn:
    # As an exception, so that partial files and child processes are removed.
    sys.exit(128 + number)
