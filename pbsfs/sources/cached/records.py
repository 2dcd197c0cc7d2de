"""What a source said, as records in the cache on disk: listings, manifests and logs, with their time.

Only `--offline` reads them; nothing verifies what a record says, so it uses only
those that this user or root wrote.
Pure functions, for any thread.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pbsfs.base.errors import DamageError, PbsfsError
from pbsfs.base.names import Archive, Group, Namespace, Snapshot
from pbsfs.formats.index import MAX_ARCHIVE_SIZE
from pbsfs.formats.manifest import CryptMode
from pbsfs.sources.base import FileInfo, GroupInfo, SnapshotInfo
from pbsfs.sources.cached.files import Kind, Name

MAX_RECORD = 256 << 20
"""Bytes: a listing of a million snapshots has some 200 MB."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a record is about. `source`: which source, with the user; `what`: the kind of answer; `of`: the
    namespace, group, snapshot or file."""

    source: str
    what: str
    of: str

    @property
    def own(self) -> Name:
        """The name of the record that this user writes: no other user's takes its place."""
        return self._of(os.geteuid())

    @property
    def usable(self) -> list[Name]:
        """The names of the records that this user believes: its own, and that of root."""
        return [self._of(user) for user in dict.fromkeys((os.geteuid(), 0))]

    def _of(self, user: int) -> Name:
        return Name(hashlib.sha256(f"{self._text} {user}".encode()).digest(), Kind.RECORD)

    @property
    def _text(self) -> str:
        return json.dumps([self.source, self.what, self.of])

    def pack(self, body: bytes, digest: bytes) -> bytes:
        """A record of `body`, which the source returned now. `digest`: its SHA-256."""
        head = {"place": self._text, "time": int(time.time()), "sha256": digest.hex()}
        return json.dumps(head).encode() + b"\n" + body

    def unpack(self, record: bytes) -> tuple[int, bytes]:
        """The time of a record in seconds, and its body. Raises DamageError if it is not of this place
        or not whole, as after a power failure."""
        head, _newline, body = record.partition(b"\n")
        found = _parsed(head)
        if not isinstance(found, dict) or found.get("place") != self._text:
            raise DamageError("it is about something else")
        if hashlib.sha256(body).hexdigest() != found.get("sha256"):
            raise DamageError("it is not whole")
        return _whole(found, "time"), body


def pack_namespaces(found: Sequence[Namespace]) -> bytes:
    return json.dumps([str(namespace) for namespace in found]).encode()


def unpack_namespaces(body: bytes) -> list[Namespace]:
    """Raises PbsfsError."""
    return [Namespace.parse(_is_text(each)) for each in _list(body)]


def pack_groups(found: Sequence[GroupInfo]) -> bytes:
    return json.dumps(
        [
            [info.group.type, info.group.id, info.last_backup, info.snapshot_count, info.owner, info.notes]
            for info in found
        ]
    ).encode()


def unpack_groups(namespace: Namespace, body: bytes) -> list[GroupInfo]:
    """Raises PbsfsError."""
    groups = []
    for each in _list(body):
        kind, name, last, count, owner, notes = _fields(each, 6)
        group = Group(namespace, _is_text(kind), _is_text(name))
        newest = None if last is None else _is_whole(last)
        groups.append(GroupInfo(group, newest, _is_whole(count), _maybe(owner), _maybe(notes)))
    return groups


def pack_snapshots(found: Sequence[SnapshotInfo]) -> bytes:
    return json.dumps(
        [
            {
                "time": info.snapshot.time,
                "files": [
                    [
                        file.archive.filename,
                        file.size,
                        None if file.crypt_mode is None else file.crypt_mode.value,
                        None if file.csum is None else file.csum.hex(),
                    ]
                    for file in info.files
                ],
                "owner": info.owner,
                "protected": info.protected,
                "key_fingerprint": info.key_fingerprint,
                "notes": info.notes,
                "verify_state": info.verify_state,
                "error": info.error,
            }
            for info in found
        ]
    ).encode()


def unpack_snapshots(group: Group, body: bytes) -> list[SnapshotInfo]:
    """Raises PbsfsError."""
    found = []
    for each in _list(body):
        if not isinstance(each, dict) or not isinstance(each.get("files"), list):
            raise DamageError("not a snapshot")
        found.append(
            SnapshotInfo(
                snapshot=Snapshot(group, _whole(each, "time")),
                files=tuple(_file(file) for file in each["files"]),
                owner=_maybe(each.get("owner")),
                protected=each.get("protected") is True,
                key_fingerprint=_maybe(each.get("key_fingerprint")),
                notes=_maybe(each.get("notes")),
                verify_state=_maybe(each.get("verify_state")),
                error=_maybe(each.get("error")),
            )
        )
    return found


def _file(each: Any) -> FileInfo:
    name, size, mode, csum = _fields(each, 4)
    try:
        return FileInfo(
            Archive(_is_text(name)),
            _is_whole(size),
            None if mode is None else CryptMode(mode),
            None if csum is None else bytes.fromhex(_is_text(csum)),
        )
    except (ValueError, PbsfsError) as error:
        raise DamageError(f"not a file: {error}") from None


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DamageError("not JSON") from None


def _list(body: bytes) -> list[Any]:
    found = _parsed(body)
    if not isinstance(found, list):
        raise DamageError("not a list")
    return found


def _fields(each: Any, count: int) -> list[Any]:
    if not isinstance(each, list) or len(each) != count:
        raise DamageError(f"not {count} fields")
    return each


def _is_text(value: Any) -> str:
    if not isinstance(value, str):
        raise DamageError("not text")
    return value


def _maybe(value: Any) -> str | None:
    return None if value is None else _is_text(value)


def _is_whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_ARCHIVE_SIZE:
        raise DamageError("not a number")
    return value


def _whole(each: dict[str, Any], name: str) -> int:
    return _is_whole(each.get(name))
