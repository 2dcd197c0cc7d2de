"""Keys as directories and files: what one or more listings found, in memory, for the code that lists them.

A listing never fetches: what it reads has to be added before, with `add_content`. Filled in the trio loop. A
thread may read what is complete: all of it, or the directories to which nothing is added any more.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Union

from pbsfs.base.errors import DamageError, NotFoundError, PbsfsError, SourceError
from pbsfs.sources.bucket.pages import StoredObject
from pbsfs.sources.layout import Steps

_Directory = dict[str, Union["_Directory", StoredObject]]


@dataclass(frozen=True, slots=True)
class _Status:
    """What changes when an object does. `st_mtime_ns`: no time, but as good as one to see that."""

    st_mtime_ns: int
    st_size: int
    st_ino: int = 0


@dataclass(frozen=True, slots=True)
class _Entry:
    """An object, or a directory: the part of a key that other keys share."""

    name: str
    node: _Directory | StoredObject

    def is_symlink(self) -> bool:
        return False

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return isinstance(self.node, dict)

    def stat(self, *, follow_symlinks: bool = True) -> _Status:
        if isinstance(self.node, StoredObject):
            return _Status(hash(self.node.version), self.node.size)
        return _Status(0, 0)


class KeyFiles:
    """The objects whose keys begin with `root`, which ends with `/` or is empty. `name`: of it, in
    messages."""

    def __init__(self, root: str, name: str, most: int) -> None:
        """`most`: how many objects and directories there may be."""
        self.root = root
        self._name = name
        self._left = self._most = most
        self._tree: _Directory = {}
        self._contents: dict[Steps, bytes | PbsfsError] = {}

    def add(self, objects: Iterable[StoredObject]) -> None:
        """Adds what a listing found. Leaves out keys that are the path of no file.

        Raises SourceError if there are too many.
        """
        for found in objects:
            self._count()
            *above, name = found.key.removeprefix(self.root).split("/")
            if (directory := self._directory(above)) is not None and _is_name(name):
                directory.setdefault(name, found)

    def add_directories(self, prefixes: Iterable[str]) -> None:
        """Adds what a delimited listing found, without what is in it. Raises like `add`."""
        for prefix in prefixes:
            self._count()
            self._directory(prefix.removeprefix(self.root).rstrip("/").split("/"))

    def add_content(self, steps: Steps, content: bytes | PbsfsError) -> None:
        """What an object holds, or why it can't be fetched."""
        self._contents[steps] = content

    def object(self, steps: Steps) -> StoredObject | None:
        """The object at `steps`; None if there is none."""
        node = self._node(steps)
        return node if isinstance(node, StoredObject) else None

    def joined(self, steps: Steps) -> str:
        return "/".join((self._name, *steps))

    def problem(self, error: OSError | SourceError, steps: Steps = ()) -> str:
        if not isinstance(error, OSError):
            return str(error)
        return f"cannot read {error.filename or self.joined(steps)}: {error.strerror}"

    def read_file(self, steps: Steps, limit: int) -> bytes:
        if not isinstance(self._node(steps), StoredObject):
            raise self._missing(steps)
        content = self._contents.get(steps)
        if content is None or isinstance(content, NotFoundError):  # removed since it was listed
            raise self._missing(steps)
        if isinstance(content, PbsfsError):
            raise content
        if len(content) > limit:
            raise DamageError(f"{self.joined(steps)} has {len(content)} bytes where {limit} is the most")
        return content

    @contextmanager
    def scanned(self, steps: Steps) -> Iterator[Iterator[_Entry]]:
        node = self._node(steps)
        if not isinstance(node, dict):
            raise self._missing(steps)
        yield (_Entry(name, child) for name, child in node.items())

    def exists(self, steps: Steps) -> bool:
        return self._node(steps) is not None

    def enter(self, steps: Steps) -> None:
        if not isinstance(self._node(steps), dict):
            raise self._missing(steps)

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise SourceError(f"{self._name}: more than {self._most} names in one list")

    def _node(self, steps: Steps) -> _Directory | StoredObject | None:
        node: _Directory | StoredObject | None = self._tree
        for step in steps:
            node = node.get(step) if isinstance(node, dict) else None
        return node

    def _directory(self, names: list[str]) -> _Directory | None:
        """The directory at `names`, which is made if needed; None if they are no path."""
        directory = self._tree
        for name in names:
            if not _is_name(name):
                return None
            below = directory.get(name)
            if not isinstance(below, dict):  # an object of that name: what is below it counts more
                below = directory[name] = {}
            directory = below
        return directory

    def _missing(self, steps: Steps) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.joined(steps))


def _is_name(name: str) -> bool:
    return name not in ("", ".", "..")
