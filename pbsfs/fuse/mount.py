"""A mount, from start to end: set up, serve until asked to stop, clean up.

Runs in the process that serves the mount (`pbsfs mount` starts one of its own for the background).
The mount ends on SIGTERM, SIGINT and SIGHUP (unless it is ignored), on any kind of umount, and when serving
fails. Reads of open files then fail, and the mount point is free.
"""

from __future__ import annotations

import pbsfs.fuse.shim  # before pyfuse3, see there

import logging
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pyfuse3
import trio

from pbsfs.base.errors import MountError, SourceError, UsageError
from pbsfs.base.names import Namespace
from pbsfs.formats.keys import Key
from pbsfs.fuse.attributes import Ownership
from pbsfs.fuse.mountpoint import mounted_at
from pbsfs.fuse.operations import Operations
from pbsfs.fuse.session import mounted
from pbsfs.reader.damage import ZeroedRanges
from pbsfs.reader.reader import open_reader
from pbsfs.runtime.process import ending_signals
from pbsfs.runtime.recent import Recent
from pbsfs.runtime.threads import in_thread
from pbsfs.sources.base import Source
from pbsfs.tasks.metrics import MetricsAddress, listening, serve_metrics
from pbsfs.tree import Directory, Tree
from pbsfs.tree.expected import expected_at

log = logging.getLogger(__name__)
stats_log = logging.getLogger("pbsfs.stats")
stats_log.setLevel(logging.INFO)  # whatever the level of the log: a person asked for these lines

READ_AHEAD_KIB = 1024
"""The kernel's read-ahead for the mount. Its default of 128 KiB halves the throughput and more; above
the largest FUSE request (1 MiB) nothing is gained."""

ANSWER_TIMEOUT = 30.0
"""Seconds after which pbsfs gives up a mount that does not answer."""


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How to mount.

    `flags`: options for the kernel and libfuse, unchanged. `zeroed`: records damaged ranges that read as
    zeros; None where they fail instead. `attributes`: see `Operations`, by the path of the mount's root in
    the tree. `files`: see `Tree`. `safe_names`: see `Operations`. `subtree`: the place in the tree that the
    mount shows at its root. `fsname`: the source's name in the mount table; None for the name that the source
    has. `metrics`: where the numbers are served; None for nowhere. `connection`: the descriptor of a mount
    that another process has attached at `mountpoint`, and will detach; None to mount there.
    """

    mountpoint: Path
    ownership: Ownership
    flags: frozenset[str]
    refresh: float
    cache_size: int
    namespace: Namespace
    keys: Mapping[str, Key]
    zeroed: ZeroedRanges | None
    attributes: Callable[[str], Mapping[str, bytes]] = lambda _root: {}
    files: bool = True
    safe_names: bool = False
    subtree: str = ""
    fsname: str | None = None
    metrics: MetricsAddress | None = None
    connection: int | None = None


async def serve(
    source: Source, options: MountOptions, ready: Callable[[str], None], stopping: Callable[[], None]
) -> None:
    """Mounts `source` and serves it until the mount ends.

    Calls `ready` with the source's name when the mount answers, and `stopping` before it ends.

    Raises MountError if mounting fails, NotFoundError if the namespace or subtree does not exist, UsageError
    if the subtree is not a directory, SourceError if the source can't be read, and KeyboardInterrupt if a
    signal ends it before the mount answers.
    """
    failure: Exception | None = None
    stopped = answered = False

    def answers() -> None:
        nonlocal answered
        answered = True
        ready(str(source))

    # pbsfs catches signals before the mount exists, so that none of them can leave it behind.
    with trio.open_signal_receiver(*ending_signals()) as signals:
        async with trio.open_nursery() as nursery:

            async def wait_for_signal() -> None:
                nonlocal stopped
                async for number in signals:
                    log.info("%s: unmounting on %s", options.mountpoint, signal.Signals(number).name)
                    stopped = True
                    nursery.cancel_scope.cancel()

            nursery.start_soon(wait_for_signal)
            try:
                with _kept() as recent:
                    await _open_and_serve(source, options, recent, answers, stopping)
            except Exception as error:  # raised outside, so that the nursery does not wrap it in a group
                failure = error
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if stopped and not answered:
        raise KeyboardInterrupt
    if options.zeroed is not None:
        options.zeroed.log_all()


async def _open_and_serve(
    source: Source,
    options: MountOptions,
    recent: Recent,
    ready: Callable[[], None],
    stopping: Callable[[], None],
) -> None:
    if options.subtree:
        source.expect(expected_at(options.subtree, options.namespace, reads=False))
    async with open_reader(
        source, cache_size=options.cache_size, keys=options.keys, zeroed=options.zeroed
    ) as reader:
        await source.namespaces(options.namespace)  # else the mount would show errors only
        tree = Tree(reader, options.namespace, refresh=options.refresh, files=options.files)
        root = await tree.find(options.subtree)
        if not isinstance(root, Directory):
            raise UsageError(f"{root} is not a directory; mount the directory that it is in")
        attributes = options.attributes(os.fsdecode(root.path))
        operations = Operations(
            tree, options.ownership, attributes, root, safe_names=options.safe_names, recent=recent
        )
        pbsfs.fuse.shim.install(operations)
        name = options.fsname or _name(source, root)
        with (
            _listening(options.metrics) as sock,
            mounted(
                operations,
                operations.notices,
                options.mountpoint,
                options.flags,
                name,
                connection=options.connection,
            ),
        ):
            try:
                await _serve_until_stopped(operations, options.mountpoint, ready, sock)
            finally:
                stopping()


@contextmanager
def _kept() -> Iterator[Recent]:
    """Keeps the last warnings and errors that are logged meanwhile."""
    recent = Recent()
    logging.getLogger().addHandler(recent)
    try:
        yield recent
    finally:
        logging.getLogger().removeHandler(recent)


def _listening(address: MetricsAddress | None) -> AbstractContextManager[socket.socket | None]:
    return nullcontext() if address is None else listening(address)


def _name(source: Source, root: Directory) -> str:
    """The source's name in the mount table, with the place below it that is shown."""
    return f"{source}:{root}" if root.path else str(source)


async def _serve_until_stopped(
    operations: Operations, mountpoint: Path, ready: Callable[[], None], sock: socket.socket | None
) -> None:
    """`sock`: where metrics are served."""
    failure: MountError | None = None

    async def serve_requests() -> None:
        nonlocal failure
        try:
            await pyfuse3.main()
        except Exception as error:  # raised outside, so that the nursery does not wrap it in a group
            log.exception("serving %s failed", mountpoint)
            failure = MountError(f"serving {mountpoint} failed: {error}; mount it again")
        nursery.cancel_scope.cancel()

    async def wait_for_unmount() -> None:
        # pyfuse3 notices too, but waits for the pending requests, and so for storage. The
        # connection's end shows as an error, which epoll always reports; pyfuse3 waits for its input.
        with select.epoll() as ended:
            ended.register(pbsfs.fuse.shim.session_fd(), 0)
            await trio.lowlevel.wait_readable(ended.fileno())
        log.info("%s was unmounted", mountpoint)
        nursery.cancel_scope.cancel()

    async def log_stats() -> None:
        with trio.open_signal_receiver(signal.SIGUSR1) as signals:
            async for _number in signals:
                stats_log.info("%s: %s", mountpoint, operations.numbers.line())

    async def check_answers() -> None:
        nonlocal failure
        with trio.move_on_after(ANSWER_TIMEOUT):
            try:
                await in_thread(os.stat, mountpoint, abandon_on_cancel=True)
                # Only now: the kernel's handshake, which the answer comes after, resets it.
                _raise_read_ahead(mountpoint)
                ready()
                return
            except OSError as error:
                failure = MountError(
                    f"the mount on {mountpoint} does not answer: {error.strerror}; look at its log"
                )
            except SourceError as error:  # no thread
                failure = MountError(f"cannot mount on {mountpoint}: {error}")
        failure = failure or MountError(f"the mount on {mountpoint} does not answer; look at its log")
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_requests)
        nursery.start_soon(wait_for_unmount)
        nursery.start_soon(operations.zeros.run)
        nursery.start_soon(operations.forgetting.run)
        nursery.start_soon(operations.pages.run)
        nursery.start_soon(log_stats)
        if sock is not None:
            nursery.start_soon(serve_metrics, operations.numbers, sock)
        nursery.start_soon(check_answers)
        nursery.start_soon(operations.space.keep)
    if failure is not None:
        raise failure


def _raise_read_ahead(mountpoint: Path) -> None:
    mount = mounted_at(mountpoint)
    if mount is None:
        return
    setting = Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb")
    try:
        setting.write_text(str(READ_AHEAD_KIB))
    except OSError as error:  # only root may; everything works without
        log.debug("%s stays as it is: %s", setting, error.strerror)
