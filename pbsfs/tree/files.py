"""The files of a snapshot: images, archives of files as streams, and blobs.

What a stat costs is decided here. The sizes of images come with the listing; how long a blob is, and which
chunks of an image are holes, takes reading the blob or index. A source with cheap files is asked for both.
With any other, a stat of a blob fetches all blobs of its snapshot, side by side; holes are learned when the
image is opened, and until then its `Stat` says that it is not exact. The snapshot's directory keeps what was
learned. Used from tasks of one trio loop.
"""

from __future__ import annotations

import abc
import logging
from typing import TYPE_CHECKING

import trio

from pbsfs.base.errors import DamageError, KeyRequiredError, PbsfsError
from pbsfs.base.names import ArchiveKind
from pbsfs.reader.image import Image
from pbsfs.reader.opened import Blob
from pbsfs.sources.base import FileInfo, SnapshotInfo
from pbsfs.tree.node import Node
from pbsfs.tree.stat import Stat, nanoseconds

if TYPE_CHECKING:
    from pbsfs.tree.snapshots import SnapshotDirectory

log = logging.getLogger(__name__)


class File(Node):
    """A file of a snapshot."""

    __slots__ = ("_snapshot", "file")

    def __init__(self, snapshot: SnapshotDirectory, name: bytes, file: FileInfo) -> None:
        super().__init__(snapshot.tree, snapshot, name)
        self._snapshot = snapshot
        self.file = file

    @property
    def info(self) -> SnapshotInfo:
        """The snapshot that it belongs to."""
        return self._snapshot.info

    async def stat(self) -> Stat:
        if self._learned() is None and self.tree.reader.source.cheap_files:
            try:
                self._keep(await self._look())
            except (DamageError, KeyRequiredError) as error:
                # Shown all the same, as the listing has it; opening it raises the error.
                log.debug("%s", error)
                self._keep(self._listed(exact=True))
            except PbsfsError as error:
                log.debug("%s", error)
        return self.known()

    def known(self) -> Stat:
        """The stat as far as it is known, without asking."""
        return self._learned() or self._listed(exact=False)

    def _learned(self) -> Stat | None:
        return self._snapshot.stats.get(self.file.archive.filename)

    def _keep(self, stat: Stat) -> None:
        self._snapshot.stats[self.file.archive.filename] = stat

    def _stat(self, size: int, data_size: int, *, exact: bool = True) -> Stat:
        return Stat(size, data_size, mtime_ns=nanoseconds(self.info.snapshot.time), exact=exact)

    def _listed(self, *, exact: bool) -> Stat:
        return self._stat(self.file.size, self.file.size, exact=exact)

    @abc.abstractmethod
    async def _look(self) -> Stat:
        """The exact stat, from the file itself."""

    async def facts(self) -> dict[str, str]:
        stat = await self.stat()
        mode = self.file.crypt_mode
        return snapshot_facts(self.info) | known_facts(
            archive=self.file.archive.filename,
            crypt_mode=mode.value if mode else None,
            size=str(stat.size),
        )


class ImageFile(File):
    """An archive with an index: a disk image or a pxar stream."""

    __slots__ = ("_csum",)

    def __init__(self, snapshot: SnapshotDirectory, name: bytes, file: FileInfo) -> None:
        super().__init__(snapshot, name, file)
        self._csum: bytes | None = None  # of the index that the kept stat is from

    async def open(self) -> Image:
        """The present content, however old the listing. Raises DamageError, KeyRequiredError, SourceError."""
        image = await self.tree.reader.open_image(self.info, self.file, self.tree.refresh)
        if self._csum != image.index.csum:
            self._keep(self._exact(image))
            self._csum = image.index.csum
        return image

    async def _look(self) -> Stat:
        return self._exact(await self.tree.reader.open_image(self.info, self.file, self.tree.refresh))

    def _exact(self, image: Image) -> Stat:
        return self._stat(image.size, image.data_size())

    async def facts(self) -> dict[str, str]:
        facts = await super().facts()
        zeroed = self.tree.reader.zeroed
        if zeroed is not None:
            facts["damaged_ranges"] = zeroed.text_of(f"{self.info.snapshot}/{self.file.archive.name}")
        if self.file.archive.kind is ArchiveKind.FIXED and self.tree.reader.source.cheap_files:
            try:
                index = (await self.open()).index
            except PbsfsError:
                return facts
            return facts | {"chunk_size": str(index.chunk_size)}
        return facts


class BlobFile(File):
    """A small file that is stored whole: a configuration, the manifest, a log."""

    __slots__ = ()

    async def stat(self) -> Stat:
        if self.tree.reader.source.cheap_files:
            return await super().stat()
        await self._snapshot.look_at_blobs()
        return self.known()

    async def glance(self) -> Stat:
        return await self.stat() if self.tree.reader.source.cheap_files else self.known()

    def forget_size(self) -> None:
        """Has the size learned again."""
        self._snapshot.stats.pop(self.file.archive.filename, None)

    async def learn_size(self, limiter: trio.CapacityLimiter) -> None:
        """Learns the size, unless it is known. Where the blob can't be read, the next call tries again."""
        async with limiter:
            if self._learned() is None:
                try:
                    self._keep(await self._look())
                except PbsfsError as error:  # opening it raises the error
                    log.debug("%s", error)

    async def open(self) -> Blob:
        """The present content, however old the listing; shared. Raises DamageError, KeyRequiredError,
        SourceError."""
        blob = await self.tree.reader.open_blob(self.info, self.file, self.tree.refresh)
        self._keep(self._stat(len(blob.data), len(blob.data)))
        return blob

    async def read(self) -> bytes:
        """The decoded content. Raises like `open`."""
        return (await self.open()).data

    async def _look(self) -> Stat:
        size = await self.tree.reader.blob_size(self.info, self.file, self.tree.refresh)
        return self._stat(size, size)


def known_facts(**facts: str | None) -> dict[str, str]:
    """Those of `facts` that are known."""
    return {name: value for name, value in facts.items() if value is not None}


def snapshot_facts(info: SnapshotInfo) -> dict[str, str]:
    """What people ask about a snapshot, and about each of its files."""
    snapshot = info.snapshot
    return known_facts(
        namespace=str(snapshot.group.namespace),
        backup_type=snapshot.group.type,
        backup_id=snapshot.group.id,
        backup_time=snapshot.time_text,
        owner=info.owner,
        protected="true" if info.protected else "false",
        key_fingerprint=info.key_fingerprint,
        verify_state=info.verify_state or "none",
        notes=info.notes,
    )
