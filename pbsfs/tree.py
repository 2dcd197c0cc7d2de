"""The tree that is shown: directories, links and files, listed on demand.

All doors show the same tree: the mount as a file system, the command line by paths, NBD by export
names. Nodes are made when their directory is listed and belong to one `Tree`. A directory's listing
is kept for a few seconds; when it is listed again, a child that did not change stays the same object,
and so does what was learned about it. Used from tasks of one trio loop.

What a stat costs is decided here. The sizes of images come with the listing; how long a blob is, and which
chunks of an image are holes, takes reading the blob or index. A source with cheap files is asked for both.
With any other, a stat of a blob fetches all blobs of its snapshot, side by side, and what was learned is kept
as long as the manifest is the same; holes are learned when the image is opened, and until then its `Stat`
says that it is not exact.
"""

from __future__ import annotations

import abc
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import trio

from pbsfs.base.errors import (
    DamageError,
    ForbiddenError,
    KeyRequiredError,
    NotFoundError,
    PbsfsError,
    UsageError,
)
from pbsfs.base.names import (
    BACKUP_TYPES,
    MANIFEST,
    ROOT_NAMESPACE,
    ArchiveKind,
    Namespace,
    format_time,
    parse_time,
)
from pbsfs.reader.image import Image
from pbsfs.reader.opened import Blob
from pbsfs.reader.reader import Reader
from pbsfs.sources.base import FileInfo, GroupInfo, SnapshotInfo

log = logging.getLogger(__name__)

DEFAULT_REFRESH = 5.0
"""Seconds for which a listing is kept: new backups appear within this time."""

BLOBS_AT_ONCE = 4
"""Blobs of a snapshot that are fetched side by side for their sizes. Each is in memory meanwhile."""

AHEAD = 8
"""Directories that are listed side by side where they are listed one after another. As many connections are
kept to a server."""

LISTED_IN_ORDER = 3
"""Directories that are listed one after another before the next ones are listed with them."""

IN_ONE_GO = 500
"""Nodes that are made before other tasks have their turn: a few milliseconds."""

LATEST = "latest"
NAMESPACES = "ns"
XATTR_PREFIX = "user.pbs."


@dataclass(frozen=True, slots=True)
class Stat:
    """What `stat` tells of a node, as far as the tree knows it.

    `data_size`: bytes that are not holes. `mtime`: seconds since the epoch, None where there is no
    time to tell. `exact`: whether `size` and `data_size` are final.
    """

    size: int = 0
    data_size: int = 0
    mtime: int | None = None
    exact: bool = True


class Node(abc.ABC):
    """A place in the tree. `path` is its place below the root, without a leading slash."""

    __slots__ = ("__weakref__", "path", "tree")

    def __init__(self, tree: Tree, path: str) -> None:
        self.tree = tree
        self.path = path

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @abc.abstractmethod
    async def stat(self) -> Stat:
        """Never raises for damage: a node that was listed can be seen, whatever is behind it."""

    async def glance(self) -> Stat:
        """`stat`, but what takes a request of its own for the node is left out, and then it is not exact."""
        return await self.stat()

    def shows(self, info: object) -> bool:
        """Whether the node is still right when its directory is listed anew and `info` is found."""
        return True

    async def facts(self) -> dict[str, str]:
        """What people ask about the node, by the names that extended attributes have without prefix."""
        return {}

    def __str__(self) -> str:
        return self.path or "/"


class Directory(Node):
    """A node with children. Subclasses list them; this class keeps the listing for a while."""

    __slots__ = ("_children", "_fresh_until", "_listing", "_walk")

    def __init__(self, tree: Tree, path: str, walk: _Walk | None = None) -> None:
        """`walk`: shared with the directories beside it, where listing takes a request for each."""
        super().__init__(tree, path)
        self._children: dict[str, Node] = {}
        self._fresh_until = float("-inf")
        self._listing: trio.Lock | None = None
        self._walk = walk

    @abc.abstractmethod
    async def _list(self) -> Iterable[Node]:
        """The children, asked from the source."""

    async def children(self) -> dict[str, Node]:
        """The children by name. Raises PbsfsError where they can't be listed."""
        if self._is_fresh() or self._walk is None:
            return await self._listed()
        failure: PbsfsError | None = None
        async with trio.open_nursery() as nursery:
            for node in self._walk.next_after(self):
                nursery.start_soon(node._list_ahead)
            try:
                await self._listed()
            except PbsfsError as error:
                failure = error  # raised outside, so that the nursery does not wrap it in a group
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return self._children

    def _asking(self) -> trio.Lock:
        """Held by the task that asks the source, for all that wait. Made when it is wanted: most of 100,000
        snapshots are never looked at."""
        if self._listing is None:
            self._listing = trio.Lock()
        return self._listing

    def _is_fresh(self) -> bool:
        return trio.current_time() < self._fresh_until

    async def _listed(self) -> dict[str, Node]:
        async with self._asking():
            if not self._is_fresh():
                self._children = await _by_name(await self._list())
                self._fresh_until = trio.current_time() + self.tree.refresh
        return self._children

    async def _list_ahead(self) -> None:
        try:
            await self._listed()
        except PbsfsError as error:  # who looks at it is told
            log.debug("%s: not listed ahead: %s", self, error)

    def names_last(self) -> float:
        """Seconds for which the listing is still kept, and so the most that a door may keep its names."""
        return max(0.0, self._fresh_until - trio.current_time())

    async def child(self, name: str) -> Node:
        """The child called `name`. Raises NotFoundError."""
        try:
            return (await self.children())[name]
        except KeyError:
            raise NotFoundError(f"{self}: there is no '{name}'") from None

    async def stat(self) -> Stat:
        return Stat(mtime=self._mtime())

    def _mtime(self) -> int | None:
        return None

    def _keep(self, name: str, make: Callable[[str], Node], info: object = None) -> Node:
        """The child `name` as it was, where it still shows `info`; else a new one, made from its path."""
        known = self._children.get(name)
        return known if known is not None and known.shows(info) else make(f"{self.path}/{name}".lstrip("/"))


class _Walk:
    """Notices that the directories in one are listed or looked at in order, as `find` and `ls -R` do.

    It says which are next, so that they are asked for side by side.
    """

    def __init__(self, parent: Directory) -> None:
        self._parent = parent
        self._children: dict[str, Node] = {}  # as they were when the places were taken
        self._nodes: list[Node] = []
        self._places: dict[str, int] = {}
        self._place = -1  # of the one that was listed last
        self._asked = float("-inf")
        self._in_order = 0

    def next_after(self, node: Directory) -> list[Directory]:
        """What to ask for together with `node`, which somebody wants now."""
        if self._children is not self._parent._children:
            self._children = self._parent._children
            self._nodes = list(self._children.values())
            self._places = {name: place for place, name in enumerate(self._children)}
        before, asked = self._place, self._asked
        self._place, self._asked = self._places.get(node.name, -1), trio.current_time()
        # Up to AHEAD of them were listed meanwhile. A program that takes longer than the refresh time for one
        # has no use for listings that were made ahead.
        follows = 0 < self._place - before <= AHEAD and self._asked - asked < node.tree.refresh
        self._in_order = self._in_order + 1 if follows else 1
        if self._in_order < LISTED_IN_ORDER:
            return []
        after = self._nodes[self._place + 1 : self._place + AHEAD]
        return [node for node in after if isinstance(node, Directory) and not node._is_fresh()]


class NamespaceDirectory(Directory):
    """A namespace: its backup types, and the namespaces below it.

    It asks for all groups of the namespace at once, and `vm`, `ct`, `host` and `ns` show their part of
    that: however many of them are looked at, the source is asked once.
    """

    __slots__ = ("_told_forbidden", "groups", "namespace", "namespaces", "round")

    def __init__(self, tree: Tree, path: str, namespace: Namespace, walk: _Walk | None = None) -> None:
        super().__init__(tree, path, walk)
        self.namespace = namespace
        self.round = 0  # listings that there were
        self.groups: list[GroupInfo] = []
        self.namespaces: list[Namespace] = []
        self._told_forbidden = False

    async def _list(self) -> list[Node]:
        source = self.tree.reader.source
        self.namespaces = await source.namespaces(self.namespace)
        try:
            self.groups = await source.groups(self.namespace)
        except ForbiddenError as error:
            if not self.namespaces:
                raise
            # Who may read some namespaces below sees those.
            if not self._told_forbidden:
                log.warning("%s: its own backups are left out: %s", self, error)
            self._told_forbidden = True
            self.groups = []
        self.round += 1
        present = {info.group.type for info in self.groups}
        children: list[Node] = [
            self._keep(name, functools.partial(TypeDirectory, self, backup_type=name))
            for name in BACKUP_TYPES
            if name in present
        ]
        if self.namespaces:
            children.append(self._keep(NAMESPACES, functools.partial(NamespacesDirectory, self)))
        return children

    async def facts(self) -> dict[str, str]:
        return {"namespace": str(self.namespace)}


class _PartDirectory(Directory):
    """A part of what a namespace's own listing found; it is as fresh as that."""

    __slots__ = ("_round", "_walk_inside", "parent")

    def __init__(self, parent: NamespaceDirectory, path: str) -> None:
        super().__init__(parent.tree, path)
        self.parent = parent
        self._round = 0  # the listing of the parent that the children are from
        self._walk_inside = _Walk(self)

    async def children(self) -> dict[str, Node]:
        await self.parent.children()
        async with self._asking():
            while self._round != self.parent.round:
                found = self.parent.round
                self._children = await _by_name(await self._list())
                self._round = found
        return self._children

    def names_last(self) -> float:
        return self.parent.names_last()


class NamespacesDirectory(_PartDirectory):
    """`ns`: the namespaces directly below one."""

    __slots__ = ()

    async def _list(self) -> list[Node]:
        return [
            self._keep(
                ns.parts[-1],
                functools.partial(NamespaceDirectory, self.tree, namespace=ns, walk=self._walk_inside),
            )
            for ns in self.parent.namespaces
        ]

    async def facts(self) -> dict[str, str]:
        return {"namespace": str(self.parent.namespace)}


class TypeDirectory(_PartDirectory):
    """`vm`, `ct` or `host` of a namespace: its groups of that type."""

    __slots__ = ("type",)

    def __init__(self, parent: NamespaceDirectory, path: str, backup_type: str) -> None:
        super().__init__(parent, path)
        self.type = backup_type

    async def _list(self) -> Iterable[Node]:
        return (
            self._keep(
                info.group.id,
                functools.partial(GroupDirectory, self.tree, info=info, walk=self._walk_inside),
                info,
            )
            for info in self._groups()
        )

    def _groups(self) -> list[GroupInfo]:
        return [info for info in self.parent.groups if info.group.type == self.type]

    def _mtime(self) -> int | None:
        return max((i.last_backup for i in self._groups() if i.last_backup is not None), default=None)

    async def facts(self) -> dict[str, str]:
        return {"namespace": str(self.parent.namespace), "backup_type": self.type}


class GroupDirectory(Directory):
    """A group: its finished snapshots, and `latest`."""

    __slots__ = ("info", "looks")

    def __init__(self, tree: Tree, path: str, info: GroupInfo, walk: _Walk) -> None:
        super().__init__(tree, path, walk)
        self.info = info
        self.looks = _Walk(self)  # at the blobs of its snapshots

    def shows(self, info: object) -> bool:
        # A group stays the same group, whatever a newer listing says of it.
        if isinstance(info, GroupInfo):
            self.info = info
        return True

    async def _list(self) -> Iterable[Node]:
        return self._nodes(await self.tree.reader.source.snapshots(self.info.group))

    def _nodes(self, snapshots: list[SnapshotInfo]) -> Iterator[Node]:
        for info in snapshots:
            yield self._keep(
                info.snapshot.time_text, functools.partial(SnapshotDirectory, self, info=info), info
            )
        if any(info.error is None for info in snapshots):
            yield self._keep(LATEST, functools.partial(Latest, self.tree, group=self))

    def _mtime(self) -> int | None:
        return self.info.last_backup

    async def facts(self) -> dict[str, str]:
        info = self.info
        return _told(
            namespace=str(info.group.namespace),
            backup_type=info.group.type,
            backup_id=info.group.id,
            backup_count=str(info.snapshot_count),
            last_backup=None if info.last_backup is None else format_time(info.last_backup),
            owner=info.owner,
            notes=info.notes,
        )


class SnapshotDirectory(Directory):
    """A snapshot: its files."""

    __slots__ = ("_group", "_looked_until", "_version", "info")

    def __init__(self, group: GroupDirectory, path: str, info: SnapshotInfo) -> None:
        super().__init__(group.tree, path)
        self._group = group
        self.info = info
        self._looked_until = float("-inf")
        self._version = b""  # the manifest that goes with the sizes of the blobs

    def shows(self, info: object) -> bool:
        return self.info == info

    def _files(self) -> dict[str, Node]:
        """The files by name, made when they are wanted first."""
        if self._children:
            return self._children
        taken = self._children
        stored = {file.archive.filename for file in self.info.files}
        for file in self.info.files:
            # 'x.img.fidx' and 'x.img.blob' would share a name: the second keeps its stored name, which
            # therefore no other file may take ('x.img.blob.blob').
            name = file.archive.name
            if name in taken or name in stored:
                name = file.archive.filename
            path = f"{self.path}/{name}"
            if file.archive.kind is ArchiveKind.BLOB:
                taken[name] = BlobFile(self, path, file)
            else:
                taken[name] = ImageFile(self.tree, path, self.info, file)
        return taken

    async def look_at_blobs(self) -> None:
        """Learns how long the blobs are, from a source without cheap files. What can't be read stays as it
        was listed, and is tried again by those who ask after the refresh time."""
        if trio.current_time() < self._looked_until:
            return
        async with trio.open_nursery() as nursery:
            for node in self._group.looks.next_after(self):
                if isinstance(node, SnapshotDirectory):
                    nursery.start_soon(node._look_at_blobs)
            await self._look_at_blobs()

    async def _look_at_blobs(self) -> None:
        async with self._asking():
            if trio.current_time() < self._looked_until:
                return
            blobs = [node for node in self._files().values() if isinstance(node, BlobFile)]
            try:
                version = await self.tree.reader.version(self.info.snapshot, self.tree.refresh)
                if version != self._version:
                    for node in blobs:
                        node.forget_size()
                    self._version = version
                limiter = trio.CapacityLimiter(BLOBS_AT_ONCE)
                async with trio.open_nursery() as nursery:
                    for node in blobs:
                        nursery.start_soon(node.learn_size, limiter)
            except PbsfsError as error:
                log.debug("%s: the sizes of its blobs are not known: %s", self, error)
            self._looked_until = trio.current_time() + self.tree.refresh

    async def children(self) -> dict[str, Node]:
        # A snapshot never changes, so its files need no refreshing: where they do differ (a manifest
        # was repaired), the group's listing makes a new directory.
        if self.info.error is not None:
            raise DamageError(f"{self.path}: {self.info.error}")
        return self._files()

    def names_last(self) -> float:
        return self._group.names_last()  # which makes a new directory where anything did change

    async def _list(self) -> Iterable[Node]:
        return self._files().values()

    def _mtime(self) -> int | None:
        return self.info.snapshot.time

    async def facts(self) -> dict[str, str]:
        modes = {f.crypt_mode.value for f in self.info.files if f.crypt_mode and f.archive != MANIFEST}
        return _snapshot_facts(self.info) | _told(
            size=str(sum(file.size for file in self.info.files)),
            crypt_mode=modes.pop() if len(modes) == 1 else "mixed" if modes else None,
            error=self.info.error,
        )


class Latest(Node):
    """The link to a group's newest snapshot that can be read, computed when it is followed."""

    __slots__ = ("_group",)

    def __init__(self, tree: Tree, path: str, group: GroupDirectory) -> None:
        super().__init__(tree, path)
        self._group = group

    async def target(self) -> str:
        """The name of the snapshot's directory. Raises NotFoundError."""
        for node in reversed((await self._group.children()).values()):  # the newest first
            if isinstance(node, SnapshotDirectory) and node.info.error is None:
                return node.name
        raise NotFoundError(f"{self._group}: there is no finished snapshot")

    async def stat(self) -> Stat:
        try:
            target = await self.target()
        except PbsfsError:
            return Stat(exact=False)
        return Stat(size=len(target), mtime=parse_time(target))


class File(Node):
    """A file of a snapshot."""

    __slots__ = ("_stat", "file", "info")

    def __init__(self, tree: Tree, path: str, info: SnapshotInfo, file: FileInfo) -> None:
        super().__init__(tree, path)
        self.info = info
        self.file = file
        self._stat: Stat | None = None  # kept once it is exact

    async def stat(self) -> Stat:
        if self._stat is None and self.tree.reader.source.cheap_files:
            await self._learn()
        return self.known()

    def known(self) -> Stat:
        """The stat as far as it is known, without asking."""
        return self._stat or self._listed(exact=False)

    async def _learn(self) -> None:
        try:
            self._stat = await self._look()
        except (DamageError, KeyRequiredError) as error:
            # Seen all the same, as the listing has it: opening it says what is wrong.
            log.debug("%s", error)
            self._stat = self._listed(exact=True)
        except PbsfsError as error:
            log.debug("%s", error)

    def _listed(self, *, exact: bool) -> Stat:
        return Stat(self.file.size, self.file.size, self.info.snapshot.time, exact=exact)

    @abc.abstractmethod
    async def _look(self) -> Stat:
        """The exact stat, from the file itself."""

    async def facts(self) -> dict[str, str]:
        stat = await self.stat()
        mode = self.file.crypt_mode
        return _snapshot_facts(self.info) | _told(
            archive=self.file.archive.filename,
            crypt_mode=mode.value if mode else None,
            size=str(stat.size),
        )


class ImageFile(File):
    """An archive with an index: a disk image or a pxar stream."""

    __slots__ = ("_csum",)

    def __init__(self, tree: Tree, path: str, info: SnapshotInfo, file: FileInfo) -> None:
        super().__init__(tree, path, info, file)
        self._csum: bytes | None = None  # of the index that `_stat` was taken from

    async def open(self) -> Image:
        """The present content, however old the listing. Raises DamageError, KeyRequiredError, SourceError."""
        image = await self.tree.reader.open_image(self.info, self.file, self.tree.refresh)
        if self._csum != image.index.csum:
            self._stat, self._csum = self._exact(image), image.index.csum
        return image

    async def _look(self) -> Stat:
        return self._exact(await self.tree.reader.open_image(self.info, self.file, self.tree.refresh))

    def _exact(self, image: Image) -> Stat:
        return Stat(image.size, image.data_size(), self.info.snapshot.time)

    async def facts(self) -> dict[str, str]:
        facts = await super().facts()
        zeroed = self.tree.reader.zeroed
        if zeroed is not None:
            facts["damaged_ranges"] = zeroed.told(f"{self.info.snapshot}/{self.file.archive.name}")
        if self.file.archive.kind is ArchiveKind.FIXED and self.tree.reader.source.cheap_files:
            try:
                index = (await self.open()).index
            except PbsfsError:
                return facts
            return facts | {"chunk_size": str(index.chunk_size)}
        return facts


class BlobFile(File):
    """A small file that is stored whole: a configuration, the manifest, a log."""

    __slots__ = ("_snapshot",)

    def __init__(self, snapshot: SnapshotDirectory, path: str, file: FileInfo) -> None:
        super().__init__(snapshot.tree, path, snapshot.info, file)
        self._snapshot = snapshot

    async def stat(self) -> Stat:
        if self.tree.reader.source.cheap_files:
            return await super().stat()
        await self._snapshot.look_at_blobs()
        return self.known()

    async def glance(self) -> Stat:
        return await self.stat() if self.tree.reader.source.cheap_files else self.known()

    def forget_size(self) -> None:
        self._stat = None

    async def learn_size(self, limiter: trio.CapacityLimiter) -> None:
        """Learns the size, unless it is known. Where the blob can't be read, the next call tries again."""
        async with limiter:
            if self._stat is None:
                try:
                    self._stat = await self._look()
                except PbsfsError as error:  # opening it says what is wrong
                    log.debug("%s", error)

    async def open(self) -> Blob:
        """The present content, however old the listing; shared. Raises DamageError, KeyRequiredError,
        SourceError."""
        blob = await self.tree.reader.open_blob(self.info, self.file, self.tree.refresh)
        self._stat = Stat(len(blob.data), len(blob.data), self.info.snapshot.time)
        return blob

    async def read(self) -> bytes:
        """The decoded content. Raises like `open`."""
        return (await self.open()).data

    async def _look(self) -> Stat:
        size = await self.tree.reader.blob_size(self.info, self.file, self.tree.refresh)
        return Stat(size, size, self.info.snapshot.time)


class Tree:
    """The tree of one source, rooted at one of its namespaces."""

    def __init__(
        self, reader: Reader, root: Namespace = ROOT_NAMESPACE, *, refresh: float = DEFAULT_REFRESH
    ) -> None:
        """`refresh`: seconds for which a listing is kept."""
        self.reader = reader
        self.refresh = refresh
        self.root = NamespaceDirectory(self, "", root)

    async def at(self, path: str) -> Node:
        """The node whose `path` this is; a link is not followed. Raises NotFoundError."""
        node: Node = self.root
        for step in path.split("/") if path else ():
            if not isinstance(node, Directory):
                raise NotFoundError(f"{node} is not a directory")
            node = await node.child(step)
        return node

    async def find(self, path: str) -> Node:
        """The node at `path` below the root; links on the way and at its end are followed.

        Raises NotFoundError, and UsageError for a path that no tree could have.
        """
        trail: list[Node] = [self.root]
        for step in path.split("/"):
            if step in ("", "."):
                continue
            if step == "..":
                raise UsageError(f"'{path}': '..' has no meaning here")
            here = trail[-1]
            if not isinstance(here, Directory):
                raise NotFoundError(f"{here} is not a directory")
            node = await _child_or_suggest(here, step)
            if isinstance(node, Latest):
                node = await here.child(await node.target())
            trail.append(node)
        return trail[-1]


async def _by_name(nodes: Iterable[Node]) -> dict[str, Node]:
    """The nodes by their names; other tasks have their turn meanwhile, however many there are."""
    found: dict[str, Node] = {}
    for node in nodes:
        found[node.name] = node
        if len(found) % IN_ONE_GO == 0:
            await trio.lowlevel.checkpoint()
    return found


async def _child_or_suggest(directory: Directory, name: str) -> Node:
    children = await directory.children()
    if name in children:
        return children[name]
    for node in children.values():
        if isinstance(node, File) and node.file.archive.filename == name:
            return node  # people copy stored names from the vendor's client
    names = list(children)
    shown = ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")
    raise NotFoundError(f"{directory}: there is no '{name}'; there is {shown or 'nothing'}")


def _told(**facts: str | None) -> dict[str, str]:
    return {name: value for name, value in facts.items() if value is not None}


def _snapshot_facts(info: SnapshotInfo) -> dict[str, str]:
    snapshot = info.snapshot
    return _told(
        namespace=str(snapshot.group.namespace),
        backup_type=snapshot.group.type,
        backup_id=snapshot.group.id,
        backup_time=snapshot.time_text,
        owner=info.owner,
        protected="true" if info.protected else "false",
        key_fingerprint=info.key_fingerprint,
        verify_state=info.verify_state or "none",
        notes=info.notes,
    )
