"""Which files in an archive damage of its streams hits. Used by `pbsfs verify`, in a trio loop."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from pbsfs.base.errors import PbsfsError
from pbsfs.contents.base import Entry
from pbsfs.reader.contents import OpenContents
from pbsfs.reader.damage import Range
from pbsfs.tree import ArchiveDirectory, ImageFile, SnapshotDirectory
from pbsfs.tree.archives import ArchiveFiles
from pbsfs.tree.namespaces import FILES
from pbsfs.tree.snapshots import shown_archives

MOST_NAMED = 1000
"""Paths that are kept; more are only counted."""

IN_ONE_GO = 1000
"""Entries that are looked at between two looks for an end."""


@dataclass(slots=True)
class Hit:
    """Paths below the root of the tree, of files and of directories that cannot be listed in full.

    `count`: how many there are; `paths` holds `MOST_NAMED` of them at most.
    """

    paths: list[bytes] = field(default_factory=list)
    count: int = 0

    def add(self, path: bytes) -> None:
        self.count += 1
        if len(self.paths) < MOST_NAMED:
            self.paths.append(path)


async def files_hit(file: ImageFile, ranges: Sequence[Range]) -> Hit:
    """The files that need one of `ranges` of `file`; none where it is not a stream of an archive.

    `ranges`: in order, without overlap. Where the archive cannot be opened, its path is the only one.
    """
    hit = Hit()
    snapshot = file.parent
    if not isinstance(snapshot, SnapshotDirectory):
        return hit
    for name, files in shown_archives(snapshot.info).items():
        if isinstance(files, ArchiveFiles) and file.file in files.streams:
            archive = ArchiveDirectory(snapshot, name, files)
            path = FILES + b"/" + archive.path
            try:
                opened = await archive.open()
            except PbsfsError:
                hit.add(path)
                continue
            stream = files.streams.index(file.file)
            await opened.run(functools.partial(_look, opened, path, stream, ranges, hit))
            opened.close()
    return hit


def _look(opened: OpenContents, root: bytes, stream: int, ranges: Sequence[Range], hit: Hit) -> None:
    starts = [found.offset for found in ranges]
    incomplete: set[bytes] = set()
    for count, (path, entry) in enumerate(opened.contents.walk(opened.contents.root)):
        if count % IN_ONE_GO == 0:
            trio.from_thread.check_cancelled()
        where = root + b"/" + path if path else root
        if not isinstance(entry, Entry):
            if where not in incomplete:
                incomplete.add(where)
                hit.add(where)
            continue
        piece = opened.contents.stored_at(entry) if entry.is_file else None
        if piece is None or piece.stream != stream or not piece.length:
            continue
        number = bisect.bisect_right(starts, piece.offset) - 1
        for found in ranges[max(number, 0) : number + 2]:
            if found.offset < piece.offset + piece.length and piece.offset < found.offset + found.length:
                hit.add(where)
                break
