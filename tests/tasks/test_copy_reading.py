"""How a copy reads and writes at once, and in which pieces."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pbsfs.chunks.limits import FetchLimits
from pbsfs.reader.buffers import Buffer
from pbsfs.reader.handle import Handle
from pbsfs.tasks.image.copy import Pieces, copy_image
from pbsfs.tasks.image.opening import open_target
from pbsfs.tasks.image.target import Target
from tests.support import made
from tests.support.run import in_trio, run, until
from tests.support.sources import CHUNK_SIZE, MemorySource
from tests.tasks.copies import (
    NAME,
    SMALL,
    an_image,
    export,
    nobody_asks,
)


class Stuck(Target):
    """Writes nothing before `go` is set, and then fails with `error` if there is one."""

    def __init__(self, path: Path, error: OSError | None = None) -> None:
        super().__init__(os.open(path, os.O_CREAT | os.O_WRONLY), "out")
        self.go = threading.Event()
        self.error = error

    def write(self, offset: int, data: Buffer) -> None:
        self.go.wait(30)
        if self.error is not None:
            raise self.error
        super().write(offset, data)

    def hole(self, offset: int, length: int) -> None:
        raise AssertionError("there is none")


async def copy_until_stuck(
    content: bytes, target: Stuck, patch: pytest.MonkeyPatch
) -> tuple[list[int], Exception | None]:
    """Copies to `target`, which goes on when nothing more is read.

    Returns the offsets that were read, in order, and the error that it ended with.
    """
    pieces: list[int] = []
    failure: Exception | None = None
    real = Handle.read_parts

    async def read(handle: Handle, offset: int, size: int) -> list[Buffer]:
        pieces.append(offset)
        return await real(handle, offset, size)

    async def release() -> None:
        try:
            # One piece is being written, some are queued, and one is in the reader's hand.
            await until(lambda: len(pieces) >= SMALL.queued + 2)
            await until(lambda: not image.store._fetches)
            await wait_all_tasks_blocked()
            assert len(pieces) == SMALL.queued + 2
        finally:
            target.go.set()

    patch.setattr(Handle, "read_parts", read)
    async with an_image(content) as image, trio.open_nursery() as nursery:
        nursery.start_soon(release)
        try:
            await copy_image(image, target, nobody_asks, SMALL)
        except Exception as error:
            failure = error
        finally:
            target.close()
    return pieces, failure


def test_reading_goes_on_while_writing_and_stays_little_ahead(tmp_path: Path) -> None:
    content = made.image(1, "r" * 12)
    with pytest.MonkeyPatch.context() as patch:
        pieces, failure = run(lambda: copy_until_stuck(content, Stuck(tmp_path / "out"), patch))
    assert failure is None
    assert pieces == list(range(0, len(content), CHUNK_SIZE))
    assert (tmp_path / "out").read_bytes() == content


def test_when_writing_fails_its_error_is_told_though_reading_fails_of_it(tmp_path: Path) -> None:
    content = made.image(1, "r" * 12)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for _ in range(10):  # the order in which tasks go on is left to chance
        with pytest.MonkeyPatch.context() as patch:
            _pieces, failure = run(lambda: copy_until_stuck(content, Stuck(tmp_path / "out", error), patch))
        assert failure is error


def test_data_is_read_in_pieces_that_end_where_a_chunk_of_a_usual_image_does(tmp_path: Path) -> None:
    content = made.image(1, "0rrrr0rr")
    done: list[int] = []
    pieces = Pieces(size=2 * CHUNK_SIZE)
    run(lambda: export(content, tmp_path / "out", advance=done.append, pieces=pieces))
    assert [count // CHUNK_SIZE for count in done] == [1, 1, 2, 1, 1, 2]


def test_holes_on_the_way_do_not_end_the_read_ahead(tmp_path: Path) -> None:
    content = made.image(1, "r0000" * 12)
    limits = FetchLimits(reorder_distance=CHUNK_SIZE, evidence=CHUNK_SIZE, max_window=4 * CHUNK_SIZE)
    source = MemorySource()

    async def main() -> None:
        async with an_image(content, source=source, limits=limits) as image:
            source.hold(image.index.digest(5))  # the second piece of data
            with open_target(tmp_path / "out", NAME, image.size, force=False) as target:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(copy_image, image, target, nobody_asks, SMALL)
                    await until(lambda: image.index.digest(5) in source.fetched)
                    await wait_all_tasks_blocked()
                    ahead = {image.index.digest(number) for number in (10, 15, 20)}
                    assert ahead <= set(source.fetched)
                    assert image.store.sequential_readers == 1
                    nursery.cancel_scope.cancel()
            assert image.store.sequential_readers == 0

    run(main)


@in_trio
async def test_a_hole_is_zeroed_in_pieces_between_which_a_copy_can_end() -> None:
    zeroed: list[tuple[int, int]] = []
    done: list[int] = []

    class Device(Target):
        hole_piece = 4 * CHUNK_SIZE

        def hole(self, offset: int, length: int) -> None:
            zeroed.append((offset, length))

    async with an_image(bytes(10 * CHUNK_SIZE)) as image:
        await copy_image(image, Device(-1, "device"), done.append)
    assert zeroed == [(0, 4 * CHUNK_SIZE), (4 * CHUNK_SIZE, 4 * CHUNK_SIZE), (8 * CHUNK_SIZE, 2 * CHUNK_SIZE)]
    assert done == [length for _offset, length in zeroed]
