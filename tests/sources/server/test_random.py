"""A thousand reads at random, with faults at random: right bytes or a clean error, never a hang."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from pbsfs.base.errors import PbsfsError
from pbsfs.base.names import Archive, Snapshot
from pbsfs.chunks.cache import ChunkCache
from pbsfs.reader.handle import Handle
from pbsfs.reader.image import Image
from pbsfs.reader.reader import Reader, open_reader
from pbsfs.sources.server.limits import ServerLimits
from pbsfs.testing.writer import DatastoreWriter
from tests.sources.server import serving
from tests.sources.server.serving import CHUNK, IMAGE, STREAM, TOKEN, USER, VM, source_of
from tests.support import made
from tests.support.made import TIME
from tests.support.server import (
    Corrupt,
    Drop,
    EndlessHeaders,
    Garbage,
    GoAway,
    Huge,
    ReferenceServer,
    Reset,
    Stall,
    Status,
    Truncate,
    WrongLength,
    ZipBomb,
)
from tests.support.server.faults import Fault

SCENARIOS = 1000
BATCHES = 10
HANG = 30.0
"""Seconds for one scenario, which takes some milliseconds: only a hang takes that long."""

SIZES = ["r", "rtr", "0r0", "rtrr0rrt", "tt0000rr0rtr"]
CONTENTS: dict[tuple[Snapshot, Archive], bytes] = {
    (VM.snapshot(TIME + number), archive): made.image(10 * number + kind, layout, tail=number * 331)
    for number, layout in enumerate(SIZES)
    for kind, archive in enumerate((IMAGE, STREAM))
}


@pytest.fixture(scope="module")
def datastore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    writer = DatastoreWriter(tmp_path_factory.mktemp("random") / "datastore")
    for snapshot in sorted({snapshot for snapshot, _archive in CONTENTS}):
        files = {archive.filename: CONTENTS[snapshot, archive] for archive in (IMAGE, STREAM)}
        writer.add_snapshot(snapshot, files, chunk_size=CHUNK)
    return writer.path


@pytest.fixture(scope="module")
def shared(datastore: Path) -> Iterator[ReferenceServer]:
    with serving.served(datastore) as server:
        yield server


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """That something is tried again is told of; anything else would fail the test."""
    yield
    records = caplog.get_records("call")
    records[:] = [r for r in records if not r.getMessage().endswith(("; trying again", ": available again"))]


def random_fault(source: random.Random) -> Fault:
    match = source.choice(["/api2/json/reader?", "/download", "/download?file", *["/chunk"] * 3, "/"])
    often: dict[str, Any] = {
        "match": match,
        "skip": source.randrange(4),
        "times": source.choice([1, 1, 2, 3]),
    }
    after = source.choice([0, 1, source.randrange(100), source.randrange(100_000)])
    made_by: list[Callable[[], Fault]] = [
        lambda: Drop(**often, after_bytes=after, reset=source.random() < 0.5),
        lambda: Drop(after_bytes=after),
        lambda: Stall(match=match, skip=source.randrange(4), after_bytes=after),
        lambda: Status(**often, status=source.choice([400, 401, 403, 404, 418, 429, 500, 502, 503])),
        lambda: Corrupt(**often, at=source.choice([0, 10, -1])),
        lambda: Truncate(**often, missing=source.choice([1, 40, 10**6])),
        lambda: WrongLength(**often, by=source.choice([-1, 1, 10**9])),
        lambda: Reset(**often, code=source.randrange(14), after_bytes=after),
        lambda: GoAway(**often, last_stream_id=source.choice([None, 0, 1 << 20])),
        lambda: Garbage(times=source.choice([1, 2])),
        lambda: EndlessHeaders(match=match),
        lambda: Huge(match=match, announce=source.random() < 0.5),
        lambda: ZipBomb(match=match, announce=source.random() < 0.5),
    ]
    return source.choice(made_by)()


def random_events(server: ReferenceServer) -> list[Callable[[], None]]:
    """What else may happen between two reads."""
    return [
        server.drop_connections,
        server.restart,
        lambda: server.clock.advance(3 * 3600),
        lambda: None,
        lambda: None,
    ]


class Tally:
    def __init__(self) -> None:
        self.right = 0
        self.failed = 0

    def fail(self, error: PbsfsError) -> None:
        assert str(error).isprintable()
        self.failed += 1


async def read_somewhere(
    source: random.Random, handle: Handle | Image, size: int, content: bytes, tally: Tally
) -> None:
    offset = source.choice([0, source.randrange(size + 10), max(0, size - source.randrange(CHUNK))])
    length = source.choice([1, 4096, CHUNK, 3 * CHUNK, source.randrange(1, size + 1)])
    for _turn in range(source.choice([1, 1, 4])):  # several make a sequence, which is read ahead
        try:
            found = await handle.read(offset, length)
        except PbsfsError as error:
            tally.fail(error)
        else:
            assert bytes(found) == content[offset : offset + length]
            tally.right += 1
        offset += length


def forget(reader: Reader) -> None:
    """Nothing that was read before answers."""
    reader.store.cache = ChunkCache(reader.store.cache.room)


async def scenario(source: random.Random, reader: Reader, server: ReferenceServer, tally: Tally) -> None:
    for _fault in range(source.randrange(3)):
        server.faults.add(random_fault(source))
    forget(reader)
    (snapshot, archive), content = source.choice(list(CONTENTS.items()))
    try:
        infos = {info.snapshot: info for info in await reader.source.snapshots(snapshot.group)}
        info = infos[snapshot]
        file = next(file for file in info.files if file.archive == archive)
        image = await reader.open_image(info, file)
    except PbsfsError as error:
        tally.fail(error)
        return
    assert image.size == len(content)
    handle = image.handle()
    async with trio.open_nursery() as nursery:
        for _reader in range(source.choice([1, 1, 3])):
            where: Handle | Image = image if source.random() < 0.5 else handle
            nursery.start_soon(read_somewhere, source, where, image.size, content, tally)
        source.choice(random_events(server))()
        if source.random() < 0.1:
            nursery.cancel_scope.cancel()
    handle.close()


@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_read_gives_the_right_bytes_or_a_clean_error_whatever_happens(
    shared: ReferenceServer, batch: int
) -> None:
    tally = Tally()

    async def main() -> None:
        source = source_of(
            shared,
            (USER, TOKEN)[batch % 2],
            retry_timeout=1,
            stall_timeout=0.1,
            connections=1 + batch % 3,
            limits=ServerLimits(request_timeout=0.1),
        )
        async with open_reader(source) as reader:
            for number in range(SCENARIOS // BATCHES):
                with trio.fail_after(HANG):
                    await scenario(random.Random(f"{batch} {number}"), reader, shared, tally)
                shared.faults.clear()
            # Afterwards all is as it was.
            for (snapshot, archive), content in CONTENTS.items():
                image = await serving.image_of(reader, snapshot, archive)
                assert await serving.read_all(image) == content

    trio.run(main)
    assert tally.right > 2 * tally.failed > 0
