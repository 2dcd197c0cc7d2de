"""The metadata of a datastore, as the listings read it: directories and small files, wherever they are.

A source implements `Files` and `Store` for its kind of storage. The listings call them from worker threads;
everything may block.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from pbsfs.base.errors import DamageError, NotFoundError, SourceError
from pbsfs.base.names import Group, Namespace
from pbsfs.sources import layout
from pbsfs.sources.collection import Collection, parse_collection
from pbsfs.sources.layout import Steps
from pbsfs.sources.listing.limits import ListingLimits


class NoNamespaceError(NotFoundError):
    """A namespace that does not exist."""


class Status(Protocol):
    """What changes when a file changes; a part of os.stat_result."""

    @property
    def st_mtime_ns(self) -> int: ...
    @property
    def st_size(self) -> int: ...
    @property
    def st_ino(self) -> int: ...


class Entry(Protocol):
    """A file or directory in a directory; a part of os.DirEntry."""

    @property
    def name(self) -> str: ...
    def is_symlink(self) -> bool: ...
    def is_dir(self, *, follow_symlinks: bool = True) -> bool: ...
    def stat(self, *, follow_symlinks: bool = True) -> Status: ...


class Files(Protocol):
    """Directories and files below a root. Every OSError that its methods raise has a name in `filename`."""

    def joined(self, steps: Steps) -> str:
        """What is at `steps`, for messages."""

    def problem(self, error: OSError | SourceError, steps: Steps = ()) -> str:
        """The problem that `error` reports; `steps`: what was read, for an error that does not name it."""

    def read_file(self, steps: Steps, limit: int) -> bytes:
        """All bytes of a file. Raises DamageError if it has more than `limit`, SourceError, OSError."""

    def scanned(self, steps: Steps) -> AbstractContextManager[Iterator[Entry]]:
        """The entries of a directory, valid until the context ends. Raises SourceError, OSError."""

    def exists(self, steps: Steps) -> bool:
        """Whether there is anything at `steps`. Raises like `scanned`."""

    def enter(self, steps: Steps) -> None:
        """Checks that there is a directory at `steps`. Raises like `scanned`."""


class Store(abc.ABC):
    """A datastore. `metadata`: everything of it but the chunks."""

    metadata: Files

    def __init__(self, limits: ListingLimits) -> None:
        self._limits = limits

    @abc.abstractmethod
    def __str__(self) -> str:
        """What the datastore is, for messages."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raises SourceError if this is not a datastore: not any more, if its storage is gone."""

    def enter_namespace(self, namespace: Namespace) -> Steps:
        """The steps to a namespace. Raises NoNamespaceError, SourceError, OSError."""
        steps = layout.namespace_steps(namespace)
        try:
            self._enter(steps)
        except (FileNotFoundError, NotADirectoryError):
            self.check()  # a datastore whose disk is not mounted has no namespaces either
            raise NoNamespaceError(f"{self}: there is no namespace '{namespace}'") from None
        return steps

    def enter_group(self, group: Group) -> Steps:
        """The steps to a group. Raises FileNotFoundError if there is none, SourceError, other OSErrors."""
        steps = layout.group_steps(group)
        self._enter(steps)
        return steps

    def _enter(self, steps: Steps) -> None:
        """Checks that a directory exists: one that does not is not empty."""
        self.metadata.enter(steps)
        self.check()  # the empty mount point of a disk is not a datastore without backups

    def owner(self, group: Group) -> str | None:
        """The owner of a group; None if there is no file that says so."""
        text = self._text((*layout.group_steps(group), layout.OWNER))
        lines = text.split("\n", 1) if text else []
        return lines[0].strip() or None if lines else None

    def notes(self, group: Group) -> str | None:
        """The notes of a group; None if there are none that can be read."""
        return self._text((*layout.group_steps(group), layout.NOTES))

    def _text(self, steps: Steps) -> str | None:
        try:
            content = self.metadata.read_file(steps, self._limits.owner_and_notes)
        except (OSError, SourceError, DamageError):
            return None
        return content.decode(errors="replace")

    def collection(self) -> Collection | None:
        """The last garbage collection; None if nothing is noted. Raises DamageError, SourceError, OSError."""
        try:
            content = self.metadata.read_file((layout.GC_STATUS,), self._limits.owner_and_notes)
        except FileNotFoundError:
            return None
        try:
            return parse_collection(json.loads(content))
        except (ValueError, RecursionError):
            raise DamageError(f"{self.metadata.joined((layout.GC_STATUS,))} is not valid JSON") from None
