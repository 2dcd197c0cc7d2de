"""Names of things in a datastore: namespace, group, snapshot, archive.

Immutable values that parse and format themselves, nothing else. A value that exists is safe to make
a path of: the constructors refuse everything that the server would refuse (rules restated from
proxmox-backup 3.2.4, `pbs-api-types`: `[A-Za-z0-9_][A-Za-z0-9._-]*` for ids and namespace names,
at most 7 levels of namespaces).
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from datetime import UTC, datetime

from pbsfs.base.errors import UsageError

BACKUP_TYPES = ("vm", "ct", "host")
"""The backup types, in the order in which they are shown."""

MAX_NAMESPACE_DEPTH = 7

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*", re.ASCII)
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)
_SAFE_TIME = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d)-(\d\d)-(\d\dZ)")
_MAX_NAME = 255  # NAME_MAX of every Linux file system: longer names could not exist on disk


def is_safe_name(name: str) -> bool:
    """Whether `name` may be an id or the name of a namespace (and so one path component)."""
    return len(name) <= _MAX_NAME and _SAFE_NAME.fullmatch(name) is not None


def format_time(seconds: int) -> str:
    """`seconds` since the epoch as `YYYY-MM-DDTHH:MM:SSZ`."""
    # Not strftime, whose %Y has fewer than four digits before the year 1000 on some systems.
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None).isoformat(timespec="seconds") + "Z"


def parse_time(text: str) -> int:
    """The inverse of `format_time`. Raises UsageError for any other form."""
    if _TIME.fullmatch(text):
        try:
            seconds = int(datetime.fromisoformat(text).timestamp())
        except ValueError:
            pass
        else:
            if format_time(seconds) == text:  # newer Pythons read 24:00:00 as the next day
                return seconds
    raise UsageError(f"'{text}' is not a backup time; write it as 2023-11-14T22:13:20Z")


def safe_name(name: bytes) -> bytes:
    """The name of a snapshot without colons, which Windows does not allow: `2023-11-14T22-13-20Z`."""
    return name.replace(b":", b"-")


def usual_name(name: bytes) -> bytes:
    """The inverse of `safe_name`. Returns any other name unchanged."""
    found = _SAFE_TIME.fullmatch(name)
    return b":".join(found.groups()) if found else name


@dataclass(frozen=True, slots=True, order=True)
class Namespace:
    """A namespace, by the names of its levels; the root namespace has none."""

    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.parts) > MAX_NAMESPACE_DEPTH:
            raise UsageError(f"namespace '{self}' is nested deeper than {MAX_NAMESPACE_DEPTH} levels")
        for part in self.parts:
            if not is_safe_name(part):
                raise UsageError(f"'{part}' is not the name of a namespace")

    @classmethod
    def parse(cls, text: str) -> Namespace:
        """`prod/db` → Namespace(("prod", "db")); the empty string is the root namespace."""
        return cls(tuple(text.strip("/").split("/"))) if text.strip("/") else ROOT_NAMESPACE

    def child(self, name: str) -> Namespace:
        return Namespace((*self.parts, name))

    def __str__(self) -> str:
        return "/".join(self.parts)


ROOT_NAMESPACE = Namespace()


@dataclass(frozen=True, slots=True, order=True)
class Group:
    """A backup group: everything that was backed up as `<type>/<id>` in one namespace."""

    namespace: Namespace
    type: str
    id: str

    def __post_init__(self) -> None:
        if self.type not in BACKUP_TYPES:
            raise UsageError(f"'{self.type}' is not a backup type (vm, ct or host)")
        if not is_safe_name(self.id):
            raise UsageError(f"'{self.id}' is not a backup id")

    def snapshot(self, time: int) -> Snapshot:
        return Snapshot(self, time)

    def __str__(self) -> str:
        """The group's path below the root of a mount: `ns/prod/vm/100`."""
        return "".join(f"ns/{part}/" for part in self.namespace.parts) + f"{self.type}/{self.id}"


@dataclass(frozen=True, slots=True, order=True)
class Snapshot:
    """One backup of a group; `time` is in seconds since the epoch."""

    group: Group
    time: int

    def __post_init__(self) -> None:
        try:
            well_formed = _TIME.fullmatch(format_time(self.time)) is not None
        except (ValueError, OverflowError, OSError):
            well_formed = False
        if not well_formed:
            raise UsageError(f"{self.time} is not a backup time")

    @property
    def time_text(self) -> str:
        return format_time(self.time)

    def __str__(self) -> str:
        """The snapshot's path below the root of a mount."""
        return f"{self.group}/{self.time_text}"


class ArchiveKind(enum.Enum):
    """How an archive is stored; the end of its stored name says it."""

    FIXED = ".fidx"
    DYNAMIC = ".didx"
    BLOB = ".blob"


_SUFFIXES = tuple(kind.value for kind in ArchiveKind)


@dataclass(frozen=True, slots=True, order=True)
class Archive:
    """A file of a snapshot, by its stored name (`drive-scsi0.img.fidx`)."""

    filename: str

    def __post_init__(self) -> None:
        if not is_safe_name(self.filename) or not self.filename.endswith(_SUFFIXES):
            raise UsageError(f"{self.filename!r} is not the name of an archive")

    @property
    def kind(self) -> ArchiveKind:
        return next(kind for kind in ArchiveKind if self.filename.endswith(kind.value))

    @property
    def name(self) -> str:
        """The name that users know: without the suffix of the storage kind."""
        return self.filename[: -len(self.kind.value)]

    def __str__(self) -> str:
        return self.filename


MANIFEST = Archive("index.json.blob")
CLIENT_LOG = Archive("client.log.blob")
MASTER_KEY_BLOB = Archive("rsa-encrypted.key.blob")
"""The backup's key, encrypted for a master key. Its manifest entry says `encrypt`, but the blob
itself is a plain one: the content is encrypted already."""
