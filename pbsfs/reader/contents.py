"""What is in an archive, opened: its contents, and the images that their bytes come from.

Opened once for each archive that is in use. Used from tasks of one trio loop; the contents are parsed in
worker threads, since that takes time that grows with what is in them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from pbsfs.base.errors import DamageError
from pbsfs.contents.archive import Archive
from pbsfs.contents.base import Contents, Entry, Found, Piece
from pbsfs.reader.bridge import Bridge, ImageStream
from pbsfs.reader.image import Extent, Image
from pbsfs.reader.pieces import PiecesHandle
from pbsfs.reader.reader import Reader
from pbsfs.sources.base import FileInfo, SnapshotInfo

log = logging.getLogger(__name__)

R = TypeVar("R")

SMALL_FILE = 4 << 20
"""Bytes up to which the files of one archive share a reader, so that pbsfs reads ahead from one to the next:
a chunk of 4 MiB holds many of them."""


LEAST_HOLE = 64 << 10
"""Bytes of a file from which pbsfs looks for holes in it: chunks of archives have at least as many."""

KEPT_SIZES = 10_000
"""Files whose sizes without holes are kept."""

MANY_PIECES = 1000
"""Pieces of a file from which its reader is made in a worker thread."""

MOST_RUNS = 10_000
"""Holes and data that are counted of one file: more would block the loop."""


class OpenContents:
    """`contents`, and the images of its streams."""

    def __init__(self, contents: Contents, images: Sequence[Image], bridge: Bridge) -> None:
        self.contents = contents
        self.images = images
        self._bridge = bridge
        self._handles = [image.handle() for image in images]
        self._data_sizes: dict[int, int] = {}

    async def run(self, work: Callable[[], R], *, abandon: bool = False) -> R:
        """Calls `work`, which reads the contents, in a worker thread: see `Bridge.run`."""
        return await self._bridge.run(work, abandon=abandon)

    async def children(self, directory: Entry) -> Found:
        """Names and types of what `directory` holds, and the rest where that costs no more."""
        return await self.run(functools.partial(self.contents.children, directory, names_only=True))

    async def complete(self, directory: Entry, entries: Sequence[Entry]) -> list[Entry | DamageError | None]:
        """See `Contents.complete`."""
        return await self.run(functools.partial(self.contents.complete, directory, entries))

    async def learn_link_counts(self, entry: Entry) -> None:
        """Has the contents know how many names each file has."""
        await self.run(functools.partial(self.contents.link_count, entry))

    async def xattrs(self, entry: Entry) -> dict[bytes, bytes]:
        """See `Contents.xattrs`."""
        return await self.run(functools.partial(self.contents.xattrs, entry))

    async def file(self, entry: Entry) -> PiecesHandle:
        """A reader of its own for a file. Raises DamageError, KeyRequiredError, SourceError."""
        found = self.cached_file(entry)
        if found is not None:
            return found
        pieces = await self.run(functools.partial(self.contents.data, entry, unconfirmed=self._unconfirmed))
        reader = functools.partial(self._reader, entry, pieces)
        return reader() if len(pieces) <= MANY_PIECES else await self.run(reader)

    def cached_file(self, entry: Entry) -> PiecesHandle | None:
        """The same; None where the place of its bytes is not known without waiting. Call from the trio loop.

        Raises DamageError.
        """
        find = functools.partial(self.contents.data_at_once, entry, unconfirmed=self._unconfirmed)
        pieces = self._bridge.run_cached(find)
        return None if pieces is None else self._reader(entry, pieces)

    @property
    def _unconfirmed(self) -> bool:
        # Where damaged data is to read as zeros, damage of what stands before a file's bytes costs no more.
        return any(image.shows_zeros for image in self.images)

    def _reader(self, entry: Entry, pieces: Sequence[Piece]) -> PiecesHandle:
        is_small = entry.size <= SMALL_FILE
        handles = self._handles if is_small else [image.handle() for image in self.images]

        async def decode(offset: int, size: int) -> bytes:
            return await self.run(functools.partial(self.contents.read, entry, offset, size))

        handle = PiecesHandle(pieces, handles, own=not is_small, decode=decode)
        if entry.size >= LEAST_HOLE and self.contents.stored_at(entry) is None:
            self._keep_data_size(entry, _data_in(handle.extents(0, entry.size)))
        return handle

    @contextmanager
    def streams(self, *, whole: bool = True) -> Iterator[list[ImageStream]]:
        """Streams of its own for one that reads much in order. `whole`: all of the contents."""
        streams = [ImageStream(image, whole=whole) for image in self.images]
        try:
            yield streams
        finally:
            for stream in streams:
                stream.close()

    def data_size(self, entry: Entry) -> tuple[int, bool]:
        """Bytes of an exact entry that are not holes, as far as that is known without reading; and whether
        the number changes when the file is opened."""
        if entry.size < LEAST_HOLE or not entry.is_file:
            return entry.size, False
        known = self._data_sizes.get(entry.inode)
        if known is None:
            piece = self.contents.stored_at(entry)
            if piece is None or piece.stream is None:
                return entry.size, True
            known = _data_in(self.images[piece.stream].extents(piece.offset, piece.length))
            known = self._keep_data_size(entry, known)
        return known, False

    def _keep_data_size(self, entry: Entry, size: int | None) -> int:
        """`size`: None where there are too many holes to count."""
        if len(self._data_sizes) >= KEPT_SIZES:
            self._data_sizes.clear()
        known = entry.size if size is None else size  # an estimate from above
        self._data_sizes[entry.inode] = known
        return known

    def close(self) -> None:
        """Gives back what the readers of small files hold. Call from the trio loop."""
        for handle in self._handles:
            handle.close()


def _data_in(extents: Iterator[Extent]) -> int | None:
    """Bytes that are not in holes; None where there are more than MOST_RUNS runs."""
    size = 0
    for number, extent in enumerate(extents):
        if number >= MOST_RUNS:
            return None
        size += 0 if extent.hole else extent.length
    return size


async def open_archive(
    reader: Reader, info: SnapshotInfo, files: Sequence[FileInfo], catalog: FileInfo | None, max_age: float
) -> OpenContents:
    """The archive of `files`: one stream, or metadata and payload.

    `catalog`: lists the names of archives of one stream; pbsfs does without one that it cannot read.

    Raises DamageError, KeyRequiredError and SourceError.
    """
    images = [await reader.open_image(info, file, max_age) for file in files]
    hints: ImageStream | None = None
    if catalog is not None:
        try:
            hints = ImageStream(await reader.open_image(info, catalog, max_age))
        except DamageError as error:
            log.warning("%s; names are read from the archive instead", error)
    streams = [ImageStream(image) for image in images]
    name = files[0].archive.filename
    contents = await reader.bridge.run(lambda: Archive(*streams, catalog=hints, name=name))
    return OpenContents(contents, images, reader.bridge)
