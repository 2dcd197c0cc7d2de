"""The images and blobs that are open: each once, however many handles use it, charged to the memory limit.

An image needs little memory besides its digest table; a blob needs its content. When the charges don't fit,
the images that were read least recently drop their tables, and fetch them again at their next read. The rest
can't be dropped, so what does not fit beside it is refused. A charge ends when its image or blob is freed, so
callers need not give anything back. Used from tasks of one trio loop.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

import trio

from pbsfs.base.errors import PbsfsError, SourceError
from pbsfs.base.names import Archive, Snapshot
from pbsfs.chunks.budget import Budget
from pbsfs.chunks.limits import DEFAULT, FetchLimits
from pbsfs.formats.index import Index
from pbsfs.reader.image import Image
from pbsfs.runtime.memory import Charge, Memory
from pbsfs.runtime.threads import in_thread
from pbsfs.sources.base import FileInfo

log = logging.getLogger(__name__)

R = TypeVar("R")

HOLDER = "open files"
"""What an error calls the bytes that are charged here."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Blob:
    """The decoded content of a blob that is open."""

    data: bytes
    charge: Charge


@dataclass(slots=True, eq=False)
class _Work(Generic[R]):
    """Work that runs, and how many tasks wait for it."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)
    waiting: int = 0
    result: R | None = None
    error: PbsfsError | None = None


class OpenFiles:
    """The images and blobs of one reader that are open."""

    def __init__(self, nursery: trio.Nursery, memory: Memory, limits: FetchLimits = DEFAULT) -> None:
        """`nursery`: runs work that several tasks wait for."""
        self._nursery = nursery
        self._memory = memory
        self._images: WeakValueDictionary[Hashable, Image] = WeakValueDictionary()
        self._blobs: WeakValueDictionary[Hashable, Blob] = WeakValueDictionary()
        self._under_way: dict[Hashable, _Work[Any]] = {}
        self._fetching = Budget(limits.file_budget)
        # The charges of each index: for its table, and for what stays when the table is dropped.
        self._tables: WeakKeyDictionary[Index, Charge] = WeakKeyDictionary()
        self._rests: WeakKeyDictionary[Index, Charge] = WeakKeyDictionary()
        self._awaited: Counter[Index] = Counter()  # how many tasks wait for the table of each
        self._reported_restored = False
        memory.reclaim_with(self._drop_tables)

    async def image(self, identity: Hashable, size: int, make: Callable[[], Awaitable[Image]]) -> Image:
        """The image `identity`: the one that is open, or the result of `make`.

        `size`: bytes that its digest table usually has. Raises MemoryLimitError, and the errors of `make`.
        """
        image = self._images.get(identity)
        if image is not None:
            return image

        async def work() -> Image:
            async with self._fetching.take(size):
                table = self._memory.charge(HOLDER, size, passing=True)
                self._memory.reclaim()
                image = await make()
                index = image.index
                with self._in_use(index):
                    table.resize(index.table_size)  # which may be larger than usual
                    self._tables[index] = table
                    what = f"{image}: the {index.rest_size} bytes of its index"
                    self._rests[index] = self._memory.admit(what, HOLDER, index.rest_size)
                return self._images.setdefault(identity, image)

        return await self._once(identity, work)

    def has(self, snapshot: Snapshot, archive: Archive) -> bool:
        """Whether an image of this snapshot and name is open, whatever its checksum."""
        return any(image.snapshot == snapshot and image.archive == archive for image in self._images.values())

    async def restore(self, index: Index, fetch: Callable[[], Awaitable[bytes]]) -> None:
        """Restores the digest table of `index` from the result of `fetch`. Raises its errors, and
        DamageError.

        The index has the table until the caller waits for something else.
        """

        async def work() -> None:
            if not self._reported_restored:
                log.info(
                    "open files need more than the %d bytes of memory that they may use, so digest tables of "
                    "images are fetched again when they are read; close some files to read faster",
                    self._memory.limit,
                )
            self._reported_restored = True
            async with self._fetching.take(index.table_size):
                table = self._memory.charge(HOLDER, index.table_size, passing=True)
                self._memory.reclaim()
                await in_thread(index.restore_table, await fetch())
                self._tables[index] = table

        # The tasks that wait continue some turns of the loop after the table was restored. If another image
        # that is read had it dropped in between, neither might ever finish its read.
        with self._in_use(index):
            await self._once(index, work)

    async def blob(self, name: str, file: FileInfo, size: int, read: Callable[[], Awaitable[bytes]]) -> Blob:
        """The blob `file`, called `name`: the one that is open, or one with the content that `read` returns.

        `size`: bytes that fetching it needs, as far as known. Raises MemoryLimitError, and the errors of
        `read`.
        """
        # Without a checksum the file may have changed: only its content shows whether it is the same.
        found = self._blobs.get((name, file)) if file.csum is not None else None
        if found is not None:
            return found

        async def work() -> Blob:
            async with self._fetching.take(size):
                # Refused before it is fetched, if possible: it has hardly fewer bytes decoded than stored.
                charge = self._admit(name, file.size)
                passing = self._memory.charge(HOLDER, max(0, size - file.size), passing=True)
                self._memory.reclaim()
                data = await read()
                content = file.csum or await in_thread(_sum, data)
                identity = (name, replace(file, csum=content))
                blob = self._blobs.get(identity)
                if blob is None:
                    passing.resize(0)
                    charge.resize(0)
                    blob = self._blobs[identity] = Blob(data, self._admit(name, len(data)))
                return blob

        return await self._once((name, file), work)

    def _admit(self, name: str, size: int) -> Charge:
        return self._memory.admit(f"{name}: its {size} bytes", HOLDER, size)

    @contextmanager
    def _in_use(self, index: Index) -> Iterator[None]:
        """Keeps `index` from dropping its table."""
        self._awaited[index] += 1
        try:
            yield
        finally:
            self._awaited[index] -= 1
            if not self._awaited[index]:
                del self._awaited[index]

    def _drop_tables(self, excess: int) -> None:
        """Drops tables of at least `excess` bytes if possible, the least recently read images first."""
        loaded = [image for image in self._images.values() if image.index in self._tables]
        for image in sorted(loaded, key=lambda image: image.last_read):
            if excess <= 0:
                return
            if image.index not in self._awaited:
                log.debug("%s: dropped its digest table", image)
                excess -= image.index.table_size
                image.index.drop_table()
                del self._tables[image.index]

    async def _once(self, identity: Hashable, work: Callable[[], Awaitable[R]]) -> R:
        """The result of `work`, which runs once for all tasks that want `identity` at the same time.

        It continues when some of these tasks are cancelled, and ends when all are.
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
            # A copy for each: a raised error refers to the frames of its task, and so to closed images.
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
