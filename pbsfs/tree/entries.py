"""The files in archives and on volumes: the entries below a root, as nodes.

What an archive holds never changes, so its listings are kept as long as the nodes live. Used from tasks of
one trio loop.
"""

from __future__ import annotations

import logging
import stat as stat_bits
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import trio

from pbsfs.base.errors import DamageError, NotFoundError, PbsfsError
from pbsfs.base.text import quoted
from pbsfs.contents.base import Entry
from pbsfs.reader.pieces import PiecesHandle
from pbsfs.tree.node import NAME_SIZE, XATTR_PREFIX, Directory, Link, Listing, Node
from pbsfs.tree.stat import Stat

if TYPE_CHECKING:
    from pbsfs.tree.archives import ContentsRoot

log = logging.getLogger(__name__)

MOST_COMPLETED = 128
"""Entries whose headers are read side by side when a program looks at them in order."""

NEAR = 1 << 20
"""Bytes behind an entry whose entries are read with it: they lie in the same chunk or the next."""

LASTS = 24 * 3600.0
"""Seconds for which the kernel may keep entries of archives, which never change."""

ENTRY_SIZE = 500
"""Bytes of memory for an entry of an archive besides its name: measured."""


@contextmanager
def _naming(node: ContentsNode) -> Iterator[None]:
    """Has errors of what is in an archive name `node`: see `ContentsNode.named`."""
    try:
        yield
    except DamageError as error:
        raise node.named(error) from None


class ContentsNode(Node):
    """An entry of an archive."""

    __slots__ = ()

    @property
    def directory(self) -> ContentsDirectory:
        """The directory that it is in; of an archive's root, itself."""
        return cast("ContentsDirectory", self.parent)

    @property
    def inside(self) -> ContentsRoot:
        """The root of the archive or volume."""
        return self.directory.inside

    @property
    def entry(self) -> Entry:
        """The entry as far as it is known."""
        return cast("Entry", self.directory.listed(self.name))

    @property
    def key(self) -> bytes:
        return self.inside.key_of(self.entry) if self.entry.exact else self.path

    def shows(self, value: object) -> bool:
        return isinstance(value, Entry) and stat_bits.S_IFMT(value.mode) == stat_bits.S_IFMT(self.entry.mode)

    def named(self, error: DamageError) -> DamageError:
        """`error` with the path of the node. One that names a file of the snapshot stays as it is: damage of
        a chunk is the same error for all that it hits, so the log has it once."""
        if str(error).startswith(f"{self.inside.snapshot.info.snapshot}/"):
            return error
        return DamageError(f"{self}: {error}")

    async def learn(self) -> Entry:
        """The exact entry. Raises DamageError, KeyRequiredError, NotFoundError, SourceError."""
        entry = self.entry
        return entry if entry.exact else await self.directory.complete(entry)

    async def stat(self) -> Stat:
        try:
            await self.inside.learn_link_counts(await self.learn())
        except PbsfsError as error:  # opening it raises the error
            log.debug("%s: %s", self, error)
        return self.known()

    def known(self) -> Stat:
        """The stat as far as it is known, without asking."""
        return self.inside.known_stat(self.entry)

    async def glance(self) -> Stat:
        return self.known()

    async def xattrs(self) -> dict[bytes, bytes]:
        """As they are stored. Raises like `learn`."""
        entry = await self.learn()
        with _naming(self):
            return await self.inside.xattrs_of(entry)

    async def xattr(self, name: bytes) -> bytes | None:
        """The value of one: stored with the entry, or, of a root, a fact of the archive or volume.

        Facts are not listed, so that programs do not copy them. Raises like `learn`.
        """
        if (value := (await self.xattrs()).get(name)) is not None:
            return value
        facts = self.inside is self and name.startswith(XATTR_PREFIX)
        return (await self.fact_xattrs()).get(name) if facts else None

    @property
    def known_to_have_no_xattrs(self) -> bool:
        entry = self.entry
        return entry.exact and not entry.has_xattrs

    async def facts(self) -> dict[str, str]:
        return await self.inside.facts()


class ContentsFile(ContentsNode):
    """A regular file of an archive."""

    __slots__ = ()

    async def open(self) -> PiecesHandle:
        """A reader of its own. Raises like `learn`."""
        entry = await self.learn()
        with _naming(self):
            return await (await self.inside.open()).file(entry)

    def open_cached(self) -> PiecesHandle | None:
        """The same; None where that has to wait. Raises DamageError."""
        opened, entry = self.inside.opened, self.entry
        return opened.cached_file(entry) if opened is not None and entry.exact else None


class ContentsSpecial(ContentsNode):
    """A device, FIFO or socket of an archive."""

    __slots__ = ()

    async def glance(self) -> Stat:
        return await self.stat()  # Linux never takes another device number of an inode that it knows


class ContentsLink(ContentsNode, Link):
    """A symbolic link of an archive."""

    __slots__ = ()

    async def target(self) -> bytes:
        return (await self.learn()).target or b""


class ContentsDirectory(ContentsNode, Directory):
    """A directory of an archive.

    `damage`: why the listing may lack entries; None where it does not.
    """

    __slots__ = ("_completing", "_inside", "_is_listed", "_next", "_order", "_places", "_step", "damage")

    _inside: ContentsRoot  # of all but the root: kept, since trees can be thousands of levels deep

    def __init__(self, parent: Directory, name: bytes) -> None:
        super().__init__(parent.tree, parent, name)
        if isinstance(parent, ContentsDirectory):
            self._inside = parent.inside
        self.damage: DamageError | None = None
        self._is_listed = False
        self._completing: trio.Lock | None = None
        self._order: list[bytes] = []  # the names as they are listed, made when entries are completed
        self._places: dict[bytes, int] = {}
        self._next = -1  # the place in it behind what was completed last
        self._step = 1  # how many to complete next

    @property
    def inside(self) -> ContentsRoot:
        return self._inside

    @property
    def failure(self) -> DamageError | None:
        """`damage` as an error of its own, which says where it is."""
        return None if self.damage is None else self.named(self.damage)

    async def children(self) -> Listing:
        """The children that can be read; `damage` says whether there may be more. Raises like `learn`."""

        async def read() -> bool:
            with _naming(self):
                # What is in a directory is found without its own attributes, which may be damaged.
                entry = await self.learn() if self.inside is self else self.entry
                contents = await self.inside.open()
                found = await contents.children(entry)
            await self._take((child.name, child) for child in found.entries)
            self.damage = found.damage
            self._is_listed = True
            return True

        if not self._is_listed:
            await self._asking().run(lambda: self._is_listed or None, read)
        self.tree.hold(self)
        return self.listing()

    async def child(self, name: bytes) -> Node:
        """The child called `name`. Raises NotFoundError, or the damage that may hide it."""
        children = await self.children()
        if name in children:
            return children[name]
        if self.failure is not None:
            raise self.failure
        return await super().child(name)

    def cached_child(self, name: bytes) -> Node | None:
        """The child called `name`; None where the directory was not listed, or has no such entry."""
        if not self._is_listed or name not in self._values:
            return None
        self.tree.hold(self)
        return self.listing()[name]

    async def list_values(self) -> Iterable[tuple[bytes, object]]:
        return (await self.children()).values_by_name.items()

    def size_of(self, value: Entry) -> int:
        return NAME_SIZE + ENTRY_SIZE

    def make(self, name: bytes, value: Entry) -> Node:
        if value.is_directory:
            return ContentsDirectory(self, name)
        if value.is_file:
            return ContentsFile(self.tree, self, name)
        kind = ContentsLink if value.is_link else ContentsSpecial
        return kind(self.tree, self, name)

    def names_last(self) -> float:
        return LASTS if self._is_listed and self.damage is None else self.inside.snapshot.names_last()

    def above(self) -> Directory:
        return self.directory

    async def complete(self, entry: Entry) -> Entry:
        """The exact form of the child `entry`; with it those that come next, where a program goes through
        them in order. Raises like `learn`."""
        self._completing = self._completing or trio.Lock()
        async with self._completing:
            known = self._values.get(entry.name)
            if isinstance(known, Entry) and known.exact:
                return known
            batch = self._batch(entry.name)
            contents = await self.inside.open()
            answers = await contents.complete(self.entry, batch)
            for asked, answer in zip(batch, answers, strict=True):
                if isinstance(answer, Entry):
                    self._values[asked.name] = answer
            answer = answers[0]
        if answer is None:
            raise NotFoundError(
                f"{self}: {quoted(entry.name.decode(errors='replace'))} is not in the archive"
            )
        if isinstance(answer, DamageError):
            raise DamageError(f"{self}/{entry.name.decode(errors='replace')}: {answer}")
        return answer

    def _batch(self, name: bytes) -> list[Entry]:
        """`name`, and inexact ones behind it: those that lie near, and twice as many each time that they are
        asked for in order."""
        if not self._places:
            self._places = {listed: place for place, listed in enumerate(self._values)}
            self._order = list(self._values)
        place = self._places[name]
        self._step = min(2 * self._step, MOST_COMPLETED) if place == self._next else 1
        near = cast("Entry", self._values[name]).position + NEAR
        batch: list[Entry] = []
        for number in range(place, min(place + MOST_COMPLETED, len(self._order))):
            entry = cast("Entry", self._values[self._order[number]])
            if number >= place + self._step and entry.position >= near:
                break
            self._next = number + 1
            if not entry.exact:
                batch.append(entry)
        return batch
