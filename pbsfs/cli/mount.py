"""`pbsfs mount`: starts a mount, by default in the background (`mount_background`)."""

from __future__ import annotations

import os
import pwd
import sys
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
from pbsfs.cli.mount_background import Report, start_in_background
from pbsfs.cli.options import damage_option, logging_options, source_options
from pbsfs.cli.parameters import SECONDS
from pbsfs.cli.running import environment, find_terminal
from pbsfs.fuse.attaching import CONNECTION, attach
from pbsfs.fuse.mountpoint import check_usable, unmount
from pbsfs.fuse.mountpoint import resolve as place_of
from pbsfs.fuse.options import FuseOptions
from pbsfs.reader.damage import ZeroedRanges
from pbsfs.runtime.logs import LogOptions, set_up_logging
from pbsfs.runtime.service import NOTIFY_SOCKET, ServiceManager, inherited

if TYPE_CHECKING:
    from pbsfs.tasks.metrics import MetricsAddress

DEFAULT_CACHE_SIZE = "256M"


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
@click.option("--attach-for", metavar="USER", hidden=True)
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
    attach_for: str | None,
    ready_fd: int | None,
    source_fd: int | None,
    log: LogOptions,
) -> None:
    """Show the backups as files at MOUNTPOINT, an empty directory, read-only.

    SOURCE is a profile of the configuration (NAME:), a repository, the directory of a datastore or a bucket
    (s3://BUCKET/DATASTORE); options may name it instead. A path after it is as with --subtree: NAME:PATH,
    REPOSITORY/PATH, /DIR:PATH, s3://BUCKET/DATASTORE:PATH.

    Files have mode 0440 and belong to the user who mounts; uid=, gid=, umask= and allow_other grant
    access to others.

    \b
    Examples:
      pbsfs mount home: /mnt/pbs
      pbsfs mount --repository reader@pbs@pbs.example.com:store1 /mnt/pbs
      pbsfs mount --datastore-dir /srv/store1 /mnt/pbs
      pbsfs mount --ns prod -o allow_other,gid=100 home: /mnt/pbs
      pbsfs mount --subtree files/host/web1 home: /mnt/web1
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
    service = ServiceManager(environment().get(NOTIFY_SOCKET) if ready_fd is None else None)
    connection = inherited(environment(), CONNECTION)
    if connection is not None:
        place = place_of(mountpoint)  # without access: it answers no sooner than this process does
        service.drop(CONNECTION)  # the mount ends with this process
    else:
        place = check_usable(mountpoint, datastore=_existing(datastore), nonempty=options.nonempty)
    if attach_for is not None:
        _attach(place, options, places[0], attach_for, service)
        return
    if not foreground and description is None:
        set_up_logging(log)  # reports a log file that can't be written
        arguments = ["--cache-size", cache_size]
        arguments += [f"--refresh={refresh}"] if refresh is not None else []
        arguments += ["--log-level", log.level, "--on-damage", "fail" if on_damage is None else "zero"]
        arguments += [f"--subtree={subtree}"]
        arguments += [f"--metrics={metrics_address}"] if metrics_address is not None else []
        arguments += [f"--log-file={os.path.abspath(log.file)}"] if log.file is not None else []
        arguments += [f"--log-format={log.format}"] if log.format is not None else []
        arguments += [f"-o{text}" for text in fuse_options if text]
        described = describe(source, variables, find_terminal(), ask_for_default=True)
        start_in_background(arguments, described, place)
        return
    set_up_logging(log, background=ready_fd is not None)
    report = Report(ready_fd, service, place)
    try:
        if description is None:
            description = describe(source, variables, find_terminal(), ask_for_default=True)
        size = parse_cache_size(cache_size)
        _serve(
            description,
            place,
            connection,
            options,
            size,
            refresh,
            subtree,
            on_damage,
            metrics_address,
            report,
        )
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
    if not places[-1]:
        raise click.BadParameter("the path is empty.")
    mountpoint = Path(places[-1])  # not click's: that asks the mount
    if len(places) == 1:
        return source, "", mountpoint
    named, path = source_of(places[0], environment())
    if source.names_source():
        raise UsageError(f"{places[0]}: an option names the source too; leave one of them out")
    source = replace(
        source,
        profile=named.profile,
        repository=named.repository,
        datastore_dir=named.datastore_dir,
        bucket=named.bucket,
    )
    return source, path, mountpoint


def _metrics_address(text: str) -> MetricsAddress:
    from pbsfs.tasks.metrics import MetricsAddress  # noqa: PLC0415 - slow to import, and seldom needed

    return MetricsAddress.parse(text)


def _existing(path: Path | None) -> Path | None:
    """`path` if it is a directory: only then can it overlap the mount point."""
    return path if path is not None and os.path.isdir(path) else None


def _attach(place: Path, options: FuseOptions, name: str, user: str, service: ServiceManager) -> None:
    """Mounts at `place` for a process of `user` that the service manager starts next."""
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        raise UsageError(f"--attach-for {user}: there is no such user; name that of the service") from None
    name = options.fsname or name
    connection = attach(place, name, options.flags, uid=account.pw_uid, gid=account.pw_gid)
    try:
        service.keep(connection, CONNECTION)
    except MountError:
        unmount(place, lazy=True)
        raise


def _serve(
    description: Description,
    place: Path,
    connection: int | None,
    options: FuseOptions,
    cache_size: int,
    refresh: float | None,
    subtree: str,
    zeroed: ZeroedRanges | None,
    metrics: MetricsAddress | None,
    report: Report,
) -> None:
    # Slow to import, and the waiting process does not need them.
    import trio  # noqa: PLC0415

    from pbsfs.fuse.attributes import Ownership  # noqa: PLC0415
    from pbsfs.fuse.mount import MountOptions, serve  # noqa: PLC0415
    from pbsfs.tree import DEFAULT_REFRESH  # noqa: PLC0415

    mount_options = MountOptions(
        mountpoint=place,
        ownership=Ownership(options.uid, options.gid, options.umask, options.as_stored),
        flags=frozenset(options.flags),
        files=options.files,
        safe_names=options.safe_names,
        refresh=DEFAULT_REFRESH if refresh is None else refresh,
        cache_size=cache_size,
        namespace=description.namespace,
        keys=description.keys,
        zeroed=zeroed,
        attributes=lambda root: {SOURCE_ATTRIBUTE: shown_source(description, root)},
        subtree=subtree,
        fsname=options.fsname,
        metrics=metrics,
        connection=connection,
    )

    trio.run(serve, description.open(), mount_options, report.ready, report.stopping)
