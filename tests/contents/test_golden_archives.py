"""Every entry of the archives that the vendor's client wrote is what it was on disk, in every field."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pbsfs.contents.archive import Archive
from pbsfs.contents.base import Contents, Entry
from tests.support.archives import FILES, Memory, stream, truth

pytestmark = pytest.mark.golden

ROOT = FILES / "datastore"

WHOLE = {
    "ct/210/2024-11-07T17:20:00Z/root": "tree-1",
    "ct/210/2024-11-08T17:20:00Z/root": "tree-2",
    "ct/211/2024-11-07T17:20:00Z/root": "tree-1",
    "ct/211/2024-11-08T17:20:00Z/root": "tree-2",
    "host/laptop/2024-11-07T17:20:00Z/home": "tree-h",
    "host/laptop/2024-11-08T17:20:00Z/home": "tree-h",
}
"""Archives that hold all of a tree, by the name of its truth."""


def open_archive(name: str) -> Archive:
    version_1 = ROOT / f"{name}.pxar.didx"
    if version_1.exists():
        return Archive(Memory(stream(version_1)))
    metadata, payload = (Path(f"{ROOT / name}.{ending}.didx") for ending in ("mpxar", "ppxar"))
    return Archive(Memory(stream(metadata)), Memory(stream(payload)))


def content(archive: Contents, file: Entry) -> bytes:
    pieces = archive.data(file)
    parts = []
    for piece in pieces:
        assert piece.stream is not None
        parts.append(archive.streams[piece.stream].pread(piece.offset, piece.length))
    data = b"".join(parts)
    assert len(data) == sum(piece.length for piece in pieces) == file.size
    return data


def as_truth(archive: Contents, path: bytes, entry: Entry) -> dict[str, Any]:
    """`entry` as the truth has it, all fields but the number of links."""
    found: dict[str, Any] = {
        "p": path.hex(),
        "t": stat.S_IFMT(entry.mode),
        "m": stat.S_IMODE(entry.mode),
        "u": entry.uid,
        "g": entry.gid,
        "mt": entry.mtime_ns,
        "x": {name.hex(): value.hex() for name, value in archive.xattrs(entry).items()},
    }
    if entry.has_xattrs != bool(found["x"]):
        found["has_xattrs"] = entry.has_xattrs
    if entry.is_file:
        found |= {"s": entry.size, "h": hashlib.sha256(content(archive, entry)).hexdigest()}
    if entry.target is not None:
        found["l"] = entry.target.hex()
        assert entry.size == len(entry.target)
    if stat.S_ISCHR(entry.mode) or stat.S_ISBLK(entry.mode):
        found["d"] = [os.major(entry.rdev), os.minor(entry.rdev)]
    return found


def expected(row: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in row.items() if key != "n"}
    if not stat.S_ISREG(row["t"]):
        del kept["s"]  # a directory's is the file system's own, a link's follows from its target
    return kept


def everything(archive: Contents) -> Iterator[tuple[bytes, Entry]]:
    yield b"", archive.root
    for path, entry in archive.walk(archive.root):
        assert isinstance(entry, Entry)
        yield path, entry


@pytest.mark.parametrize("name", WHOLE)
def test_every_entry_is_as_it_was(name: str) -> None:
    archive = open_archive(name)
    rows = truth(WHOLE[name])
    found = dict(everything(archive))
    assert found.keys() == rows.keys()
    for path, entry in found.items():
        assert as_truth(archive, path, entry) == expected(rows[path])
