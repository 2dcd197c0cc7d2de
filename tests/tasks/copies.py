"""Images that are copied, and copies of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from pbsfs.chunks.limits import DEFAULT, FetchLimits
from pbsfs.reader.image import Image
from pbsfs.reader.reader import open_reader
from pbsfs.tasks.image.copy import DEFAULT_PIECES, Pieces, copy_image
from pbsfs.tasks.image.opening import open_target
from tests.support import made
from tests.support.sources import CHUNK_SIZE, MemorySource, file_of

NAME = "disk.img"
SNAPSHOT = made.snapshot()
CONTENT = made.image(1, "0rr00t0", tail=512)
SMALL = Pieces(size=CHUNK_SIZE)


def nobody_asks(_count: int) -> None:
    """What the progress is told to when nobody watches it."""


@asynccontextmanager
async def an_image(
    content: bytes,
    *,
    chunk_size: int = CHUNK_SIZE,
    source: MemorySource | None = None,
    limits: FetchLimits = DEFAULT,
) -> AsyncIterator[Image]:
    source = source or MemorySource()
    info = source.add(SNAPSHOT, {f"{NAME}.fidx": content}, chunk_size=chunk_size)
    async with open_reader(source, limits=limits) as reader:
        yield await reader.open_image(info, file_of(info, f"{NAME}.fidx"))


async def export(
    content: bytes,
    dest: Path,
    *,
    force: bool = False,
    advance: Callable[[int], None] = nobody_asks,
    pieces: Pieces = DEFAULT_PIECES,
) -> None:
    async with an_image(content) as image:
        with open_target(dest, NAME, image.size, force=force) as target:
            await copy_image(image, target, advance, pieces)


def is_clean(directory: Path, *names: str) -> bool:
    return sorted(path.name for path in directory.iterdir()) == sorted(names)
