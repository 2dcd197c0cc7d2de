"""Groups, their snapshots, and the link `latest`. Used from tasks of one trio loop."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator

import trio

from pbsfs.base.errors import DamageError, NotFoundError, PbsfsError
from pbsfs.base.names import MANIFEST, ArchiveKind, format_time, parse_time, usual_name
from pbsfs.disks.host import VolumeInfo
from pbsfs.reader.disks import OpenDisks, disks_of, open_disks
from pbsfs.sources.base import FileInfo, GroupInfo, SnapshotInfo
from pbsfs.sources.retry import SharedTry
from pbsfs.tree.archives import ArchiveDirectory, ArchiveFiles
from pbsfs.tree.files import BlobFile, ImageFile, known_facts, snapshot_facts
from pbsfs.tree.node import HOLDER, NAME_SIZE, Directory, Link, Listing, Node
from pbsfs.tree.stat import Stat, nanoseconds
from pbsfs.tree.volumes import NOTE, BrokenDisk, Note, VolumeDirectory
from pbsfs.tree.walk import Walk

log = logging.getLogger(__name__)

BLOBS_AT_ONCE = 4
"""Blobs of a snapshot that are fetched side by side for their sizes. Each is in memory meanwhile."""

SNAPSHOT_SIZE = 600
FILE_SIZE = 220
"""Bytes of memory for a snapshot without its notes, and for each of its files: measured."""

READING_SIZE = 3 << 10
"""Bytes of memory that a snapshot needs while a server's list is parsed: measured."""

MOST_SNAPSHOTS = 500_000
"""Snapshots that a group is taken to have at most: a server may claim any number."""

LATEST = "latest"
CATALOG = "catalog.pcat1"


class GroupDirectory(Directory):
    """A group: its finished snapshots, and `latest`. `looks`: at the blobs of its snapshots."""

    __slots__ = ("_info", "looks")

    def __init__(self, parent: Directory, name: bytes, info: GroupInfo, walk: Walk) -> None:
        super().__init__(parent.tree, parent, name, walk)
        self._info = info
        self.looks = Walk()

    @property
    def info(self) -> GroupInfo:
        """As the newest listing has it: a group stays the same group, whatever changes about it."""
        listed = self.parent.listed(self.name) if self.parent is not None else None
        if isinstance(listed, GroupInfo):
            self._info = listed
        return self._info

    async def list_values(self) -> Iterable[tuple[bytes, object]]:
        reader = self.tree.reader
        count = min(self.info.snapshot_count, MOST_SNAPSHOTS)
        reading = reader.store.memory.charge(HOLDER, count * READING_SIZE, passing=True)
        reader.store.memory.reclaim()
        try:
            return _snapshots(await reader.source.snapshots(self.info.group))
        finally:
            reading.resize(0)

    def size_of(self, value: SnapshotInfo | None) -> int:
        if value is None:
            return NAME_SIZE
        notes = sys.getsizeof(value.notes) if value.notes else 0
        return NAME_SIZE + SNAPSHOT_SIZE + len(value.files) * FILE_SIZE + notes

    def listed_as(self, name: bytes) -> bytes:
        # One node, path and inode number, whichever form of a snapshot's name is looked up.
        return usual_name(name)

    def make(self, name: bytes, value: SnapshotInfo | None) -> Node:
        return Latest(self, name) if value is None else SnapshotDirectory(self, name, value)

    def _mtime_ns(self) -> int | None:
        return nanoseconds(self.info.last_backup)

    async def facts(self) -> dict[str, str]:
        info = self.info
        return known_facts(
            namespace=str(info.group.namespace),
            backup_type=info.group.type,
            backup_id=info.group.id,
            backup_count=str(info.snapshot_count),
            last_backup=None if info.last_backup is None else format_time(info.last_backup),
            owner=info.owner,
            notes=info.notes,
        )


def _snapshots(listed: list[SnapshotInfo]) -> Iterator[tuple[bytes, object]]:
    for info in listed:
        yield os.fsencode(info.snapshot.time_text), info
    if any(info.error is None for info in listed):
        yield os.fsencode(LATEST), None


class SnapshotDirectory(Directory):
    """A snapshot: its files. `stats`: what was learned about them, by their stored names."""

    __slots__ = (
        "_disks",
        "_disks_version",
        "_looked_until",
        "_opening",
        "_version",
        "group",
        "info",
        "stats",
    )

    def __init__(self, group: GroupDirectory, name: bytes, info: SnapshotInfo) -> None:
        super().__init__(group.tree, group, name)
        self.group = group
        self.info = info
        self.stats: dict[str, Stat] = {}
        self._looked_until = float("-inf")
        self._version = b""  # the manifest that goes with the sizes of the blobs
        self._opening: SharedTry[bool] | None = None  # made when it is first needed
        self._disks: OpenDisks | None = None
        self._disks_version = b""  # the manifest that goes with them

    def shows(self, value: object) -> bool:
        return self.info == value

    async def children(self) -> Listing:
        # A snapshot never changes, so its files need no refreshing: where they do differ (a manifest
        # was repaired), the group's listing makes a new directory.
        if self.info.error is not None:
            raise DamageError(f"{self}: {self.info.error}")

        async def take() -> bool:
            await self._take(await self.list_values())
            return True

        if not self._values:  # its disks are opened once, however many tasks look into it
            self._opening = self._opening or SharedTry()
            await self._opening.run(lambda: bool(self._values) or None, take)
        return self.listing()

    async def list_values(self) -> Iterable[tuple[bytes, object]]:
        if not self.tree.opens_archives:
            return shown_files(self.info).items()
        shown: dict[bytes, object] = {**shown_archives(self.info)}
        for name, volume in (await self._volumes()).items():
            shown[name + b".img" if name in shown else name] = volume
        return shown.items()

    async def _volumes(self) -> dict[bytes, VolumeInfo | PbsfsError]:
        """The volumes on the disks, by name; an error for a disk whose volumes cannot be found."""
        files = disks_of([file for file in self.info.files if file.archive.kind is ArchiveKind.FIXED])
        if not files:
            return {}
        reader = self.tree.reader
        self._disks_version = await reader.version(self.info.snapshot, self.tree.refresh)
        self._disks = await open_disks(reader, self.info, files, self.tree.refresh)
        found: dict[bytes, VolumeInfo | PbsfsError] = {}
        for volume in self._disks.volumes:
            if volume.damage is not None:
                found[volume.name] = DamageError(volume.damage)
            else:
                found[volume.name if volume.problem is None else volume.name + NOTE] = volume
        return found | {os.fsencode(name): error for name, error in self._disks.failed.items()}

    async def child(self, name: bytes) -> Node:
        node = await super().child(name)
        if isinstance(node, ArchiveDirectory) and await node.was_replaced():
            self.tree.forget(node)
            return (await self.children())[name]
        if isinstance(node, VolumeDirectory | BrokenDisk | Note) and await self._disks_were_replaced():
            for other in list((await self.children()).values()):
                self.tree.forget(other)
            self._values = {}
            return await super().child(name)
        return node

    async def _disks_were_replaced(self) -> bool:
        """Whether the snapshot was made again since its disks were opened."""
        try:
            version = await self.tree.reader.version(self.info.snapshot, self.tree.refresh)
        except PbsfsError as error:
            log.debug("%s: %s", self, error)
            return False
        return version != self._disks_version

    def make(self, name: bytes, value: FileInfo | ArchiveFiles | VolumeInfo | PbsfsError) -> Node:
        if isinstance(value, ArchiveFiles):
            return ArchiveDirectory(self, name, value)
        if isinstance(value, PbsfsError):
            return BrokenDisk(self, name, value)
        if isinstance(value, VolumeInfo):
            if value.problem is None:
                assert self._disks is not None
                return VolumeDirectory(self, name, value, self._disks, self._disks_version)
            return Note(self, name, self.info.files[0], value)
        kind = BlobFile if value.archive.kind is ArchiveKind.BLOB else ImageFile
        return kind(self, name, value)

    def names_last(self) -> float:
        return self.group.names_last()  # which makes a new directory where anything did change

    async def look_at_blobs(self) -> None:
        """Learns how long the blobs are, from a source without cheap files. A blob that can't be read keeps
        its listed size, and the next call after the refresh time tries again."""
        if trio.current_time() < self._looked_until:
            return
        async with trio.open_nursery() as nursery:
            for node in self.group.looks.next_after(self):
                if isinstance(node, SnapshotDirectory):
                    nursery.start_soon(node._look_at_blobs)
            await self._look_at_blobs()
        self.tree.hold(self)

    async def _look_at_blobs(self) -> None:
        def is_known() -> bool | None:
            return trio.current_time() < self._looked_until or self.info.error is not None or None

        async def look() -> bool:
            blobs = [node for node in (await self.children()).values() if isinstance(node, BlobFile)]
            try:
                version = await self.tree.reader.version(self.info.snapshot, self.tree.refresh)
                if version != self._version:
                    for node in blobs:
                        node.forget_size()
                    self._version = version
                limiter = trio.CapacityLimiter(BLOBS_AT_ONCE)
                async with trio.open_nursery() as nursery:
                    for node in blobs:
                        nursery.start_soon(node.learn_size, limiter)
            except PbsfsError as error:
                log.debug("%s: the sizes of its blobs are not known: %s", self, error)
            self._looked_until = trio.current_time() + self.tree.refresh
            return True

        await self._asking().run(is_known, look)

    def _mtime_ns(self) -> int | None:
        return nanoseconds(self.info.snapshot.time)

    async def facts(self) -> dict[str, str]:
        modes = {f.crypt_mode.value for f in self.info.files if f.crypt_mode and f.archive != MANIFEST}
        return snapshot_facts(self.info) | known_facts(
            size=str(sum(file.size for file in self.info.files)),
            crypt_mode=modes.pop() if len(modes) == 1 else "mixed" if modes else None,
            error=self.info.error,
        )


def shown_files(info: SnapshotInfo) -> dict[bytes, FileInfo]:
    """The files of a snapshot by the names that they are shown under."""
    shown: dict[bytes, FileInfo] = {}
    stored = {file.archive.filename for file in info.files}
    for file in info.files:
        # 'x.img.fidx' and 'x.img.blob' would share a name: the second keeps its stored name, which
        # therefore no other file may take ('x.img.blob.blob').
        name = file.archive.name
        if name in stored or os.fsencode(name) in shown:
            name = file.archive.filename
        shown[os.fsencode(name)] = file
    return shown


def shown_archives(info: SnapshotInfo) -> dict[bytes, FileInfo | ArchiveFiles]:
    """The blobs of a snapshot, and its archives of files, by the names that `files` shows them under.

    An archive is one stream `NAME.pxar`, or metadata `NAME.mpxar` and payload `NAME.ppxar`.
    """
    shown: dict[bytes, FileInfo | ArchiveFiles] = {}
    streams: dict[str, FileInfo] = {}
    for name, file in shown_files(info).items():
        if file.archive.kind is ArchiveKind.BLOB:
            shown[name] = file
        elif file.archive.kind is ArchiveKind.DYNAMIC:
            streams[file.archive.name] = file
    for filename, file in streams.items():
        stem, _dot, form = filename.rpartition(".")
        if form == "pxar":
            archive = ArchiveFiles((file,), streams.get(CATALOG))
        elif form == "mpxar":  # without its payload it is shown, and opening it says what is wrong
            both = (filename, f"{stem}.ppxar")
            archive = ArchiveFiles(tuple(streams[name] for name in both if name in streams))
        else:
            continue
        taken = not stem or os.fsencode(stem) in shown
        shown[os.fsencode(filename if taken else stem)] = archive
    return shown


class Latest(Link):
    """The link to a group's newest snapshot that can be read, found when it is followed."""

    __slots__ = ("_group",)

    def __init__(self, group: GroupDirectory, name: bytes) -> None:
        super().__init__(group.tree, group, name)
        self._group = group

    @property
    def repeats(self) -> bool:
        return True

    async def target(self) -> bytes:
        """The name of the snapshot's directory. Raises NotFoundError, and what listing the group raises."""
        listing = await self._group.children()
        for name in reversed(listing):  # the newest first
            info = listing.values_by_name[name]
            if isinstance(info, SnapshotInfo) and info.error is None:
                return name
        raise NotFoundError(f"{self._group}: there is no finished snapshot")

    def _mtime_ns(self, target: bytes) -> int | None:
        return nanoseconds(parse_time(os.fsdecode(target)))
