"""Reads and checks everything that was backed up, each chunk once, however many images share it.

`pbsfs verify` calls it. It runs in the trio loop and checks several chunks at once. It reports damage by file
and range, in every file that contains it. Of more chunks than fit in memory, it reads some again.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Callable, Sequence

import trio

from pbsfs.base.errors import DamageError, KeyRequiredError, PbsfsError
from pbsfs.chunks.store import Chunk
from pbsfs.contents.base import Entry
from pbsfs.formats.keys import Key
from pbsfs.reader.bridge import ImageStream
from pbsfs.reader.damage import Range, merged
from pbsfs.reader.decoded import stream_of
from pbsfs.reader.image import Image
from pbsfs.runtime.memory import Memory
from pbsfs.tasks.hit import files_hit
from pbsfs.tasks.known import KnownChunks
from pbsfs.tasks.report import Damage, Report
from pbsfs.tree import BlobFile, ContentsNode, Directory, File, ImageFile, Node

log = logging.getLogger(__name__)

WORKERS = 12
"""Chunks that are checked at once: some for each core to decode, and enough for the round trip to a server.
The store bounds their memory."""

STRIDE = 1024
"""Chunks of an index that are processed before other tasks run: a few milliseconds."""

SHOWN_REASONS = 100
"""Reasons that the report names for one file, before it only counts the rest."""

BAD_SIZE = 500
"""Bytes of memory for a damaged chunk and the reason."""

Identity = tuple[bytes, Key | None, int]
"""A chunk, with the length that an index claims: a wrong length is damage of that index only."""


class Verification:
    """One run over some nodes of a tree."""

    def __init__(
        self,
        memory: Memory,
        *,
        known: KnownChunks | None = None,
        stride: int = STRIDE,
    ) -> None:
        """`memory`: what the chunks that were read are charged to. `known`: remembers these chunks; None for
        a set of half of `memory`. `stride`: see `STRIDE`.
        """
        self.report = Report()
        self._advance: Callable[[int], None] = lambda _count: None
        self._known = KnownChunks(memory, memory.open_limit // 2) if known is None else known
        self._stride = stride
        self._bad: dict[Identity, str] = {}
        self._bad_charge = memory.charge("damaged chunks", 0)
        self._done = 0

    async def collect(self, node: Node) -> list[File | ContentsNode]:
        """The files at and below `node`; directories that can't be listed go into the report.

        An archive that is shown as a directory stands for all files in it.
        """
        if isinstance(node, File | ContentsNode):
            return [node]
        if not isinstance(node, Directory):
            return []
        files: list[File | ContentsNode] = []
        try:
            children = await node.children()
        except DamageError as error:
            damage = Damage.of(node.path, error)
            if all(known.path != damage.path for known in self.report.damaged):  # paths may overlap
                self.report.damaged.append(damage)
            return []
        for child in children.values():
            if not child.repeats:
                files += await self.collect(child)
        return files

    async def run(self, files: Sequence[File | ContentsNode], advance: Callable[[int], None]) -> Report:
        """Reads `files`; calls `advance` with the number of bytes that are done.

        Raises SourceError if the source fails: that is not damage.
        """

        def done(count: int) -> None:
            self._done += count
            advance(count)

        self._advance = done
        for file in files:
            self.report.files += not isinstance(file, ContentsNode)
            path, end = os.fsdecode(file.path), self._done + (await file.glance()).data_size
            try:
                if isinstance(file, ImageFile):
                    image = await file.open()
                    await self._check_chunks(image)
                    await self._locate(path, image, file)
                elif isinstance(file, BlobFile):
                    await file.read()
                elif isinstance(file, ContentsNode):
                    await self._check_contents(file)
            except DamageError as error:
                self.report.damaged.append(Damage.of(file.path, error))
            except KeyRequiredError as error:
                self.report.unverified[path] = str(error)
                self.report.missing_keys.setdefault(error.fingerprint, []).append(path)
            self._advance(end - self._done)  # holes that a listing does not know, and what can't be read
        return self.report

    async def _check_chunks(self, image: Image) -> None:
        failure: PbsfsError | None = None
        async with trio.open_nursery() as nursery:
            sending, receiving = trio.open_memory_channel[int](0)

            async def work(numbers: trio.MemoryReceiveChannel[int]) -> None:
                nonlocal failure
                with numbers:
                    async for number in numbers:
                        try:
                            await self._check_chunk(image, number)
                        except PbsfsError as error:  # raised outside: a nursery would wrap it in a group
                            failure = failure or error
                            nursery.cancel_scope.cancel()

            with receiving:
                for _worker in range(WORKERS):
                    nursery.start_soon(work, receiving.clone())
            with sending:
                for count, number in enumerate(image.data_chunks(0, image.size), 1):
                    chunk = image.chunk(number)
                    if self._known.add(chunk):
                        await sending.send(number)
                    else:
                        self._advance(chunk.length)
                    if count % self._stride == 0:
                        await trio.lowlevel.checkpoint()
        if failure is not None:
            raise failure

    async def _check_chunk(self, image: Image, number: int) -> None:
        chunk = image.chunk(number)
        try:
            await image.store.request(chunk).wait()
        except DamageError as error:
            self._bad[_identity(chunk)] = str(error)
            self._bad_charge.resize(BAD_SIZE * len(self._bad))
            log.info("%s: %s", image, error)
        self.report.chunks += 1
        self.report.size += chunk.length
        self._advance(chunk.length)

    async def _locate(self, path: str, image: Image, file: ImageFile) -> None:
        """Reports the damaged ranges of `image`, all of whose chunks were read."""
        if not self._bad:
            return
        found: list[Range] = []
        reasons: set[str] = set()
        for count, number in enumerate(image.data_chunks(0, image.size), 1):
            if count % self._stride == 0:
                await trio.lowlevel.checkpoint()
            reason = self._bad.get(_identity(image.chunk(number)))
            if reason is not None:
                start, end = image.index.span(number)
                found.append(Range(start, end - start))
                reasons.add(reason)
        if found:
            shown = sorted(reasons)[:SHOWN_REASONS]
            if len(reasons) > SHOWN_REASONS:
                shown.append(f"… ({len(reasons)} in all)")
            ranges = merged(found)
            hit = await files_hit(file, ranges)
            self.report.damaged.append(Damage(path, "; ".join(shown), ranges, hit))

    async def _check_contents(self, node: ContentsNode) -> None:
        """Reads an entry of an archive, and all below it; what cannot be read goes into the report."""
        top, opened = await node.learn(), await node.inside.open()

        def check(path: bytes, entry: Entry | DamageError, streams: list[ImageStream]) -> None:
            if not isinstance(entry, Entry):
                self.report.damaged.append(Damage.of(path, entry))
                return
            self.report.files += entry.is_file
            opened.contents.xattrs(entry)
            for piece in opened.contents.data(entry) if entry.is_file else ():
                stream = stream_of(piece, streams, opened.contents, entry)
                if stream is None:
                    continue
                for span in stream.spans(piece.offset, piece.length):
                    if not span.hole:
                        stream.pread(span.offset, span.length)
                        self.report.size += span.length

        def work(streams: list[ImageStream]) -> None:
            walked = opened.contents.walk(top) if top.is_directory else ()
            for path, entry in itertools.chain([(b"", top)], walked):
                trio.from_thread.check_cancelled()
                where = b"%b/%b" % (node.path, path) if path else node.path
                try:
                    check(where, entry, streams)
                except DamageError as error:
                    self.report.damaged.append(Damage.of(where, error))

        with opened.streams() as streams:
            await opened.run(functools.partial(work, streams))


def _identity(chunk: Chunk) -> Identity:
    return *chunk.identity, chunk.length
