"""Names and times in directories of FAT and exFAT.

Sources: Microsoft's "FAT File System Specification" and "exFAT file system specification"; the short names'
letters as Linux's vfat shows them with its defaults.
"""

from __future__ import annotations

import functools
import struct

DAY = 86_400

_EPOCH = 3652
"""Days from 1970 to 1980."""

_BEFORE = (0, 0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334, 0, 0, 0)
"""Days of a year before a month; of months that do not exist, as Linux counts them."""


def _lower(byte: int) -> bytes:
    """A letter of code page 437 as a small one, where the code page has it."""
    letter = bytes([byte]).decode("cp437")
    try:
        letter.lower().encode("cp437")
    except UnicodeEncodeError:
        return letter.encode()
    return letter.lower().encode()


_AS_IS = [bytes([byte]).decode("cp437").encode() for byte in range(256)]
_SMALL = [_lower(byte) for byte in range(256)]

SMALL_BASE, SMALL_EXTENSION = 0x08, 0x10
"""Of the byte that Windows NT uses for them: parts of a short name that are shown in small letters."""


def short_name(stored: bytes, flags: int) -> bytes:
    """The name that 11 bytes in code page 437 say, in UTF-8. `flags`: which parts are in small letters."""
    if stored[0] == 0x05:  # 0xE5 would say that the entry is deleted
        stored = b"\xe5" + stored[1:]
    base = _part(stored[:8], flags & SMALL_BASE)
    extension = _part(stored[8:], flags & SMALL_EXTENSION)
    return base + b"." + extension if extension else base


def _part(stored: bytes, small: int) -> bytes:
    stored = stored.split(b"\0", 1)[0].rstrip(b" ")
    if stored.isascii():
        return stored.lower() if small else stored
    letters = _SMALL if small else _AS_IS
    return b"".join([letters[byte] for byte in stored])


def short_label(stored: bytes) -> str:
    """The label that 11 bytes in code page 437 say."""
    if stored[:1] == b"\x05":
        stored = b"\xe5" + stored[1:]
    return stored.split(b"\0", 1)[0].decode("cp437").rstrip(" ")


def short_checksum(stored: bytes) -> int:
    """What the parts of a long name say of the 11 bytes of the short one that they belong to."""
    total = 0
    for byte in stored:
        total = (total >> 1 | (total & 1) << 7) + byte & 0xFF
    return total


def utf16_name(units: bytes) -> bytes:
    """A name in UTF-16 (little endian) as UTF-8. A surrogate without its other half becomes the three bytes
    that WTF-8 has for it, so that each name stays another one."""
    return units.decode("utf-16-le", "surrogatepass").encode("utf-8", "surrogatepass")


_SLOT = struct.Struct("<B10sBBB12sH4s")


class LongName:
    """A long name that is being read: its parts lie before the short name, the last one first."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._next = 0
        self._checksum = 0

    def clear(self) -> None:
        self._next = 0
        if self._parts:
            self._parts = []

    def add(self, slot: bytes) -> None:
        """One part, 32 bytes. A part that is not the next one ends what was read before."""
        number, first, _attributes, _type, checksum, second, _cluster, third = _SLOT.unpack(slot)
        if number & 0x40 and 1 <= number & 0x3F <= 20:
            self._parts = []
            self._next = number & 0x3F
            self._checksum = checksum
        elif not self._parts or number != self._next or checksum != self._checksum:
            self.clear()
            return
        self._parts.append(first + second + third)
        self._next -= 1

    def take(self, stored: bytes) -> bytes | None:
        """The whole name that belongs to a short one; None where there is none. Clears it."""
        if not self._parts:
            return None
        whole = self._next == 0 and self._checksum == short_checksum(stored)
        units = b"".join(reversed(self._parts))
        self.clear()
        if not whole:
            return None
        for at in range(0, len(units), 2):
            if units[at : at + 2] == b"\0\0":
                units = units[:at]
                break
        return utf16_name(units) if 0 < len(units) <= 510 else None


@functools.lru_cache(maxsize=4096)
def _day(date: int) -> int:
    """Days since 1970 of a date, counted as Linux does, also those that no calendar has."""
    year, month, day = date >> 9, date >> 5 & 15, date & 31
    leap = (year + 3) // 4  # days of February 29 before this year
    if year > 120:  # 2100 does not have one
        leap -= 1
    if year % 4 == 0 and year != 120 and month > 2:
        leap += 1
    return _EPOCH + year * 365 + leap + _BEFORE[max(month, 1)] + max(day, 1) - 1


def dos_time(date: int, time: int) -> int:
    """Nanoseconds since 1970. Neither has a zone: it is taken as UTC."""
    return (_day(date) * DAY + (time >> 11) * 3600 + (time >> 5 & 63) * 60 + (time & 31) * 2) * 1_000_000_000
