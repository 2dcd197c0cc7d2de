"""The truth about archives: what the vendor's client backed up, and what a directory holds of it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import golden

FILES = golden.ROOT / "files"
ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")

EXCLUDED = ("*.log", "/many/file-0000*")
"""The patterns of the one archive that was made with `--exclude`."""


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive of the golden data. `path`: below `files`. `below`: where in the truth its root is."""

    path: str
    truth: str
    key: str | None = None
    below: bytes = b""
    excluded: bool = False


ARCHIVES = [
    Archive("ct/210/2024-11-07T17:20:00Z/root", "tree-1"),
    Archive("ct/210/2024-11-08T17:20:00Z/root", "tree-2"),
    Archive("ct/211/2024-11-07T17:20:00Z/root", "tree-1"),
    Archive("ct/211/2024-11-08T17:20:00Z/root", "tree-2"),
    Archive("host/laptop/2024-11-07T17:20:00Z/home", "tree-h", "plain"),
    Archive("host/laptop/2024-11-08T17:20:00Z/home", "tree-h", "plain"),
    Archive("host/web-2.lan/2024-11-07T17:20:00Z/home", "tree-h", excluded=True),
    Archive("host/web-2.lan/2024-11-07T17:20:00Z/etc", "tree-2", below=b"etc"),
]


def truth(archive: Archive) -> dict[bytes, dict[str, Any]]:
    """Every entry of an archive by its path, the root's is empty, as README of the golden data has it.

    Of an archive with `excluded`, `.pxarexclude-cli` is not in it.
    """
    found: dict[bytes, dict[str, Any]] = {}
    for line in (FILES / "truth" / f"{archive.truth}.jl").read_text().splitlines():
        entry = json.loads(line)
        path = bytes.fromhex(entry["p"])
        if archive.below:
            if path != archive.below and not path.startswith(archive.below + b"/"):
                continue
            path = path[len(archive.below) + 1 :]
        name = path.rpartition(b"/")[2]
        if archive.excluded and (name.endswith(b".log") or path.startswith(b"many/file-0000")):
            continue
        found[path] = entry
    return found


def names_below(root: Path) -> set[bytes]:
    """The paths of all that is below a directory, relative to it."""
    found: set[bytes] = set()
    for folder, directories, files in os.walk(os.fsencode(root)):
        inner = os.path.relpath(folder, os.fsencode(root))
        found |= {os.path.normpath(os.path.join(inner, name)) for name in directories + files}
    return found


def differences(root: Path, archive: Archive, *, but: frozenset[str] = frozenset()) -> list[str]:
    """How what is below `root` differs from the truth; `but`: fields that are not looked at."""
    expected = truth(archive)
    there = names_below(root) - {b".pxarexclude-cli"}
    found = [f"{path!r} is missing" for path in set(expected) - there - {b""}]
    found += [f"{path!r} should not be there" for path in there - set(expected)]
    for path, entry in expected.items():
        if path not in there and path:
            continue
        place = os.path.join(os.fsencode(root), path) if path else os.fsencode(root)
        for field, value in fields_at(place).items():
            if field not in but and entry.get(field) != value:
                found.append(f"{path!r}: {field} is {value!r}, not {entry.get(field)!r}")
    return found


def fields_at(path: bytes) -> dict[str, Any]:
    """What the truth says of an entry, but a directory's size and link count, which archives do not have."""
    status = os.lstat(path)
    kind = stat.S_IFMT(status.st_mode)
    fields: dict[str, Any] = {"t": kind, "m": stat.S_IMODE(status.st_mode), "mt": status.st_mtime_ns}
    fields |= {"u": status.st_uid, "g": status.st_gid, "x": _xattrs(path)}
    if kind != stat.S_IFDIR:
        fields |= {"n": status.st_nlink, "s": status.st_size}
    if kind == stat.S_IFREG:
        with open(path, "rb") as file:
            fields["h"] = hashlib.file_digest(file, "sha256").hexdigest()
    elif kind == stat.S_IFLNK:
        fields["l"] = os.readlink(path).hex()
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        fields["d"] = [os.major(status.st_rdev), os.minor(status.st_rdev)]
    return fields


def _xattrs(path: bytes) -> dict[str, str]:
    try:
        names = {*map(os.fsencode, os.listxattr(path, follow_symlinks=False)), *ACLS}
    except OSError as error:
        if error.errno != errno.ENOTSUP:  # of file systems without them
            raise
        return {}
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name.hex()] = os.getxattr(path, name, follow_symlinks=False).hex()
        except OSError:  # it has no such list
            continue
    return found
