"""Searches the files in archives and disk images, in all snapshots and namespaces below some places.

Archives are read side by side, each in a worker thread that tests the entries there; the matches come in the
order of the tree. Used from tasks of one trio loop.
"""

from __future__ import annotations

import re
import stat as stat_bits
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from pbsfs.base.errors import PbsfsError
from pbsfs.contents.base import Contents, Entry
from pbsfs.tree import (
    ContentsDirectory,
    Directory,
    GroupDirectory,
    Node,
    SnapshotDirectory,
    Stat,
)

SIDE_BY_SIDE = 4
"""Archives that are read at once: each waits for storage most of the time, but they share one processor."""

IN_ONE_GO = 1000
"""Matches that a thread hands over at once, and directories' entries between two looks for an end."""

QUEUED = 8
"""Hand-overs of one archive that wait until those before it are done; then its thread waits."""

TYPES = {
    "f": stat_bits.S_IFREG,
    "d": stat_bits.S_IFDIR,
    "l": stat_bits.S_IFLNK,
    "b": stat_bits.S_IFBLK,
    "c": stat_bits.S_IFCHR,
    "p": stat_bits.S_IFIFO,
    "s": stat_bits.S_IFSOCK,
}
"""The types of find(1)."""


@dataclass(frozen=True, slots=True)
class Condition:
    """What an entry has to be like. All parts have to match; empty ones match everything.

    `names`: patterns of which the name matches one; they match neither NUL nor a slash. `path`: matches the
    whole path, as it is shown. `types`: values of `TYPES`. `sizes`: each the least and the most bytes.
    `newer`, `older`: nanoseconds since the epoch.
    """

    names: tuple[re.Pattern[bytes], ...] = ()
    path: re.Pattern[bytes] | None = None
    types: frozenset[int] = frozenset()
    sizes: tuple[tuple[int, int], ...] = ()
    newer: int | None = None
    older: int | None = None

    @property
    def name(self) -> re.Pattern[bytes] | None:
        """One pattern for `names`; None where any name will do."""
        if not self.names:
            return None
        return re.compile(b"|".join(b"(?:" + name.pattern + b")" for name in self.names), re.DOTALL)

    def matches(self, path: bytes, name: bytes, mode: int, size: int, mtime_ns: int | None) -> bool:
        """Whether an entry is such a one; `path`: from the root of the tree."""
        if self.names and not any(pattern.fullmatch(name) for pattern in self.names):
            return False
        if self.types and stat_bits.S_IFMT(mode) not in self.types:
            return False
        if self.sizes and not all(least <= size <= most for least, most in self.sizes):
            return False
        if self.newer is not None and (mtime_ns is None or mtime_ns <= self.newer):
            return False
        if self.older is not None and (mtime_ns is None or mtime_ns >= self.older):
            return False
        return self.path is None or self.path.fullmatch(path) is not None


class Match(NamedTuple):
    """An entry that was found. `path`: from the root of the tree. `stat`: of files in archives, the entry."""

    path: bytes
    stat: Stat | Entry


@dataclass(slots=True)
class Search:
    """A search. `failed`: what could not be read, in full or in part, with the path.

    `archives`: how many were searched so far; `searched`: called when that changes.
    """

    condition: Condition
    latest: bool = False
    searched: Callable[[], None] = lambda: None
    failed: list[tuple[bytes, PbsfsError]] = field(default_factory=list)
    archives: int = 0

    async def run(self, places: Iterable[Node], emit: Callable[[list[Match]], None]) -> None:
        """Calls `emit` with the matches at and below `places`, in their order.

        Raises PbsfsError where a place itself cannot be listed; `failed` gets what cannot be read below it.
        """
        failure: Exception | None = None
        put, order = trio.open_memory_channel[_Matches](SIDE_BY_SIDE - 1)
        async with trio.open_nursery() as nursery:

            async def go_through() -> None:
                nonlocal failure
                async with put:
                    try:
                        for place in places:
                            await self._go(place, put, nursery)
                    except PbsfsError as error:  # raised outside, so that the nursery does not wrap it
                        failure = error

            nursery.start_soon(go_through)
            async for matches in order:
                async with matches:
                    async for batch in matches:
                        try:
                            emit(batch)
                        except Exception as error:  # raised outside as well
                            failure = error
                            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _go(self, place: Node, put: _Order, nursery: trio.Nursery) -> None:
        stack = [iter([place])]
        while stack:
            node = next(stack[-1], None)
            if node is None:
                stack.pop()
                continue
            if isinstance(node, ContentsDirectory):
                send, receive = trio.open_memory_channel[list[Match]](QUEUED)
                await put.send(receive)
                nursery.start_soon(self._search, node, send)
                continue
            stat = await node.stat()
            if self.condition.matches(node.path, node.name, stat.mode, stat.size, stat.mtime_ns):
                send, receive = trio.open_memory_channel[list[Match]](1)
                send.send_nowait([Match(node.path, stat)])
                send.close()
                await put.send(receive)
            if isinstance(node, Directory):
                try:
                    stack.append(iter(await self._below(node)))
                except PbsfsError as error:
                    if node is place:
                        raise
                    self.failed.append((node.path, error))

    async def _below(self, directory: Directory) -> list[Node]:
        children = await directory.children()
        if self.latest and isinstance(directory, GroupDirectory):
            for name in reversed(children):
                newest = children[name]
                if isinstance(newest, SnapshotDirectory) and newest.info.error is None:
                    return [newest]
            return []
        return [node for node in children.values() if not node.repeats]

    async def _search(self, directory: ContentsDirectory, send: trio.MemorySendChannel[list[Match]]) -> None:
        async with send:
            try:
                entry = await directory.learn()
                opened = await directory.inside.open()
                await opened.run(lambda: self._walk(opened.contents, directory, entry, send))
            except PbsfsError as error:
                self.failed.append((directory.path, error))
        self.archives += 1
        self.searched()

    def _walk(
        self,
        contents: Contents,
        directory: ContentsDirectory,
        entry: Entry,
        send: trio.MemorySendChannel[list[Match]],
    ) -> None:
        """In a worker thread."""
        matches = self.condition.matches
        batch: list[Match] = []
        if matches(directory.path, directory.name, entry.mode, entry.size, entry.mtime_ns):
            batch.append(Match(directory.path, entry))
        name = self.condition.name
        walked = contents.walk(entry) if name is None else contents.search(entry, name)
        for count, (inner, found) in enumerate(walked):
            path = directory.path_of(inner)
            if not isinstance(found, Entry):
                self.failed.append((path, found))
            elif matches(path, found.name, found.mode, found.size, found.mtime_ns):
                batch.append(Match(path, found))
            if count % IN_ONE_GO == 0:
                trio.from_thread.check_cancelled()
            if len(batch) >= IN_ONE_GO:
                trio.from_thread.run(send.send, batch)
                batch = []
        if batch:
            trio.from_thread.run(send.send, batch)


_Matches = trio.MemoryReceiveChannel[list[Match]]
_Order = trio.MemorySendChannel[_Matches]
