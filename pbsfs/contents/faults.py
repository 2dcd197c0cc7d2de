"""What is wrong in an archive: its errors, worded alike, and how many of them a directory has."""

from __future__ import annotations

from pbsfs.base.errors import DamageError


def damaged(position: int, problem: str) -> DamageError:
    """The error of `problem` with what lies at byte `position`. The caller adds the archive's name."""
    return DamageError(f"{problem}, at byte {position} of the archive")


class Faults:
    """What is wrong in a directory: how much, and the first of it. Of one thread."""

    def __init__(self) -> None:
        self.count = 0
        self._first: DamageError | None = None

    def add(self, error: DamageError) -> None:
        self.count += 1
        if self._first is None:
            self._first = error

    def summary(self) -> DamageError | None:
        if self.count < 2:
            return self._first
        return DamageError(f"{self.count} entries cannot be read; first: {self._first}")
