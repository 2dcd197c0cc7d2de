"""`pbsfs mount`: starts a mount, by default in the background.

A mount in the background is a new process (not a fork, as it has threads). It reports one line over a pipe:
`0` when the mount answers, or the exit status and the reason of a failure. So `pbsfs mount` reports every
failure.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pbsfs.access.config import configure, source_of
from pbsfs.access.description import Description, DirectoryAccess
from pbsfs.access.options import SOURCE_ATTRIBUTE, SourceOptions, resolve, shown_source
from pbsfs.access.resolve import describe
from pbsfs.access.sizes import parse_cache_size
from pbsfs.base.errors import INTERRUPTED_EXIT_STATUS, MountError, PbsfsError, UsageError, exit_status_of
from pbsfs.base.names import Namespace
from pbsfs.cli.options import (
    SECONDS,
    FilePath,
    damage_option,
    environment,
    find_terminal,
    logging_options,
    source_options,
)
from pbsfs.fuse.mountpoint import check_usable, is_automount
from pbsfs.fuse.options import FuseOptions
from pbsfs.reader.damage import ZeroedRanges
from pbsfs.runtime.logs import LogOptions, set_up_logging
from pbsfs.runtime.process import signals_held_back
from pbsfs.runtime.service import NOTIFY_SOCKET, ServiceManager

if TYPE_CHECKING:
    from pbsfs.tasks.metrics import MetricsAddress

DEFAULT_CACHE_SIZE = "256M"
DEFAULT_REFRESH = 5.0
"""Seconds."""


@click.command("mount")
@click.argument("places", nargs=-1, required=True, metavar="[SOURCE] MOUNTPOINT")
@source_options
@click.option(
    "-o",
    "fuse_options",
    metavar="OPTIONS",
    multiple=True,
    help="Set mount options, as in mount(8): allow_other, uid=N, gid=N, umask=OCTAL, nonempty, …",
)
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground; Ctrl-C unmounts.")
@click.option(
    "--cache-size",
    metavar="SIZE",
    help="Keep decoded chunks in this much memory (default: 256M).",
)
@click.option(
    "--refresh",
    metavar="SECONDS",
    type=SECONDS,
    help="Show new backups within this time (default: 5).",
)
@click.option(
    "--subtree",
    metavar="PATH",
    default="",
    help="Show only this directory of the tree, such as files/host/web1 (default: all).",
)
@damage_option
@click.option(
    "--metrics",
    metavar="PATH|127.0.0.1:PORT",
    help="Serve what the mount did as OpenMetrics on this Unix socket or loopback port (default: nowhere).",
)
@click.option("--ready-fd", type=int, hidden=True)
@click.option("--source-fd", type=int, hidden=True)
@logging_options
def command(
    places: tuple[str, ...],
    source: SourceOptions,
    fuse_options: tuple[str, ...],
    foreground: bool,
    cache_size: str | None,
    refresh: float | None,
    subtree: str,
    on_damage: ZeroedRanges | None,
    metrics: str | None,
    ready_fd: int | None,
    source_fd: int | None,
    log: LogOptions,
) -> None:
    """Show the backups as files at MOUNTPOINT, an empty directory, read-only.

    SOURCE is a profile of the configuration (NAME:), a repository or the directory of a datastore; options
    may name it instead. A path after it is as with --subtree: NAME:PATH, REPOSITORY/PATH, /DIR:PATH.

    Files have mode 0440 and belong to the user who mounts; uid=, gid=, umask= and allow_other grant
    access to others.

    \b
    Examples:
      pbsfs mount home: /mnt/pbs
      pbsfs mount --repository reader@pbs@pbs.example.com:store1 /mnt/pbs
      pbsfs mount --datastore-dir /srv/store1 /mnt/pbs
      pbsfs mount --ns prod -o allow_other,gid=100 home: /mnt/pbs
      pbsfs mount --datastore-dir /srv/store1 --subtree files/host/web1 /mnt/web1
      pbsfs umount /mnt/pbs
    """
    source, below, mountpoint = _split(source, places)
    if below and subtree:
        raise UsageError(f"--subtree {subtree}: {places[0]} names a path too; leave one of them out")
    subtree = below or subtree
    description = None if source_fd is None else Description.taken_over(source_fd)
    variables, profile = environment(), None
    if description is None:
        configured = configure(source, environment())
        source, variables, profile = configured.options, configured.environment, configured.profile
    if profile is not None:
        fuse_options = (*profile.mount_options, *fuse_options)
        cache_size = profile.cache_size if cache_size is None else cache_size
        refresh = profile.refresh if refresh is None else refresh
        log = log if log.format is not None else replace(log, format=profile.log_format)
    cache_size = DEFAULT_CACHE_SIZE if cache_size is None else cache_size
    refresh = DEFAULT_REFRESH if refresh is None else refresh
    options = FuseOptions.parse(fuse_options)
    parse_cache_size(cache_size)
    metrics_address = None if metrics is None else _metrics_address(metrics)
    if description is None:
        source = resolve(source, variables)
        Namespace.parse(source.namespace or "")
        datastore = source.datastore_dir
    else:
        access = description.access
        datastore = access.path if isinstance(access, DirectoryAccess) else None
    place = check_usable(mountpoint, datastore=_existing(datastore), nonempty=options.nonempty)
    if not foreground and description is None:
        set_up_logging(log)  # reports a log file that can't be written
        arguments = ["--cache-size", cache_size, "--refresh", str(refresh)]
        arguments += ["--log-level", log.level, "--on-damage", "fail" if on_damage is None else "zero"]
        arguments += [f"--subtree={subtree}"]
        arguments += [f"--metrics={metrics_address}"] if metrics_address is not None else []
        arguments += [f"--log-file={os.path.abspath(log.file)}"] if log.file is not None else []
        arguments += [f"--log-format={log.format}"] if log.format is not None else []
        arguments += [f"-o{text}" for text in fuse_options if text]
        described = describe(source, variables, find_terminal(), ask_for_default=True)
        _start_in_background(arguments, described, place)
        return
    set_up_logging(log, background=ready_fd is not None)
    service = ServiceManager(environment().get(NOTIFY_SOCKET) if ready_fd is None else None)
    report = _Report(ready_fd, service, place)
    try:
        if description is None:
            description = describe(source, variables, find_terminal(), ask_for_default=True)
        size = parse_cache_size(cache_size)
        _serve(description, place, options, size, refresh, subtree, on_damage, metrics_address, report)
    except PbsfsError as error:
        if ready_fd is None:
            raise
        report.failed(error)  # the waiting process prints it
        sys.exit(exit_status_of(error))
    except KeyboardInterrupt:
        if ready_fd is None:
            raise
        sys.exit(INTERRUPTED_EXIT_STATUS)  # without the empty line, which the waiting process prints


def _split(source: SourceOptions, places: tuple[str, ...]) -> tuple[SourceOptions, str, Path]:
    """Of `[SOURCE] MOUNTPOINT`: the source, the path below it, and the mount point."""
    if len(places) > 2:
        raise UsageError(f"{places[2]}: one argument too many; give SOURCE and MOUNTPOINT")
    mountpoint = FilePath().convert(places[-1], None, None)
    if len(places) == 1:
        return source, "", mountpoint
    if source.names_source():
        raise UsageError(f"{places[0]}: an option names the source too; leave one of them out")
    named, path = source_of(places[0], environment())
    source = replace(
        source, profile=named.profile, repository=named.repository, datastore_dir=named.datastore_dir
    )
    return source, path, mountpoint


def _metrics_address(text: str) -> MetricsAddress:
    from pbsfs.tasks.metrics import MetricsAddress  # noqa: PLC0415 - slow to import, and seldom needed

    return MetricsAddress.parse(text)


def _existing(path: Path | None) -> Path | None:
    """`path` if it is a directory: only then can it overlap the mount point."""
    return path if path is not None and os.path.isdir(path) else None


def _serve(
    description: Description,
    place: Path,
    options: FuseOptions,
    cache_size: int,
    refresh: float,
    subtree: str,
    zeroed: ZeroedRanges | None,
    metrics: MetricsAddress | None,
    report: _Report,
) -> None:
    # Slow to import, and the waiting process does not need them.
    import trio  # noqa: PLC0415

    from pbsfs.fuse.attributes import Ownership  # noqa: PLC0415
    from pbsfs.fuse.mount import MountOptions, serve  # noqa: PLC0415

    mount_options = MountOptions(
        mountpoint=place,
        ownership=Ownership(options.uid, options.gid, options.umask, options.as_stored),
        flags=frozenset(options.flags),
        files=options.files,
        safe_names=options.safe_names,
        refresh=refresh,
        cache_size=cache_size,
        namespace=description.namespace,
        keys=description.keys,
        zeroed=zeroed,
        attributes=lambda root: {SOURCE_ATTRIBUTE: shown_source(description, root)},
        subtree=subtree,
        fsname=options.fsname,
        metrics=metrics,
    )

    trio.run(serve, description.open(), mount_options, report.ready, report.stopping)


class _Report:
    """Reports to the service manager or the waiting process, if there is one."""

    def __init__(self, fd: int | None, service: ServiceManager, place: Path) -> None:
        self._fd = fd
        self._service = service
        self._place = place

    def ready(self, source: str) -> None:
        """The mount of `source` answers.

        A process in the background detaches from the terminal, the caller's pipes and its directory. That of
        an automount leaves the caller's process group only now: outside of it, the kernel lets it wait.
        """
        self._service.ready(f"{source} is mounted at {self._place}")
        if self._fd is None:
            return
        if os.getsid(0) != os.getpid():
            os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        self._send("0")

    def stopping(self) -> None:
        """The mount ends."""
        self._service.stopping()

    def failed(self, error: PbsfsError) -> None:
        self._send(f"{exit_status_of(error)} {error}")

    def _send(self, line: str) -> None:
        if self._fd is not None:
            os.write(self._fd, line.encode(errors="replace"))
            os.close(self._fd)
            self._fd = None


class _BackgroundError(PbsfsError):
    """What the process in the background reported, with the exit status that it gave."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.exit_status = status  # type: ignore[misc]  # the status of the other process's error


def _end(child: subprocess.Popen[bytes]) -> None:
    """Stopped while it waits for the mount: nothing stays mounted or running."""
    child.send_signal(signal.SIGTERM)
    child.wait()


def _start_in_background(arguments: list[str], description: Description, place: Path) -> None:
    reading, writing = os.pipe()
    # -P: does not import modules from the current directory, which anybody may have written.
    command_line = [sys.executable, "-P", "-m", "pbsfs", "mount", "--foreground", f"--ready-fd={writing}"]
    with open(reading, "rb") as pipe, ExitStack() as stack:
        with description.handed_over() as described, signals_held_back():
            command_line += [f"--source-fd={described}", *arguments]
            child = subprocess.Popen(
                [*command_line, "--", str(place)],
                stdin=subprocess.DEVNULL,
                pass_fds=[writing, described],
                start_new_session=not is_automount(place),
            )
            stack.push(lambda kind, *_error: None if kind is None else _end(child))
        os.close(writing)
        status, _space, text = pipe.read().decode(errors="replace").partition(" ")
        if status == "0":
            # The mount is complete: a signal no longer stops it.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            child.returncode = 0  # the process keeps running, so there is nothing to wait for
            return
    code = child.wait()
    if not status:
        raise MountError(
            f"{place}: the process of the mount ended with status {code}; "
            "run it with --foreground --log-level debug"
        )
    raise _BackgroundError(text, int(status))
