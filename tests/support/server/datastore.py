"""A datastore directory, listed as the server lists it.

Independent of `pbsfs.sources.directory`: it answers in the server's own terms and order (that of the
directory), and fails with the server's own texts. Nothing is kept, so that a test may change the
directory at any time. Blocking, and used from the server's loop all the same: directories of tests
are small.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbsfs.base.errors import PbsfsError, UsageError
from pbsfs.base.names import BACKUP_TYPES, MANIFEST, Group, Namespace, Snapshot, parse_time
from pbsfs.formats import blob
from pbsfs.formats.manifest import MAX_MANIFEST_SIZE
from pbsfs.sources import layout
from tests.support.server.answers import RefusedError

_STORED_FILE = re.compile(r".*\.([fd]idx|blob)")


@dataclass(frozen=True, slots=True)
class Datastore:
    """`name`: what clients call it; `shown`: the path that texts show in the place of the real one."""

    name: str
    path: Path
    shown: str

    def acl_path(self, namespace: Namespace) -> str:
        return "/".join(("/datastore", self.name, *namespace.parts))

    def snapshot_path(self, snapshot: Snapshot) -> Path:
        return self.path.joinpath(*layout.snapshot_steps(snapshot))

    def shown_path(self, path: Path) -> str:
        """How texts write a path: as the server would show it, in quotes."""
        return json.dumps(f"{self.shown}/{path.relative_to(self.path)}", ensure_ascii=False)

    def chunk_path(self, digest: str) -> Path:
        return self.path.joinpath(layout.CHUNKS, *layout.chunk_steps(bytes.fromhex(digest)))

    # --- listing

    def namespaces(self, parent: Namespace, depth: int) -> Iterator[Namespace]:
        """`parent` and what is below it, at most `depth` levels."""
        self._enter(self._namespace_path(parent))
        yield parent
        if depth > 0:
            for name in _directories(self._namespace_path(parent) / layout.NAMESPACES):
                try:
                    child = parent.child(name)
                except UsageError:
                    continue
                yield from self.namespaces(child, depth - 1)

    def groups(self, namespace: Namespace, backup_type: str | None = None) -> Iterator[Group]:
        path = self._namespace_path(namespace)
        self._enter(path)
        for found in _directories(path):
            if found in BACKUP_TYPES and backup_type in (None, found):
                for name in _directories(path / found):
                    try:
                        yield Group(namespace, found, name)
                    except UsageError:
                        continue

    def snapshots(self, group: Group) -> Iterator[Snapshot]:
        self._enter(self.path.joinpath(*layout.group_steps(group)))
        for name in _directories(self.path.joinpath(*layout.group_steps(group))):
            try:
                yield group.snapshot(parse_time(name))
            except UsageError:
                continue

    def exists(self, what: Group | Snapshot) -> bool:
        return (self.path / str(what)).is_dir()

    def owner(self, group: Group) -> str:
        """The owner of a group. Raises RefusedError."""
        path = self.path.joinpath(*layout.group_steps(group)) / "owner"
        try:
            return path.read_text().splitlines()[0].rstrip()
        except OSError as error:
            raise RefusedError(400, f"unable to read {self.shown_path(path)} - {os_error(error)}") from None

    def notes(self, group: Group) -> str | None:
        """The first line of a group's notes."""
        try:
            return (self.path.joinpath(*layout.group_steps(group)) / "notes").read_text().split("\n", 1)[0]
        except OSError:
            return None

    def stored_files(self, snapshot: Snapshot) -> list[str]:
        """The names of a snapshot's files. Raises RefusedError."""
        path = self.snapshot_path(snapshot)
        self._enter(path)
        return [e.name for e in os.scandir(path) if e.is_file() and _STORED_FILE.fullmatch(e.name)]

    def is_protected(self, snapshot: Snapshot) -> bool:
        return (self.snapshot_path(snapshot) / layout.PROTECTED).exists()

    def manifest(self, snapshot: Snapshot) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The manifest, and the files as they are listed. Raises RefusedError."""
        path = self.snapshot_path(snapshot) / MANIFEST.filename
        try:
            raw = path.read_bytes()
            manifest = json.loads(blob.decode(raw, max_size=MAX_MANIFEST_SIZE))
            files = [
                {
                    "filename": file["filename"],
                    "crypt-mode": file.get("crypt-mode", "none"),
                    "size": file["size"],
                }
                for file in manifest["files"]
            ]
        except OSError as error:
            raise RefusedError(
                400, f"unable to load blob '{self.shown_path(path)}' - {os_error(error)}"
            ) from None
        except (PbsfsError, ValueError, TypeError, KeyError) as error:
            raise RefusedError(400, f"unable to load blob '{self.shown_path(path)}' - {error}") from None
        mode = "none" if manifest.get("signature") is None else "sign-only"
        files.append({"filename": MANIFEST.filename, "crypt-mode": mode, "size": len(raw)})
        known = {file["filename"] for file in files}
        files += [{"filename": name} for name in self.stored_files(snapshot) if name not in known]
        return manifest, files

    # --- reading

    def read(self, path: Path) -> bytes:
        """A stored file. Raises OSError."""
        return path.read_bytes()

    def _namespace_path(self, namespace: Namespace) -> Path:
        return self.path.joinpath(*layout.namespace_steps(namespace))

    def _enter(self, path: Path) -> None:
        if not path.is_dir():
            raise RefusedError(400, "ENOENT: No such file or directory")


def os_error(error: OSError) -> str:
    """An I/O error in the words of the server's language."""
    return f"{error.strerror} (os error {error.errno})"


def _directories(path: Path) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(path) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
