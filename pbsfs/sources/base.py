"""The interface that every source of backups has.

A source lists backups and returns stored bytes. It verifies and decodes nothing that the reader layer can
verify for all sources. All methods may be called concurrently from tasks of one trio loop. They raise
`NotFoundError` for what does not exist, `SourceError` if the source can't be read, and `DamageError` if the
stored data is not valid.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import trio

from pbsfs.base.errors import DamageError, NotFoundError
from pbsfs.base.names import Archive, Group, Namespace, Snapshot
from pbsfs.base.text import first_of
from pbsfs.formats.blob import Stored
from pbsfs.formats.manifest import CryptMode
from pbsfs.sources.collection import Collection
from pbsfs.sources.rate import Rate

log = logging.getLogger(__name__)

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """A group as listed. `last_backup`: time of its newest snapshot, if it has any.

    `snapshot_count` may count snapshots that are not listed because they are not finished.
    """

    group: Group
    last_backup: int | None
    snapshot_count: int
    owner: str | None
    notes: str | None = None


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file of a snapshot as listed.

    `size`: of an index, the archive's decoded bytes; of a blob, its stored bytes. `csum` (32 bytes)
    if the listing has it. `crypt_mode` None: unknown (the file is not in the manifest).
    """

    archive: Archive
    size: int
    crypt_mode: CryptMode | None
    csum: bytes | None = None


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A finished snapshot as listed. `error`: why its contents can't be listed, if so; the source has logged
    that."""

    snapshot: Snapshot
    files: tuple[FileInfo, ...]
    owner: str | None = None
    protected: bool = False
    key_fingerprint: str | None = None
    notes: str | None = None
    verify_state: str | None = None
    error: str | None = None


class Usage(NamedTuple):
    """The space of a datastore in bytes, as statvfs(3) has it. `available`: what its owner may still use;
    with `used` it may be less than `total`."""

    total: int
    used: int
    available: int


@dataclass(frozen=True, slots=True)
class Expected:
    """What will be read first, so that a source may ask for it ahead. What does not exist is no error.

    `namespaces`: whose groups are listed; `group`: whose snapshots are. `snapshot`: of which `files` are
    read. `sessions`: whether images or streams of it are read, too.
    """

    namespaces: tuple[Namespace, ...] = ()
    group: Group | None = None
    snapshot: Snapshot | None = None
    files: tuple[Archive, ...] = ()
    sessions: bool = False


class Source(abc.ABC):
    """A place to read backups from: a server, or a datastore in a directory."""

    cheap_files: bool
    """Whether reading an index costs little enough to do it for a stat."""

    doubts: tuple[float, ...] = ()
    """The pauses, in seconds, after each of which data is fetched again before it counts as damage. Empty if
    nothing can change the data between the storage and pbsfs."""

    rate: Rate | None = None
    """The limit of the bytes a second that are fetched; None for no limit."""

    @abc.abstractmethod
    def __str__(self) -> str:
        """What the source is, for messages: no secrets."""

    def expect(self, expected: Expected) -> None:  # noqa: B027 - most have nothing to gain
        """Called before `open`, if it is known what will be read first."""

    def prepare(self, snapshot: Snapshot) -> None:  # noqa: B027 - most have nothing to gain
        """Called before a manifest is asked for, if an image or stream of the snapshot is read then."""

    async def open(self, nursery: trio.Nursery) -> None:  # noqa: B027 - most have nothing to do
        """Called once before reading; raises SourceError if the source can't be used.

        The background tasks of the source run in `nursery`.
        """

    @abc.abstractmethod
    async def namespaces(self, parent: Namespace) -> list[Namespace]:
        """The namespaces directly below `parent`, in order."""

    @abc.abstractmethod
    async def groups(self, namespace: Namespace) -> list[GroupInfo]:
        """The groups in `namespace` itself, in order."""

    @abc.abstractmethod
    async def snapshots(self, group: Group) -> list[SnapshotInfo]:
        """The finished snapshots of `group`, oldest first."""

    @abc.abstractmethod
    async def fetch_file(self, snapshot: Snapshot, archive: Archive, limit: int) -> bytes:
        """The stored bytes of one file of a snapshot; DamageError if they are more than `limit`."""

    @abc.abstractmethod
    async def fetch_chunk(self, snapshot: Snapshot, archive: Archive, digest: bytes, limit: int) -> Stored:
        """The stored blob of a chunk that the index `archive` names; DamageError above `limit` bytes."""

    async def kept_chunk(self, digest: bytes, limit: int, *, claim: bool = True) -> Stored | None:
        """The stored blob of a chunk, of at most `limit` bytes, if a cache in front of the source has it.

        It costs the source nothing, so it needs no turn of `rate`. Not verified either. `claim`: whether the
        caller fetches the chunk at once if it is not kept, so that other processes may wait for it.
        """
        return None

    async def kept_file(self, csum: bytes, limit: int) -> bytes | None:
        """The same for an index or blob, by its checksum in the manifest."""
        return None

    def keep_file(self, csum: bytes, data: bytes) -> None:  # noqa: B027 - most have no cache
        """Has that cache keep an index or blob, if the work of `confirmed` that fetched it accepts it."""

    async def missing_chunks(self, snapshot: Snapshot, digests: Sequence[bytes]) -> list[int] | None:
        """Which of these chunks of `snapshot` are not stored, by their places in `digests`; reads none.

        None if only reading them can show that. Raises SourceError, also if they may be stored elsewhere, or
        if the snapshot was removed meanwhile.
        """
        return None

    async def usage(self) -> Usage | None:
        """The space of the datastore; None if it is unknown."""
        return None

    async def collection(self) -> Collection | None:
        """The last garbage collection; None if the user may not see it, or nothing is noted."""
        return None

    async def confirmed(self, work: Callable[[], Awaitable[R]]) -> R:
        """The result of `work`, which fetches something and checks it; done again while it raises
        DamageError, as often as `doubts` says."""
        for pause in self.doubts:
            try:
                return await work()
            except DamageError as error:
                log.debug("%s: %s; fetching it again", self, error)
            await trio.sleep(pause)
        return await work()

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Releases all resources of the source."""


async def no_namespace(
    source: str, list_below: Callable[[Namespace], Awaitable[list[Namespace]]], namespace: Namespace
) -> NotFoundError:
    """The error for a namespace that does not exist, with those that there are in the one above.

    `list_below`: as `Source.namespaces`. Raises SourceError.
    """
    try:
        found = first_of(map(str, await list_below(Namespace(namespace.parts[:-1]))))
        there = f"there is {found}" if found else "there is none"
    except NotFoundError as error:  # which names those above that
        there = str(error).rpartition("; ")[2]
    return NotFoundError(f"{source}: there is no namespace '{namespace}'; {there}")
