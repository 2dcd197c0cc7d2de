"""Trees that tests write as archives, and what a reader has to show of them."""

from __future__ import annotations

import os
import stat
import struct
from typing import Any

from pbsfs.contents.archive import Archive
from pbsfs.contents.base import Contents, Entry
from pbsfs.testing.archives import Node, write, write_catalog
from tests.support.archives import Memory

NAME = "root.pxar.didx"


def directory(name: bytes = b"", *children: Node, **fields: Any) -> Node:
    return Node(name, stat.S_IFDIR | 0o755, children=list(children), **fields)


def file(name: bytes, data: bytes = b"", **fields: Any) -> Node:
    return Node(name, stat.S_IFREG | 0o644, data=data, **fields)


def acl(*entries: tuple[int, int, int]) -> bytes:
    """Tags, permissions and ids, as linux/posix_acl_xattr.h has them."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 0xFFFFFFFF


def some() -> Node:
    """A small tree with an entry of every type, and every kind of attribute."""
    first = file(b"first", b"the first file", uid=1000, gid=100, mtime_ns=1_700_000_000_123_456_789)
    attributes = {
        b"user.a": b"1",
        b"user.empty": b"",
        b"system.posix_acl_access": acl(
            (1, 6, NOBODY),
            (2, 7, 1000),
            (2, 4, 1001),
            (4, 4, NOBODY),
            (8, 5, 50),
            (16, 7, NOBODY),
            (32, 0, NOBODY),
        ),
        b"security.capability": b"\x01\x00\x00\x02" + bytes(16),
    }
    inherited = {
        b"system.posix_acl_default": acl(
            (1, 7, NOBODY), (2, 6, 7), (4, 5, NOBODY), (16, 6, NOBODY), (32, 1, NOBODY)
        )
    }
    return directory(
        b"",
        first,
        directory(b"inner", directory(b"empty"), Node(b"again", link_to=first), file(b"last", b"z" * 300)),
        Node(b"link", stat.S_IFLNK | 0o777, target=b"../elsewhere/\xff"),
        Node(b"null", stat.S_IFCHR | 0o666, device=(1, 3)),
        Node(b"pipe", stat.S_IFIFO | 0o600, mtime_ns=-1),
        directory(b"shared", xattrs=inherited),
        Node(b"sda", stat.S_IFBLK | 0o660, device=(259, 300_000)),
        Node(b"socket", stat.S_IFSOCK | 0o755),
        Node(b"with", stat.S_IFREG | 0o4670, data=b"", xattrs=attributes),
        Node(b"\xfe\x01", link_to=first),
    )


def open_tree(root: Node, *, split: bool, catalog: bool = False, **options: Any) -> Archive:
    written = write(root, split=split, **options)
    return Archive(
        Memory(written.main),
        Memory(written.payload) if written.payload is not None else None,
        catalog=Memory(write_catalog({NAME.encode(): root})) if catalog else None,
        name=NAME,
    )


def content(archive: Contents, entry: Entry) -> bytes:
    parts = []
    for piece in archive.data(entry):
        assert piece.stream is not None
        parts.append(archive.streams[piece.stream].pread(piece.offset, piece.length))
    data = b"".join(parts)
    assert len(data) == entry.size
    return data


Shown = dict[bytes, tuple[Any, ...]]


def shown(archive: Contents) -> Shown:
    """Everything that a reader shows of each entry, by path; raises where anything is damaged."""
    found = {}
    for path, entry in [(b"", archive.root), *archive.walk(archive.root)]:
        if not isinstance(entry, Entry):
            raise entry
        found[path] = shown_of(archive, entry)
    return found


def shown_of(archive: Contents, entry: Entry) -> tuple[Any, ...]:
    return (
        *(entry.mode, entry.uid, entry.gid, entry.mtime_ns, entry.size, entry.rdev, entry.target),
        archive.xattrs(entry),
        content(archive, entry) if entry.is_file else b"",
        archive.link_count(entry),
    )


def expected(root: Node) -> Shown:
    """What a reader has to show of `root`: as `shown`."""
    found: Shown = {}
    names: dict[Node, int] = {}
    nodes = [(b"", root)]
    for path, node in nodes:
        names[node.link_to or node] = names.get(node.link_to or node, 0) + 1
        nodes += [(os.path.join(path, child.name), child) for child in node.children]
    for path, node in nodes:
        real = node.link_to or node
        size = len(real.target) if stat.S_ISLNK(real.mode) else len(real.data)
        found[path] = (
            *(real.mode, real.uid, real.gid, real.mtime_ns, size, os.makedev(*real.device)),
            real.target if stat.S_ISLNK(real.mode) else None,
            dict(real.xattrs),
            real.data,
            names[real],
        )
    return found
