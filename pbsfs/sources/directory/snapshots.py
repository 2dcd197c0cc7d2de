"""The snapshots of a group, as a directory has them: what their manifests say.

Parsed manifests are kept as long as nothing in the snapshot's directory changes, so that listing again costs
little. Used by the directory source, from several worker threads at once; everything blocks.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict

from pbsfs.base.errors import PbsfsError, SourceError
from pbsfs.base.names import CLIENT_LOG, MANIFEST, Group, Snapshot
from pbsfs.base.text import quoted
from pbsfs.formats import blob
from pbsfs.formats.manifest import MAX_MANIFEST_SIZE, CryptMode, Manifest
from pbsfs.runtime.report import Reporter
from pbsfs.sources import layout
from pbsfs.sources.base import FileInfo, SnapshotInfo
from pbsfs.sources.directory.datastore import Datastore
from pbsfs.sources.directory.limits import DirectoryLimits
from pbsfs.sources.directory.names import Names

log = logging.getLogger(__name__)

_Identity = tuple[int, ...]
"""What changes when a snapshot changes: its manifest, the names beside it, its owner."""


class SnapshotListing:
    """Lists the snapshots of `datastore`; problems go to `reporter`."""

    def __init__(
        self, datastore: Datastore, names: Names, reporter: Reporter, limits: DirectoryLimits
    ) -> None:
        self._datastore = datastore
        self._names = names
        self._reporter = reporter
        self._limits = limits
        self._lock = threading.Lock()  # guards what follows
        self._parsed: OrderedDict[Snapshot, tuple[_Identity, SnapshotInfo]] = OrderedDict()  # latest use last

    def forget(self) -> None:
        """Frees what is kept."""
        with self._lock:
            self._parsed.clear()

    def snapshots(self, group: Group) -> list[SnapshotInfo]:
        """The finished snapshots of `group`, oldest first.

        Raises FileNotFoundError if there is no such group, DamageError, SourceError, other OSErrors.
        """
        self._datastore.enter_group(group)
        owner = self._datastore.owner(group)
        found = (self._info(Snapshot(group, time), owner) for time in self._names.times(group))
        return [info for info in found if info is not None]

    def _info(self, snapshot: Snapshot, owner: str | None) -> SnapshotInfo | None:
        """What the snapshot's directory says; None if it is not finished, or in the trash."""
        steps = layout.snapshot_steps(snapshot)
        try:
            with self._datastore.metadata.scanned(steps) as entries:
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
            info = self._kept(snapshot, identity)
            if info is not None:
                return info
            info = self._parse(snapshot, owner, set(names), log_size)
        except FileNotFoundError:
            return None  # forgotten since its group was listed
        except (OSError, SourceError) as error:
            info = SnapshotInfo(snapshot, (), owner, error=self._datastore.metadata.problem(error, steps))
            self._reporter.report(f"{snapshot}: {info.error}")
            return info
        self._keep(snapshot, identity, info)
        return info

    def _kept(self, snapshot: Snapshot, identity: _Identity) -> SnapshotInfo | None:
        with self._lock:
            known = self._parsed.get(snapshot)
            if known is None or known[0] != identity:
                return None
            self._parsed.move_to_end(snapshot)
            return known[1]

    def _keep(self, snapshot: Snapshot, identity: _Identity, info: SnapshotInfo) -> None:
        with self._lock:
            self._parsed[snapshot] = (identity, info)
            self._parsed.move_to_end(snapshot)
            while len(self._parsed) > self._limits.parsed_manifests:
                self._parsed.popitem(last=False)

    def _parse(
        self, snapshot: Snapshot, owner: str | None, names: set[str], log_size: int | None
    ) -> SnapshotInfo:
        """What the manifest says. `names`: of the files in the directory; `log_size`: bytes of the client's
        log, if it is there. Raises SourceError, OSError."""
        try:
            steps = layout.file_steps(snapshot, MANIFEST)
            raw = self._datastore.metadata.read_file(steps, blob.stored_limit(MAX_MANIFEST_SIZE))
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
