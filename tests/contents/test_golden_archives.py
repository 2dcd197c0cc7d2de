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
from pbsfs.testing.archives import Node, write
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


VERSION_1 = [name for name in WHOLE if (ROOT / f"{name}.pxar.didx").exists()]

REUSED = "ct/211/2024-11-08T17:20:00Z/root"
"""Made of the payloads of the day before, so with references and tables that no single backup writes."""

EXCLUDED = "host/web-2.lan/2024-11-07T17:20:00Z/home"
"""Without *.log and /many/file-0000*."""

PART = "host/web-2.lan/2024-11-07T17:20:00Z/etc"
"""What is below `etc` in tree-2."""


def open_archive(name: str, *, with_catalog: bool = True) -> Archive:
    version_1 = ROOT / f"{name}.pxar.didx"
    if version_1.exists():
        catalog = Memory(stream(version_1.with_name("catalog.pcat1.didx"))) if with_catalog else None
        return Archive(Memory(stream(version_1)), catalog=catalog, name=version_1.name)
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
        assert archive.link_count(entry) == (rows[path]["n"] if entry.is_file else 1)
    assert archive.knows_link_counts


@pytest.mark.parametrize("name", WHOLE)
def test_look_ups_find_what_listings_show(name: str) -> None:
    archive = open_archive(name)
    directories = [archive.root, *(e for _p, e in everything(archive) if e.is_directory)]
    for directory in directories:
        found = archive.children(directory)
        assert found.damage is None
        for entry in found.entries:
            assert archive.child(directory, entry.name) == entry
        assert archive.child(directory, b"not there") is None
        assert archive.child(directory, b"") is None


def test_names_of_one_file_share_an_inode_and_nothing_else_does() -> None:
    for name in WHOLE:
        archive = open_archive(name)
        counts: dict[int, int] = {}
        for _path, entry in everything(archive):
            counts[entry.inode] = counts.get(entry.inode, 0) + 1
        for _path, entry in everything(archive):
            assert counts[entry.inode] == archive.link_count(entry)
        assert any(count > 1 for count in counts.values()), "the trees have hard links"


@pytest.mark.parametrize("name", VERSION_1)
def test_the_catalog_gives_the_names(name: str) -> None:
    archive = open_archive(name)
    stack = [archive.root]
    while stack:
        directory = stack.pop()
        exact = archive.children(directory)
        named = archive.children(directory, names_only=True)
        assert named.damage is None
        assert not any(entry.exact for entry in named.entries)
        assert [e.name for e in named.entries] == [e.name for e in exact.entries]
        for by_name, entry in zip(named.entries, exact.entries, strict=True):
            assert stat.S_IFMT(by_name.mode) == stat.S_IFMT(entry.mode)
            assert by_name.inode in (0, entry.inode)
            if entry.is_directory:
                assert (by_name.position, by_name.end, by_name.hint) == (
                    entry.position,
                    entry.end,
                    entry.hint,
                )
        assert archive.complete(directory, named.entries) == exact.entries
        assert archive.complete(directory, exact.entries) == exact.entries
        stack.extend(entry for entry in named.entries if entry.is_directory)


@pytest.mark.parametrize("name", [name for name in VERSION_1 if name.startswith("ct/")])
def test_names_cost_fewer_reads_than_entries(name: str) -> None:
    archive = open_archive(name)
    big = archive.child(archive.root, b"big")
    assert big is not None
    (main,) = archive.streams
    assert isinstance(main, Memory)
    before = main.reads
    archive.children(big, names_only=True)
    assert main.reads - before <= 2
    assert main.requested == 0
    archive.children(big)
    assert main.requested > 1, "headers are requested side by side"


@pytest.mark.parametrize("name", VERSION_1)
def test_without_a_catalog_the_links_count_that_were_seen(name: str) -> None:
    archive = open_archive(name, with_catalog=False)
    rows = truth(WHOLE[name])
    assert archive.knows_link_counts
    found = dict(everything(archive))
    assert {path: archive.link_count(e) for path, e in found.items() if e.is_file} == {
        path: row["n"] for path, row in rows.items() if stat.S_ISREG(row["t"])
    }


def test_an_archive_with_exclusions_holds_the_rest() -> None:
    archive = open_archive(EXCLUDED)
    rows = {
        path: row
        for path, row in truth("tree-h").items()
        if not path.endswith(b".log") and not path.startswith(b"many/file-0000")
    }
    found = dict(everything(archive))
    listed = found.pop(b".pxarexclude-cli")
    assert content(archive, listed) == b"*.log\n/many/file-0000*\n"
    assert found.keys() == rows.keys()
    for path, entry in found.items():
        assert as_truth(archive, path, entry) == expected(rows[path])


def test_one_of_two_archives_in_a_snapshot() -> None:
    archive = open_archive(PART)
    rows = {p[4:]: row | {"p": p[4:].hex()} for p, row in truth("tree-2").items() if p.startswith(b"etc/")}
    rows[b""] = truth("tree-2")[b"etc"] | {"p": ""}
    found = dict(everything(archive))
    del found[b".pxarexclude-cli"]
    assert found.keys() == rows.keys()
    for path, entry in found.items():
        assert as_truth(archive, path, entry) == expected(rows[path])
    assert not any(entry.exact for entry in archive.children(archive.root, names_only=True).entries)


@pytest.mark.parametrize("name", [name for name in WHOLE if name != REUSED])
def test_the_writer_of_the_tests_writes_the_same_archive(name: str) -> None:
    archive = open_archive(name)
    nodes: dict[bytes, Node] = {}
    for path, entry in everything(archive):
        node = Node(
            entry.name,
            entry.mode,
            entry.uid,
            entry.gid,
            entry.mtime_ns,
            data=content(archive, entry) if entry.is_file else b"",
            target=entry.target or b"",
            device=(os.major(entry.rdev), os.minor(entry.rdev)),
            xattrs=archive.xattrs(entry),
        )
        nodes[path] = node
        if path:
            nodes[os.path.dirname(path)].children.append(node)
    # Only now, in the order of the archive: what comes first is the file, and the others are links to it.
    stack = [(b"", nodes[b""])]
    order: list[tuple[bytes, Node]] = []
    while stack:
        path, node = stack.pop()
        order.append((path, node))
        stack += [(os.path.join(path, child.name), child) for child in reversed(node.children)]
    entries = dict(everything(archive))
    firsts: dict[int, Node] = {}
    for path, node in order:
        if entries[path].is_file:
            first = firsts.setdefault(entries[path].inode, node)
            node.link_to = first if first is not node else None
    written = write(nodes[b""], split=len(archive.streams) == 2)
    streams = [data for data in (written.main, written.payload) if data is not None]
    assert streams == [stream.pread(0, stream.size) for stream in archive.streams]
