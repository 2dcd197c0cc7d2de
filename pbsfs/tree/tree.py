"""The tree of one source, and how a path is found in it. Used from tasks of one trio loop."""

from __future__ import annotations

import os

from pbsfs.base.errors import NotFoundError, UsageError
from pbsfs.base.names import ROOT_NAMESPACE, Namespace
from pbsfs.base.text import first_of, quoted
from pbsfs.reader.reader import Reader
from pbsfs.tree.files import File
from pbsfs.tree.namespaces import NamespaceDirectory
from pbsfs.tree.node import Directory, Link, Node, Nodes

DEFAULT_REFRESH = 5.0
"""Seconds for which a listing is kept: new backups appear within this time."""


class Tree(Nodes):
    """The tree of one source, rooted at one of its namespaces."""

    def __init__(
        self, reader: Reader, root: Namespace = ROOT_NAMESPACE, *, refresh: float = DEFAULT_REFRESH
    ) -> None:
        """`refresh`: seconds for which a listing is kept."""
        super().__init__(reader, refresh)
        self.root = NamespaceDirectory(self, None, b"", root)

    async def at(self, path: bytes) -> Node:
        """The node whose `path` this is; a link is not followed. Raises NotFoundError."""
        node: Node = self.root
        for step in path.split(b"/") if path else ():
            if not isinstance(node, Directory):
                raise NotFoundError(f"{node} is not a directory")
            node = await node.child(step)
        return node

    async def find(self, path: str | bytes) -> Node:
        """The node at `path` below the root; links on the way and at its end are followed.

        `path`: a node's, or what a person typed, encoded as `os.fsencode` does. Raises NotFoundError,
        and UsageError for a path that no tree could have.
        """
        here: Node = self.root
        for step in os.fsencode(path).split(b"/"):
            if step in (b"", b"."):
                continue
            if step == b"..":
                raise UsageError(f"{quoted(os.fsdecode(path))}: '..' has no meaning here")
            if not isinstance(here, Directory):
                raise NotFoundError(f"{here} is not a directory")
            node = await _child_or_suggest(here, step)
            here = await here.child(await node.target()) if isinstance(node, Link) else node
        return here


async def _child_or_suggest(directory: Directory, name: bytes) -> Node:
    children = await directory.children()
    if name in children:
        return children[name]
    typed = os.fsdecode(name)
    for node in children.values() if typed.endswith((".fidx", ".didx", ".blob")) else ():
        if isinstance(node, File) and node.file.archive.filename == typed:
            return node  # people copy stored names from the vendor's client
    there = first_of(os.fsdecode(shown) for shown in children) or "nothing"
    raise NotFoundError(f"{directory}: there is no {quoted(typed)}; there is {there}")
