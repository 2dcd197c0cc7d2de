"""The records of directories of ISO 9660: where a file is, its name without extensions, its time. Pure."""

from __future__ import annotations

import struct
from typing import NamedTuple

from pbsfs.base.errors import DamageError

LEAST = 34
"""Bytes of the shortest record."""

_HEAD = struct.Struct("<BBI4xI4x7sBBB4xB")
_DIRECTORY, _ASSOCIATED, _MORE = 2, 4, 0x80
_LEAST_ZONE, _MOST_ZONE = -52, 52
_QUARTER = 15 * 60


class Record(NamedTuple):
    """`start`: the block where the data begins. `system`: what extensions keep in it. `is_interleaved`: the
    data lies in parts, which are not in it. `continues`: the next record has more of the same file."""

    name: bytes
    start: int
    size: int
    mtime: int
    is_directory: bool
    is_associated: bool
    is_interleaved: bool
    continues: bool
    system: bytes
    length: int

    @property
    def is_special(self) -> bool:
        """Whether it is the directory, or the one above it."""
        return self.name in {b"\0", b"\1"}


def record_in(block: bytes, at: int) -> Record:
    """The record at `at` of a block. Raises DamageError."""
    length = block[at] if at < len(block) else 0
    if length < LEAST or at + length > len(block):
        raise DamageError("a record of a directory has a wrong length")
    raw = block[at : at + length]
    _, attributes, extent, size, date, flags, unit, gap, width = _HEAD.unpack_from(raw)
    end = _HEAD.size + width
    if not width or end > length:
        raise DamageError("a name in a directory is longer than its record")
    return Record(
        raw[_HEAD.size : end],
        extent + attributes,
        size,
        short_time(date),
        bool(flags & _DIRECTORY),
        bool(flags & _ASSOCIATED),
        bool(unit or gap),
        bool(flags & _MORE),
        raw[end + end % 2 :],
        length,
    )


def short_time(date: bytes) -> int:
    """Seconds since the epoch, of seven bytes."""
    year, month, day, hour, minute, second, zone = struct.unpack("<6Bb", date)
    return _seconds(1900 + year, month, day, hour, minute, second, zone)


def long_time(date: bytes) -> int:
    """The same of sixteen digits and a zone. Raises DamageError."""
    if len(date) != 17 or not date[:16].isdigit():
        raise DamageError("a time is wrong")
    digits = date.decode("latin-1")
    fields = [int(digits[:4]), *(int(digits[at : at + 2]) for at in range(4, 14, 2))]
    year, month, day, hour, minute, second = fields
    return _seconds(year, month, day, hour, minute, second, struct.unpack("<b", date[16:])[0])


def _seconds(year: int, month: int, day: int, hour: int, minute: int, second: int, zone: int) -> int:
    """As the kernel counts them (mktime64), which takes impossible dates too."""
    month -= 2
    if month <= 0:
        month += 12
        year -= 1
    days = year // 4 - year // 100 + year // 400 + 367 * month // 12 + day + year * 365 - 719499
    found = ((days * 24 + hour) * 60 + minute) * 60 + second
    return found - zone * _QUARTER if _LEAST_ZONE <= zone <= _MOST_ZONE else found


def plain_name(name: bytes) -> bytes:
    """A name without extensions, as the kernel shows it: in lower case, without the version 1."""
    name = name.split(b"\0")[0]
    for end in (b".;1", b";1"):
        if name.endswith(end):
            name = name[: -len(end)]
            break
    return name.lower().replace(b";", b".").replace(b"/", b".")


def joliet_name(name: bytes) -> bytes:
    """A name of Joliet as UTF-8, as the kernel shows it. Raises DamageError."""
    try:
        text = name.decode("utf-16-be")
    except UnicodeDecodeError:
        raise DamageError("a name of Joliet is not UTF-16") from None
    if len(text) > 2:
        text = text.removesuffix(";1")
    return (text[:1] + text[1:].rstrip(".")).encode()
