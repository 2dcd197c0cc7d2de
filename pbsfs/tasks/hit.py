"""Which files damage of an image hits: those in an archive, or on the volumes of a disk.

Used by `pbsfs verify`, in a trio loop; archives and volumes are walked in worker threads.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from pbsfs.base.errors import DamageError, NotFoundError, PbsfsError, UnsupportedError
from pbsfs.base.names import ArchiveKind
from pbsfs.contents.base import DECODED, Contents, Entry, Piece
from pbsfs.reader.contents import OpenContents
from pbsfs.reader.damage import Range
from pbsfs.reader.decoded import STEP
from pbsfs.tree import (
    ArchiveDirectory,
    BrokenDisk,
    Directory,
    ImageFile,
    Node,
    SnapshotDirectory,
    VolumeDirectory,
)
from pbsfs.tree.archives import ArchiveFiles
from pbsfs.tree.namespaces import FILES
from pbsfs.tree.snapshots import shown_archives

MOST_NAMED = 1000
"""Paths that are kept; more are only counted."""

IN_ONE_GO = 1000
"""Entries that are looked at between two looks for an end."""

MOST_LOOKED_AT = 20_000_000
"""Entries of a volume that are looked at: what wrote the disk decides how many it seems to have."""


@dataclass(slots=True)
class Hit:
    """Paths below the root of the tree, of files and of directories that cannot be listed in full.

    `count`: how many there are; `paths` holds `MOST_NAMED` of them at most. `incomplete`: volumes, or a
    snapshot, of which other files may be hit too, with the reason.
    """

    paths: list[bytes] = field(default_factory=list)
    count: int = 0
    incomplete: dict[bytes, str] = field(default_factory=dict)

    def add(self, path: bytes) -> None:
        """Counts a path, and names it if there is room."""
        self.count += 1
        if len(self.paths) < MOST_NAMED:
            self.paths.append(path)


class _Ranges:
    """Damaged ranges, in order, without overlap."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        self._ranges = ranges
        self._starts = [found.offset for found in ranges]

    def hit(self, offset: int, length: int) -> bool:
        """Whether one of them has a byte of the range."""
        number = bisect.bisect_left(self._starts, offset + length) - 1
        if number < 0 or not length:
            return False
        return offset < self._ranges[number].offset + self._ranges[number].length


async def files_hit(file: ImageFile, ranges: Sequence[Range]) -> Hit:
    """The files that need one of `ranges` of `file`; none where it is neither a stream of an archive nor a
    disk with volumes.

    `ranges`: in order, without overlap. Where the archive cannot be opened, its path is the only one.
    """
    hit = Hit()
    snapshot = file.parent
    if not isinstance(snapshot, SnapshotDirectory):
        return hit
    damaged = _Ranges(ranges)
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
            await opened.run(functools.partial(_look_in_archive, opened, path, stream, damaged, hit))
            opened.close()
    if file.file.archive.kind is ArchiveKind.FIXED:
        await _VolumesOf(snapshot, file, damaged, hit).look()
    return hit


def _look_in_archive(opened: OpenContents, root: bytes, stream: int, damaged: _Ranges, hit: Hit) -> None:
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
        if piece is not None and piece.stream == stream and damaged.hit(piece.offset, piece.length):
            hit.add(where)


class _VolumesOf:
    """The volumes that may lie on a damaged disk."""

    def __init__(self, snapshot: SnapshotDirectory, file: ImageFile, damaged: _Ranges, hit: Hit) -> None:
        """`snapshot`: beside `files`. `hit`: gets what is found."""
        self._snapshot = snapshot
        self._file = file
        self._damaged = damaged
        self._hit = hit

    async def look(self) -> None:
        """Looks at all of them, one after the other. Never raises PbsfsError."""
        place = FILES + b"/" + self._snapshot.path
        try:
            for node in (await _listed(self._snapshot, place)).values():
                if isinstance(node, BrokenDisk):
                    self._note(node.path, node.error)
                elif isinstance(node, VolumeDirectory) and not node.repeats:
                    await self._look_at(node)
        except NotFoundError:
            pass  # a tree without `files`, or a snapshot that was removed
        except PbsfsError as error:
            self._note(place, error)

    async def _look_at(self, node: VolumeDirectory) -> None:
        try:
            opened = await node.open()
            numbers = [n for n, image in enumerate(opened.images) if image.archive == self._file.file.archive]
            await opened.run(functools.partial(self._walk, opened.contents, node.path, numbers))
            opened.close()
        except PbsfsError as error:
            self._note(node.path, error)

    def _walk(self, contents: Contents, root: bytes, numbers: Sequence[int]) -> None:
        """In a worker thread. `numbers`: of the disk among the streams."""
        incomplete: set[bytes] = set()
        for count, (path, entry) in enumerate(contents.walk(contents.root)):
            if count % IN_ONE_GO == 0:
                trio.from_thread.check_cancelled()
            if count >= MOST_LOOKED_AT:
                self._hit.incomplete[root] = f"only {count} of its entries were looked at"
                return
            where = root + b"/" + path if path else root
            if isinstance(entry, Entry):
                if self._is_hit(contents, entry, numbers):
                    self._hit.add(where)
            elif self._is_ours(entry):
                self._hit.incomplete.setdefault(root, str(entry))
                if where not in incomplete:
                    incomplete.add(where)
                    self._hit.add(where)

    def _is_hit(self, contents: Contents, entry: Entry, numbers: Sequence[int]) -> bool:
        def touches(pieces: Sequence[Piece]) -> bool:
            return any(p.stream in numbers and self._damaged.hit(p.offset, p.length) for p in pieces)

        try:
            if entry.has_xattrs:
                contents.xattrs(entry)
            pieces = contents.data(entry) if entry.is_file else ()
            if touches(pieces):
                return True
            decoded = [piece for piece in pieces if piece.stream == DECODED]
            stored = contents.decoded_from(entry) if decoded else ()
            if stored is None or touches(stored):  # another copy may be whole
                for piece in decoded:
                    end = piece.offset + piece.length
                    for offset in range(piece.offset, end, STEP):
                        trio.from_thread.check_cancelled()
                        contents.read(entry, offset, min(STEP, end - offset))
        except DamageError as error:
            return self._is_ours(error)
        return False

    def _note(self, path: bytes, error: PbsfsError) -> None:
        if self._is_ours(error):
            self._hit.incomplete.setdefault(path, str(error))

    def _is_ours(self, error: PbsfsError) -> bool:
        """Whether an error may come from the damage of the disk: it neither names another one alone, nor is
        of what pbsfs never reads."""
        if isinstance(error, UnsupportedError):
            return False
        info, text = self._snapshot.info, str(error)
        named = [f.archive for f in info.files if f"{info.snapshot}/{f.archive.name}: " in text]
        return not named or self._file.file.archive in named


async def _listed(node: Node, path: bytes) -> dict[bytes, Node]:
    """The children of the node at `path` of the tree that `node` is in."""
    while node.parent is not None:
        node = node.parent
    for step in path.split(b"/"):
        if isinstance(node, Directory):
            node = await node.child(step)
    return dict(await node.children()) if isinstance(node, Directory) else {}
