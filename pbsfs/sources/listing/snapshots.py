"""The snapshots of a group, as the directories of a datastore have them: what their manifests say.

Parsed manifests are kept as long as nothing in the snapshot's directory changes, so that listing again costs
little. Used by sources, from several worker threads at once; everything blocks.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from typing import NamedTuple

from pbsfs.base.errors import PbsfsError, SourceError
from pbsfs.base.names import CLIENT_LOG, MANIFEST, Group, Snapshot
from pbsfs.base.text import quoted
from pbsfs.formats import blob
from pbsfs.formats.manifest import MAX_MANIFEST_SIZE, CryptMode, Manifest
from pbsfs.runtime.report import Reporter
from pbsfs.sources import layout
from pbsfs.sources.base import FileInfo, SnapshotInfo
from pbsfs.sources.listing.names import Names
from pbsfs.sources.listing.store import Store

log = logging.getLogger(__name__)

_Identity = tuple[int, ...]
"""What changes when a snapshot changes: its manifest, the names beside it, its owner."""


class KeptManifests:
    """What the latest `limit` manifests say, by snapshot. For any thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()  # guards what follows
        self._parsed: OrderedDict[Snapshot, tuple[_Identity, SnapshotInfo]] = OrderedDict()  # latest use last

    def forget(self) -> None:
        """Frees what is kept."""
        with self._lock:
            self._parsed.clear()

    def get(self, snapshot: Snapshot, identity: _Identity) -> SnapshotInfo | None:
        """What the manifest says; None if the one that is kept is not that of `identity`."""
        with self._lock:
            known = self._parsed.get(snapshot)
            if known is None or known[0] != identity:
                return None
            self._parsed.move_to_end(snapshot)
            return known[1]

    def put(self, snapshot: Snapshot, identity: _Identity, info: SnapshotInfo) -> None:
        """Keeps what the manifest of `identity` says."""
        with self._lock:
            self._parsed[snapshot] = (identity, info)
            self._parsed.move_to_end(snapshot)
            while len(self._parsed) > self._limit:
                self._parsed.popitem(last=False)


class _Found(NamedTuple):
    """A finished snapshot's directory. `names`: of the files in it. `log_size`: bytes of the client's log, if
    it is there."""

    identity: _Identity
    names: frozenset[str]
    log_size: int | None


class SnapshotListing:
    """Lists the snapshots of `store`; problems go to `reporter`, and parsed manifests to `kept`."""

    def __init__(self, store: Store, names: Names, reporter: Reporter, kept: KeptManifests) -> None:
        self._store = store
        self._names = names
        self._reporter = reporter
        self._kept = kept

    def snapshots(self, group: Group) -> list[SnapshotInfo]:
        """The finished snapshots of `group`, oldest first.

        Raises FileNotFoundError if there is no such group, DamageError, SourceError, other OSErrors.
        """
        self._store.enter_group(group)
        owner = self._store.owner(group)
        found = (self._info(Snapshot(group, time), owner) for time in self._names.times(group))
        return [info for info in found if info is not None]

    def unread(self, group: Group) -> list[Snapshot]:
        """The snapshots whose manifests `snapshots` would read now. Raises like it."""
        owner = self._store.owner(group)
        unread = []
        for snapshot in (Snapshot(group, time) for time in self._names.times(group)):
            found = self._look(snapshot, owner)
            if found is not None and self._kept.get(snapshot, found.identity) is None:
                unread.append(snapshot)
        return unread

    def _look(self, snapshot: Snapshot, owner: str | None) -> _Found | None:
        """What is in the snapshot's directory; None if it is not finished, or in the trash."""
        with self._store.metadata.scanned(layout.snapshot_steps(snapshot)) as entries:
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
        return _Found(identity, frozenset(names), log_size)

    def _info(self, snapshot: Snapshot, owner: str | None) -> SnapshotInfo | None:
        """What the snapshot's directory says; None if it is not finished, or in the trash."""
        try:
            found = self._look(snapshot, owner)
            if found is None:
                return None
            info = self._kept.get(snapshot, found.identity)
            if info is not None:
                return info
            info = self._parse(snapshot, owner, found)
        except FileNotFoundError:
            return None  # forgotten since its group was listed
        except (OSError, SourceError) as error:
            problem = self._store.metadata.problem(error, layout.snapshot_steps(snapshot))
            info = SnapshotInfo(snapshot, (), owner, error=problem)
            self._reporter.report(f"{snapshot}: {info.error}")
            return info
        if info.error is None:  # the next listing tries again
            self._kept.put(snapshot, found.identity, info)
        return info

    def _parse(self, snapshot: Snapshot, owner: str | None, found: _Found) -> SnapshotInfo:
        """What the manifest says. Raises SourceError, OSError."""
        try:
            steps = layout.file_steps(snapshot, MANIFEST)
            raw = self._store.metadata.read_file(steps, blob.stored_limit(MAX_MANIFEST_SIZE))
            manifest = Manifest.parse(blob.decode(raw, max_size=MAX_MANIFEST_SIZE, encrypted=False))
        except PbsfsError as error:
            self._reporter.report(f"{snapshot}: unreadable manifest: {error}")
            return SnapshotInfo(snapshot, (), owner, error=f"unreadable manifest: {error}")
        for name in manifest.unknown:
            self._reporter.report(f"{snapshot}: left out a file of an unknown kind: {quoted(name)}")
        files = [
            FileInfo(file.archive, file.size, file.crypt_mode, file.csum)
            for file in manifest.files
            if file.archive not in (MANIFEST, CLIENT_LOG)
        ]
        for file in files:
            if file.archive.filename not in found.names:
                self._reporter.report(f"{snapshot}: {file.archive} is in the manifest, but missing")
        files.append(FileInfo(MANIFEST, len(raw), CryptMode.NONE))
        if found.log_size is not None:
            files.append(FileInfo(CLIENT_LOG, found.log_size, None))
        return SnapshotInfo(
            snapshot=snapshot,
            files=tuple(files),
            owner=owner,
            protected=layout.PROTECTED in found.names,
            key_fingerprint=manifest.key_fingerprint,
            notes=manifest.notes,
            verify_state=manifest.verify_state,
        )
