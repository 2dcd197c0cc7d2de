"""Text from outside, made fit to be shown: on a terminal, in a log, in an error.

Names, notes and a server's words may hold escape codes, line breaks and bytes that are not text. Errors and
log records carry such text unchanged; the output cleans it, in one place each: the log's formatter and the
last line of the command line. Code that quotes a name uses `quoted`. Pure functions, for any thread.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_SHOWN = 2000
"""Characters of one line that are shown: an error of a few sentences, and a server's words."""

SHOWN_NAMES = 8
"""Names that an error lists before it only counts the rest."""

MAX_EXCERPT = 100
"""Characters that an error repeats of a setting that is not valid: enough to find it."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def printable(text: str, *, keep: str = "") -> str:
    """`text` with each character replaced that a terminal would obey or can't show; `keep` is exempt."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _REPLACEMENT for c in text)


def escaped(text: str) -> str:
    """`text` in one line, with escapes for what is not printable: it shows what was there."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def excerpt(text: str, limit: int = MAX_EXCERPT) -> str:
    """The beginning of `text`, escaped like `escaped`, in at most `limit` characters."""
    shown = escaped(text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def one_line(text: str, limit: int = MAX_SHOWN) -> str:
    """`text` as one line of at most `limit` characters; a space stands for what is not printable."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * limit]).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def size_text(size: int) -> str:
    """A number of bytes for people: `512 B`, `1.5 KiB`, `20 GiB`, rounded to at least two digits."""
    value, unit = float(size), 0
    while abs(value) >= 1023.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit and abs(value) < 9.95 else f"{value:.0f} {_UNITS[unit]}"


def counted(count: int, noun: str) -> str:
    """A number of things: `1 range`, `2 ranges`, `0 entries`. `noun`: a regular one, for one thing."""
    if count == 1:
        return f"1 {noun}"
    if noun.endswith("ry"):
        return f"{count} {noun[:-1]}ies"
    return f"{count} {noun}{'es' if noun.endswith('ch') else 's'}"


def quoted(name: str) -> str:
    """`name` in quotes, with everything escaped that is not printable, as Python writes it."""
    return repr(name[:MAX_SHOWN])


def first_of(names: Iterable[str], most: int = SHOWN_NAMES) -> str:
    """The first `most` of `names` with commas between, and how many there are if there are more."""
    listed = list(names)
    shown = ", ".join(listed[:most])
    return f"{shown}, … ({len(listed)} in all)" if len(listed) > most else shown
