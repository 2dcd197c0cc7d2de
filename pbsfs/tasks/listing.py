"""Lists the nodes of a tree, for `pbsfs ls`.

The rows go to a callback one by one, so that memory use does not grow with the listing. Used from tasks of
one trio loop.
"""

from __future__ import annotations

import os
import stat as stat_bits
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from pbsfs.base.errors import DamageError, KeyRequiredError, NotFoundError, PbsfsError
from pbsfs.base.permissions import DEFAULT_UMASK
from pbsfs.base.text import size_text
from pbsfs.runtime.threads import in_thread
from pbsfs.tasks.attributes import device_text, mode_text, time_text, type_text
from pbsfs.tree import ContentsDirectory, ContentsNode, Directory, FilesDirectory, Link, Node, Stat

IN_ONE_GO = 500
"""Rows that are made before other tasks run: a few milliseconds."""

COLUMNS = ("MODE", "UID", "GID", "SIZE", "DATA", "TIME", "NAME")
"""What the columns of a long listing are; DATA: the size without holes."""

WIDTHS = (10, 5, 5, 15, 15, 20)
"""Characters of the columns before the name, for programs: the same in every listing."""

HIDDEN = (DamageError, KeyRequiredError, NotFoundError)
"""Why a node can't be read although its neighbours can. NotFoundError: the archive lacks an entry that its
catalog lists."""


@dataclass(frozen=True, slots=True)
class Row:
    """One node of a listing.

    `name`: its path below what is listed. `stat`: None if only names are listed. `stored`: whether an archive
    stores the owner and mode. `error`: why it can't be read, or its children are not, or not all, listed.
    `branches`: for each level of a tree down to it, whether the listing has more entries of that level.
    """

    name: bytes
    path: bytes
    stat: Stat | None = None
    target: bytes | None = None
    stored: bool = False
    error: str | None = None
    branches: tuple[bool, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The row for programs. A key whose value is not known is missing."""
        row: dict[str, Any] = {"name": os.fsdecode(self.name), "path": os.fsdecode(self.path)}
        stat = self.stat
        if stat is not None:
            row["type"] = type_text(stat.mode)
            if self.target is not None:
                row["target"] = os.fsdecode(self.target)
            if stat_bits.S_ISREG(stat.mode):
                row |= {"size": stat.size, "data_size": stat.data_size}
            if stat.mtime_ns is not None:
                row["time"] = time_text(stat.mtime_ns, whole_seconds=True)
            if self.stored and stat.uid is not None:
                row |= {"mode": mode_text(stat.mode), "uid": stat.uid, "gid": stat.gid}
                row |= {"links": stat.nlink, "mtime_ns": stat.mtime_ns}
                if (device := device_text(stat.mode, stat.rdev)) is not None:
                    row["device"] = device
        if self.error is not None:
            row["error"] = self.error
        return row

    def as_cells(self, *, human: bool = False) -> tuple[str, ...]:
        """The row by `COLUMNS`; without a stat only the name. `human`: sizes with a unit."""
        name, stat = os.fsdecode(self.name), self.stat
        if stat is None:
            return (name,)
        umask = DEFAULT_UMASK if stat.uid is None and not stat_bits.S_ISLNK(stat.mode) else 0
        mode = stat_bits.filemode(stat.mode & ~umask)
        if self.stored and stat.uid is None:  # it can't be read, so only its type is known
            mode = mode[0] + "?" * 9
        owner, group = ("-" if number is None else str(number) for number in (stat.uid, stat.gid))
        size = data = "-"
        if (device := device_text(stat.mode, stat.rdev)) is not None:
            size = device
        elif stat_bits.S_ISREG(stat.mode):
            size, data = (
                size_text(s).replace(" ", "") if human else str(s) for s in (stat.size, stat.data_size)
            )
        time = "-" if stat.mtime_ns is None else time_text(stat.mtime_ns, whole_seconds=True)
        if stat_bits.S_ISDIR(stat.mode):
            name += "/"
        if self.target is not None:
            name += f" -> {os.fsdecode(self.target)}"
        return mode, owner, group, size, data, time, name


def line_of(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The cells of a row in one line. `widths`: of all columns but the last, at least."""
    *before, name = cells
    return " ".join([*(f"{cell:>{width}}" for cell, width in zip(before, widths, strict=False)), name])


@dataclass(slots=True)
class Lister:
    """One listing. `emit`: called with each row. `report`: called with an error for each node that can't be
    read, in full or in part. `full`: with the stat of each node. `depth`: levels that a recursive listing
    has at most; None for all."""

    emit: Callable[[Row], None]
    report: Callable[[PbsfsError], None]
    full: bool = False
    recursive: bool = False
    depth: int | None = None
    _count: int = 0

    async def list(self, node: Node) -> None:
        """Lists the children of a directory, or any other node itself.

        Reports damage below `node`, or of a part of it, and missing keys. Raises PbsfsError if
        `node` can't be listed, and SourceError.
        """
        if not isinstance(node, Directory):
            await self._emit(node, node.name, None, ())
            return
        root = node.path_of(b"")
        stack = [_Level(await _children(node))]
        if (damage := _damage(node)) is not None:
            self.report(damage)
        while stack:
            child = stack[-1].take()
            if child is None:
                stack.pop()
                continue
            below: Iterator[Node] | None = None
            error: PbsfsError | None = None
            deeper = self.recursive and (self.depth is None or len(stack) < self.depth)
            if deeper and isinstance(child, Directory) and not isinstance(child, FilesDirectory):
                try:
                    below = await _children(child)
                    error = _damage(child)
                except HIDDEN as failure:
                    error = failure
            branches = tuple(level.upcoming is not None for level in stack)
            await self._emit(child, child.path.removeprefix(root), error, branches)
            if below is not None:
                stack.append(_Level(below))

    async def _emit(
        self, node: Node, name: bytes, error: PbsfsError | None, branches: tuple[bool, ...]
    ) -> None:
        self._count += 1
        if self._count % IN_ONE_GO == 0:
            await trio.lowlevel.checkpoint()
        stored = isinstance(node, ContentsNode)
        if self.full and isinstance(node, ContentsNode):
            try:
                await node.learn()
            except HIDDEN as failure:
                error = error or failure
        if error is not None:
            self.report(error)
        text = None if error is None else str(error)
        if not self.full:
            self.emit(Row(name, node.path, error=text, branches=branches))
            return
        stat = await node.stat()
        target = stat.target
        if isinstance(node, Link) and not stored:
            target = await node.target()
        self.emit(Row(name, node.path, stat, target, stored, text, branches))


async def _children(directory: Directory) -> Iterator[Node]:
    """The children in the order of a listing: in archives and on volumes, where the order means nothing to
    people, by name. Raises what listing them raises."""
    children = await directory.children()
    if not isinstance(directory, ContentsDirectory):
        return iter(children.values())
    names = await in_thread(lambda: sorted(children))
    return (children[name] for name in names)


class _Level:
    """The children of one directory, with a look at the next one. `upcoming`: None at the end."""

    __slots__ = ("_nodes", "upcoming")

    def __init__(self, nodes: Iterator[Node]) -> None:
        self._nodes = nodes
        self.upcoming = next(nodes, None)

    def take(self) -> Node | None:
        node = self.upcoming
        self.upcoming = next(self._nodes, None)
        return node


def _damage(directory: Directory) -> DamageError | None:
    """Why the listing of a directory that was just listed may lack entries; None if it is complete."""
    if not isinstance(directory, ContentsDirectory) or directory.damage is None:
        return None
    return DamageError(f"{directory}: {directory.damage}")
