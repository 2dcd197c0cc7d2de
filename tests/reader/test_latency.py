"""Nothing keeps the trio loop from its other tasks for long, however large an image is."""

from __future__ import annotations

import json

import pytest
import trio

from pbsfs.base.names import MANIFEST, Archive
from pbsfs.formats import blob, index
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import MAX_MANIFEST_SIZE, CryptMode
from pbsfs.reader.decode import SMALL
from pbsfs.reader.image import Image
from pbsfs.reader.reader import open_reader
from pbsfs.sources.base import FileInfo, SnapshotInfo
from pbsfs.tree import ImageFile, Tree
from tests.support import made
from tests.support.sources import MemorySource
from tests.support.steps import LIMIT, measured_steps

TIB = 1 << 40
CHUNK = 4 << 20
NAME = "disk.img.fidx"
SNAPSHOT = made.snapshot()
DATA = b"data" * (CHUNK // 4)


def holding(size: int, pattern: str) -> tuple[MemorySource, SnapshotInfo]:
    """A source with an image of `size` bytes: `pattern` ('0' a hole, 'd' data) again and again."""
    source = MemorySource()
    digests = {"0": blob.chunk_digest(bytes(CHUNK), None), "d": source.add_chunk(DATA)}
    count = size // CHUNK
    body = b"".join(digests[kind] for kind in pattern) * (count // len(pattern))
    raw, csum = index.encode_fixed([body], size=size, chunk_size=CHUNK, ctime=0)
    source.files[SNAPSHOT, Archive(NAME)] = raw
    file = FileInfo(Archive(NAME), size, CryptMode.NONE, csum)
    source.infos[SNAPSHOT] = SnapshotInfo(SNAPSHOT, (file,))
    return source, source.infos[SNAPSHOT]


async def use(image: Image) -> None:
    """Seeks and reads all over the image."""
    for place in range(0, image.size, image.size // CHUNK // 50 * CHUNK):
        data = image.next_data(place)
        image.next_hole(place)
        next(image.extents(place, image.size))
        handle = image.handle()
        if data is not None:
            assert await handle.read(data, 512) == DATA[:512]
        handle.close()
        await trio.lowlevel.checkpoint()


def test_opening_looking_at_seeking_and_reading_large_images_leaves_the_loop_free() -> None:
    async def main(size: int, pattern: str) -> None:
        source, _info = holding(size, pattern)
        async with open_reader(source) as reader:
            node = await Tree(reader).find(f"{SNAPSHOT}/disk.img")
            assert isinstance(node, ImageFile)
            with measured_steps() as steps:
                share = pattern.count("d") / len(pattern)
                assert (await node.stat()).data_size == size * share
                await use(await node.open())
                await node.open()
            assert steps.longest < LIMIT, pattern

    for size, pattern in ((4 * TIB, "0d"), (4 * TIB, "0"), (4 * TIB, "d"), (2 * TIB, "d0000d")):
        trio.run(main, size - size % (CHUNK * len(pattern)), pattern)  # on a true clock, as it is measured


def test_other_tasks_run_while_an_index_is_read() -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await trio.lowlevel.checkpoint()

    async def main() -> None:
        source, info = holding(16 * TIB, "0d")
        async with open_reader(source) as reader, trio.open_nursery() as nursery:
            nursery.start_soon(tick)
            await reader.open_image(info, info.files[0])
            assert ticks > 20
            nursery.cancel_scope.cancel()

    trio.run(main)


def bloated(source: MemorySource) -> int:
    """Makes the manifest of `SNAPSHOT` as large as it may be; returns the bytes that it is stored in."""
    manifest = source.files[SNAPSHOT, MANIFEST]
    content = json.loads(blob.decode(manifest, max_size=MAX_MANIFEST_SIZE))
    content.setdefault("unprotected", {})["junk"] = [0] * (MAX_MANIFEST_SIZE // 3 - 2000)
    text = json.dumps(content).encode()
    assert MAX_MANIFEST_SIZE * 0.99 < len(text) <= MAX_MANIFEST_SIZE
    stored = source.files[SNAPSHOT, MANIFEST] = blob.encode(text)
    return len(stored)


@pytest.mark.parametrize("keys", [{}, {made.KEY.fingerprint: made.KEY}])
def test_a_large_manifest_leaves_the_loop_free(keys: dict[str, Key]) -> None:
    async def main() -> None:
        source = MemorySource()
        mode = CryptMode.SIGN_ONLY if keys else CryptMode.NONE
        info = source.add(
            SNAPSHOT, {"a.conf.blob": b"content"}, crypt_mode=mode, key=made.KEY if keys else None
        )
        assert bloated(source) < SMALL, "it is small until it is decoded"
        async with open_reader(source, keys=keys) as reader:
            with measured_steps() as steps:
                await reader.version(SNAPSHOT, 0)
                assert await reader.read_blob(info, info.files[0]) == b"content"
            assert steps.longest < LIMIT

    trio.run(main)


@pytest.mark.parametrize("key", [None, made.KEY])
def test_a_blob_that_holds_much_leaves_the_loop_free(key: Key | None) -> None:
    async def main() -> None:
        source = MemorySource()
        mode = CryptMode.NONE if key is None else CryptMode.ENCRYPT
        info = source.add(SNAPSHOT, {"a.log.blob": bytes(blob.MAX_BLOB_SIZE)}, crypt_mode=mode, key=key)
        assert info.files[0].size < SMALL, "it is small until it is decoded"
        async with open_reader(source, keys={} if key is None else {key.fingerprint: key}) as reader:
            with measured_steps() as steps:
                assert len(await reader.read_blob(info, info.files[0])) == blob.MAX_BLOB_SIZE
            assert steps.longest < LIMIT

    trio.run(main)
