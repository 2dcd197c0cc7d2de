"""Patterns that choose entries of a directory tree by path, as those of the vendor's client do.

`*` and `?` stop at a slash; `**` between slashes stands for any directories. A pattern matches a path whose
last names it matches, `log` and `var/log` that of `srv/var/log`; one that starts with a slash matches whole
paths only. One that ends with a slash matches directories only, one that starts with `!` means the opposite,
and of several that match the last counts (Rust crate pathpatterns, src/match_list.rs and src/pattern.rs).

Pure functions of their arguments, for any thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pbsfs.base.errors import DamageError, UsageError
from pbsfs.base.text import excerpt
from pbsfs.contents.base import Contents, Entry

_CLASSES = {
    b"alnum": rb"0-9A-Za-z",
    b"alpha": rb"A-Za-z",
    b"blank": rb" \t",
    b"cntrl": rb"\x00-\x1f\x7f",
    b"digit": rb"0-9",
    b"graph": rb"!-~",
    b"lower": rb"a-z",
    b"print": rb" -~",
    b"punct": rb"!-/:-@\[-`{-~",
    b"space": rb"\t-\r ",
    b"upper": rb"A-Z",
    b"xdigit": rb"0-9A-Fa-f",
}

_TOKEN = re.compile(
    rb"""
    (?P<any>   (?:\A|(?<=/)) \*\*+ (?:/|\Z) )  # whole directories
    | (?P<star> \*+ )
    | (?P<one>  \? )
    | \[ (?P<not> [!^]? ) (?P<set> \]? (?: \[:[a-z]+:\] | \\. | [^]\\] )* ) \]
    | \\ (?P<escaped> . )
    | (?P<plain> [^\\[] )
    """,
    re.DOTALL | re.VERBOSE,
)

_MEMBER = re.compile(rb"\[:([a-z]+):\]|\\(.)|(.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern. `path`: matches a whole path without a leading slash. `opposite`: it started with `!`."""

    path: re.Pattern[bytes]
    directories_only: bool
    opposite: bool

    @classmethod
    def parse(cls, text: bytes) -> Pattern:
        """Raises UsageError."""
        body = text.removeprefix(b"!")
        directories_only = body.endswith(b"/")
        expression = b"" if body.startswith(b"/") else b"(?:.*/)?"
        expression += _expression(body.strip(b"/"), text)
        if not body:
            raise _bad(text, "it is empty")
        return cls(re.compile(expression, re.DOTALL), directories_only, text.startswith(b"!"))

    def matches(self, path: bytes, *, is_directory: bool) -> bool:
        return (is_directory or not self.directories_only) and self.path.fullmatch(path) is not None


def _bad(text: bytes, problem: str) -> UsageError:
    shown = excerpt(text.decode(errors="replace"))
    return UsageError(f"pattern '{shown}': {problem}; write \\ before a character that stands for itself")


def name_pattern(text: bytes, *, ignore_case: bool = False) -> re.Pattern[bytes]:
    """A pattern for names, as find(1) has it; it matches neither NUL nor a slash. Raises UsageError."""
    expression = _expression(text, text).replace(b"[^/]", rb"[^/\0]").replace(b".*", rb"[^/\0]*")
    return re.compile(b"(?i:" + expression + b")" if ignore_case else expression, re.DOTALL)


def _expression(stripped: bytes, text: bytes) -> bytes:
    expression = b""
    at = 0
    while at < len(stripped):
        token = _TOKEN.match(stripped, at)
        if token is None:
            raise _bad(text, "a bracket or backslash is not complete")
        expression += _translated(token, text)
        at = token.end()
    return expression


def _translated(token: re.Match[bytes], text: bytes) -> bytes:
    if token["any"] is not None:
        return b"(?:.*/)?" if token["any"].endswith(b"/") else b".*"
    if token["star"] is not None:
        return b"[^/]*"
    if token["one"] is not None:
        return b"[^/]"
    if token["set"] is not None:
        return _set(token, text)
    return re.escape(token["escaped"] or token["plain"])


def _set(token: re.Match[bytes], text: bytes) -> bytes:
    """A set of characters in brackets; a slash is never one of them."""
    members = b""
    for member in _MEMBER.finditer(token["set"]):
        name, escaped, plain = member.groups()
        if name is not None:
            if name not in _CLASSES:
                raise _bad(text, f"there is no class of characters {name.decode()}")
            members += _CLASSES[name]
        elif plain == b"-":
            members += plain
        else:
            members += b"\\x%02x" % ord(escaped or plain)
    try:
        return re.compile(b"(?!/)[" + (b"^" if token["not"] else b"") + members + b"]").pattern
    except re.error:
        raise _bad(text, "a range of characters is the wrong way round") from None


def _verdict(patterns: Sequence[Pattern], path: bytes, *, is_directory: bool) -> bool | None:
    """What the last pattern that matches says; None where none does."""
    for pattern in reversed(patterns):
        if pattern.matches(path, is_directory=is_directory):
            return not pattern.opposite
    return None


@dataclass(frozen=True, slots=True)
class Selection:
    """What of a directory tree is meant: all, or what `included` matches, without what `excluded` matches.

    What is below a directory that is meant is meant too, unless a pattern says the opposite; what is below
    one that is excluded never is.
    """

    included: tuple[Pattern, ...] = ()
    excluded: tuple[Pattern, ...] = ()

    @classmethod
    def parse(cls, included: Iterable[bytes], excluded: Iterable[bytes]) -> Selection:
        """Raises UsageError."""
        return cls(tuple(map(Pattern.parse, included)), tuple(map(Pattern.parse, excluded)))

    @property
    def is_all(self) -> bool:
        return not self.included and not self.excluded

    def walk(self, contents: Contents, top: Entry) -> Iterator[tuple[bytes, Entry | DamageError]]:
        """As `Contents.walk`, but only what is meant, and the directories on the way there.

        Directories that cannot be listed come too, unless they are excluded: what is meant may be in them.
        """
        if self.is_all:
            yield from contents.walk(top)
            return
        excluded: set[bytes] = set()  # the directory that was excluded last
        levels: list[tuple[bytes, bool]] = [(b"", not self.included)]
        waiting: list[tuple[bytes, Entry]] = []  # directories that are needed if something in them is
        for path, entry in contents.walk(top, enter=lambda path: path not in excluded):
            if not isinstance(entry, Entry):
                yield path, entry
                continue
            while not path.startswith(levels[-1][0]):
                levels.pop()
            while waiting and not path.startswith(waiting[-1][0] + b"/"):
                waiting.pop()
            is_directory = entry.is_directory
            if _verdict(self.excluded, path, is_directory=is_directory):
                excluded.clear()
                excluded.add(path)
                continue
            verdict = _verdict(self.included, path, is_directory=is_directory)
            wanted = levels[-1][1] if verdict is None else verdict
            if wanted:
                yield from waiting
                waiting.clear()
                yield path, entry
            elif is_directory:
                waiting.append((path, entry))
            if is_directory:
                levels.append((path + b"/", wanted))
