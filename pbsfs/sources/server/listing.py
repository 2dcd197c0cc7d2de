"""The server's lists: JSON to values.

Each entry is checked alone: an invalid one, from a newer or a hostile server, is left out and reported, and
the others are still listed. All work that grows with a list is done here, so that it can run in a worker
thread. Used by `source`. Pure; from any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pbsfs.base.errors import DamageError, PbsfsError, SourceError
from pbsfs.base.names import BACKUP_TYPES, CLIENT_LOG, MANIFEST, Archive, Group, Namespace, Snapshot
from pbsfs.base.text import counted, first_of, one_line
from pbsfs.formats.index import MAX_ARCHIVE_SIZE
from pbsfs.formats.manifest import CryptMode
from pbsfs.sources.base import FileInfo, GroupInfo, SnapshotInfo, Usage

T = TypeVar("T")

MAX_DESCRIBED = 8
"""Left-out entries of one list that a report describes; the report counts the others."""

MAX_REASON = 200
"""Characters of the reason why an entry was left out: it may quote the server."""


@dataclass(frozen=True, slots=True)
class Listed(Generic[T]):
    """A parsed list. `count`: how many entries the server sent. `refused`: the entries that were left out,
    and why; empty if there are none."""

    entries: list[T]
    count: int
    refused: str


def parse_list(data: object, parse: Callable[[dict[str, Any]], T]) -> Listed[T]:
    """The entries that `parse` accepts, in the server's order. Raises SourceError if `data` is not a list.

    `parse` raises a PbsfsError for an entry that it does not accept.
    """
    if not isinstance(data, list):
        raise SourceError("the server's answer is not a list")
    entries: list[T] = []
    reasons: list[str] = []
    for entry in data:
        try:
            if not isinstance(entry, dict):
                raise DamageError("not an object")
            entries.append(parse(entry))
        except PbsfsError as error:
            if len(reasons) < MAX_DESCRIBED:
                reasons.append(one_line(str(error), MAX_REASON))
    return Listed(entries, len(data), _refused(len(data) - len(entries), reasons))


def _refused(count: int, reasons: list[str]) -> str:
    if not count:
        return ""
    first = f" (the first {len(reasons)} of {count})" if count > len(reasons) else ""
    return f"left out {counted(count, 'entry')} of the server's list{first}: {'; '.join(reasons)}"


def parse_groups(namespace: Namespace, data: object) -> Listed[GroupInfo]:
    """The groups of a namespace, by type and ID. See `parse_group`."""
    listed = parse_list(data, lambda entry: parse_group(namespace, entry))
    listed.entries.sort(key=lambda info: (BACKUP_TYPES.index(info.group.type), info.group.id))
    return listed


def parse_snapshots(group: Group, data: object) -> Listed[SnapshotInfo]:
    """The finished snapshots, oldest first."""
    files: list[str] = []  # the snapshots of which files were left out, and why

    def parse(entry: dict[str, Any]) -> SnapshotInfo | None:
        info, refused = parse_snapshot(group, entry)
        if info is not None and refused:
            files.append(f"{info.snapshot}: {refused}")
        return info

    listed = parse_list(data, parse)
    finished = [info for info in listed.entries if info is not None]
    refused = "; ".join(filter(None, [listed.refused, first_of(files)]))
    return Listed(sorted(finished, key=lambda info: info.snapshot), listed.count, refused)


def parse_namespace(entry: dict[str, Any]) -> Namespace:
    """One namespace."""
    return Namespace.parse(_text(entry, "ns"))


def parse_store(entry: dict[str, Any]) -> str:
    """The name of one datastore."""
    return _text(entry, "store")


def parse_group(namespace: Namespace, entry: dict[str, Any]) -> GroupInfo:
    """One group. `last_backup` is None if the newest snapshot is not finished: the entry has no other."""
    group = Group(namespace, _text(entry, "backup-type"), _text(entry, "backup-id"))
    count = _number(entry, "backup-count")
    # A group without a snapshot has 0 there.
    newest = Snapshot(group, _number(entry, "last-backup")).time if count else None
    files = entry.get("files")  # of the newest
    if isinstance(files, list) and MANIFEST.filename not in files:
        newest = None
    return GroupInfo(group, newest, count, _optional(entry, "owner"), _optional(entry, "comment"))


def parse_snapshot(group: Group, entry: dict[str, Any]) -> tuple[SnapshotInfo | None, str]:
    """The snapshot, and which of its files were left out and why.

    None if the snapshot is not finished: the server lists it without sizes and manifest. If the server lists
    a manifest but no sizes, it can't read that manifest.
    """
    if (_text(entry, "backup-type"), _text(entry, "backup-id")) != (group.type, group.id):
        raise DamageError(f"it does not belong to {group}")
    snapshot = Snapshot(group, _number(entry, "backup-time"))
    listed = parse_list(entry.get("files"), _file)
    files = tuple({file.archive: file for file in listed.entries if file is not None}.values())
    if not any(file.archive == MANIFEST for file in files) or entry.get("size") is None:
        if entry.get("size") is not None or {"filename": MANIFEST.filename} not in entry["files"]:
            return None, ""
        error = "unreadable manifest: the server can't read it"
        return SnapshotInfo(snapshot, (), _optional(entry, "owner"), error=error), ""
    verification = entry.get("verification")
    info = SnapshotInfo(
        snapshot=snapshot,
        files=files,
        owner=_optional(entry, "owner"),
        protected=entry.get("protected") is True,
        key_fingerprint=_optional(entry, "fingerprint"),
        notes=_optional(entry, "comment"),
        verify_state=_optional(verification, "state") if isinstance(verification, dict) else None,
    )
    return info, listed.refused


def parse_usage(data: object) -> Usage | None:
    """A datastore's status. None if the user may not see it: the server sends zeros then.

    Raises DamageError if `data` is not a status.
    """
    if not isinstance(data, dict):
        raise DamageError("the server's answer is not a status")
    found = Usage(_number(data, "total"), _number(data, "used"), _number(data, "avail"))
    return found if found.total else None


def _file(entry: dict[str, Any]) -> FileInfo | None:
    mode = entry.get("crypt-mode")
    try:
        crypt_mode = None if mode is None else CryptMode(mode)
    except ValueError:
        raise DamageError("no valid crypt-mode") from None
    archive = Archive(_text(entry, "filename"))
    if entry.get("size") is None:  # in the directory, and not in the manifest
        return FileInfo(archive, 0, None) if archive == CLIENT_LOG else None
    return FileInfo(archive, _number(entry, "size"), crypt_mode)


def _text(entry: dict[str, Any], name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str):
        raise DamageError(f"it has no valid '{name}'")
    return value


def _optional(entry: dict[str, Any], name: str) -> str | None:
    value = entry.get(name)
    return value.encode(errors="replace").decode() if isinstance(value, str) else None


def _number(entry: dict[str, Any], name: str) -> int:
    value = entry.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_ARCHIVE_SIZE:
        raise DamageError(f"it has no valid '{name}'")
    return value
