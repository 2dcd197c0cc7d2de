"""A walk through the children of a directory in order, and which of them it will want next.

`namespaces` and `snapshots` make one for the children of a directory, and `Directory.children` asks it. Used
from tasks of one trio loop.
"""

from __future__ import annotations

import trio

from pbsfs.tree.node import Directory

AHEAD = 8
"""Directories that are listed side by side where they are listed one after another. As many connections are
kept to a server."""

LISTED_IN_ORDER = 3
"""Directories that are listed one after another before the next ones are listed with them."""


class Walk:
    """Notices that the children of one directory are listed or looked at in order, as `find` and `ls -R` do.

    It says which come next, so that the source is asked for them side by side.
    """

    def __init__(self) -> None:
        self._values: dict[bytes, object] = {}  # the listing that the places are from
        self._names: list[bytes] = []
        self._places: dict[bytes, int] = {}
        self._place = -1  # of the one that was listed last
        self._asked = float("-inf")
        self._in_order = 0
        self._ahead: list[Directory] = []  # held until the walk has come to them

    def next_after(self, node: Directory) -> list[Directory]:
        """The directories to ask for together with `node`, which somebody wants now."""
        parent = node.parent
        if parent is None:
            return []
        listing = parent.listing()
        if self._values is not listing.values_by_name:
            self._values = listing.values_by_name
            self._names = list(listing)
            self._places = {name: place for place, name in enumerate(self._names)}
        before, asked = self._place, self._asked
        self._place, self._asked = self._places.get(node.name, -1), trio.current_time()
        # Up to AHEAD of them were listed meanwhile. A program that takes longer than the refresh time for one
        # has no use for listings that were made ahead.
        follows = 0 < self._place - before <= AHEAD and self._asked - asked < node.tree.refresh
        self._in_order = self._in_order + 1 if follows else 1
        if self._in_order < LISTED_IN_ORDER:
            self._ahead = []
            return []
        after = (listing[name] for name in self._names[self._place + 1 : self._place + AHEAD])
        self._ahead = [node for node in after if isinstance(node, Directory)]
        return [node for node in self._ahead if not node.is_fresh()]
