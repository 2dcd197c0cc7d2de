"""A datastore with one small archive."""

from __future__ import annotations

from pathlib import Path

from pbsfs.base.names import Group, Namespace, Snapshot
from pbsfs.testing.archives import Node, write
from pbsfs.testing.writer import DatastoreWriter


def archive_with(path: Path, *children: Node) -> str:
    """A datastore with a host's archive that has these files; the path of its root in the tree."""
    snapshot = Snapshot(Group(Namespace(), "host", "a"), 1_700_000_000)
    made = write(Node(b"", children=list(children)), split=False).main
    DatastoreWriter(path).add_snapshot(snapshot, {"root.pxar.didx": made})
    return f"files/{snapshot}/root"
