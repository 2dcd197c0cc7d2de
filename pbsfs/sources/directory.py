"""A datastore directory on disk, read in place.

Nothing is ever written or locked, so a read-only medium and the disk of a dead server do. Blocking
file I/O runs in worker threads that are abandoned when the storage below does not answer in time: a
reader gets an error then, and the mount stays alive.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import trio

from pbsfs.errors import DamageError, NotFoundError, PbsfsError, SourceError, UsageError
from pbsfs.formats import blob
from pbsfs.formats.manifest import MAX_MANIFEST_SIZE, CryptMode, Manifest
from pbsfs.names import (
    BACKUP_TYPES,
    CLIENT_LOG,
    MANIFEST,
    MAX_NAMESPACE_DEPTH,
    Archive,
    Group,
    Namespace,
    Snapshot,
    parse_time,
)
from pbsfs.sources.base import FileInfo, GroupInfo, SnapshotInfo, Source

log = logging.getLogger(__name__)

T = TypeVar("T")

IO_TIMEOUT = 60.0
"""Seconds that one file operation may take. A sick disk answers within its own retries (tens of
seconds); a network file system whose server is gone never does."""

MAX_THREADS = 32
"""Threads that may be in file operations at once. They mostly wait for the disk; stuck ones must not
use up trio's default pool, on which decoding depends."""

MAX_PARSED = 20_000
"""Snapshots whose parsed manifest is kept (about 1 KiB each), so that listing again is cheap."""

_MEDIUM_ERRORS = (errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENODATA, errno.EILSEQ)
"""What a file system says of one file that its disk can't read any more, or that fails its own checks."""

MAX_SMALL_FILE = 64 << 10
"""Bytes of an owner or notes file that are read."""


def is_datastore(path: Path) -> bool:
    """Whether `path` looks like a datastore: it has the chunk store that every datastore has."""
    return (path / ".chunks").is_dir()


class DirectorySource(Source):
    """The datastore in the directory `path`."""

    cheap_files = True

    def __init__(self, path: Path) -> None:
        """Raises SourceError where `path` is no datastore."""
        self.path = path
        self._threads = trio.CapacityLimiter(MAX_THREADS)
        # manifest's identity on disk -> what was parsed from it
        self._parsed: OrderedDict[Snapshot, tuple[tuple[int, ...], SnapshotInfo]] = OrderedDict()
        self._reported: set[str] = set()
        self._lock = threading.Lock()  # guards these two, which worker threads share
        self._check()

    def __str__(self) -> str:
        return f"datastore directory {self.path}"

    def _check(self) -> None:
        try:
            if is_datastore(self.path):
                return
            kind = os.stat(self.path)
        except OSError as error:
            raise SourceError(f"cannot read datastore {self.path}: {error.strerror}") from None
        if not stat.S_ISDIR(kind.st_mode):
            raise SourceError(f"{self.path} is not a directory: name the datastore's directory")
        raise SourceError(f"{self.path} is not a datastore: it has no directory '.chunks'")

    async def aclose(self) -> None:
        with self._lock:
            self._parsed.clear()

    async def namespaces(self, parent: Namespace) -> list[Namespace]:
        return await self._in_thread(lambda: self._namespaces(parent))

    async def groups(self, namespace: Namespace) -> list[GroupInfo]:
        return await self._in_thread(lambda: self._groups(namespace))

    async def snapshots(self, group: Group) -> list[SnapshotInfo]:
        return await self._in_thread(lambda: self._snapshots(group))

    async def fetch_file(self, snapshot: Snapshot, archive: Archive, limit: int) -> bytes:
        path = self._snapshot_path(snapshot) / archive.filename
        return await self._in_thread(lambda: _read(path, limit))

    async def fetch_chunk(self, snapshot: Snapshot, archive: Archive, digest: bytes, limit: int) -> bytes:
        name = digest.hex()
        path = self.path / ".chunks" / name[:4] / name
        return await self._in_thread(lambda: self._read_chunk(path, limit))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Runs blocking `work`; every OSError becomes a SourceError, and so does a stuck file system."""
        with trio.move_on_after(IO_TIMEOUT):
            try:
                return await trio.to_thread.run_sync(work, limiter=self._threads, abandon_on_cancel=True)
            except (FileNotFoundError, NotADirectoryError) as error:
                # A missing file is only told from a missing datastore by looking at the datastore.
                await trio.to_thread.run_sync(self._check, limiter=self._threads, abandon_on_cancel=True)
                raise NotFoundError(f"{error.filename} does not exist") from None
            except OSError as error:
                raise SourceError(
                    f"cannot read {error.filename or self.path}: {error.strerror}",
                    retryable=not isinstance(error, PermissionError),
                ) from None
        raise SourceError(f"no answer from {self} within {IO_TIMEOUT:.0f} s", retryable=True)

    def _report(self, text: str) -> None:
        """Logs a warning about the datastore, once however often the same is met."""
        with self._lock:
            known = text in self._reported
            self._reported.add(text)
        if not known:
            log.warning("%s", text)

    # --- blocking: below here everything runs in a worker thread

    def _namespace_path(self, namespace: Namespace) -> Path:
        return self.path.joinpath(*(step for part in namespace.parts for step in ("ns", part)))

    def _group_path(self, group: Group) -> Path:
        return self._namespace_path(group.namespace) / group.type / group.id

    def _snapshot_path(self, snapshot: Snapshot) -> Path:
        return self._group_path(snapshot.group) / snapshot.time_text

    def _enter(self, path: Path) -> None:
        """Makes sure that `path` is there: what does not exist is not something empty."""
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        self._check()  # and an empty directory where a disk was mounted is not 'no backups'

    def _enter_namespace(self, namespace: Namespace) -> Path:
        """The directory of a namespace. Raises NotFoundError where there is none."""
        path = self._namespace_path(namespace)
        try:
            self._enter(path)
        except (FileNotFoundError, NotADirectoryError):
            self._check()  # a datastore that is away is not one without this namespace
            raise NotFoundError(f"{self}: there is no namespace '{namespace}'") from None
        return path

    def _namespaces(self, parent: Namespace) -> list[Namespace]:
        path = self._enter_namespace(parent)
        if len(parent.parts) == MAX_NAMESPACE_DEPTH:
            return []
        return sorted(_valid(parent.child, _directories(path / "ns")))

    def _groups(self, namespace: Namespace) -> list[GroupInfo]:
        path = self._enter_namespace(namespace)
        return [
            self._group_info(group)
            for backup_type in BACKUP_TYPES
            for group in sorted(
                _valid(functools.partial(Group, namespace, backup_type), _directories(path / backup_type))
            )
        ]

    def _group_info(self, group: Group) -> GroupInfo:
        path = self._group_path(group)
        try:
            times = _valid(parse_time, _directories(path))
        except OSError as error:  # listed all the same, as its neighbours are: looking into it fails
            self._report(f"{group}: cannot read {error.filename or path}: {error.strerror}")
            times = []
        return GroupInfo(
            group=group,
            last_backup=max(times, default=None),
            snapshot_count=len(times),
            owner=_first_line(path / "owner"),
            notes=_small_text(path / "notes"),
        )

    def _snapshots(self, group: Group) -> list[SnapshotInfo]:
        path = self._group_path(group)
        self._enter(path)
        owner = _first_line(path / "owner")
        found = (
            self._snapshot_info(Snapshot(group, time), owner)
            for time in sorted(_valid(parse_time, _directories(path)))
        )
        return [info for info in found if info is not None]

    def _snapshot_info(self, snapshot: Snapshot, owner: str | None) -> SnapshotInfo | None:
        """What the snapshot's directory says; None while it is not finished."""
        path = self._snapshot_path(snapshot)
        try:
            entries = {entry.name: entry for entry in os.scandir(path) if _is(entry.is_file)}
            if MANIFEST.filename not in entries:
                self._report(f"{snapshot}: left out, it has no manifest (unfinished or abandoned backup)")
                return None
            manifest = entries[MANIFEST.filename].stat()
            identity = (
                manifest.st_mtime_ns,
                manifest.st_size,
                manifest.st_ino,
                hash((owner, tuple(sorted(entries)))),
            )
            with self._lock:
                known = self._parsed.get(snapshot)
                if known is not None and known[0] == identity:
                    self._parsed.move_to_end(snapshot)
                    return known[1]
            info = self._parse(snapshot, owner, path, entries)
        except FileNotFoundError:
            return None  # forgotten while we looked
        except OSError as error:
            info = SnapshotInfo(
                snapshot, (), owner, error=f"cannot read {error.filename or path}: {error.strerror}"
            )
            self._report(f"{snapshot}: {info.error}")
            return info
        with self._lock:
            self._parsed[snapshot] = (identity, info)
            while len(self._parsed) > MAX_PARSED:
                self._parsed.popitem(last=False)
        return info

    def _parse(
        self, snapshot: Snapshot, owner: str | None, path: Path, entries: dict[str, os.DirEntry[str]]
    ) -> SnapshotInfo:
        try:
            raw = _read(path / MANIFEST.filename, blob.stored_limit(MAX_MANIFEST_SIZE))
            manifest = Manifest.parse(blob.decode(raw, max_size=MAX_MANIFEST_SIZE, encrypted=False))
        except PbsfsError as error:
            self._report(f"{snapshot}: unreadable manifest: {error}")
            return SnapshotInfo(snapshot, (), owner, error=f"unreadable manifest: {error}")
        for name in manifest.unknown:
            self._report(f"{snapshot}: left out a file of a kind that is not known: {name!r}")
        files = [
            FileInfo(file.archive, file.size, file.crypt_mode, file.csum)
            for file in manifest.files
            if file.archive not in (MANIFEST, CLIENT_LOG)
        ]
        for file in files:
            if file.archive.filename not in entries:
                self._report(f"{snapshot}: {file.archive} is in the manifest, but missing")
        files.append(FileInfo(MANIFEST, len(raw), CryptMode.NONE))
        if CLIENT_LOG.filename in entries:
            files.append(FileInfo(CLIENT_LOG, entries[CLIENT_LOG.filename].stat().st_size, None))
        return SnapshotInfo(
            snapshot=snapshot,
            files=tuple(files),
            owner=owner,
            protected=".protected" in entries,
            key_fingerprint=manifest.key_fingerprint,
            notes=manifest.notes,
            verify_state=manifest.verify_state,
        )

    def _read_chunk(self, path: Path, limit: int) -> bytes:
        try:
            return _read(path, limit)
        except (FileNotFoundError, NotADirectoryError):
            self._check()
            bad = sorted(path.parent.glob(f"{path.name}.*.bad")) if path.parent.is_dir() else []
            reason = f"a verification found it damaged ({bad[0].name})" if bad else "missing"
            raise DamageError(f"chunk file {path}: {reason}") from None
        except OSError as error:
            if error.errno not in _MEDIUM_ERRORS:
                raise
            self._check()  # the disk is there: it is this file that it can't read
            raise DamageError(f"chunk file {path}: {error.strerror}") from None


def _directories(path: Path) -> list[str]:
    """The names of the directories in `path`; none where there is no such directory."""
    try:
        return [entry.name for entry in os.scandir(path) if _is(entry.is_dir)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is(kind: Callable[[], bool]) -> bool:
    """What an entry says it is. One that can't be looked at is taken for what is looked for: shown with
    an error of its own, it neither hides its neighbours nor is hidden itself."""
    try:
        return kind()
    except OSError:
        return True


def _valid(make: Callable[[str], T], names: Iterable[str]) -> list[T]:
    """`make(name)` for those names for which it is not refused: others are no part of a datastore."""
    made = []
    for name in names:
        try:
            made.append(make(name))
        except UsageError:
            continue
    return made


def _read(path: Path, limit: int) -> bytes:
    """All bytes of a regular file; DamageError where it has more than `limit`."""
    # O_NONBLOCK: a FIFO in the place of a file must not hang the reader.
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise DamageError(f"{path} is not a regular file")
        if found.st_size > limit:
            raise DamageError(f"{path} has {found.st_size} bytes where {limit} is the most")
        data = os.read(file, found.st_size)
        while len(data) < found.st_size:
            more = os.read(file, found.st_size - len(data))
            if not more:
                raise DamageError(f"{path} got shorter while it was read")
            data += more
        return data
    except OSError as error:
        error.filename = str(path)  # read(2) does not know it, and the message needs it
        raise
    finally:
        os.close(file)


def _small_text(path: Path) -> str | None:
    try:
        return _read(path, MAX_SMALL_FILE).decode(errors="replace")
    except (OSError, DamageError):
        return None


def _first_line(path: Path) -> str | None:
    text = _small_text(path)
    lines = text.split("\n", 1) if text else []
    return lines[0].strip() or None if lines else None
