"""The versions of one file, in an archive or on a disk, over all snapshots of its group.

Snapshots are looked at side by side. Two of them have the same version where all that is stored with the
entry is the same, or with `content` also the bytes. Used by `pbsfs versions`, from tasks of one trio loop.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from pbsfs.base.errors import NotFoundError, PbsfsError, UsageError
from pbsfs.contents.base import Entry
from pbsfs.reader.bridge import ImageStream
from pbsfs.reader.contents import OpenContents
from pbsfs.reader.decoded import stream_of
from pbsfs.tasks.attributes import differing
from pbsfs.tree import BrokenDisk, ContentsNode, Directory, Latest, Note, SnapshotDirectory, Tree
from pbsfs.tree.namespaces import FILES
from pbsfs.tree.volumes import NOTE

SIDE_BY_SIDE = 8
"""Snapshots that are looked at at once: each asks the source a few things, one after the other."""

PIECE = 4 << 20
"""Bytes that are hashed at a time."""


@dataclass(frozen=True, slots=True)
class State:
    """An entry as one snapshot has it. `digest`: SHA-256 of a file's bytes, where contents are compared."""

    entry: Entry
    xattrs: tuple[tuple[bytes, bytes], ...]
    digest: bytes | None = None

    def changes_since(self, other: State) -> tuple[str, ...]:
        """What differs: type, size, mtime, mode, owner, link, device, xattrs, content."""
        changes = differing(other.entry, self.entry)
        if self.xattrs != other.xattrs:
            changes.append("xattrs")
        if self.digest != other.digest:
            changes.append("content")
        return tuple(changes)


@dataclass(slots=True)
class Version:
    """A version, in snapshots that follow one another. `state`: None where these do not have the file.

    `first`, `last`: times of the snapshots, in seconds since the epoch. `changes`: since the version before.
    """

    state: State | None
    first: int
    last: int
    snapshots: int = 1
    changes: tuple[str, ...] = ()


@dataclass(slots=True)
class Versions:
    """What was found. `failed`: snapshots that could not be looked at, by path."""

    versions: list[Version] = field(default_factory=list)
    failed: list[tuple[bytes, PbsfsError]] = field(default_factory=list)


async def versions_of(
    tree: Tree,
    path: bytes,
    *,
    content: bool = False,
    looked: Callable[[int, int], None] = lambda _done, _all: None,
) -> Versions:
    """The versions of the entry at `path`, which is in an archive of any snapshot, the oldest first.

    `looked`: called with the number of snapshots that were looked at, and of all.

    It need not exist in that snapshot. Raises NotFoundError where no snapshot has it, UsageError for a path
    outside of archives, and what listing the group raises.
    """
    snapshot, inner = await _split(tree, path)
    listing = await snapshot.group.children()
    found = [node for node in listing.values() if isinstance(node, SnapshotDirectory)]
    states: list[State | PbsfsError | None] = [None] * len(found)
    count = 0
    looked(0, len(found))
    limiter = trio.CapacityLimiter(SIDE_BY_SIDE)

    async def look(place: int, node: SnapshotDirectory) -> None:
        nonlocal count
        async with limiter:
            states[place] = await _state(tree, node, inner, content=content)
        count += 1
        looked(count, len(found))

    async with trio.open_nursery() as nursery:
        for place, node in enumerate(found):
            nursery.start_soon(look, place, node)
    result = Versions()
    for node, state in zip(found, states, strict=True):
        if isinstance(state, PbsfsError):
            result.failed.append((node.path, state))
        else:
            _add(result.versions, node.info.snapshot.time, state)
    if not any(version.state for version in result.versions) and not result.failed:
        raise NotFoundError(f"{snapshot.group}: no snapshot has {inner.decode(errors='replace')}")
    return result


async def _split(tree: Tree, path: bytes) -> tuple[SnapshotDirectory, bytes]:
    """The snapshot that a path leads through, and the rest of it: an archive's name, and the path in it."""
    here: Directory = tree.root
    steps = [step for step in path.split(b"/") if step not in (b"", b".")]
    for number, step in enumerate(steps):
        node = await tree.typed_child(here, step)
        if isinstance(node, Latest):
            node = await here.child(await node.target())
        if isinstance(node, SnapshotDirectory) and node.tree.opens_archives and len(steps) > number + 2:
            return node, b"/".join(steps[number + 1 :])
        if not isinstance(node, Directory):
            break
        here = node
    raise UsageError(
        f"{path.decode(errors='replace')}: not a file in an archive; name one, as "
        f"{FILES.decode()}/host/web1/latest/root/etc/fstab"
    )


async def _state(
    tree: Tree, snapshot: SnapshotDirectory, inner: bytes, *, content: bool
) -> State | PbsfsError | None:
    try:
        node = await tree.find(snapshot.path + b"/" + inner, follow=False)
        if not isinstance(node, ContentsNode):
            return None
        entry, opened = await node.learn(), await node.inside.open()
        xattrs = tuple(sorted((await opened.xattrs(entry)).items())) if entry.has_xattrs else ()
        digest = await _digest(opened, entry) if content and entry.is_file else None
        return State(entry, xattrs, digest)
    except NotFoundError:
        return await _what_hides(snapshot, inner.partition(b"/")[0])
    except PbsfsError as error:
        return error


async def _what_hides(snapshot: SnapshotDirectory, name: bytes) -> PbsfsError | None:
    """Why the archive or volume `name` may be there all the same; None where it is not."""
    children = await snapshot.children()
    if name in children:
        return None
    nodes = (node for node in children.values() if isinstance(node, BrokenDisk | Note))
    return next((n.error for n in nodes if isinstance(n, BrokenDisk) or n.name == name + NOTE), None)


async def _digest(opened: OpenContents, entry: Entry) -> bytes:
    with opened.streams(whole=False) as streams:
        return await opened.run(functools.partial(_hash, opened, streams, entry))


def _hash(opened: OpenContents, streams: Sequence[ImageStream], entry: Entry) -> bytes:
    digest = hashlib.sha256()
    for piece in opened.contents.data(entry):
        stream = stream_of(piece, streams, opened.contents, entry)
        for offset in range(0, piece.length, PIECE):
            length = min(PIECE, piece.length - offset)
            digest.update(bytes(length) if stream is None else stream.view(piece.offset + offset, length))
    return digest.digest()


def _add(versions: list[Version], time: int, state: State | None) -> None:
    last = versions[-1] if versions else None
    if last is not None and (last.state is None) == (state is None):
        same = state is None or last.state is None or not state.changes_since(last.state)
        if same:
            last.last = time
            last.snapshots += 1
            return
    before = next((version.state for version in reversed(versions) if version.state), None)
    changes = state.changes_since(before) if state is not None and before is not None else ()
    versions.append(Version(state, time, time, changes=changes))
