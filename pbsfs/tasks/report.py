"""What a verification found, as text and as JSON. Made by `Verification`, shown by `pbsfs verify`.

Plain values, used from one task.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from typing import Any

from pbsfs.base.text import SHOWN_NAMES, counted, first_of, printable
from pbsfs.reader.damage import Range
from pbsfs.tasks.hit import Hit

SOME_PATHS = 3
"""Paths that are named as examples if many files need one key."""


@dataclass(slots=True)
class Damage:
    """What is wrong with one file.

    `ranges`: the damaged bytes; empty for the whole file. `hit`: the files in the archive or
    on the disk that need these bytes.
    """

    path: str
    reason: str
    ranges: list[Range] = field(default_factory=list)
    hit: Hit = field(default_factory=Hit)

    @classmethod
    def of(cls, path: bytes, error: Exception) -> Damage:
        """The damage of a whole file. The reason does not repeat the path, which errors often start with."""
        parent, slash, name = path.rpartition(b"/")
        reason = str(error)
        shown = parent.decode(errors="backslashreplace") + slash.decode()
        for start in (
            os.fsdecode(path),
            path.decode(errors="backslashreplace"),
            path.decode(errors="replace"),
            shown + name.decode(errors="replace"),
        ):
            if reason.startswith(f"{start}: "):
                reason = reason.removeprefix(f"{start}: ")
                break
        return cls(os.fsdecode(path), reason)


@dataclass(slots=True)
class Report:
    """What was found. `chunks`, `size`: what was read. `unverified`: the reasons by path; `missing_keys`:
    these paths by the fingerprint of the key, None if it is not known."""

    files: int = 0
    chunks: int = 0
    size: int = 0
    damaged: list[Damage] = field(default_factory=list)
    unverified: dict[str, str] = field(default_factory=dict)
    missing_keys: dict[str | None, list[str]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The report for programs, by path."""
        return {
            "files": self.files,
            "chunks": self.chunks,
            "bytes": self.size,
            "damaged": [
                {
                    "path": damage.path,
                    "reason": damage.reason,
                    "ranges": [{"offset": found.offset, "length": found.length} for found in damage.ranges],
                    "files": [os.fsdecode(path) for path in damage.hit.paths],
                    "file_count": damage.hit.count,
                    "incomplete": [
                        {"path": os.fsdecode(path), "reason": why}
                        for path, why in damage.hit.incomplete.items()
                    ],
                }
                for damage in self._sorted()
            ],
            "unverified": [{"path": path, "reason": why} for path, why in sorted(self.unverified.items())],
        }

    def as_text(self) -> str:
        """The report for people: a line for each damaged file and missing key, and the totals at the end."""
        lines = []
        for damage in self._sorted():
            where = ", ".join(f"bytes {r.offset} to {r.offset + r.length - 1}" for r in damage.ranges)
            lines.append(f"damaged: {damage.path}: {where + ': ' if where else ''}{damage.reason}")
            if damage.hit.count:
                named = ", ".join(map(os.fsdecode, damage.hit.paths[:SHOWN_NAMES]))
                more = f", … ({damage.hit.count} in all)" if damage.hit.count > SHOWN_NAMES else ""
                lines.append(f"  files in it that are damaged: {named}{more}")
            for path, why in itertools.islice(damage.hit.incomplete.items(), SHOWN_NAMES):
                lines.append(
                    f"  {os.fsdecode(path)}: can't be read completely, so more may be damaged: {why}"
                )
        for fingerprint, paths in sorted(self.missing_keys.items(), key=lambda item: item[1]):
            key = f"the key {fingerprint}" if fingerprint else "a key that the manifest does not name"
            some = first_of(sorted(paths), SOME_PATHS)
            lines.append(f"not checked: {key} was not given (--keyfile): {some}")
        chunks = f"{counted(self.chunks, 'chunk')}, " if self.chunks else ""
        lines.append(
            f"{counted(self.files, 'file')}, {chunks}{counted(self.size, 'byte')} read; "
            f"{len(self.damaged)} damaged, {len(self.unverified)} not checked"
        )
        return "\n".join(map(printable, lines))  # one by one: a name may hold a line break

    def _sorted(self) -> list[Damage]:
        return sorted(self.damaged, key=lambda damage: damage.path)
