"""The server's lists: JSON to values.

Pure. Every entry is checked by itself: one that makes no sense (a newer server's, or a hostile one's) is left
out, and told of, and does not hide its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pbsfs.errors import DamageError, PbsfsError, SourceError
from pbsfs.formats.index import MAX_ARCHIVE_SIZE
from pbsfs.formats.manifest import CryptMode
from pbsfs.names import CLIENT_LOG, MANIFEST, Archive, Group, Namespace, Snapshot
from pbsfs.sources.base import FileInfo, GroupInfo, SnapshotInfo, Usage

T = TypeVar("T")


def parse_list(data: object, parse: Callable[[dict[str, Any]], T]) -> tuple[list[T], list[str]]:
    """The entries that `parse` takes, and for each that it refuses, why. Raises SourceError for no list."""
    if not isinstance(data, list):
        raise SourceError("the server's answer is no list")
    entries: list[T] = []
    refused: list[str] = []
    for entry in data:
        try:
            if not isinstance(entry, dict):
                raise DamageError("not an object")
            entries.append(parse(entry))
        except PbsfsError as error:
            refused.append(f"left out an entry of the server's list: {error}")
    return entries, refused


def parse_namespace(entry: dict[str, Any]) -> Namespace:
    return Namespace.parse(_text(entry, "ns"))


def parse_store(entry: dict[str, Any]) -> str:
    return _text(entry, "store")


def parse_group(namespace: Namespace, entry: dict[str, Any]) -> GroupInfo:
    group = Group(namespace, _text(entry, "backup-type"), _text(entry, "backup-id"))
    count = _number(entry, "backup-count")
    # A group without a finished backup says 0, or the least of all times.
    newest = Snapshot(group, _number(entry, "last-backup")).time if count else None
    return GroupInfo(group, newest, count, _optional(entry, "owner"), _optional(entry, "comment"))


def parse_snapshot(group: Group, entry: dict[str, Any]) -> SnapshotInfo | None:
    """None for a snapshot that is not finished: it is listed without sizes and manifest.

    One that is listed without sizes, but with a manifest, has one that the server can't read.
    """
    if (_text(entry, "backup-type"), _text(entry, "backup-id")) != (group.type, group.id):
        raise DamageError(f"it is not of {group}")
    snapshot = Snapshot(group, _number(entry, "backup-time"))
    listed, _refused = parse_list(entry.get("files"), _file)
    files = tuple({file.archive: file for file in listed if file is not None}.values())
    if not any(file.archive == MANIFEST for file in files) or entry.get("size") is None:
        if entry.get("size") is not None or {"filename": MANIFEST.filename} not in entry["files"]:
            return None
        return SnapshotInfo(
            snapshot, (), _optional(entry, "owner"), error="unreadable manifest: the server can't read it"
        )
    verification = entry.get("verification")
    return SnapshotInfo(
        snapshot=snapshot,
        files=files,
        owner=_optional(entry, "owner"),
        protected=entry.get("protected") is True,
        key_fingerprint=_optional(entry, "fingerprint"),
        notes=_optional(entry, "comment"),
        verify_state=_optional(verification, "state") if isinstance(verification, dict) else None,
    )


def parse_usage(data: object) -> Usage | None:
    """A datastore's status. None where the server does not tell this user: all is 0 then.

    Raises DamageError for what is not a status.
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
    if entry.get("size") is None:  # in the directory, but not in the manifest
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
