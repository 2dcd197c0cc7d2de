"""Namespaces and their parts: `vm`, `ct`, `host` and `ns`.

A namespace asks the source for all of its groups at once, and its parts show their share of that: however
many of them are looked at, the source is asked once. Used from tasks of one trio loop.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable

from pbsfs.base.errors import ForbiddenError
from pbsfs.base.names import BACKUP_TYPES, Namespace
from pbsfs.runtime.memory import MemoryLimitError
from pbsfs.sources.base import GroupInfo
from pbsfs.tree.node import NAME_SIZE, Directory, Listing, Node, Nodes
from pbsfs.tree.snapshots import GroupDirectory
from pbsfs.tree.stat import nanoseconds
from pbsfs.tree.walk import Walk

log = logging.getLogger(__name__)

NAMESPACES = b"ns"
FILES = b"files"

GROUP_SIZE = 512
"""Bytes of memory for a group: 450 with a short note, measured."""


class NamespaceDirectory(Directory):
    """A namespace: its backup types, and the namespaces below it."""

    __slots__ = ("_counts", "_reported_forbidden", "groups", "namespace", "namespaces", "round")

    def __init__(
        self,
        tree: Nodes,
        parent: Directory | None,
        name: bytes,
        namespace: Namespace,
        walk: Walk | None = None,
    ) -> None:
        super().__init__(tree, parent, name, walk)
        self.namespace = namespace
        self.round = 0  # how often it was listed
        self.groups: list[GroupInfo] = []
        self.namespaces: list[Namespace] = []
        self._counts: Counter[str] = Counter()  # groups by type
        self._reported_forbidden = False

    async def list_values(self) -> Iterable[tuple[bytes, object]]:
        source = self.tree.reader.source
        self.namespaces = await source.namespaces(self.namespace)
        try:
            self.groups = await source.groups(self.namespace)
        except ForbiddenError as error:
            if not self.namespaces:
                raise
            # A user may have access to namespaces below only: show those.
            if not self._reported_forbidden:
                log.warning("%s: its own backups are left out: %s", self, error)
            self._reported_forbidden = True
            self.groups = []
        self.round += 1
        self._counts = Counter(info.group.type for info in self.groups)
        found: list[tuple[bytes, object]] = [
            (os.fsencode(kind), kind) for kind in BACKUP_TYPES if kind in self._counts
        ]
        if self.namespaces:
            found.append((NAMESPACES, None))
        return found

    async def _take(self, listed: Iterable[tuple[bytes, object]]) -> None:
        try:
            await super()._take(listed)
        except MemoryLimitError:
            self.groups, self.namespaces = [], []
            raise

    def size_of(self, value: str | None) -> int:
        count = len(self.namespaces) if value is None else self._counts[value]
        return NAME_SIZE + count * GROUP_SIZE

    def make(self, name: bytes, value: str | None) -> Node:
        return NamespacesDirectory(self, name) if value is None else TypeDirectory(self, name, value)

    async def facts(self) -> dict[str, str]:
        return {"namespace": str(self.namespace)}


class FilesDirectory(NamespaceDirectory):
    """`files`: a namespace once more, with archives as directories of the files in them.

    Commands that go through all of a tree leave it out.
    """

    __slots__ = ()

    def __init__(self, root: NamespaceDirectory) -> None:
        super().__init__(root.tree.opening_archives(), root, FILES, root.namespace)

    @property
    def repeats(self) -> bool:
        return True


class PartDirectory(Directory):
    """A part of what a namespace's own listing found; it is as fresh as that."""

    __slots__ = ("_round", "namespace", "walk_inside")

    def __init__(self, namespace: NamespaceDirectory, name: bytes) -> None:
        super().__init__(namespace.tree, namespace, name)
        self.namespace = namespace
        self.walk_inside = Walk()
        self._round = 0  # the listing of the namespace that the values are from

    async def children(self) -> Listing:
        await self.namespace.children()

        async def take_part() -> bool:
            while self._round != self.namespace.round:
                found = self.namespace.round
                await self._take(await self.list_values())
                self._round = found
            return True

        await self._asking().run(lambda: self._round == self.namespace.round or None, take_part)
        self.tree.hold(self)
        return self.listing()

    def names_last(self) -> float:
        return self.namespace.names_last()


class NamespacesDirectory(PartDirectory):
    """`ns`: the namespaces directly below one."""

    __slots__ = ()

    async def list_values(self) -> Iterable[tuple[bytes, object]]:
        return [(os.fsencode(ns.parts[-1]), ns) for ns in self.namespace.namespaces]

    def make(self, name: bytes, value: Namespace) -> Node:
        return NamespaceDirectory(self.tree, self, name, value, self.walk_inside)

    async def facts(self) -> dict[str, str]:
        return {"namespace": str(self.namespace.namespace)}


class TypeDirectory(PartDirectory):
    """`vm`, `ct` or `host` of a namespace: its groups of that type."""

    __slots__ = ("type",)

    def __init__(self, namespace: NamespaceDirectory, name: bytes, backup_type: str) -> None:
        super().__init__(namespace, name)
        self.type = backup_type

    async def list_values(self) -> Iterable[tuple[bytes, object]]:
        return ((os.fsencode(info.group.id), info) for info in self._groups())

    def make(self, name: bytes, value: GroupInfo) -> Node:
        return GroupDirectory(self, name, value, self.walk_inside)

    def _groups(self) -> list[GroupInfo]:
        return [info for info in self.namespace.groups if info.group.type == self.type]

    def _mtime_ns(self) -> int | None:
        times = (info.last_backup for info in self._groups() if info.last_backup is not None)
        return nanoseconds(max(times, default=None))

    async def facts(self) -> dict[str, str]:
        return {"namespace": str(self.namespace.namespace), "backup_type": self.type}
