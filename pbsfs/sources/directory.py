"""A datastore directory on disk, read in place.

Nothing is ever written or locked, so a read-only medium and the disk of a dead server do. Blocking
file I/O runs in worker threads that are abandoned when the storage below does not answer in time: a
reader gets an error then, and the mount stays alive.

The directory may also be a copy or mount of what a server keeps in an object store (metadata below
`.cnt`), or the directory that such a server keeps beside it: that has all metadata, but of the chunks only
those in the server's cache. The others are not damaged, they are not here.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import trio

from pbsfs.base.errors import DamageError, NotFoundError, PbsfsError, SourceError, UsageError
from pbsfs.base.names import (
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
from pbsfs.formats import blob
from pbsfs.formats.manifest import MAX_MANIFEST_SIZE, CryptMode, Manifest
from pbsfs.runtime.report import DAY, Reporter
from pbsfs.sources import layout
from pbsfs.sources.base import FileInfo, GroupInfo, SnapshotInfo, Source, Usage
from pbsfs.sources.beneath import enter, exists, joined, read_file, scanned
from pbsfs.sources.layout import Steps, file_steps, group_steps, namespace_steps, snapshot_steps

log = logging.getLogger(__name__)

T = TypeVar("T")

IO_TIMEOUT = 60.0
"""Seconds that one file operation may take. A sick disk answers within its own retries (tens of
seconds); a network file system whose server is gone never does."""

STUCK_TIMEOUT = 2.0
STUCK_PAUSE = 10.0
"""While an operation is stuck for longer than IO_TIMEOUT, another one is given up after the first of these
(seconds), and then all others fail at once for the second: a listing of many files must not wait for each.
What can be read all the same, because only one file of the disk is sick, is read."""

MAX_THREADS = 32
"""Threads that may be in file operations at once. They mostly wait for the disk; stuck ones must not
use up trio's default pool, on which decoding depends."""

MAX_PARSED = 20_000
"""Snapshots whose parsed manifest is kept (about 1 KiB each), so that listing again is cheap."""

_MEDIUM_ERRORS = (errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENODATA, errno.EILSEQ)
"""What a file system says of one file that its disk can't read any more, or that fails its own checks."""

MAX_SMALL_FILE = 64 << 10
"""Bytes of an owner or notes file that are read."""

MAX_LOOKS = 500
"""Snapshots that one listing of groups looks into for a manifest, beyond the newest of each group: a cold
disk takes up to 10 ms for each."""

MAX_NAMED = 3
"""Names that a message gives as examples."""

_SAMPLE_AT_START = (64, 256)
_SAMPLE_ON_FAULT = (1 << 16, 4096)
"""Directories and files of the chunk store that are looked at to tell whether it is a cache. The first costs
a moment of each start; the second comes once, before a chunk is called damaged, and goes through all of a
chunk store that has few chunks in its 65,536 directories (2 s if the kernel has them cached)."""

_EVICTED_SHARE = 8
_LEAST_EVICTED = 3
"""The chunk store is a cache where one chunk file in so many is empty, and at least so many are. A power loss
leaves some empty files on an ordinary datastore, too."""

_BACKUP_FILE = re.compile(r".*(\.(fidx|didx|blob)|~\d+\.(fid|did|blo))", re.ASCII | re.IGNORECASE)
_NEARLY_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d.*", re.ASCII)


def is_datastore(path: Path) -> bool:
    """Whether `path` looks like a datastore: it has the chunk store that every datastore has."""
    return (path / layout.CHUNKS).is_dir()


class _Operation(Generic[T]):
    """Blocking `work` for a thread. `is_running`: whether a thread is in it; written by that thread only."""

    __slots__ = ("_work", "is_running")

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self.is_running = False

    def __call__(self) -> T:
        self.is_running = True
        try:
            return self._work()
        finally:
            self.is_running = False


class DirectorySource(Source):
    """The datastore in the directory `path`."""

    cheap_files = True

    def __init__(self, path: Path) -> None:
        """Raises SourceError where `path` is not a datastore."""
        self.path = path
        self._threads = trio.CapacityLimiter(MAX_THREADS)
        self._stuck: list[_Operation[Any]] = []  # given up, and still in a thread
        self._try_at = float("-inf")  # while there are such: trio's time before which others fail at once
        # manifest's identity on disk -> what was parsed from it
        self._parsed: OrderedDict[Snapshot, tuple[tuple[int, ...], SnapshotInfo]] = OrderedDict()
        self._lock = threading.Lock()  # guards it, as worker threads share it
        self._reporter = Reporter(log, repeat_after=DAY)
        self._chunks = f"{path}/{layout.CHUNKS}"
        self._metadata = str(path)
        self._check()
        if (
            path / layout.METADATA
        ).is_dir():  # what a server keeps in an object store: metadata apart from chunks
            self._metadata = f"{path}/{layout.METADATA}"
        self._is_cache: bool | None = None  # not decided yet
        self._deciding = threading.Lock()

    def __str__(self) -> str:
        return f"datastore directory {self.path}"

    async def open(self, nursery: trio.Nursery) -> None:
        try:
            is_cache = await self._in_thread(lambda: self._looks_like_a_cache(*_SAMPLE_AT_START))
        except SourceError as error:  # reading will say so, if it fails too
            log.debug("%s: %s", self, error)
            return
        if is_cache:
            self._is_cache = True
            self._reporter.report(
                f"{self} is the cache of a datastore in an object store: only some of its chunks are here; "
                "read it through the server, or from a copy of the bucket"
            )

    def _check(self) -> None:
        try:
            if is_datastore(self.path) and os.path.isdir(self._metadata):
                return
            kind = os.stat(self.path)
        except OSError as error:
            raise SourceError(f"cannot read datastore {self.path}: {error.strerror}") from None
        if not stat.S_ISDIR(kind.st_mode):
            raise SourceError(f"{self.path} is not a directory: name the datastore's directory")
        if is_datastore(self.path):
            raise SourceError(f"{self.path} is not a datastore: its directory '{layout.METADATA}' is gone")
        raise SourceError(
            f"{self.path} is not a datastore: it has no directory '{layout.CHUNKS}'{self._datastore_nearby()}"
        )

    def _datastore_nearby(self) -> str:
        """What to name instead, where that is easy to tell: a part of a datastore, or a bucket of them."""
        try:
            if is_datastore(self.path.parent):
                return f"; name {self.path.parent}"
            with os.scandir(self.path) as entries:
                inside = sorted(e.name for e in islice(entries, 1000) if is_datastore(Path(e.path)))
        except OSError:
            return ""
        return f"; name a datastore in it: {_some(inside)}" if inside else ""

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
        steps = file_steps(snapshot, archive)
        return await self._in_thread(lambda: read_file(self._metadata, steps, limit))

    async def fetch_chunk(self, snapshot: Snapshot, archive: Archive, digest: bytes, limit: int) -> bytes:
        return await self._in_thread(lambda: self._read_chunk(digest, limit))

    async def usage(self) -> Usage:
        return await self._in_thread(self._usage)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Runs blocking `work`; every OSError becomes a SourceError, and so does a stuck file system."""
        self._stuck = [operation for operation in self._stuck if operation.is_running]
        if self._stuck and trio.current_time() < self._try_at:
            raise SourceError(f"no answer from {self}: earlier reads of it are stuck", retryable=True)
        limit = STUCK_TIMEOUT if self._stuck else IO_TIMEOUT
        operation = _Operation(lambda: self._attempt(work))
        with trio.move_on_after(limit):
            result = await trio.to_thread.run_sync(operation, limiter=self._threads, abandon_on_cancel=True)
            self._try_at = float("-inf")
            return result
        if operation.is_running:
            self._stuck.append(operation)
        self._try_at = trio.current_time() + STUCK_PAUSE
        raise SourceError(f"no answer from {self} within {limit:.0f} s", retryable=True)

    # --- blocking: below here everything runs in a worker thread

    def _attempt(self, work: Callable[[], T]) -> T:
        """What `work` returns; an OSError becomes a NotFoundError or a SourceError."""
        try:
            return work()
        except (FileNotFoundError, NotADirectoryError) as error:
            self._check()  # a missing file is only told from a missing datastore by looking at the datastore
            raise NotFoundError(f"{error.filename} does not exist") from None
        except OSError as error:
            raise SourceError(
                f"cannot read {error.filename or self.path}: {error.strerror}",
                retryable=not isinstance(error, PermissionError),
            ) from None

    def _enter(self, steps: Steps) -> None:
        """Makes sure that a directory is there: what does not exist is not something empty."""
        enter(self._metadata, steps)
        self._check()  # and an empty directory where a disk was mounted is not 'no backups'

    def _enter_namespace(self, namespace: Namespace) -> Steps:
        """The directory of a namespace. Raises NotFoundError where there is none."""
        steps = namespace_steps(namespace)
        try:
            self._enter(steps)
        except (FileNotFoundError, NotADirectoryError):
            self._check()  # a datastore that is away is not one without this namespace
            raise NotFoundError(f"{self}: there is no namespace '{namespace}'") from None
        return steps

    def _namespaces(self, parent: Namespace) -> list[Namespace]:
        steps = self._enter_namespace(parent)
        if len(parent.parts) == MAX_NAMESPACE_DEPTH:
            return []
        return sorted(_valid(parent.child, self._directories((*steps, layout.NAMESPACES))).values())

    def _groups(self, namespace: Namespace) -> list[GroupInfo]:
        steps = self._enter_namespace(namespace)
        looks = iter(range(MAX_LOOKS))
        infos = [
            self._group_info(group, looks)
            for backup_type in BACKUP_TYPES
            for group in self._group_names(namespace, backup_type, (*steps, backup_type))
        ]
        return [info for info in infos if info is not None]

    def _group_names(self, namespace: Namespace, backup_type: str, steps: Steps) -> list[Group]:
        names = self._directories(steps)
        groups = _valid(functools.partial(Group, namespace, backup_type), names)
        self._report_mangled(steps, names - groups.keys(), _NEARLY_TIME, "backup ids", "100")
        return sorted(groups.values())

    def _group_info(self, group: Group, looks: Iterator[int]) -> GroupInfo | None:
        """What the group's directory says; None in the trash. `looks`: one for each snapshot that may be
        looked into once the newest is known; those beyond count as finished."""
        steps = group_steps(group)
        if self._is_there((*steps, layout.TRASHED)):
            log.info("%s: left out, it is in the trash", group)
            return None
        times = []
        try:
            times = self._times(group)
        except DamageError:
            pass  # reported already
        except (OSError, SourceError) as error:
            # Listed all the same, as its neighbours are: looking into it fails.
            self._reporter.report(f"{group}: {_problem(error, joined(self._metadata, steps))}")
        newest: int | None = None
        unfinished = 0
        for time in reversed(times):
            if newest is not None and next(looks, None) is None:
                break
            snapshot = snapshot_steps(group.snapshot(time))
            if self._is_there((*snapshot, MANIFEST.filename)) and not self._is_there(
                (*snapshot, layout.TRASHED)
            ):
                newest = time if newest is None else newest
            else:
                unfinished += 1
        return GroupInfo(
            group=group,
            last_backup=newest,
            snapshot_count=len(times) - unfinished,
            owner=_first_line(self._small_text((*steps, layout.OWNER))),
            notes=self._small_text((*steps, layout.NOTES)),
        )

    def _times(self, group: Group) -> list[int]:
        """The times of the group's snapshots, in order. Raises DamageError where it has some, and the names
        of all of them are spoilt."""
        steps = group_steps(group)
        names = self._directories(steps)
        times = _valid(parse_time, names)
        mangled = self._report_mangled(
            steps, names - times.keys(), _BACKUP_FILE, "times", "2023-11-14T22:13:20Z"
        )
        if mangled is not None and not times:
            raise DamageError(f"{group}: {mangled}")
        return sorted(times.values())

    def _report_mangled(
        self, steps: Steps, names: set[str], holding: re.Pattern[str], what: str, form: str
    ) -> str | None:
        """Warns of directories that look like backups by what is `holding` in them, but not by their names:
        copying to another file system or through another system changes ':' and cuts names short."""
        mangled = [name for name in sorted(names) if self._holds((*steps, name), holding)]
        if not mangled:
            return None
        text = (
            f"left out directories that hold backups, but whose names are not {what}: {_some(mangled)}; "
            f"copying changed them: rename them (to the form {form})"
        )
        self._reporter.report(f"{joined(self._metadata, steps)}: {text}")
        return text

    def _holds(self, steps: Steps, pattern: re.Pattern[str]) -> bool:
        """Whether something in a directory has a name like that; looks at the first hundred."""
        try:
            with scanned(self._metadata, steps) as entries:
                return any(pattern.fullmatch(entry.name) for entry in islice(entries, 100))
        except (OSError, SourceError):
            return False

    def _directories(self, steps: Steps) -> set[str]:
        """The names of the directories in a directory; none where there is no such directory."""
        try:
            with scanned(self._metadata, steps) as entries:
                found = set()
                for entry in entries:
                    if not _is(entry.is_symlink):
                        if _is(functools.partial(entry.is_dir, follow_symlinks=False)):
                            found.add(entry.name)
                    elif _leads_to_directory(entry):
                        path = joined(self._metadata, (*steps, entry.name))
                        self._reporter.report(
                            f"{path}: left out, it is a symbolic link; use a bind mount in its place"
                        )
                return found
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def _is_there(self, steps: Steps) -> bool:
        """Whether something has that name, as far as that can be looked at."""
        return _is(lambda: exists(self._metadata, steps))

    def _snapshots(self, group: Group) -> list[SnapshotInfo]:
        steps = group_steps(group)
        self._enter(steps)
        owner = _first_line(self._small_text((*steps, layout.OWNER)))
        found = (self._snapshot_info(Snapshot(group, time), owner) for time in self._times(group))
        return [info for info in found if info is not None]

    def _snapshot_info(self, snapshot: Snapshot, owner: str | None) -> SnapshotInfo | None:
        """What the snapshot's directory says; None while it is not finished, and in the trash."""
        steps = snapshot_steps(snapshot)
        try:
            with scanned(self._metadata, steps) as entries:
                names = {entry.name: entry for entry in entries}
                if layout.TRASHED in names:
                    log.info("%s: left out, it is in the trash", snapshot)
                    return None
                if MANIFEST.filename not in names:
                    self._reporter.report(
                        f"{snapshot}: left out, it has no manifest (unfinished or abandoned backup)"
                    )
                    return None
                manifest = names[MANIFEST.filename].stat(follow_symlinks=False)
                client_log = names.get(CLIENT_LOG.filename)
                log_size = client_log.stat(follow_symlinks=False).st_size if client_log is not None else None
            identity = (
                manifest.st_mtime_ns,
                manifest.st_size,
                manifest.st_ino,
                hash((owner, log_size, tuple(sorted(names)))),
            )
            with self._lock:
                known = self._parsed.get(snapshot)
                if known is not None and known[0] == identity:
                    self._parsed.move_to_end(snapshot)
                    return known[1]
            info = self._parse(snapshot, owner, set(names), log_size)
        except FileNotFoundError:
            return None  # forgotten while we looked
        except (OSError, SourceError) as error:
            info = SnapshotInfo(snapshot, (), owner, error=_problem(error, joined(self._metadata, steps)))
            self._reporter.report(f"{snapshot}: {info.error}")
            return info
        with self._lock:
            self._parsed[snapshot] = (identity, info)
            while len(self._parsed) > MAX_PARSED:
                self._parsed.popitem(last=False)
        return info

    def _parse(
        self, snapshot: Snapshot, owner: str | None, names: set[str], log_size: int | None
    ) -> SnapshotInfo:
        """What the manifest says. `names`: of the files that are there; `log_size`: bytes of the client's
        log, if there is one."""
        try:
            steps = file_steps(snapshot, MANIFEST)
            raw = read_file(self._metadata, steps, blob.stored_limit(MAX_MANIFEST_SIZE))
            manifest = Manifest.parse(blob.decode(raw, max_size=MAX_MANIFEST_SIZE, encrypted=False))
        except PbsfsError as error:
            self._reporter.report(f"{snapshot}: unreadable manifest: {error}")
            return SnapshotInfo(snapshot, (), owner, error=f"unreadable manifest: {error}")
        for name in manifest.unknown:
            self._reporter.report(f"{snapshot}: left out a file of a kind that is not known: {name!r}")
        files = [
            FileInfo(file.archive, file.size, file.crypt_mode, file.csum)
            for file in manifest.files
            if file.archive not in (MANIFEST, CLIENT_LOG)
        ]
        for file in files:
            if file.archive.filename not in names:
                self._reporter.report(f"{snapshot}: {file.archive} is in the manifest, but missing")
        files.append(FileInfo(MANIFEST, len(raw), CryptMode.NONE))
        if log_size is not None:
            files.append(FileInfo(CLIENT_LOG, log_size, None))
        return SnapshotInfo(
            snapshot=snapshot,
            files=tuple(files),
            owner=owner,
            protected=layout.PROTECTED in names,
            key_fingerprint=manifest.key_fingerprint,
            notes=manifest.notes,
            verify_state=manifest.verify_state,
        )

    def _usage(self) -> Usage:
        self._check()  # what is at the place of a disk that is away has another size
        found = os.statvfs(self.path)
        return Usage(
            total=found.f_blocks * found.f_frsize,
            used=(found.f_blocks - found.f_bfree) * found.f_frsize,
            available=found.f_bavail * found.f_frsize,
        )

    def _small_text(self, steps: Steps) -> str | None:
        try:
            return read_file(self._metadata, steps, MAX_SMALL_FILE).decode(errors="replace")
        except (OSError, SourceError, DamageError):
            return None

    def _read_chunk(self, digest: bytes, limit: int) -> bytes:
        steps = layout.chunk_steps(digest)
        try:
            data = read_file(self._chunks, steps, limit)
        except (FileNotFoundError, NotADirectoryError):
            raise self._absent(digest, "missing") from None
        except OSError as error:
            if error.errno not in _MEDIUM_ERRORS:
                raise
            self._check()  # the disk is there: it is this file that it can't read
            raise DamageError(f"chunk file {joined(self._chunks, steps)}: {error.strerror}") from None
        if not data:
            raise self._absent(digest, "it is empty")
        return data

    def _absent(self, digest: bytes, problem: str) -> DamageError | SourceError:
        """The error of a chunk of which nothing is here: damage, unless it is kept elsewhere."""
        self._check()
        with scanned(self._chunks, ()) as entries:
            if next(entries, None) is None:
                return SourceError(
                    f"{self._chunks} is empty: the disk with the chunks is not mounted there?", retryable=True
                )
        if self._is_only_a_cache():
            return SourceError(
                f"chunk {digest.hex()} is not here: the chunks of {self} are in an object store; read it "
                "through the server, or from a copy of the bucket"
            )
        bad = self._bad_copy(digest)
        if bad is not None:
            problem = f"a verification found it damaged ({bad})"
        return DamageError(f"chunk file {joined(self._chunks, layout.chunk_steps(digest))}: {problem}")

    def _bad_copy(self, digest: bytes) -> str | None:
        """The name of the first damaged copy of a chunk that a verification left."""
        try:
            with scanned(self._chunks, layout.chunk_steps(digest)[:-1]) as entries:
                return min((e.name for e in entries if layout.is_bad_copy(e.name, digest)), default=None)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _is_only_a_cache(self) -> bool:
        """Whether chunks that are not here are in an object store. Decided once."""
        with self._deciding:
            if self._is_cache is None:
                self._is_cache = self._looks_like_a_cache(*_SAMPLE_ON_FAULT)
            return self._is_cache

    def _looks_like_a_cache(self, directories: int, files: int) -> bool:
        """Looks at so many directories and files of the chunk store.

        A server that keeps its chunks in an object store leaves an empty file where it took a chunk out of
        its cache, and an empty `DIGEST.using` for one that never was in it (proxmox-backup 4.2.3,
        pbs-datastore/src/chunk_store.rs). Nothing else in the directory tells of the object store.
        """
        if self._metadata != str(self.path):
            return False  # a copy of the bucket itself
        with scanned(self._chunks, ()) as entries:
            folders = [entry.name for entry in islice(entries, directories)]
        seen = empty = 0
        for folder in folders:
            try:
                with scanned(self._chunks, (folder,)) as entries:
                    for entry in entries:
                        if entry.name.endswith(layout.UNCACHED):
                            return True
                        if layout.is_chunk_name(entry.name) and seen < files:
                            seen += 1
                            empty += entry.stat(follow_symlinks=False).st_size == 0
            except (OSError, SourceError):
                continue  # what it holds counts neither way
            if seen >= files:
                break
        return empty >= _LEAST_EVICTED and empty * _EVICTED_SHARE >= seen


def _problem(error: OSError | SourceError, path: str) -> str:
    """What was wrong, as text; `path` for an error that does not name one."""
    return (
        f"cannot read {error.filename or path}: {error.strerror}"
        if isinstance(error, OSError)
        else str(error)
    )


def _some(names: list[str]) -> str:
    """Some of `names`, as a message can show them."""
    more = f", … ({len(names)} in all)" if len(names) > MAX_NAMED else ""
    return ", ".join(map(ascii, names[:MAX_NAMED])) + more


def _is(kind: Callable[[], bool]) -> bool:
    """What an entry says it is. One that can't be looked at is taken for what is looked for: shown with
    an error of its own, it neither hides its neighbours nor is hidden itself."""
    try:
        return kind()
    except (OSError, SourceError):
        return True


def _leads_to_directory(link: os.DirEntry[str]) -> bool:
    """Whether there may be a directory at the end of a link."""
    try:
        return link.is_dir()
    except OSError as error:
        return error.errno != errno.ELOOP


def _valid(make: Callable[[str], T], names: Iterable[str]) -> dict[str, T]:
    """`make(name)` by name, for those for which it is not refused: others are no part of a datastore."""
    made = {}
    for name in names:
        try:
            made[name] = make(name)
        except UsageError:
            continue
    return made


def _first_line(text: str | None) -> str | None:
    lines = text.split("\n", 1) if text else []
    return lines[0].strip() or None if lines else None
