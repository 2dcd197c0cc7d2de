"""What readers of file systems have in common: a file system as contents, by its inodes.

A reader of one kind gives names, inodes and the places of data; here names are checked, and directories that
would be in two places, so that no walk is without an end. Synchronous; of one thread.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from contextlib import suppress

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import Contents, Entry, Found
from pbsfs.contents.faults import Faults
from pbsfs.disks.volume import Volume

MOST_NAMES = 4_000_000
"""Names of a directory."""

MOST_DIRECTORIES = 1_000_000
"""Directories whose parents are kept."""


_UNKNOWN = Entry(b"", 0, exact=False)[7:]
"""The fields behind the inode, of an entry whose name, type and inode alone are known."""


class FileSystem(Contents):
    """A file system that is open. `kind`: as mount(8) names it. `streams`: the disks that its volume lies on,
    for the numbers in pieces."""

    kind: str

    def __init__(self, volume: Volume) -> None:
        """Raises DamageError, KeyRequiredError, SourceError."""
        self.streams = ()
        self.volume = volume
        self._parents: dict[int, int] = {}

    @abc.abstractmethod
    def facts(self) -> dict[str, str]:
        """What people ask about it, by name: `label` and `uuid` (where it has them; text from the disk, not
        escaped), `journal` (`clean`, `none`, `replayed: …`, `not replayed: …`) and what else its kind has."""

    @abc.abstractmethod
    def names(self, directory: Entry) -> Iterator[tuple[bytes, int, int]]:
        """The names in `directory`, without `.` and `..`: each with its inode, and its type as in st_mode or
        0 where the directory does not tell it. Raises DamageError after those that can be read."""

    @abc.abstractmethod
    def inode(self, number: int) -> Entry:
        """The exact entry of an inode, with an empty name."""

    def subvolume(self, number: int | None) -> Entry | None:
        """The directory that mount(8) shows with the option `subvolid=number`, or without it (None). None
        where there is no such subvolume. Raises DamageError."""
        return self.root if number is None else None

    def prefetch_inodes(self, numbers: Sequence[int]) -> None:
        """Requests what `inode` will read for each of `numbers`, side by side."""

    # --- what Contents asks for

    def children(self, directory: Entry, *, names_only: bool = False) -> Found:
        faults = Faults()
        entries: list[Entry] = []
        seen: set[bytes] = set()
        try:
            for name, number, kind in self.names(directory):
                problem = _problem(name)
                if problem is None and name in seen:
                    problem = "a second entry has the same name"
                if problem is None and len(seen) >= MOST_NAMES:
                    problem = f"there are more than {MOST_NAMES} names in the directory"
                if problem is not None:
                    faults.add(DamageError(problem))
                    if len(seen) >= MOST_NAMES:
                        break
                    continue
                seen.add(name)
                entries.append(Entry._make((name, kind, 0, 0, 0, 0, number, *_UNKNOWN)))
        except DamageError as error:
            faults.add(error)
        exact = not names_only or any(not entry.mode for entry in entries)
        if exact:
            done = self.complete(directory, entries)
        else:
            done = list(map(self._placed, [directory] * len(entries), entries))
        kept: list[Entry] = []
        for found in done:
            if isinstance(found, DamageError):
                faults.add(found)
            elif found is not None:
                kept.append(found)
        return Found(kept, faults.summary())

    def child(self, directory: Entry, name: bytes) -> Entry | None:
        found = self.children(directory, names_only=True)
        for entry in found.entries:
            if entry.name == name:
                answer = self.complete(directory, [entry])[0]
                if isinstance(answer, DamageError):
                    raise answer
                return answer
        if found.damage is not None:
            raise found.damage
        return None

    def complete(self, directory: Entry, entries: Sequence[Entry]) -> list[Entry | DamageError | None]:
        wanted = [entry.inode for entry in entries if not entry.exact]
        if len(wanted) > 1:
            with suppress(DamageError):  # `inode` says which is wrong
                self.prefetch_inodes(wanted)
        done: list[Entry | DamageError | None] = []
        for entry in entries:
            if entry.exact:
                done.append(entry)
                continue
            try:
                exact = self.inode(entry.inode)
                if entry.mode and (entry.mode ^ exact.mode) & 0o170000:
                    raise DamageError(f"inode {entry.inode} has another type than its name says")
                exact = exact.named(entry.name)
                done.append(self._placed(directory, exact) if exact.is_directory else exact)
            except DamageError as error:
                done.append(error)
        return done

    def _placed(self, directory: Entry, entry: Entry) -> Entry | DamageError:
        """`entry`; an error where it is a directory that is in another one too."""
        if not entry.is_directory:
            return entry
        if len(self._parents) >= MOST_DIRECTORIES and entry.inode not in self._parents:
            return DamageError(f"there are more than {MOST_DIRECTORIES} directories")
        parent = self._parents.setdefault(entry.inode, directory.inode)
        if parent != directory.inode or entry.inode == self.root.inode:
            return DamageError(f"directory {entry.inode} is in two places")
        return entry

    def link_count(self, entry: Entry) -> int:
        return entry.links if entry.is_file else 1

    @property
    def knows_link_counts(self) -> bool:
        return True


def _problem(name: bytes) -> str | None:
    if not name or b"/" in name or b"\0" in name or name in {b".", b".."}:
        return "a name is empty, '.' or '..', or contains '/' or NUL"
    return None
