"""The volumes on the disks of a snapshot: each a directory of the files in it, or a note why it is not.

Used from tasks of one trio loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pbsfs.base.errors import PbsfsError, UnsupportedError
from pbsfs.disks.host import VolumeInfo
from pbsfs.reader.contents import OpenContents
from pbsfs.reader.disks import OpenDisks
from pbsfs.reader.opened import HOLDER, Blob
from pbsfs.sources.base import FileInfo
from pbsfs.tree.archives import ContentsRoot
from pbsfs.tree.files import BlobFile, known_facts, snapshot_facts
from pbsfs.tree.stat import Stat

if TYPE_CHECKING:
    from pbsfs.tree.snapshots import SnapshotDirectory

NOTE = b".txt"
"""What the name of a note ends with, behind the name of its volume."""


class VolumeDirectory(ContentsRoot):
    """The root of a file system on a volume."""

    __slots__ = ("_disks", "volume")

    def __init__(
        self, snapshot: SnapshotDirectory, name: bytes, volume: VolumeInfo, disks: OpenDisks, version: bytes
    ) -> None:
        super().__init__(snapshot, name)
        self.volume = volume
        self._disks = disks
        self._key = b"\0".join((self.path, version))

    def shows(self, value: object) -> bool:
        return self.volume == value

    @property
    def repeats(self) -> bool:
        return self.volume.is_guest

    async def _open(self) -> OpenContents:
        return await self._disks.open(self.volume)

    async def facts(self) -> dict[str, str]:
        found = (await self.open()).contents.facts()
        return (
            snapshot_facts(self.snapshot.info)
            | known_facts(
                file_system=self.volume.kind,
                size=None if self.volume.is_guest else str(self.volume.size),  # it lies on several
                part_uuid=self.volume.part_uuid,
            )
            | found
        )


class BrokenDisk(ContentsRoot):
    """A disk whose volumes cannot be found: whatever looks into it gets the reason."""

    __slots__ = ("error",)

    def __init__(self, snapshot: SnapshotDirectory, name: bytes, error: PbsfsError) -> None:
        super().__init__(snapshot, name)
        self.error = error

    def shows(self, value: object) -> bool:
        return self.error is value

    async def _open(self) -> OpenContents:
        raise self.error

    async def facts(self) -> dict[str, str]:
        raise self.error


class Note(BlobFile):
    """A file that says why a volume is not shown as a directory, and what to do."""

    __slots__ = ("_text", "_volume")

    def __init__(self, snapshot: SnapshotDirectory, name: bytes, file: FileInfo, volume: VolumeInfo) -> None:
        super().__init__(snapshot, name, file)
        self._volume = volume
        self._text = f"{volume.kind}: {volume.problem}\n".encode(errors="replace")

    @property
    def error(self) -> PbsfsError:
        """The same as an error."""
        name = self.name.decode(errors="backslashreplace")
        return UnsupportedError(f"{name}: {self._volume.kind}: {self._volume.problem}")

    def shows(self, value: object) -> bool:
        return True

    async def stat(self) -> Stat:
        return self.known()

    def known(self) -> Stat:
        return self._stat(len(self._text), len(self._text))

    async def glance(self) -> Stat:
        return self.known()

    def forget_size(self) -> None:
        pass

    async def open(self) -> Blob:
        return Blob(self._text, self.tree.reader.store.memory.charge(HOLDER, len(self._text)))

    async def facts(self) -> dict[str, str]:
        volume = self._volume
        return snapshot_facts(self.info) | known_facts(
            file_system=volume.kind, size=str(volume.size), part_uuid=volume.part_uuid, problem=volume.problem
        )
