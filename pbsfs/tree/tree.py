"""The tree of one source, and how a path is found in it. Used from tasks of one trio loop."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable

from pbsfs.base.errors import NotFoundError, UsageError
from pbsfs.base.names import ROOT_NAMESPACE, Namespace
from pbsfs.base.text import first_of, printable, quoted
from pbsfs.reader.reader import Reader
from pbsfs.tree.entries import ContentsDirectory, ContentsLink
from pbsfs.tree.files import File
from pbsfs.tree.namespaces import FILES, FilesDirectory, NamespaceDirectory
from pbsfs.tree.node import Directory, Link, Node, Nodes

DEFAULT_REFRESH = 5.0
"""Seconds for which a listing is kept: new backups appear within this time."""

MAX_LINKS = 40
"""Symbolic links that are followed for one path, as by Linux (MAXSYMLINKS)."""

_ARCHIVES = (b".pxar", b".mpxar", b".ppxar")  # what their names end with
_DISK = b".img"


class RootDirectory(NamespaceDirectory):
    """The root of the tree: a namespace, and `files`."""

    __slots__ = ("_shows_files",)

    def __init__(self, tree: Nodes, namespace: Namespace, *, files: bool) -> None:
        super().__init__(tree, None, b"", namespace)
        self._shows_files = files

    async def list_values(self) -> Iterable[tuple[bytes, object]]:
        listed = list(await super().list_values())
        return [*listed, (FILES, None)] if self._shows_files else listed

    def make(self, name: bytes, value: str | None) -> Node:
        return FilesDirectory(self) if name == FILES else super().make(name, value)


class Tree(Nodes):
    """The tree of one source, rooted at one of its namespaces."""

    def __init__(
        self,
        reader: Reader,
        root: Namespace = ROOT_NAMESPACE,
        *,
        refresh: float = DEFAULT_REFRESH,
        files: bool = False,
    ) -> None:
        """`refresh`: seconds for which a listing is kept. `files`: whether there is `files`."""
        super().__init__(reader, refresh)
        self.root = RootDirectory(self, root, files=files)

    async def at(self, path: bytes) -> Node:
        """The node whose `path` this is; a link is not followed. Raises NotFoundError."""
        node: Node = self.root
        for step in path.split(b"/") if path else ():
            if not isinstance(node, Directory):
                raise NotFoundError(f"{node} is not a directory")
            node = await node.child(step)
        return node

    async def find(self, path: str | bytes, *, follow: bool = True) -> Node:
        """The node at `path` below the root. Links on the way are followed, and with `follow` one at its end.

        The links of an archive are resolved in the archive, as if its root were the root directory.
        `path`: a node's, or what a person typed, encoded as `os.fsencode` does. Raises NotFoundError,
        and UsageError for a path that no tree could have.
        """
        here: Node = self.root
        steps = deque(os.fsencode(path).split(b"/"))
        if b".." in steps:
            raise UsageError(
                f"{quoted(os.fsdecode(path))}: '..' has no meaning here; name the path without it"
            )
        links = 0
        while steps:
            step = steps.popleft()
            if step in (b"", b"."):
                continue
            if not isinstance(here, Directory):
                raise NotFoundError(f"{here} is not a directory{await self._contents(here, here.name)}")
            if step == b"..":  # of a link in an archive
                here = here.above()
                continue
            node = await self.typed_child(here, step)
            if not isinstance(node, Link) or not (follow or any(steps)):
                here = node
                continue
            links += 1
            if links > MAX_LINKS:
                raise NotFoundError(f"{node}: more than {MAX_LINKS} symbolic links follow one another")
            target = await node.target()
            if isinstance(node, ContentsLink) and target.startswith(b"/"):
                here = node.inside
            steps.extendleft(reversed(target.split(b"/")))
        return here

    async def typed_child(self, directory: Directory, name: bytes) -> Node:
        """The child that a person calls `name`. Raises NotFoundError, which says what there is instead."""
        children = await directory.children()
        if directory.listed_as(name) in children:
            return await directory.child(name)
        if isinstance(directory, ContentsDirectory):
            return await directory.child(name)
        typed = os.fsdecode(name)
        for node in children.values() if typed.endswith((".fidx", ".didx", ".blob")) else ():
            if isinstance(node, File) and node.file.archive.filename == typed:
                return node  # people copy stored names from the vendor's client
        there = first_of(os.fsdecode(shown) for shown in children) or "nothing"
        archive = next((name + form for form in _ARCHIVES if name + form in children), b"")
        is_file = b"." in name or name + _DISK in children
        meant = archive or next((shown for shown in children if shown.endswith(_DISK) and not is_file), b"")
        contents = await self._contents(children[meant], meant) if meant else ""
        raise NotFoundError(f"{directory}: there is no {quoted(typed)}; there is {there}{contents}")

    async def _contents(self, node: Node, name: bytes) -> str:
        """Where the files of an archive or disk are, as the end of an error; nothing for other nodes."""
        if (
            not isinstance(node, File)
            or not name.endswith((*_ARCHIVES, _DISK))
            or FILES not in await self.root.children()
        ):
            return ""
        snapshot = printable(os.fsdecode(node.path.rpartition(b"/")[0]))
        if name.endswith(_DISK):
            return f"; the files on its disks are below files/{snapshot}"
        return f"; the files in {quoted(os.fsdecode(name))} are below files/{snapshot}"
