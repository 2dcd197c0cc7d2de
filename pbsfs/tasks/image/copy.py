"""Copies an image to a target: reading and writing overlap.

One task reads in order, with the read-ahead of an open file, and passes the pieces to another, which writes
them in a worker thread. Called by `pbsfs export`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import trio

from pbsfs.reader.buffers import Buffer
from pbsfs.reader.image import Extent, Image
from pbsfs.runtime.threads import in_thread
from pbsfs.runtime.together import run_together
from pbsfs.tasks.image.target import Target


class Pieces(NamedTuple):
    """How an image is cut.

    `size`: bytes that are read and written at a time, by default one chunk of a usual image. `queued`: pieces
    that may wait for the writer, few, so that memory use stays small.
    """

    size: int = 4 << 20
    queued: int = 2


DEFAULT_PIECES = Pieces()


async def copy_image(
    image: Image,
    target: Target,
    advance: Callable[[int], None],
    pieces: Pieces = DEFAULT_PIECES,
) -> None:
    """Writes all of `image` to `target`; calls `advance` with the bytes of each step.

    Raises DamageError and SourceError from reading, OSError from writing.
    """
    image.store.serve_copy(1, in_order=True)
    sending, receiving = trio.open_memory_channel[tuple[Extent, list[Buffer]]](pieces.queued)

    async def read() -> None:
        handle = image.handle(whole=True)
        try:
            with sending:
                for extent in _cut(image, pieces.size, target.hole_piece):
                    data: list[Buffer] = []
                    if extent.hole:
                        handle.skip_hole(extent.offset + extent.length)
                    else:
                        data = await handle.read_parts(extent.offset, extent.length)
                    await sending.send((extent, data))
        finally:
            handle.close()

    async def write() -> None:
        with receiving:  # closed before `read` runs, which otherwise could report the failure first
            async for extent, data in receiving:
                await in_thread(_put, target, extent, data, abandon_on_cancel=target.endless)
                advance(extent.length)

    await run_together([read, write])


async def copy_blob(data: bytes, target: Target) -> None:
    """Writes a small file's content to `target`. Raises OSError."""
    await in_thread(target.write, 0, data, abandon_on_cancel=target.endless)


def _cut(image: Image, data_piece: int, hole_piece: int) -> Iterator[Extent]:
    """The image's extents, cut at multiples of `data_piece` and `hole_piece` bytes."""
    for extent in image.extents(0, image.size):
        piece = hole_piece if extent.hole else data_piece
        offset, end = extent.offset, extent.offset + extent.length
        while offset < end:
            stop = min(end, offset - offset % piece + piece)
            yield Extent(offset, stop - offset, extent.hole)
            offset = stop


def _put(target: Target, extent: Extent, parts: list[Buffer]) -> None:
    if extent.hole:
        target.hole(extent.offset, extent.length)
    offset = extent.offset
    for data in parts:
        target.write(offset, data)
        offset += len(data)
