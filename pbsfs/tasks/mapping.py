"""The map of an image: which of its bytes are data, holes, changed since another snapshot, and damaged.

Holes and changes come from indexes alone. Damage takes a look at the chunks: whether their files are there,
where the source can say that at little cost, or a full check. A map has one byte for each chunk, and its
extents are made one by one, so that a map of 16 TiB takes some MB. Used by `pbsfs map`, from tasks of one
trio loop; a finished map is read from any thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import trio

from pbsfs.base.errors import DamageError, NotFoundError, PbsfsError
from pbsfs.formats.index import Index
from pbsfs.reader.bridge import digest_of
from pbsfs.reader.image import Image
from pbsfs.runtime.threads import in_thread
from pbsfs.tasks.amounts import snapshot_before
from pbsfs.tasks.changed import changed_chunks
from pbsfs.tasks.verify import Verification
from pbsfs.tree import ImageFile, SnapshotDirectory

HOLE, CHANGED, DAMAGED = 1, 2, 4
"""What a byte of `ImageMap.states` is made of. Data is what is not a hole."""

LOOK_TIME = 10.0
"""Seconds for which pbsfs looks for the files of chunks: a disk takes up to 20 ms for each."""

LOOKED_AT_ONCE = 256
"""Chunks whose files one operation looks for."""

_RUN = re.compile(rb"(.)\1*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class MapExtent:
    """A range of bytes, in one state."""

    offset: int
    length: int
    hole: bool
    changed: bool
    damaged: bool


@dataclass(slots=True)
class Cell:
    """A part of an image in a picture of it: how many of its bytes are what. `length`: all of them."""

    length: int = 0
    data: int = 0
    changed: int = 0
    damaged: int = 0


@dataclass(slots=True)
class ImageMap:
    """The map of an image with this `index`.

    `states`: a byte for each chunk. `compared`: whether it was compared with another image. `checked`:
    whether all data was read. `found`: the bytes from the beginning on whose chunks have files, but for those
    that are marked; 0 where pbsfs did not look. `unknown`: why it could not look.
    """

    index: Index
    states: bytearray
    compared: bool = False
    checked: bool = False
    found: int = 0
    unknown: str | None = None
    totals: Cell = field(default_factory=Cell)

    @property
    def size(self) -> int:
        """The bytes of the image."""
        return self.index.size

    def extents(self) -> Iterator[MapExtent]:
        """All of the image, in order; neighbours differ."""
        for run in _RUN.finditer(self.states):
            start, end = self.index.span(run.start())[0], self.index.span(run.end() - 1)[1]
            state = self.states[run.start()]
            yield MapExtent(
                start, end - start, bool(state & HOLE), bool(state & CHANGED), bool(state & DAMAGED)
            )

    def cells(self, size: int) -> list[Cell]:
        """The image in parts of `size` bytes; the last may be shorter."""
        cells = [Cell() for _ in range(-(-self.size // size))]
        for found in self.extents():
            here, end = found.offset, found.offset + found.length
            while here < end:
                cell = cells[here // size]
                stop = min(end, (here // size + 1) * size)
                _count(cell, found, stop - here)
                here = stop
        return cells

    def add_up(self) -> None:
        """Brings `totals` up to date."""
        self.totals = Cell()
        for found in self.extents():
            _count(self.totals, found, found.length)

    def mark_damaged(self, start: int, end: int) -> None:
        """Marks the chunks that hold the bytes from `start` up to `end`."""
        for number in range(self.index.find(start), self.index.find(end - 1) + 1):
            self.states[number] |= DAMAGED


def _count(cell: Cell, found: MapExtent, length: int) -> None:
    cell.length += length
    cell.data += 0 if found.hole else length
    cell.changed += length if found.changed else 0
    cell.damaged += length if found.damaged else 0


async def map_of(
    file: ImageFile, since: ImageFile | None, *, check: bool, advance: Callable[[int], None]
) -> ImageMap:
    """The map of `file`, compared with `since`. `check`: reads all data, and calls `advance` as a
    `Verification` does; otherwise pbsfs only looks for the files of chunks, for a while, if it can do that.

    Raises DamageError, KeyRequiredError, SourceError.
    """
    image = await file.open()
    before = None if since is None else await since.open()
    states = await in_thread(_states, image, before)
    found = ImageMap(image.index, states, compared=before is not None, checked=check)
    if check:
        report = await Verification(image.store.memory).run([file], advance)
        for damage in report.damaged:
            if not damage.ranges:
                raise DamageError(damage.reason)
            for part in damage.ranges:
                found.mark_damaged(part.offset, part.offset + part.length)
    else:
        await _look(file, image, found)
    await in_thread(found.add_up)
    return found


def _states(image: Image, before: Image | None) -> bytearray:
    """The holes and changes. In a worker thread."""
    index = image.index
    states = bytearray(index.count)
    number = 0
    while number < index.count:
        hole, behind = index.run(number)
        if hole:
            states[number:behind] = bytes([HOLE]) * (behind - number)
        number = behind
        trio.from_thread.check_cancelled()
    if before is not None and before.index.csum != index.csum:
        for number in changed_chunks(before, image):
            states[number] |= CHANGED
    return states


async def _look(file: ImageFile, image: Image, found: ImageMap) -> None:
    """Marks the chunks without a file, as far as the source shows in `LOOK_TIME`."""
    source = file.tree.reader.source
    numbers = image.data_chunks(0, image.size)
    end = trio.current_time() + LOOK_TIME
    try:
        while batch := await in_thread(_batch, image, numbers):
            digests = [digest for _number, digest in batch]
            missing = await source.missing_chunks(file.info.snapshot, digests)
            if missing is None:
                return
            for place in missing:
                found.states[batch[place][0]] |= DAMAGED
            found.found = image.index.span(batch[-1][0])[1]
            if trio.current_time() >= end:
                return
        found.found = image.size
    except DamageError:
        raise
    except PbsfsError as error:
        found.unknown = str(error)


def _batch(image: Image, numbers: Iterator[int]) -> list[tuple[int, bytes]]:
    return [(number, digest_of(image, number)) for number in islice(numbers, LOOKED_AT_ONCE)]


async def image_in(snapshot: SnapshotDirectory, file: ImageFile) -> ImageFile:
    """The image in `snapshot` with the name of `file`. Raises NotFoundError, DamageError."""
    node = await snapshot.child(file.name)
    if not isinstance(node, ImageFile):
        raise NotFoundError(f"{node}: not an image")
    return node


async def image_in_previous(file: ImageFile) -> ImageFile:
    """The image with the same name in the snapshot before. Raises NotFoundError, DamageError."""
    snapshot = file.parent
    before = await snapshot_before(snapshot) if isinstance(snapshot, SnapshotDirectory) else None
    if before is None:
        raise NotFoundError(f"{snapshot}: there is no snapshot before it; leave out --since, or name one")
    return await image_in(before, file)
