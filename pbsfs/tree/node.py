"""What every node of the tree does: names, attributes, and listings that are kept for a while.

A directory keeps its listing as values: the source's facts by name. It makes the node of a child on demand
and holds it weakly. What uses a node keeps it alive: the kernel's inodes, open files, and `Nodes`, which
holds the directories that were used last. So memory follows what is in use, not what was ever walked through;
and as long as a node lives, its path leads to the same object. Used from tasks of one trio loop.

Names and paths are bytes, as the kernel has them: the names inside of archives and file systems need not be
text. Paths are joined by `/`; commands decode them with `os.fsdecode` where they show them.
"""

from __future__ import annotations

import abc
import copy
import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import trio

from pbsfs.base.errors import NotFoundError, PbsfsError
from pbsfs.base.text import quoted
from pbsfs.reader.reader import Reader
from pbsfs.runtime.memory import Charge, MemoryLimitError
from pbsfs.sources.retry import SharedTry
from pbsfs.tree.stat import DIRECTORY_MODE, LINK_MODE, Stat

if TYPE_CHECKING:
    from pbsfs.tree.walk import Walk

log = logging.getLogger(__name__)

IN_ONE_GO = 500
"""Names that are taken from a listing before other tasks have their turn: a few milliseconds."""

KEPT_DIRECTORIES = 64
"""Directories that are held, with what the source was asked for, though nobody uses them: a command or an NBD
server looks them up again within seconds."""

NAME_SIZE = 640
"""Bytes of memory for a name of a listing: in its dictionary, and the node and the inode that it may have."""

HOLDER = "listings"
"""What an error calls the bytes that are charged for listings."""

XATTR_PREFIX = b"user.pbs."


class Nodes:
    """What the nodes of one tree share: the reader, the refresh time, and which of them live.

    `opens_archives`: whether archives are shown as directories of the files in them.
    """

    def __init__(self, reader: Reader, refresh: float) -> None:
        """`refresh`: seconds for which a listing is kept."""
        self.reader = reader
        self.refresh = refresh
        self.opens_archives = False
        self._living: WeakValueDictionary[bytes, Node] = WeakValueDictionary()
        self._used_last: OrderedDict[Directory, None] = OrderedDict()
        reader.store.memory.reclaim_with(self._let_go)

    def opening_archives(self) -> Nodes:
        """The same, for a part of the tree that shows archives as directories."""
        nodes = copy.copy(self)
        nodes.opens_archives = True
        return nodes

    def child(self, directory: Directory, name: bytes, value: object) -> Node:
        """The child `name` of `directory`, listed with `value`: the one that lives, or else a new one."""
        known = self._living.get(directory.path_of(name))
        if known is not None and known.parent is directory and known.shows(value):
            return known
        made = directory.make(name, value)
        self._living[made.path] = made
        return made

    def forget(self, node: Node) -> None:
        """Has the next look-up of this path make a new node."""
        if self._living.get(node.path) is node:
            del self._living[node.path]

    def hold(self, directory: Directory) -> None:
        """Keeps `directory` alive for a while, as it was used just now."""
        self._used_last[directory] = None
        self._used_last.move_to_end(directory)
        if len(self._used_last) > KEPT_DIRECTORIES:
            self._used_last.popitem(last=False)

    def _let_go(self, excess: int) -> None:
        """Stops holding directories that nothing uses: their listings need memory."""
        self._used_last.clear()

    def __len__(self) -> int:
        return len(self._living)


class Node(abc.ABC):
    """A place in the tree. `path`: from the root, without a leading slash. `parent`: None for the root."""

    __slots__ = ("__weakref__", "parent", "path", "tree")

    def __init__(self, tree: Nodes, parent: Directory | None, name: bytes) -> None:
        self.tree = tree
        self.parent = parent
        self.path = name if parent is None else parent.path_of(name)

    @property
    def name(self) -> bytes:
        return self.path.rpartition(b"/")[2]

    @property
    def key(self) -> bytes:
        """What inode numbers are made from: the same for nodes that are one file under several names."""
        return self.path

    @property
    def repeats(self) -> bool:
        """Whether it only shows what its directory also has under another name, so that searches skip it."""
        return False

    @abc.abstractmethod
    async def stat(self) -> Stat:
        """Never raises for damage: a node that was listed can be seen, whatever is behind it."""

    async def glance(self) -> Stat:
        """`stat` without what takes a request of its own for the node; then it is not exact."""
        return await self.stat()

    def shows(self, value: object) -> bool:
        """Whether the node is still right when its directory is listed again and has `value` for it."""
        return True

    async def facts(self) -> dict[str, str]:
        """What people ask about the node, by name."""
        return {}

    async def xattrs(self) -> dict[bytes, bytes]:
        """The extended attributes: the facts, or for an entry of an archive what is stored with it."""
        return await self.fact_xattrs()

    async def xattr(self, name: bytes) -> bytes | None:
        """The value of one of them; None where there is none of that name."""
        return (await self.xattrs()).get(name)

    async def fact_xattrs(self) -> dict[bytes, bytes]:
        """The facts as extended attributes."""
        facts = await self.facts()
        return {XATTR_PREFIX + name.encode(): value.encode(errors="replace") for name, value in facts.items()}

    def __str__(self) -> str:
        return self.path.decode(errors="backslashreplace") or "/"


class Link(Node):
    """A symbolic link."""

    __slots__ = ()

    @abc.abstractmethod
    async def target(self) -> bytes:
        """Where it points to. Raises PbsfsError where that can't be known."""

    async def stat(self) -> Stat:
        try:
            target = await self.target()
        except PbsfsError as error:
            log.debug("%s: %s", self, error)
            return Stat(mode=LINK_MODE, exact=False)
        return Stat(len(target), mode=LINK_MODE, mtime_ns=self._mtime_ns(target), target=target)

    def _mtime_ns(self, target: bytes) -> int | None:
        return None


class Listing(Mapping[bytes, Node]):
    """The children of a directory as they were listed once; each node is made when it is asked for."""

    __slots__ = ("_directory", "values_by_name")

    def __init__(self, directory: Directory, values_by_name: dict[bytes, object]) -> None:
        self._directory = directory
        self.values_by_name = values_by_name

    def __getitem__(self, name: bytes) -> Node:
        return self._directory.tree.child(self._directory, name, self.values_by_name[name])

    def __contains__(self, name: object) -> bool:
        return name in self.values_by_name

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.values_by_name)

    def __reversed__(self) -> Iterator[bytes]:
        return reversed(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)


class Directory(Node):
    """A node with children. Subclasses list them and make their nodes; this class keeps the listing."""

    __slots__ = ("_charge", "_fresh_until", "_shared", "_values", "_walk")

    def __init__(self, tree: Nodes, parent: Directory | None, name: bytes, walk: Walk | None = None) -> None:
        """`walk`: shared with the directories beside it, where listing takes a request for each."""
        super().__init__(tree, parent, name)
        self._values: dict[bytes, object] = {}
        self._charge: Charge | None = None  # for `_values`
        self._fresh_until = float("-inf")
        self._shared: SharedTry[bool] | None = None
        self._walk = walk

    @abc.abstractmethod
    async def list_values(self) -> Iterable[tuple[bytes, object]]:
        """The children's names and values, from the source."""

    @abc.abstractmethod
    def make(self, name: bytes, value: Any) -> Node:
        """The node of the child `name`; `value`: what `list_values` has for it."""

    def size_of(self, value: Any) -> int:
        """Bytes of memory that a child needs, listed with `value`."""
        return NAME_SIZE

    @property
    def listing_size(self) -> int:
        """Bytes of memory that the listing is charged for."""
        return 0 if self._charge is None else self._charge.size

    def path_of(self, name: bytes) -> bytes:
        """The path of the child `name`."""
        return b"%b/%b" % (self.path, name) if self.path else name

    async def children(self) -> Listing:
        """The children. Raises PbsfsError where they can't be listed."""
        if self._walk is None or self.is_fresh():
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
        return self.listing()

    async def child(self, name: bytes) -> Node:
        """The child called `name`. Raises NotFoundError."""
        try:
            return (await self.children())[self.listed_as(name)]
        except KeyError:
            raise NotFoundError(f"{self}: there is no {quoted(name.decode(errors='replace'))}") from None

    def above(self) -> Directory:
        """Where `..` leads to, which in an archive is never outside of it."""
        return self.parent or self

    def listed_as(self, name: bytes) -> bytes:
        """The name that a listing has for the child that is looked up as `name`."""
        return name

    def listed(self, name: bytes) -> object | None:
        """The value of the child `name` in the last listing; None where it was not listed."""
        return self._values.get(name)

    def is_fresh(self) -> bool:
        """Whether the listing is young enough to be used again."""
        return trio.current_time() < self._fresh_until

    def names_last(self) -> float:
        """Seconds for which the listing is still kept, and so the most that the kernel may keep its names."""
        return max(0.0, self._fresh_until - trio.current_time())

    async def stat(self) -> Stat:
        return Stat(mode=DIRECTORY_MODE, mtime_ns=self._mtime_ns())

    def _mtime_ns(self) -> int | None:
        return None

    def listing(self) -> Listing:
        """The children as they were listed last."""
        return Listing(self, self._values)

    def _asking(self) -> SharedTry[bool]:
        """For the tasks that need something of the source at once. Made when it is first needed: most of
        100,000 snapshots are never looked at."""
        if self._shared is None:
            self._shared = SharedTry()
        return self._shared

    async def _listed(self) -> Listing:
        async def ask() -> bool:
            await self._take(await self.list_values())
            self._fresh_until = trio.current_time() + self.tree.refresh
            return True

        await self._asking().run(lambda: self.is_fresh() or None, ask)
        self.tree.hold(self)
        return self.listing()

    async def _take(self, listed: Iterable[tuple[bytes, object]]) -> None:
        """Keeps a listing, and charges for it; other tasks run meanwhile. Raises MemoryLimitError."""
        values: dict[bytes, object] = {}
        size = 0
        for name, value in listed:
            values[name] = value
            size += self.size_of(value)
            if len(values) % IN_ONE_GO == 0:
                await trio.lowlevel.checkpoint()
        memory = self.tree.reader.store.memory
        # The old listing is in memory for a moment longer, but no reason to refuse the new one.
        old = memory.charge(HOLDER, self.listing_size, passing=True)
        self._charge = None
        try:
            self._charge = memory.admit(f"{self}: the {size} bytes of its listing", HOLDER, size)
        except MemoryLimitError:
            values = {}
            raise
        finally:
            self._values = values
            old.resize(0)

    async def _list_ahead(self) -> None:
        try:
            await self._listed()
        except PbsfsError as error:  # listing it on demand raises the error
            log.debug("%s: not listed ahead: %s", self, error)
