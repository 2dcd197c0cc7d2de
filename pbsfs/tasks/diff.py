"""Compares what two places of the tree hold: archives and volumes entry by entry, images by their indexes.

Entries are merged by name, directory by directory, so memory is bounded by the directories on one path. Used
by `pbsfs diff`, from tasks of one trio loop; archives are compared in a worker thread.
"""

from __future__ import annotations

import functools
import os
import stat as stat_bits
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import trio

from pbsfs.base.errors import DamageError, PbsfsError, UsageError
from pbsfs.base.names import CLIENT_LOG, MANIFEST, ArchiveKind
from pbsfs.contents.base import Contents, Entry, Found
from pbsfs.reader.bridge import ImageStream
from pbsfs.reader.damage import Range
from pbsfs.reader.decoded import stream_of
from pbsfs.runtime.threads import in_thread
from pbsfs.tasks.attributes import differing
from pbsfs.tasks.changed import changed_ranges
from pbsfs.tree import (
    ArchiveDirectory,
    BlobFile,
    BrokenDisk,
    ContentsNode,
    ImageFile,
    Node,
    Note,
    SnapshotDirectory,
    Tree,
    VolumeDirectory,
)
from pbsfs.tree.archives import ArchiveFiles
from pbsfs.tree.namespaces import FILES
from pbsfs.tree.snapshots import shown_archives

PIECE = 1 << 20
"""Bytes that are compared at a time."""

IN_ONE_GO = 1000
"""Entries that are compared between two looks for an end, and changes that are handed over at once."""

ADDED, REMOVED, CHANGED, TYPE_CHANGED = "added", "removed", "changed", "type"


@dataclass(frozen=True, slots=True)
class Change:
    """A difference. `path`: relative to what is compared; empty for that itself. `fields`: what changed of an
    entry: size, mtime, mode, owner, link, device, xattrs, content. `ranges`: what changed of an image."""

    path: bytes
    kind: str
    fields: tuple[str, ...] = ()
    old: Entry | None = None
    new: Entry | None = None
    ranges: tuple[Range, ...] = ()
    old_size: int = 0
    new_size: int = 0

    @property
    def bytes(self) -> int:
        """How much changed: of an image, its ranges; of anything else, all of it."""
        if self.ranges:
            return sum(found.length for found in self.ranges)
        return self.old_size if self.kind == REMOVED else self.new_size


@dataclass(slots=True)
class Comparison:
    """A comparison of places in `tree`.

    `content`: compares also the bytes of files that look the same. `failed`: what could not be read, with the
    path. `counts` and `sizes`: entries and bytes by the kind of change.
    """

    tree: Tree
    content: bool = False
    failed: list[tuple[bytes, PbsfsError]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)

    async def run(self, old: Node, new: Node, emit: Callable[[list[Change]], None]) -> None:
        """Calls `emit` with the changes from `old` to `new`, in order.

        Raises UsageError for places that cannot be compared, and what opening them raises.
        """

        def counted(changes: list[Change]) -> None:
            for change in changes:
                self.counts[change.kind] += 1
                self.sizes[change.kind] += change.bytes
            emit(changes)

        await self._compare(old, new, b"", counted)

    async def _compare(self, old: Node, new: Node, path: bytes, emit: Callable[[list[Change]], None]) -> None:
        if isinstance(old, ContentsNode) and isinstance(new, ContentsNode):
            await self._archives(old, new, path, emit)
        elif isinstance(old, ImageFile) and isinstance(new, ImageFile):
            await self._images(old, new, path, emit)
        elif isinstance(old, BlobFile) and isinstance(new, BlobFile):
            before, after = await old.read(), await new.read()
            if before != after:
                sizes = len(before), len(after)
                fields = ("size", "content") if sizes[0] != sizes[1] else ("content",)
                emit([Change(path, CHANGED, fields, old_size=sizes[0], new_size=sizes[1])])
        elif isinstance(old, SnapshotDirectory) and isinstance(new, SnapshotDirectory):
            await self._snapshots(old, new, path, emit)
        else:
            raise UsageError(
                f"{old} and {new} cannot be compared; name two snapshots, two images, or two places "
                "in archives"
            )

    async def _snapshots(
        self,
        old: SnapshotDirectory,
        new: SnapshotDirectory,
        path: bytes,
        emit: Callable[[list[Change]], None],
    ) -> None:
        inside = old.tree.opens_archives and new.tree.opens_archives
        before, after = await self._files(old, inside=inside), await self._files(new, inside=inside)
        lacks_disks = any(isinstance(node, BrokenDisk) for node in (*before.values(), *after.values()))
        for name in sorted({*before, *after}):
            inner = path + b"/" + name if path else name
            sides = [files[name] for files in (before, after) if name in files]
            try:
                for node in sides:
                    if isinstance(node, BrokenDisk):
                        raise node.error
                if lacks_disks and len(sides) == 1 and isinstance(sides[0], VolumeDirectory | Note):
                    continue  # a disk that can't be read may have it
                if name not in after:
                    emit([Change(inner, REMOVED, old_size=(await before[name].stat()).size)])
                elif name not in before:
                    emit([Change(inner, ADDED, new_size=(await after[name].stat()).size)])
                else:
                    await self._compare(before[name], after[name], inner, emit)
            except PbsfsError as error:
                self.failed.append((inner, error))

    async def _files(self, snapshot: SnapshotDirectory, *, inside: bool) -> dict[bytes, Node]:
        """Archives as directories, images, and configurations, by name; but what differs always.

        `inside`: the volumes on the images instead of these.
        """
        found: dict[bytes, Node] = {}
        if inside:
            found |= {name: node for name, node in (await snapshot.children()).items() if not node.repeats}
        else:
            plain = await self.tree.at(snapshot.path.removeprefix(FILES + b"/"))
            files = await self.tree.at(FILES + b"/" + plain.path)
            assert isinstance(plain, SnapshotDirectory)
            assert isinstance(files, SnapshotDirectory)
            for name, node in (await plain.children()).items():
                is_disk = isinstance(node, ImageFile) and node.file.archive.kind is ArchiveKind.FIXED
                if is_disk or isinstance(node, BlobFile):
                    found[name] = node
            for name, value in shown_archives(plain.info).items():
                if isinstance(value, ArchiveFiles):
                    found[name] = ArchiveDirectory(files, name, value)
        for archive in (MANIFEST, CLIENT_LOG):
            found.pop(os.fsencode(archive.name), None)
        return found

    async def _images(
        self, old: ImageFile, new: ImageFile, path: bytes, emit: Callable[[list[Change]], None]
    ) -> None:
        before, after = await old.open(), await new.open()
        if before.index.csum == after.index.csum:
            return
        ranges = await in_thread(changed_ranges, before, after)
        if ranges or before.size != after.size:
            fields = ("size",) if before.size != after.size else ()
            emit([Change(path, CHANGED, fields, None, None, tuple(ranges), before.size, after.size)])

    async def _archives(
        self, old: ContentsNode, new: ContentsNode, path: bytes, emit: Callable[[list[Change]], None]
    ) -> None:
        old_entry, new_entry = await old.learn(), await new.learn()
        before, after = await old.inside.open(), await new.inside.open()

        def work(both: _Both) -> None:
            batch: list[Change] = []
            for count, change in enumerate(both.compare(path, old_entry, new_entry)):
                if change is not None:
                    batch.append(change)
                if count % IN_ONE_GO == 0:
                    trio.from_thread.check_cancelled()
                if len(batch) >= IN_ONE_GO:
                    trio.from_thread.run_sync(emit, batch)
                    batch = []
            trio.from_thread.run_sync(emit, batch)

        with before.streams() as old_streams, after.streams() as new_streams:
            both = _Both(self, before.contents, old_streams, after.contents, new_streams)
            await before.run(functools.partial(work, both))


class _Both:
    """Two archives side by side. Used in a worker thread."""

    def __init__(
        self,
        comparison: Comparison,
        old: Contents,
        old_streams: list[ImageStream],
        new: Contents,
        new_streams: list[ImageStream],
    ) -> None:
        self._comparison = comparison
        self._old, self._new = old, new
        self._old_streams, self._new_streams = old_streams, new_streams

    def compare(self, path: bytes, old: Entry, new: Entry) -> Iterator[Change | None]:
        """The changes; None for what has not changed, so that the caller may look for an end."""
        stack: list[Iterator[tuple[bytes, Entry | None, Entry | None]]] = [iter([(path, old, new)])]
        while stack:
            pair = next(stack[-1], None)
            if pair is None:
                stack.pop()
                continue
            where, before, after = pair
            try:
                yield self._change(where, before, after)
                if (before is not None and before.is_directory) or (after is not None and after.is_directory):
                    stack.append(self._pairs(where, before, after))
            except DamageError as error:
                self._comparison.failed.append((where, error))

    def _pairs(
        self, path: bytes, old: Entry | None, new: Entry | None
    ) -> Iterator[tuple[bytes, Entry | None, Entry | None]]:
        before, old_is_whole = self._children(path, self._old, old)
        after, new_is_whole = self._children(path, self._new, new)
        prefix = path + b"/" if path else b""
        for name in sorted({*before, *after}):
            # What damage may hide is neither removed nor added.
            if (name in before or old_is_whole) and (name in after or new_is_whole):
                yield prefix + name, before.get(name), after.get(name)

    def _children(
        self, path: bytes, contents: Contents, entry: Entry | None
    ) -> tuple[dict[bytes, Entry], bool]:
        """The entries of a directory by their names, and whether these are all of them."""
        if entry is None or not entry.is_directory:
            return {}, True
        found: Found = contents.children(entry)
        if found.damage is not None:
            self._comparison.failed.append((path, found.damage))
        return {child.name: child for child in found.entries}, found.damage is None

    def _change(self, path: bytes, old: Entry | None, new: Entry | None) -> Change | None:
        if old is None or new is None:
            kind = ADDED if old is None else REMOVED
            return Change(path, kind, (), old, new, (), old.size if old else 0, new.size if new else 0)
        if stat_bits.S_IFMT(old.mode) != stat_bits.S_IFMT(new.mode):
            return Change(path, TYPE_CHANGED, (), old, new, (), old.size, new.size)
        fields = differing(old, new)
        if (old.has_xattrs or new.has_xattrs) and self._old.xattrs(old) != self._new.xattrs(new):
            fields.append("xattrs")
        if self._comparison.content and old.is_file and old.size == new.size and self._bytes_differ(old, new):
            fields.append("content")
        return Change(path, CHANGED, tuple(fields), old, new, (), old.size, new.size) if fields else None

    def _bytes_differ(self, old: Entry, new: Entry) -> bool:
        before = _Bytes(self._old, self._old_streams, old)
        after = _Bytes(self._new, self._new_streams, new)
        if before.chunks() == after.chunks():
            return False  # what has the same digests need not be read
        return any(
            before.read(offset, PIECE) != after.read(offset, PIECE) for offset in range(0, old.size, PIECE)
        )


class _Bytes:
    """The bytes of a file in an archive."""

    def __init__(self, contents: Contents, streams: list[ImageStream], entry: Entry) -> None:
        self._parts = [(piece, stream_of(piece, streams, contents, entry)) for piece in contents.data(entry)]

    def chunks(self) -> list[tuple[bytes | None, int, int]]:
        """What the bytes are parts of: digests, each with offset in the chunk and length; None for zeros."""
        found: list[tuple[bytes | None, int, int]] = []
        for piece, stream in self._parts:
            if stream is None:
                found.append((None, 0, piece.length))
            else:
                found += stream.chunks(piece.offset, piece.length)
        return found

    def read(self, offset: int, size: int) -> bytes:
        """The bytes `offset` … `offset + size`, cut at the end."""
        parts: list[bytes] = []
        for piece, stream in self._parts:
            start, length = max(offset, 0), min(size, piece.length - max(offset, 0))
            if length > 0:
                parts.append(bytes(length) if stream is None else stream.pread(piece.offset + start, length))
                size -= length
            offset -= piece.length
        return b"".join(parts)
