"""The map of an image: how far pbsfs looks for the files of chunks, and what stops that."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pbsfs.base.errors import SourceError
from pbsfs.base.names import Snapshot
from pbsfs.reader.reader import open_reader
from pbsfs.tasks import mapping
from pbsfs.tasks.mapping import ImageMap, map_of
from pbsfs.tree import ImageFile, Tree
from tests.support import made
from tests.support.run import in_trio
from tests.support.sources import CHUNK_SIZE, MemorySource

DISK = made.image(1, "r0rr0r")


class LookingSource(MemorySource):
    """Finds missing chunks without reading any."""

    async def missing_chunks(self, snapshot: Snapshot, digests: Sequence[bytes]) -> list[int]:
        assert snapshot == made.snapshot()
        return await self._answer(
            "missing_chunks", [n for n, d in enumerate(digests) if d not in self.chunks]
        )


async def mapped(source: MemorySource) -> ImageMap:
    source.add(made.snapshot(), {"disk.img.fidx": DISK})
    for digest in list(source.chunks)[3:4]:  # of the third chunk of data
        del source.chunks[digest]
    async with open_reader(source) as reader:
        file = await Tree(reader).find("vm/100/latest/disk.img")
        assert isinstance(file, ImageFile)
        return await map_of(file, None, check=False, advance=lambda _count: None)


def damaged(found: ImageMap) -> list[int]:
    return [extent.offset // CHUNK_SIZE for extent in found.extents() if extent.damaged]


@in_trio
async def test_all_chunks_are_looked_for_and_none_is_read() -> None:
    source = LookingSource()
    found = await mapped(source)
    assert (damaged(found), found.found, found.unknown) == ([3], len(DISK), None)
    assert source.fetched == []


@in_trio
async def test_a_look_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "LOOK_TIME", 0.0)
    monkeypatch.setattr(mapping, "LOOKED_AT_ONCE", 2)
    source = LookingSource()
    found = await mapped(source)
    assert (damaged(found), found.found) == ([], 3 * CHUNK_SIZE)
    assert source.calls["missing_chunks"] == 1


@in_trio
async def test_a_source_that_fails_meanwhile_is_no_damage() -> None:
    source = LookingSource()
    source.fail("missing_chunks", SourceError("the disk is gone"))
    found = await mapped(source)
    assert (damaged(found), found.found, found.unknown) == ([], 0, "the disk is gone")


@in_trio
async def test_a_source_that_would_have_to_read_is_not_asked_to() -> None:
    source = MemorySource()
    found = await mapped(source)
    assert (damaged(found), found.found, found.unknown) == ([], 0, None)
    assert source.fetched == []
