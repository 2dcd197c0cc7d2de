"""Archives as directories: the roots of what is in them, and of what is on volumes.

pbsfs opens an archive when something in it is looked at, or its own attributes are; listing a snapshot does
not. Used from tasks of one trio loop; the archive is parsed in worker threads.
"""

from __future__ import annotations

import abc
import logging
import stat as stat_bits
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pbsfs.base.errors import PbsfsError
from pbsfs.contents.base import Entry
from pbsfs.reader.contents import OpenContents, open_archive
from pbsfs.sources.base import FileInfo
from pbsfs.sources.retry import SharedTry
from pbsfs.tree.entries import ContentsDirectory
from pbsfs.tree.files import known_facts, snapshot_facts
from pbsfs.tree.stat import Stat, nanoseconds

if TYPE_CHECKING:
    from pbsfs.tree.snapshots import SnapshotDirectory

log = logging.getLogger(__name__)

UNKNOWN_PERMISSIONS = {stat_bits.S_IFDIR: 0o555, stat_bits.S_IFLNK: 0o777}
"""Permissions of an entry whose own are not known yet, by type; 0444 for the others."""


@dataclass(frozen=True, slots=True)
class ArchiveFiles:
    """The files of a snapshot that make one archive: one stream, or metadata and payload.

    `catalog`: what lists the names of archives of one stream, where the snapshot has it.
    """

    streams: tuple[FileInfo, ...]
    catalog: FileInfo | None = None


class ContentsRoot(ContentsDirectory):
    """The root of an archive or volume, shown in its snapshot's directory."""

    __slots__ = ("_key", "_opened", "_opening", "_root", "snapshot")

    def __init__(self, snapshot: SnapshotDirectory, name: bytes) -> None:
        super().__init__(snapshot, name)
        self._root = Entry(b"", stat_bits.S_IFDIR, exact=False)
        self.snapshot = snapshot
        self._opened: OpenContents | None = None
        self._opening: SharedTry[OpenContents] = SharedTry()
        self._key = self.path

    @property
    def directory(self) -> ContentsDirectory:
        return self

    @property
    def inside(self) -> ContentsRoot:
        return self

    @property
    def entry(self) -> Entry:
        return self._root

    @property
    def key(self) -> bytes:
        return self._key

    def key_of(self, entry: Entry) -> bytes:
        """The key of an entry: what is made again under the same names gets other inode numbers."""
        return b"%b\0%d" % (self._key, entry.inode)

    @abc.abstractmethod
    async def _open(self) -> OpenContents:
        """What is in it, opened now; `_key` is of this content afterwards."""

    @property
    def opened(self) -> OpenContents | None:
        """What is in the archive, if it is open."""
        return self._opened

    async def open(self) -> OpenContents:
        """What is in it. Raises DamageError, KeyRequiredError, SourceError."""

        async def work() -> OpenContents:
            self._opened = await self._open()
            return self._opened

        if self._opened is None:
            return await self._opening.run(lambda: self._opened, work)
        return self._opened

    async def learn(self) -> Entry:
        self._root = (await self.open()).contents.root
        return self._root

    async def learn_link_counts(self, entry: Entry) -> None:
        """Has `known_stat` know how many names the file `entry` has. Raises like `open`."""
        if entry.is_file and self._opened is not None and not self._opened.contents.knows_link_counts:
            await self._opened.learn_link_counts(entry)

    def known_stat(self, entry: Entry) -> Stat:
        """The stat of an entry as far as it is known, without asking."""
        opened = self._opened
        if not entry.exact or opened is None:
            kind = stat_bits.S_IFMT(entry.mode)
            mtime_ns = entry.mtime_ns or nanoseconds(self.snapshot.info.snapshot.time)
            mode = kind | UNKNOWN_PERMISSIONS.get(kind, 0o444)
            return Stat(entry.size, entry.size, mode, mtime_ns, exact=False)
        contents = opened.contents
        counted = not entry.is_file or contents.knows_link_counts
        data_size, may_change = opened.data_size(entry)
        return Stat(
            entry.size,
            data_size,
            entry.mode,
            entry.mtime_ns,
            entry.uid,
            entry.gid,
            nlink=contents.link_count(entry) if counted else 1,
            rdev=entry.rdev,
            target=entry.target,
            exact=counted and not may_change,
        )

    async def xattrs_of(self, entry: Entry) -> dict[bytes, bytes]:
        """The extended attributes of an entry, as they are stored. Raises like `open`."""
        return await (await self.open()).xattrs(entry) if entry.has_xattrs else {}


class ArchiveDirectory(ContentsRoot):
    """The root of an archive."""

    __slots__ = ("_version", "files")

    def __init__(self, snapshot: SnapshotDirectory, name: bytes, files: ArchiveFiles) -> None:
        super().__init__(snapshot, name)
        self.files = files
        self._key = b"\0".join((self.path, *(file.csum or b"" for file in files.streams)))
        self._version = b""  # of the snapshot's manifest, where the listing does not have the checksums

    def shows(self, value: object) -> bool:
        return self.files == value

    async def _open(self) -> OpenContents:
        reader, info, refresh = self.tree.reader, self.snapshot.info, self.tree.refresh
        opened = await open_archive(reader, info, self.files.streams, self.files.catalog, refresh)
        if any(file.csum is None for file in self.files.streams):
            self._version = await reader.version(info.snapshot, refresh)
            self._key = b"\0".join((self.path, self._version))
        return opened

    async def was_replaced(self) -> bool:
        """Whether the snapshot was made again since it was opened, which its listing may not show."""
        if not self._version:
            return False
        try:
            version = await self.tree.reader.version(self.snapshot.info.snapshot, self.tree.refresh)
        except PbsfsError as error:
            log.debug("%s: %s", self, error)
            return False
        return version != self._version

    async def facts(self) -> dict[str, str]:
        mode = self.files.streams[0].crypt_mode
        return snapshot_facts(self.snapshot.info) | known_facts(
            archive=", ".join(file.archive.filename for file in self.files.streams),
            crypt_mode=mode.value if mode else None,
            size=str(sum(file.size for file in self.files.streams)),
        )
