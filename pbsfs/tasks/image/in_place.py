"""Turns an existing file or block device into an image, by writing only what differs.

The index has the digest of each chunk. So the target is read and hashed here, on all cores, and only chunks
with another digest are fetched; a hole takes no fetch at all. All that was written is read back from storage
and checked in the end. It can be interrupted and repeated at any point, since it begins by comparing: what is
written already is the same then. Called by `pbsfs export`, in the trio loop; worker threads read, hash and
write.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import trio

from pbsfs.base.errors import OutputError
from pbsfs.chunks.store import Chunk
from pbsfs.formats.blob import MAX_CHUNK_SIZE
from pbsfs.reader.buffers import is_zero
from pbsfs.reader.image import Image
from pbsfs.runtime.threads import in_thread
from pbsfs.runtime.together import run_together
from pbsfs.tasks.image.compared import ComparedTarget

FETCHERS = 12
"""Chunks that are fetched and written at once: enough for the round trip to a server, as `verify` has it."""

BUFFERS = 64 << 20
"""Bytes of memory for what is read from the target at once: 16 chunks of a usual image."""

HOLE_STEP = 64 << 20
"""Bytes of a hole that are compared at a time. Ctrl-C waits for as much."""

HOLE_PIECE = 1 << 20
"""Bytes of a hole that are read at once."""

HOLE_PART = 64 << 10
"""Bytes of it that are discarded together where they are not zeros: the smallest chunk."""

WAITING = 256
"""Steps that may wait for a fetch, so that comparing continues meanwhile."""


class Step(NamedTuple):
    """A range of the image that is compared at once: a chunk, or a part of a hole (`chunk` is None)."""

    offset: int
    length: int
    chunk: int | None


@dataclass(slots=True)
class Amounts:
    """What a restore did so far, or would do: bytes, except `chunks`.

    `reused`: of chunks that the target has. `differing`, `chunks`: of chunks that differ. `written`: of those
    that differ, and are written. `empty`: of holes that read as zeros in the target. `discarded`: of holes
    where the target has other data.
    """

    reused: int = 0
    differing: int = 0
    chunks: int = 0
    written: int = 0
    empty: int = 0
    discarded: int = 0


def steps_of(image: Image, hole_step: int = HOLE_STEP) -> Iterator[Step]:
    """All of the image in order: each chunk of data, and holes in parts of at most `hole_step` bytes."""
    for extent in image.extents(0, image.size):
        offset, end = extent.offset, extent.offset + extent.length
        if extent.hole:
            while offset < end:
                stop = min(end, offset - offset % hole_step + hole_step)
                yield Step(offset, stop - offset, None)
                offset = stop
        else:
            for number in range(image.index.find(offset), image.index.find(end - 1) + 1):
                start, stop = image.index.span(number)
                yield Step(start, stop - start, number)


class Restore:
    """One run over all of an image and a target."""

    def __init__(
        self,
        image: Image,
        target: ComparedTarget,
        advance: Callable[[int], None],
        *,
        dry_run: bool = False,
        amounts: Amounts | None = None,
    ) -> None:
        """`advance` gets the bytes of each step that is done. `dry_run`: whether to compare only. `amounts`:
        counts what is done; None for a new count."""
        self.amounts = Amounts() if amounts is None else amounts
        self._image = image
        self._target = target
        self._advance = advance
        self._dry_run = dry_run
        index = image.index
        # In a stream, a chunk of zeros need not be known as a hole.
        self._holes_are_known = index.chunk_size is not None
        self._buffer_size = max(HOLE_PIECE, min(index.chunk_size or MAX_CHUNK_SIZE, MAX_CHUNK_SIZE))
        self._cores = max(1, min(len(os.sched_getaffinity(0)), BUFFERS // self._buffer_size))
        self._written = bytearray(
            index.count
        )  # for each chunk: `_DATA`, `_ZEROS`, or 0 if it was not written
        self._discarded: set[int] = set()  # the offsets of steps in holes
        self.began = False  # whether anything was written

    async def run(self) -> None:
        """Makes the target what the image is, and checks what was written.

        Raises DamageError and SourceError from reading the image, OutputError if the target does not return
        what was written, and OSError.
        """
        await self._compare()
        if self._dry_run:
            return
        self.began = True
        await in_thread(self._target.settle)
        await self._check()

    async def _compare(self) -> None:
        sending, receiving = trio.open_memory_channel[tuple[Step, Chunk]](WAITING)
        steps = steps_of(self._image)

        async def compare(differing: trio.MemorySendChannel[tuple[Step, Chunk]]) -> None:
            buffer = memoryview(bytearray(self._buffer_size))
            with differing:
                for step in steps:
                    if step.chunk is None:
                        await self._empty(step, buffer)
                    else:
                        chunk = await self._chunk(step.chunk)
                        same = await in_thread(self._is_same, step, chunk, buffer)
                        if same:
                            self.amounts.reused += step.length
                            self._advance(step.length)
                        else:
                            self.amounts.differing += step.length
                            self.amounts.chunks += 1
                            await differing.send((step, chunk))

        async def fetch(differing: trio.MemoryReceiveChannel[tuple[Step, Chunk]]) -> None:
            with differing:
                async for step, chunk in differing:
                    if not self._dry_run:
                        await self._fetch(step, chunk)
                    self._advance(step.length)

        with sending, receiving:
            tasks = [partial(compare, sending.clone()) for _core in range(self._cores)]
            tasks += [partial(fetch, receiving.clone()) for _fetcher in range(FETCHERS)]
        await run_together(tasks)

    async def _chunk(self, number: int) -> Chunk:
        await self._image.load()
        return self._image.chunk(number)

    def _is_same(self, step: Step, chunk: Chunk, buffer: memoryview) -> bool:
        end = step.offset + step.length
        if self._holes_are_known and self._target.next_data(step.offset, end) == end:
            return False  # zeros, which the chunk is not
        view = buffer[: step.length]
        self._target.read_into(step.offset, view)
        return chunk.matches(view)

    async def _fetch(self, step: Step, chunk: Chunk) -> None:
        data = await self._image.read(step.offset, step.length)
        kind = _DATA
        if self._image.shows_zeros and not await in_thread(chunk.matches, data):
            kind = _ZEROS  # of a damaged chunk, as the user asked for
        self.began = True
        await in_thread(self._target.write, step.offset, data)
        assert step.chunk is not None
        self._written[step.chunk] = kind
        self.amounts.written += step.length

    async def _empty(self, step: Step, buffer: memoryview) -> None:
        def discard(piece: int, length: int) -> None:
            self.began = True
            self._target.hole(piece, length)

        act = _nothing if self._dry_run else discard
        found = await in_thread(_each_not_zero, self._target, step, buffer, act)
        self.amounts.discarded += found
        self.amounts.empty += step.length - found
        if found:
            self._discarded.add(step.offset)
        self._advance(step.length)

    async def _check(self) -> None:
        """Reads back what was written."""
        steps = (
            step
            for step in steps_of(self._image)
            if (step.offset in self._discarded if step.chunk is None else self._written[step.chunk])
        )

        async def check() -> None:
            buffer = memoryview(bytearray(self._buffer_size))
            for step in steps:
                if step.chunk is None or self._written[step.chunk] == _ZEROS:
                    bad = await in_thread(_each_not_zero, self._target, step, buffer, _nothing)
                    right = bad == 0
                else:
                    chunk = await self._chunk(step.chunk)
                    right = await in_thread(self._reads_as, step, chunk, buffer)
                if not right:
                    raise OutputError(
                        f"{self._target}: bytes {step.offset} to {step.offset + step.length - 1} do not read "
                        "as they were written; look for the reason in the kernel's log, or name another place"
                    )

        await run_together([check] * self._cores)

    def _reads_as(self, step: Step, chunk: Chunk, buffer: memoryview) -> bool:
        view = buffer[: step.length]
        self._target.read_into(step.offset, view)
        return chunk.matches(view)


_DATA, _ZEROS = 1, 2


def _nothing(_offset: int, _length: int) -> None:
    pass


def _each_not_zero(
    target: ComparedTarget, step: Step, buffer: memoryview, act: Callable[[int, int], None]
) -> int:
    """Calls `act` for each piece (offset, length) of a step that is not all zeros; returns their bytes."""
    at, end, found = step.offset, step.offset + step.length, 0
    while (at := target.next_data(at, end)) < end:
        view = buffer[: min(HOLE_PIECE - at % HOLE_PIECE, end - at)]
        target.read_into(at, view)
        if not is_zero(view):
            for start in range(0, len(view), HOLE_PART):
                part = view[start : start + HOLE_PART]
                if not is_zero(part):
                    act(at + start, len(part))
                    found += len(part)
        at += len(view)
    return found
