"""Patterns that choose entries of a directory tree by path, as those of backup programs do.

`*` and `?` stop at a slash, `**` does not. A pattern with a slash at its beginning or in the middle means the
path below the top; any other means names on every level. One that ends with a slash means directories only.
Pure functions of their arguments, for any thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_TOKEN = re.compile(rb"\*\*/|\*\*|\*|\?|\[[!^]?\]?[^]/]*\]|\\?.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern. `path`: matches a whole path without a leading slash."""

    path: re.Pattern[bytes]
    directories_only: bool

    @classmethod
    def parse(cls, text: bytes) -> Pattern:
        directories_only = text.endswith(b"/")
        body = text.rstrip(b"/")
        anchored = b"/" in body
        expression = b"".join(map(_translated, _TOKEN.findall(body.lstrip(b"/"))))
        return cls(re.compile((b"" if anchored else b"(?:.*/)?") + expression, re.DOTALL), directories_only)

    def matches(self, path: bytes, *, is_directory: bool) -> bool:
        return (is_directory or not self.directories_only) and self.path.fullmatch(path) is not None


def _translated(token: bytes) -> bytes:
    if token == b"**/":
        return b"(?:.*/)?"
    if token == b"**":
        return b".*"
    if token == b"*":
        return b"[^/]*"
    if token == b"?":
        return b"[^/]"
    if token.startswith(b"[") and len(token) > 2:
        inside = token[1:-1].replace(b"\\", b"\\\\").replace(b"[", b"\\[").replace(b"&&", b"&\\&")
        return b"[" + (b"^" + inside[1:] if inside[:1] in b"!^" else inside) + b"]"
    return re.escape(token.removeprefix(b"\\") or token)


@dataclass(frozen=True, slots=True)
class Selection:
    """What of a directory tree is meant: all, or what `included` matches, without what `excluded` matches.

    Everything below a directory that matches is meant too.
    """

    included: tuple[Pattern, ...] = ()
    excluded: tuple[Pattern, ...] = ()

    @classmethod
    def parse(cls, included: Iterable[bytes], excluded: Iterable[bytes]) -> Selection:
        return cls(tuple(map(Pattern.parse, included)), tuple(map(Pattern.parse, excluded)))

    def excludes(self, path: bytes, *, is_directory: bool) -> bool:
        """Whether `path`, and what is below it, is left out."""
        return any(pattern.matches(path, is_directory=is_directory) for pattern in self.excluded)

    def includes(self, path: bytes, *, is_directory: bool) -> bool:
        """Whether `path` is meant by itself; what is below a directory that is meant is not asked for."""
        return not self.included or any(
            pattern.matches(path, is_directory=is_directory) for pattern in self.included
        )
