"""The names of directories in a datastore: which of them are namespaces, groups and snapshots.

Directories with other names are not part of a datastore and are ignored. The exception is a directory that
holds a backup: copying to another file system or through another system changes `:` and cuts names short, and
a backup must not disappear silently. Used by the listings, from worker threads; everything blocks.
"""

from __future__ import annotations

import errno
import functools
import re
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TypeVar

from pbsfs.base.errors import DamageError, SourceError, UsageError
from pbsfs.base.names import MAX_NAMESPACE_DEPTH, Group, Namespace, parse_time
from pbsfs.base.text import first_of, quoted
from pbsfs.runtime.report import Reporter
from pbsfs.sources import layout
from pbsfs.sources.layout import Steps
from pbsfs.sources.listing.store import Entry, Files

T = TypeVar("T")

_BACKUP_FILE = re.compile(r".*(\.(fidx|didx|blob)|~\d+\.(fid|did|blo))", re.ASCII | re.IGNORECASE)
_NEARLY_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d.*", re.ASCII)

_MOST_LOOKED_AT = 100
"""Entries of a directory with a wrong name among which pbsfs looks for a backup."""


class Names:
    """The names below `root`, the root of a datastore's metadata; wrong ones go to `reporter`."""

    def __init__(self, root: Files, reporter: Reporter) -> None:
        self._root = root
        self._reporter = reporter

    def namespaces(self, parent: Namespace, steps: Steps) -> list[Namespace]:
        """The namespaces in `parent`, which is at `steps`, in order. Raises SourceError, OSError."""
        if len(parent.parts) == MAX_NAMESPACE_DEPTH:
            return []
        return sorted(_valid(parent.child, self._directories((*steps, layout.NAMESPACES))).values())

    def groups(self, namespace: Namespace, backup_type: str, steps: Steps) -> list[Group]:
        """The groups of one type in `namespace`, which is at `steps`. Raises SourceError, OSError."""
        steps = (*steps, backup_type)
        names = self._directories(steps)
        groups = _valid(functools.partial(Group, namespace, backup_type), names)
        self._report_mangled(steps, names - groups.keys(), _NEARLY_TIME, "backup ids", "100")
        return sorted(groups.values())

    def times(self, group: Group) -> list[int]:
        """The times of a group's snapshots, in order, finished or not.

        Raises DamageError if there are only snapshots whose names were changed; SourceError, OSError.
        """
        steps = layout.group_steps(group)
        names = self._directories(steps)
        times = _valid(parse_time, names)
        mangled = self._report_mangled(
            steps, names - times.keys(), _BACKUP_FILE, "times", "2023-11-14T22:13:20Z"
        )
        if mangled is not None and not times:
            raise DamageError(f"{group}: {mangled}")
        return sorted(times.values())

    def _report_mangled(
        self, steps: Steps, names: set[str], holding: re.Pattern[str], what: str, form: str
    ) -> str | None:
        """Reports those of `names` that are directories with an entry named like `holding`, and returns the
        report; None if there are none."""
        mangled = [name for name in sorted(names) if self._holds((*steps, name), holding)]
        if not mangled:
            return None
        text = (
            f"left out directories that hold backups, but whose names are not {what}: "
            f"{first_of(map(quoted, mangled))}; copying changed them: rename them (to the form {form})"
        )
        self._reporter.report(f"{self._root.joined(steps)}: {text}")
        return text

    def _holds(self, steps: Steps, pattern: re.Pattern[str]) -> bool:
        """Whether an entry of a directory is named like `pattern`."""
        try:
            with self._root.scanned(steps) as entries:
                return any(pattern.fullmatch(entry.name) for entry in islice(entries, _MOST_LOOKED_AT))
        except (OSError, SourceError):
            return False

    def _directories(self, steps: Steps) -> set[str]:
        """The names of the directories in a directory; none if that does not exist."""
        try:
            with self._root.scanned(steps) as entries:
                found = set()
                for entry in entries:
                    if not _may_be(entry.is_symlink):
                        if _may_be(functools.partial(entry.is_dir, follow_symlinks=False)):
                            found.add(entry.name)
                    elif _may_lead_to_directory(entry):
                        path = self._root.joined((*steps, entry.name))
                        self._reporter.report(
                            f"{path}: left out, it is a symbolic link; use a bind mount instead"
                        )
                return found
        except (FileNotFoundError, NotADirectoryError):
            return set()


def _may_be(kind: Callable[[], bool]) -> bool:
    """Whether an entry is of a kind. One that pbsfs can't look at counts as if it were: it is shown with an
    error of its own, and neither hides its neighbours nor is hidden itself."""
    try:
        return kind()
    except OSError:
        return True


def _may_lead_to_directory(link: Entry) -> bool:
    try:
        return link.is_dir()
    except OSError as error:
        return error.errno != errno.ELOOP


def _valid(make: Callable[[str], T], names: Iterable[str]) -> dict[str, T]:
    """`make(name)` by name, without the names that `make` refuses."""
    made = {}
    for name in names:
        try:
            made[name] = make(name)
        except UsageError:
            continue
    return made
