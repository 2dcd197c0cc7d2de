"""What nbd_bridge.py calls: one server for the life of an nbdkit process, and an export for each connection.

nbdkit calls from threads of its own. They take chunks from the cache themselves, and wait for the loop's
thread for everything else.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager

import trio

from pbsfs.base.errors import PbsfsError, errno_of, with_action
from pbsfs.nbd.connections import Connections
from pbsfs.nbd.exports import Exports
from pbsfs.nbd.limits import Limits
from pbsfs.nbd.loop import LoopThread
from pbsfs.nbd.naming import choose
from pbsfs.nbd.parameters import Settings
from pbsfs.nbd.watching import Wake, own_socket
from pbsfs.reader.handle import Handle
from pbsfs.reader.image import Extent
from pbsfs.reader.reader import open_reader
from pbsfs.runtime import process
from pbsfs.runtime.stats import COUNTS
from pbsfs.tasks.metrics import listening, serve_metrics
from pbsfs.tasks.numbers import Numbers
from pbsfs.tree import Tree
from pbsfs.tree.expected import expected_at

log = logging.getLogger(__name__)

STEP = 8 << 20
"""Bytes of a read that are gathered at once: two chunks. A request may have 64 MiB, and sixteen of them may
be under way."""

SMALL_BUFFER = 256 << 10
"""Bytes up to which the buffer of one of nbdkit's threads does not count. Each keeps the largest that it
ever needed: nbdcopy's four connections can make them 256 MiB."""

LARGEST_BLOCK = 32 << 20
"""Bytes: the largest request that clients may assume a server accepts (the NBD protocol)."""

DEFAULT_BLOCK = 4 << 20
"""Bytes: the preferred size if the chunks of an archive have no fixed size."""


def nbd_errno(error: BaseException) -> int:
    """The errno for a request that failed with `error`.

    NBD has few numbers, and any other arrives as EINVAL, which blames the client.
    """
    number = errno_of(error)
    if number == errno.EACCES:
        return errno.EPERM
    return number if number in (errno.EPERM, errno.ESHUTDOWN, errno.EINVAL) else errno.EIO


class Server:
    """All exports of one nbdkit process."""

    def __init__(
        self,
        settings: Settings,
        wanted: Callable[[], bool] = lambda: True,
        end: Callable[[], object] = lambda: None,
        limits: Limits | None = None,
    ) -> None:
        """`wanted`: asked in a thread that waits: whether its client still waits. `end`: called last in the
        loop's thread when serving failed: no request can succeed any more.
        """
        self._settings = settings
        self._path = settings.path
        self._end = end
        self._limits = limits or Limits()
        self._connections = Connections(settings.nbd_connections)
        self._exports: Exports  # from `start` on
        self.loop = LoopThread(wanted, self._limits.patience)

    def check_path(self) -> None:
        """Checks in a child process that the path can be exported. Raises PbsfsError.

        A fork copies only the calling thread, and locks that others hold stay locked in the copy. So the
        threads that a check needs live in the child. Call before there are threads.
        """
        if self._settings.ready_fd is not None:
            return  # `pbsfs nbd` has checked
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            report: dict[str, str]
            try:
                os.close(reading)
                report = {"path": trio.run(self._check)}
            except PbsfsError as error:
                report = {"error": with_action(error)}
            except BaseException as error:
                log.exception("checking failed in a way that was not foreseen")
                report = {"error": f"{type(error).__name__}: {error}"}
            finally:
                with open(writing, "w", encoding="utf-8") as pipe:
                    json.dump(report, pipe)
                os._exit(0)
        os.close(writing)
        with open(reading, encoding="utf-8") as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        report = json.loads(text) if text else {"error": "the process that checks the path died; try again"}
        if "error" in report:
            raise _CheckError(report["error"])
        # 'latest' is resolved once: all connections of one client must see the same image.
        self._path = report["path"]

    async def _check(self) -> str:
        settings = self._settings
        source = settings.source.open()
        async with open_reader(source, keys=settings.source.keys, cache_size=settings.cache_size) as reader:
            tree = Tree(reader, settings.source.namespace)
            node = await choose(tree, settings.path, missing=settings.missing, filters=settings.filters)
            return os.fsdecode(node.path)

    def start(self, wake: Wake | None = None) -> None:
        """Starts serving. Call after nbdkit's fork. `wake`: SIGUSR1, if it is for this server.

        Raises PbsfsError.
        """
        process.keep_memory_private()
        self.loop.start(self._serving(wake), self._ended)
        if self._settings.ready_fd is not None:
            os.write(self._settings.ready_fd, b"1")
            os.close(self._settings.ready_fd)

    @asynccontextmanager
    async def _serving(self, wake: Wake | None) -> AsyncIterator[None]:
        settings = self._settings
        source = settings.source.open()
        source.expect(expected_at(self._path, settings.source.namespace, reads=True))
        with ExitStack() as stack:
            sockets = [stack.enter_context(own_socket())]
            if settings.metrics is not None:
                sockets.append(stack.enter_context(listening(settings.metrics)))
            reader = open_reader(
                source, keys=settings.source.keys, cache_size=settings.cache_size, zeroed=settings.zeroed
            )
            async with reader as opened:
                tree = Tree(opened, settings.source.namespace, refresh=self._limits.refresh)
                self._exports = Exports(tree, self._path, self._limits)
                more = {"connections": self._connections.count, "open_exports": self._exports.__len__}
                numbers = Numbers(opened, more)
                async with trio.open_nursery() as nursery:
                    for sock in sockets:
                        if sock is not None:
                            nursery.start_soon(serve_metrics, numbers, sock)
                    if wake is not None:
                        nursery.start_soon(wake.log_numbers, numbers, str(source))
                    yield
                    nursery.cancel_scope.cancel()

    def _ended(self, failed: bool) -> None:
        if self._settings.zeroed is not None:
            self._settings.zeroed.log_all()
        if failed:
            self._end()

    def stop(self) -> None:
        """Ends all that was started; reads that still wait fail."""
        self.loop.stop()

    def admit(self) -> None:
        """Counts the connection of the calling thread. Raises UnavailableError if there are too many."""
        self._connections.admit()

    def list(self) -> list[tuple[str, str]]:
        """Names and descriptions of the exports. Raises PbsfsError."""
        return self.loop.call(self._exports.list)

    def default(self) -> str:
        """The name of the export for clients that name none; empty if there is no such export."""
        return self.loop.call(self._exports.default)

    def open(self, name: str) -> Export:
        """The export `name`, for one connection. Raises PbsfsError."""
        handle, description = self.loop.call(
            lambda: self._exports.open(name),
            # nbdkit does not call `close` for a client that has gone meanwhile.
            unwanted=lambda opened: self._exports.close(name, opened[0]),
        )
        return Export(self, name, handle, description, self._limits.extents)

    def close(self, export: Export) -> None:
        self.loop.post(lambda: self._exports.close(export.name, export.handle))


class _CheckError(PbsfsError):
    """The error of the checking process: its text only."""


class Export:
    """An image as one connection sees it. Any thread of nbdkit may call the methods."""

    def __init__(
        self, server: Server, name: str, handle: Handle, description: str, most_extents: int
    ) -> None:
        """`most_extents`: in one answer of `extents`."""
        self._server = server
        # Bytes that each thread of the connection holds until its end, if many. The cache gives way to them:
        # what they hold was read from it.
        self._buffers: dict[int, int] = {}
        self._memory = handle.image.store.memory
        self._most_extents = most_extents
        self.name = name
        self.handle = handle
        self.description = description
        self.size = handle.image.size

    @property
    def block_sizes(self) -> tuple[int, int, int]:
        """The least, the preferred and the largest request, in bytes; powers of two."""
        return 1, self.handle.image.index.chunk_size or DEFAULT_BLOCK, LARGEST_BLOCK

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` from `offset` on. Raises PbsfsError; `buffer` is undefined then."""
        size = len(buffer)
        if size > SMALL_BUFFER and size > self._buffers.get(threading.get_ident(), 0):
            grown = size - self._buffers.get(threading.get_ident(), 0)
            self._buffers[threading.get_ident()] = size
            self._memory.lend(grown)
        loop = self._server.loop
        try:
            if size <= STEP:
                self.handle.read_into(buffer, offset, loop)
            else:
                for start in range(0, size, STEP):
                    self.handle.read_into(buffer[start : start + STEP], offset + start, loop)
        except PbsfsError as error:
            COUNTS.failed(error)
            raise
        COUNTS.reads += 1
        COUNTS.bytes_served += size

    def fetch_ahead(self, offset: int, size: int) -> None:
        """Has chunks fetched into the cache, as far as there is space; returns at once."""

        def start() -> None:
            image = self.handle.image
            for number in image.data_chunks(offset, min(size, image.store.window_limit)):
                behind = image.index.span(number)[0] >= offset + size  # holes don't count
                if behind or not image.prefetch(number):
                    break

        self._server.loop.post(start)

    def extents(self, offset: int, size: int, *, only_one: bool) -> list[Extent]:
        """Holes and data from `offset` on: at most `Limits.extents`, so perhaps not up to the end."""
        found: list[Extent] = []
        for extent in self.handle.image.extents(offset, size):
            found.append(extent)
            if only_one or len(found) == self._most_extents:
                break
        return found

    def close(self) -> None:
        """Ends the connection's part. Call when none of its reads is under way."""
        self._memory.lend(-sum(self._buffers.values()))
        self._server.close(self)
