"""The images that nbdkit exports: one server of them for the life of a nbdkit process.

nbdkit calls from threads of its own, one for each request that is under way. What is at hand they
take from the cache themselves; for all else they wait for the one thread that runs the trio loop. That
thread starts after nbdkit's fork into the background: before it there may be no threads.
"""

from __future__ import annotations

import builtins
import concurrent.futures
import contextlib
import errno
import json
import logging
import math
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from pbsfs.base.errors import NotFoundError, PbsfsError, SourceError, errno_of
from pbsfs.base.text import first_of, printable
from pbsfs.nbd.naming import choose, description_of, image_in, images_below, what_there_is
from pbsfs.nbd.parameters import Settings
from pbsfs.reader.image import Extent, Handle, Image
from pbsfs.reader.reader import open_reader
from pbsfs.runtime import process
from pbsfs.runtime.memory import Charge, Memory
from pbsfs.sources.retry import SharedTry
from pbsfs.tree import DEFAULT_REFRESH, LATEST, ImageFile, SnapshotDirectory, Tree

log = logging.getLogger(__name__)

R = TypeVar("R")

MAX_EXPORTS = 10_000
"""Exports that are listed: nbdkit takes no more. Those that are not listed can be opened all the same."""

LIST_KEPT = DEFAULT_REFRESH
"""Seconds for which the list of exports is kept: each look at it may walk through the whole datastore."""

MAX_EXTENTS = 1024
"""Extents in one answer; a client asks again from where it ends."""

STEP = 8 << 20
"""Bytes of a read that are gathered at once: two chunks. A request may have 64 MiB, and sixteen of them may
be under way."""

PATIENCE = 0.5
"""Seconds after which a read that waits looks whether anybody still waits for it."""

SMALL_BUFFER = 256 << 10
"""Bytes up to which the buffer of one of nbdkit's threads does not count. Each keeps the largest that it
ever needed: nbdcopy's four connections can make them 256 MiB."""

LARGEST_BLOCK = 32 << 20
"""Bytes: the most that clients take for granted that a server reads at once (the NBD protocol)."""

DEFAULT_BLOCK = 4 << 20
"""Bytes: the preferred size where the chunks of an archive have no one size."""


class StoppedError(SourceError):
    """The server ends, or the client is gone: nobody waits for the answer."""

    errno = errno.ESHUTDOWN


def nbd_errno(error: BaseException) -> int:
    """The errno for a request that failed with `error`.

    NBD has few numbers, and any other arrives as EINVAL, which says that the client is at fault.
    """
    number = errno_of(error)
    if number == errno.EACCES:
        return errno.EPERM
    return number if number in (errno.EPERM, errno.ESHUTDOWN, errno.EINVAL) else errno.EIO


class Server:
    """All exports of one nbdkit process, and the loop for the threads that read (`reader.image.Loop`)."""

    patience = PATIENCE

    def __init__(
        self,
        settings: Settings,
        wanted: Callable[[], bool] = lambda: True,
        end: Callable[[], object] = lambda: None,
    ) -> None:
        """`wanted`: asked from a thread that waits in `Export.read_into`: whether its client still waits.
        `end`: called last in the loop's thread when serving failed: no request can succeed any more.
        """
        self._settings = settings
        self._path = settings.path
        self._wanted = wanted
        self._end = end
        self._exports = _Exports(settings, "")
        self._thread: threading.Thread | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._lock = threading.Lock()
        self._buffers: Charge | None = None  # for nbdkit's buffers; guarded by the lock

    def look(self) -> None:
        """Looks whether what is to be exported can be had. Raises PbsfsError, naming what there is.

        Takes place in a process of its own: threads that a check leaves behind would not live on in the
        background, and locks of theirs would stay shut for ever. Call before there are threads.
        """
        if self._settings.ready_fd is not None:
            return  # who waits for us has looked
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            report: dict[str, str]
            try:
                os.close(reading)
                report = {"path": trio.run(self._check)}
            except PbsfsError as error:
                report = {"error": str(error)}
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
        report = json.loads(text) if text else {"error": "the process that was to check it died"}
        if "error" in report:
            raise _CheckError(report["error"])
        # What 'latest' is now it stays: all connections of one client have to see the same.
        self._path = report["path"]

    async def _check(self) -> str:
        settings = self._settings
        source = settings.source.access.open()
        async with open_reader(source, keys=settings.source.keys, cache_size=settings.cache_size) as reader:
            tree = Tree(reader, settings.source.namespace)
            node = await choose(tree, settings.path, missing=settings.missing, filters=settings.filters)
            return os.fsdecode(node.path)

    def start(self) -> None:
        """Starts serving. Call after nbdkit's fork. Raises PbsfsError."""
        process.keep_memory_private()
        started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._exports = _Exports(self._settings, self._path)
        self._thread = threading.Thread(target=self._run, args=(started,), name="pbsfs", daemon=True)
        self._thread.start()
        started.result()
        if self._settings.ready_fd is not None:
            os.write(self._settings.ready_fd, b"1")
            os.close(self._settings.ready_fd)

    def stop(self) -> None:
        """Ends all that was started; reads that still wait fail."""
        if self._token is not None and self._thread is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._exports.stop)
            self._thread.join()
            self._thread = None

    def _run(self, started: concurrent.futures.Future[None]) -> None:
        async def serve() -> None:
            self._token = trio.lowlevel.current_trio_token()
            source = self._settings.source.access.open()
            async with open_reader(
                source,
                keys=self._settings.source.keys,
                cache_size=self._settings.cache_size,
                zeroed=self._settings.zeroed,
            ) as reader:
                await self._exports.serve(
                    Tree(reader, self._settings.source.namespace), lambda: started.set_result(None)
                )

        failed = False
        try:
            trio.run(serve)
        except BaseException as error:
            if started.done():
                log.exception("serving failed; nbdkit ends, start it again")
                failed = True
            else:
                started.set_exception(error)
        if self._settings.zeroed is not None:
            self._settings.zeroed.log_all()
        if failed:
            self._end()

    def list(self) -> list[tuple[str, str]]:
        """Names and descriptions of the exports. Raises PbsfsError."""
        return self.call(self._exports.list)

    def default(self) -> str:
        """The name of the export that a client gets that names none; empty where there is none such."""
        return self.call(self._exports.default)

    def open(self, name: str) -> Export:
        """The export `name`, for one connection. Raises PbsfsError."""
        handle, description = self.call(
            lambda: self._exports.open(name),
            # For a client that is gone meanwhile nbdkit closes nothing.
            unwanted=lambda opened: self._exports.close(name, opened[0]),
        )
        return Export(self, name, handle, description)

    def hold(self, memory: Memory, grown: int) -> None:
        """Charges `memory` for the buffers that nbdkit's threads hold until their connection ends."""
        with self._lock:
            if self._buffers is None:
                self._buffers = memory.charge("buffers of connections", 0)
            self._buffers.resize(self._buffers.size + grown)

    def close(self, export: Export) -> None:
        self.post(lambda: self._exports.close(export.name, export.handle))

    def post(self, call: Callable[[], object]) -> None:
        """Has `call` made in the loop, soon; does nothing where the loop has ended."""

        def guarded() -> None:  # what it raised would end the loop
            try:
                call()
            except Exception:
                if not self._exports.stopping:
                    log.exception("a request to the loop failed")

        assert self._token is not None
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(guarded)

    def check(self) -> None:
        """Raises StoppedError where nobody waits for the answer to the request of the calling thread."""
        if not self._wanted():
            raise StoppedError("nobody waits for it any more")

    def call(
        self, work: Callable[[], Awaitable[R]], unwanted: Callable[[R], object] = lambda _result: None
    ) -> R:
        """The result of the task `work`; `unwanted` gets it, in the loop, where nobody waits any more."""
        assert self._token is not None
        answer: concurrent.futures.Future[R] = concurrent.futures.Future()
        try:
            self._token.run_sync_soon(self._exports.start_soon, work, answer)
        except trio.RunFinishedError:
            raise StoppedError("the server is shutting down") from None
        while not concurrent.futures.wait([answer], self.patience).done:
            try:
                self.check()
            except StoppedError:
                answer.add_done_callback(
                    lambda done: None if done.exception() else self.post(lambda: unwanted(done.result()))
                )
                raise
        return answer.result()


class _CheckError(PbsfsError):
    """What the checking process found; the text is all that is needed."""


@dataclass(slots=True)
class _Open:
    """An export that somebody has open."""

    image: Image
    description: str
    handles: list[Handle] = field(default_factory=list)


class _Exports:
    """The part of the server that lives in the loop."""

    def __init__(self, settings: Settings, path: str) -> None:
        self._settings = settings
        self._path = path
        self._open: dict[str, _Open] = {}
        self._listing = SharedTry[builtins.list[tuple[str, str]]]()
        self._listed: builtins.list[tuple[str, str]] = []
        self._listed_until = -math.inf
        self._locked: tuple[str, ...] = ()  # the exports that were logged as not listed
        self.stopping = False

    async def serve(self, tree: Tree, ready: Callable[[], None]) -> None:
        self._tree = tree
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            ready()
            await trio.sleep_forever()

    def stop(self) -> None:
        self.stopping = True
        self._nursery.cancel_scope.cancel()

    def start_soon(self, work: Callable[[], Awaitable[R]], answer: concurrent.futures.Future[R]) -> None:
        async def run() -> None:
            try:
                result = await work()
            except trio.Cancelled:
                answer.set_exception(StoppedError("the server is shutting down"))
                raise
            except Exception as error:
                answer.set_exception(error.with_traceback(None))
            else:
                answer.set_result(result)

        try:
            self._nursery.start_soon(run)
        except RuntimeError:  # closed already
            answer.set_exception(StoppedError("the server is shutting down"))

    async def list(self) -> list[tuple[str, str]]:
        """The exports, as they are now or were some seconds ago; clients that come at once share one look."""
        return await self._listing.run(
            lambda: self._listed if trio.current_time() < self._listed_until else None, self._list
        )

    async def _list(self) -> builtins.list[tuple[str, str]]:
        self._listed = await self._find_all()
        self._listed_until = trio.current_time() + LIST_KEPT
        return self._listed

    async def _find_all(self) -> builtins.list[tuple[str, str]]:
        node = await self._tree.find(self._path)
        if isinstance(node, ImageFile):
            return [("", description_of(node))]
        # What most people look for comes first, and so is there if not all are.
        found = sorted(await images_below(node), key=lambda named: LATEST not in named[0].split("/"))
        images = self._with_key(found)
        if len(images) > MAX_EXPORTS:
            log.warning("%d of %d images are listed; all can be opened", MAX_EXPORTS, len(images))
        return [(name, description_of(image)) for name, image in images[:MAX_EXPORTS]]

    def _with_key(self, images: Sequence[tuple[str, ImageFile]]) -> Sequence[tuple[str, ImageFile]]:
        """The images without those whose key was not given.

        A client that lists asks about each export in turn, and nbdkit logs every one that does not open. So
        these are left out, and logged together: again only when they are others.
        """
        lacks_key = self._tree.reader.lacks_key
        locked = [(name, image) for name, image in images if lacks_key(image.info, image.file)]
        names = tuple(name for name, _image in locked)
        if names != self._locked:
            self._locked = names
            if names:
                keys = sorted({_short(image.info.key_fingerprint) for _name, image in locked})
                log.warning(
                    "exports that are not listed, as their keys were not given: %s, with the keys %s; "
                    "give the key files with --keyfile (keyfile= of nbdkit)",
                    first_of(names, 3),
                    first_of(keys, 3),
                )
        return [(name, image) for name, image in images if name not in set(names)] if names else images

    async def default(self) -> str:
        """The default export; no name, which opens nothing, where there is none."""
        node = await self._tree.find(self._path)
        if isinstance(node, SnapshotDirectory):
            images = await images_below(node)
            if len(images) == 1:
                return images[0][0]
        return ""

    async def open(self, name: str) -> tuple[Handle, str]:
        """A handle of its own on the export, and what it is."""
        # Connections of one client have to see the same image, also when 'latest' becomes another one.
        if name not in self._open:
            node = await self._image(name)
            self._open.setdefault(name, _Open(await node.open(), description_of(node)))
        known = self._open[name]
        handle = known.image.handle()
        known.handles.append(handle)
        return handle, known.description

    async def _image(self, name: str) -> ImageFile:
        node = await self._tree.find(self._path)
        if isinstance(node, ImageFile):
            if name not in ("", *map(os.fsdecode, (node.name, node.path)), node.file.archive.filename):
                raise NotFoundError(f"there is no export '{name}'; the one that there is has no name")
            return node
        # By its path from there, or by its whole path.
        inside = name.strip("/").removeprefix(f"{self._path}/")
        if not inside:
            raise NotFoundError(f"name an export, as in nbd://localhost/NAME; {await what_there_is(node)}")
        return await image_in(await self._tree.find(f"{self._path}/{inside}"), name)

    def close(self, name: str, handle: Handle) -> None:
        handle.close()
        known = self._open[name]
        known.handles.remove(handle)
        if not known.handles:
            del self._open[name]


class Export:
    """An image as one connection sees it. All methods may be called from any thread of nbdkit's."""

    def __init__(self, server: Server, name: str, handle: Handle, description: str) -> None:
        self._server = server
        self._buffers: dict[int, int] = {}  # bytes that each thread of the connection holds, if many
        self.name = name
        self.handle = handle
        self.description = description
        self.size = handle.image.size

    @property
    def block_sizes(self) -> tuple[int, int, int]:
        """The least, the preferred and the largest request, in bytes; powers of two."""
        return 1, self.handle.image.index.chunk_size or DEFAULT_BLOCK, LARGEST_BLOCK

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` from `offset` on. Raises PbsfsError, and then what is in it is undefined."""
        size = len(buffer)
        if size > SMALL_BUFFER and size > self._buffers.get(threading.get_ident(), 0):
            grown = size - self._buffers.get(threading.get_ident(), 0)
            self._buffers[threading.get_ident()] = size
            self._server.hold(self.handle.image.store.memory, grown)
        for start in range(0, size, STEP):
            self.handle.read_into(buffer[start : start + STEP], offset + start, self._server)

    def fetch_ahead(self, offset: int, size: int) -> None:
        """Has chunks fetched into the cache, as far as there is room; returns at once."""

        def start() -> None:
            image = self.handle.image
            for number in image.data_chunks(offset, min(size, image.store.window_limit)):
                behind = image.index.span(number)[0] >= offset + size  # holes don't count
                if behind or not image.prefetch(number):
                    break

        self._server.post(start)

    def extents(self, offset: int, size: int, *, only_one: bool) -> list[Extent]:
        """Holes and data from `offset` on: at most `MAX_EXTENTS`, so perhaps not up to the end."""
        found: list[Extent] = []
        for extent in self.handle.image.extents(offset, size):
            found.append(extent)
            if only_one or len(found) == MAX_EXTENTS:
                break
        return found

    def close(self) -> None:
        """Ends the connection's part; no read of it is under way any more."""
        self._server.hold(self.handle.image.store.memory, -sum(self._buffers.values()))
        self._server.close(self)


def _short(fingerprint: str | None) -> str:
    """A key's fingerprint as a manifest tells it: its first bytes, printable."""
    if fingerprint is None:
        return "without a name"
    return printable(fingerprint[:23])
