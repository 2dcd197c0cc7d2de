"""What is open: images and blobs, each once however many handles are on it, within a limit of memory.

An image takes little but its digest table, a blob its content. When all of them take more than the limit, the
images that were read least recently drop their tables, which are fetched again when they are read the next
time. A blob can't do without its content: one that does not fit is refused. The counts are made
from what is alive, so there is nothing to give back. Used from tasks of one trio loop.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar, cast
from weakref import WeakValueDictionary

import trio

from pbsfs.base.errors import PbsfsError, SourceError
from pbsfs.chunks.budget import Budget
from pbsfs.formats.index import Index
from pbsfs.reader.image import Image
from pbsfs.sources.base import FileInfo

log = logging.getLogger(__name__)

R = TypeVar("R")

DEFAULT_OPEN_LIMIT = 256 << 20
"""Bytes of digest tables and blobs: images of 32 TiB in chunks of 4 MiB."""

FETCHING = 64 << 20
"""Bytes of indexes and blobs that may be fetched at once, by their usual sizes. A larger one goes alone."""


class TooMuchOpenError(SourceError):
    """A blob does not fit beside those that are open."""

    errno = errno.ENOMEM


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Blob:
    """The decoded content of a blob that is open."""

    data: bytes


@dataclass(slots=True, eq=False)
class _Work(Generic[R]):
    """Work that is under way, and how many wait for it."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)
    waiting: int = 0
    result: R | None = None
    error: PbsfsError | None = None


class OpenFiles:
    """The images and blobs of one reader that are open."""

    def __init__(self, nursery: trio.Nursery, limit: int = DEFAULT_OPEN_LIMIT) -> None:
        """`nursery`: where work lives that several wait for. `limit`: in bytes."""
        self._nursery = nursery
        self._limit = limit
        self._images: WeakValueDictionary[Hashable, Image] = WeakValueDictionary()
        self._blobs: WeakValueDictionary[Hashable, Blob] = WeakValueDictionary()
        self._under_way: dict[Hashable, _Work[Any]] = {}
        self._fetching = Budget(FETCHING)
        self._awaited: Counter[Index] = Counter()  # how many wait for the table of each
        self._told_restored = False

    async def image(self, identity: Hashable, size: int, make: Callable[[], Awaitable[Image]]) -> Image:
        """The image `identity`: the one that is open, or what `make` returns.

        `size`: bytes that its digest table usually has. Raises what `make` raises.
        """
        image = self._images.get(identity)
        if image is not None:
            return image

        async def work() -> Image:
            async with self._fetching.take(size):
                self._make_room()
                image = self._images.setdefault(identity, await make())
            self._make_room(image)  # its index may be larger than usual
            return image

        return await self._once(identity, work)

    async def restore(self, index: Index, fetch: Callable[[], Awaitable[bytes]]) -> None:
        """Has `index` take its table from what `fetch` returns. Raises what that raises, and DamageError.

        It has the table until the caller waits for something else.
        """

        async def work() -> None:
            if not self._told_restored:
                log.info(
                    "open files need more than %d bytes, so digest tables of images are fetched again "
                    "when they are read; close some to read faster",
                    self._limit,
                )
            self._told_restored = True
            async with self._fetching.take(index.table_size):
                self._make_room()
                await trio.to_thread.run_sync(index.restore_table, await fetch())

        # Those that wait for it go on some turns of the loop after it came. Were it dropped meanwhile, for
        # another image that is read, neither might ever get on.
        self._awaited[index] += 1
        try:
            await self._once(index, work)
        finally:
            self._awaited[index] -= 1
            if not self._awaited[index]:
                del self._awaited[index]

    async def blob(self, name: str, file: FileInfo, size: int, read: Callable[[], Awaitable[bytes]]) -> Blob:
        """The blob `file`, called `name`: the one that is open, or with the content that `read` returns.

        `size`: bytes that it takes, as far as that is known before. Raises TooMuchOpenError, and what
        `read` raises.
        """
        # Without a checksum the file may have changed: only its content tells whether it is the same.
        found = self._blobs.get((name, file)) if file.csum is not None else None
        if found is not None:
            return found

        async def work() -> Blob:
            async with self._fetching.take(size):
                self._make_room()
                self._refuse_beyond_limit(name, file.size)  # stored, it has hardly more bytes than decoded
                data = await read()
                content = file.csum or await trio.to_thread.run_sync(_sum, data)
                identity = (name, replace(file, csum=content))
                blob = self._blobs.get(identity)
                if blob is None:
                    self._refuse_beyond_limit(name, len(data))
                    blob = self._blobs[identity] = Blob(data)
            self._make_room()
            return blob

        return await self._once((name, file), work)

    def _refuse_beyond_limit(self, name: str, size: int) -> None:
        others = self._blob_size()
        if others and others + size > self._limit:
            raise TooMuchOpenError(
                f"{name}: its {size} bytes do not fit in memory beside the {others} bytes of configurations "
                f"and logs that are open (limit: {self._limit}); close some of them"
            )

    def _blob_size(self) -> int:
        return sum(len(blob.data) for blob in self._blobs.values())

    def _make_room(self, new: Image | None = None) -> None:
        """Drops tables, the least recently read first, until all fits the limit, with what is being fetched.

        The table of `new` stays, since it may be larger than the limit, and so does what others wait for.
        """
        loaded = [image for image in self._images.values() if image.index.has_table()]
        taken = self._blob_size() + sum(image.index.table_size for image in loaded) + self._fetching.taken
        if taken <= self._limit:
            return
        for image in sorted(loaded, key=lambda image: image.last_read):
            if taken <= self._limit:
                break
            if image is new or image.index in self._awaited:
                continue
            log.debug("%s: dropped its digest table", image)
            taken -= image.index.table_size
            image.index.drop_table()

    async def _once(self, identity: Hashable, work: Callable[[], Awaitable[R]]) -> R:
        """The result of `work`, done once for all who ask for `identity` meanwhile.

        It goes on when the one that asked first is cancelled, and ends when all are.
        """
        under_way = cast("_Work[R] | None", self._under_way.get(identity))
        if under_way is None:
            under_way = _Work()
            self._nursery.start_soon(self._do, identity, under_way, work)
            self._under_way[identity] = under_way
        under_way.waiting += 1
        try:
            await under_way.done.wait()
        finally:
            under_way.waiting -= 1
            if not under_way.waiting and not under_way.done.is_set():
                self._forget(identity, under_way)
                under_way.scope.cancel()
        if under_way.error is not None:
            # To each its own: what is raised holds on to all who wait, and so to images that are closed.
            raise copy.copy(under_way.error)
        return cast("R", under_way.result)

    async def _do(self, identity: Hashable, under_way: _Work[R], work: Callable[[], Awaitable[R]]) -> None:
        error: PbsfsError | None = SourceError("reading ends: the source is being closed")
        try:
            with under_way.scope:
                under_way.result = await work()
                error = None
        except PbsfsError as failure:
            error = failure.with_traceback(None)
        except Exception as failure:
            log.exception("%s: unexpected failure", identity)
            error = SourceError(f"{type(failure).__name__}: {failure}")
        finally:
            self._forget(identity, under_way)
            under_way.error = error
            under_way.done.set()

    def _forget(self, identity: Hashable, under_way: _Work[Any]) -> None:
        if self._under_way.get(identity) is under_way:
            del self._under_way[identity]


def _sum(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
