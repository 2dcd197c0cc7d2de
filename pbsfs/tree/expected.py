"""What a path in the tree will have the source asked for, as far as its text shows that.

Used by what opens a source to look up a path that it knows. Pure; from any thread.
"""

from __future__ import annotations

import os

from pbsfs.base.errors import UsageError
from pbsfs.base.names import (
    MANIFEST,
    Archive,
    ArchiveKind,
    Group,
    Namespace,
    parse_time,
    usual_name,
)
from pbsfs.sources.base import Expected
from pbsfs.tree.namespaces import FILES, NAMESPACES

_STREAMS = (".pxar", ".mpxar", ".ppxar", ".pcat1")
_STORED = tuple(kind.value for kind in ArchiveKind)


def expected_at(path: str, root: Namespace, *, reads: bool) -> Expected:
    """What looking up `path` in the tree of `root` asks for. `reads`: whether the file there is read, too."""
    steps = [step for step in path.split("/") if step not in ("", ".")]
    in_archives = steps[:1] == [os.fsdecode(FILES)]
    if in_archives:
        del steps[0]
    namespaces = [root]
    try:
        while len(steps) > 1 and steps[0] == os.fsdecode(NAMESPACES):
            namespaces.append(namespaces[-1].child(steps[1]))
            del steps[:2]
        group = Group(namespaces[-1], *steps[:2]) if len(steps) > 1 else None
    except UsageError:  # there is no such place
        group = None
    found = Expected(tuple(namespaces), group)
    if group is None or len(steps) < 3 or not (reads or in_archives):
        return found
    try:
        snapshot = group.snapshot(parse_time(os.fsdecode(usual_name(os.fsencode(steps[2])))))
        if in_archives or len(steps) < 4:
            return Expected(found.namespaces, group, snapshot, (MANIFEST,), sessions=True)
        archive = _archive_of(steps[3])
    except UsageError:  # `latest`, or no such place
        return found
    is_blob = archive.kind is ArchiveKind.BLOB
    return Expected(found.namespaces, group, snapshot, (MANIFEST, archive), sessions=not is_blob)


def _archive_of(name: str) -> Archive:
    """The file that a snapshot most likely shows as `name`. Raises UsageError."""
    if name.endswith(_STORED):
        return Archive(name)
    kind = ArchiveKind.BLOB
    if name.endswith(".img"):
        kind = ArchiveKind.FIXED
    elif name.endswith(_STREAMS):
        kind = ArchiveKind.DYNAMIC
    return Archive(name + kind.value)
