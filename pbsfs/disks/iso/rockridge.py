"""Rock Ridge: names, owners, modes, links and devices in the records of ISO 9660. Used by `reader`."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pbsfs.base.errors import DamageError
from pbsfs.disks.iso.records import long_time, short_time

_MOST_AREAS = 64
_MOST_NAME, _MOST_TARGET = 1024, 4096
_CREATED, _MODIFIED, _LONG = 1, 2, 0x80
_AREA = struct.Struct("<I4xI4xI")
_LEAST = {b"PX": 36, b"PN": 20, b"TF": 5, b"NM": 5, b"SL": 5, b"CL": 12, b"RE": 4, b"ZF": 16}
"""Bytes of each entry, with its head of four."""

_COMPONENTS = {2: b".", 4: b"..", 8: b"/"}


@dataclass
class Attributes:
    """What Rock Ridge says of an entry; None where it says nothing.

    `child`: the block of the directory that was moved elsewhere and belongs here. `was_moved`: it belongs
    elsewhere. `unpacked`: bytes of a file that is stored with zisofs.
    """

    name: bytes | None = None
    mode: int | None = None
    links: int = 1
    uid: int = 0
    gid: int = 0
    rdev: int = 0
    mtime: int | None = None
    target: bytes | None = None
    child: int | None = None
    was_moved: bool = False
    unpacked: int | None = None


def skipped(system: bytes) -> int | None:
    """Bytes before the entries of each record, by the first record of the root; None without Rock Ridge."""
    if system[:2] == b"SP" and len(system) >= 7 and system[2] >= 7 and system[4:6] == b"\xbe\xef":
        return system[6]
    return None


def attributes(system: bytes, area: Callable[[int, int, int], bytes]) -> Attributes:
    """What is in the entries of a record. `area`: reads where they continue: a block, an offset and a size.
    Raises DamageError."""
    found = Attributes()
    name: list[bytes] = []
    target: list[bytes] = []
    is_joined = True  # whether the next component of the target continues the last
    for kind, data in _entries(system, area):
        if kind == b"PX":
            found.mode, found.links, found.uid, found.gid = struct.unpack_from("<I4xI4xI4xI", data)
        elif kind == b"PN":
            high, low = struct.unpack_from("<I4xI", data)
            # Some programs store the whole number in the low half, as st_rdev has it.
            found.rdev = low if low & ~0xFF and not high else os.makedev(high & 0xFFF, low & 0xFFFFF)
        elif kind == b"TF":
            found.mtime = _modified(data, found.mtime)
        elif kind == b"NM" and not data[0] & ~1:
            name.append(data[1:])
            if sum(map(len, name)) > _MOST_NAME:
                raise DamageError("a name of Rock Ridge is too long")
        elif kind == b"SL":
            is_joined = _add_components(target, data[1:], is_joined)
        elif kind == b"CL":
            found.child = int.from_bytes(data[:4], "little")
        elif kind == b"RE":
            found.was_moved = True
        elif kind == b"ZF" and data[:2] == b"pz":
            found.unpacked = int.from_bytes(data[4:8], "little")
    found.name = b"".join(name) or None
    found.target = b"".join(target) or None
    return found


def _entries(system: bytes, area: Callable[[int, int, int], bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The entries, each with its name and its data, in order. Raises DamageError."""
    for _ in range(_MOST_AREAS):
        after = None
        at = 0
        while at + 4 <= len(system):
            kind, length = system[at : at + 2], system[at + 2]
            if length < 4 or at + length > len(system):
                if not kind.strip(b"\0"):
                    break  # padding
                raise DamageError("an entry of Rock Ridge has a wrong length")
            if kind == b"ST":
                break
            data = system[at + 4 : at + length]
            if kind == b"CE" and len(data) >= 20:
                after = _AREA.unpack_from(data)
            elif length >= _LEAST.get(kind, 4):
                yield kind, data
            else:
                raise DamageError("an entry of Rock Ridge has a wrong length")
            at += length
        if after is None:
            return
        system = area(*after)
    raise DamageError("entries of Rock Ridge continue in too many places")


def _modified(data: bytes, known: int | None) -> int | None:
    """The time of the last change, in an entry of times; `known` where it has none."""
    flags = data[0]
    if not flags & _MODIFIED:
        return known
    size = 17 if flags & _LONG else 7
    at = 1 + size * (flags & _CREATED)
    if at + size > len(data):
        raise DamageError("an entry of Rock Ridge has a wrong length")
    return (long_time if flags & _LONG else short_time)(data[at : at + size])


def _add_components(target: list[bytes], data: bytes, is_joined: bool) -> bool:
    """Adds the components of a link's target. Returns whether the next one continues the last."""
    at = 0
    while at + 2 <= len(data):
        flags, length = data[at], data[at + 1]
        if at + 2 + length > len(data) or flags & ~1 not in {0, *_COMPONENTS}:
            raise DamageError("the target of a link has an unknown form")
        if not is_joined:
            target.append(b"/")
        target.append(_COMPONENTS.get(flags & ~1, data[at + 2 : at + 2 + length]))
        is_joined = bool(flags & 1) or flags & ~1 == 8
        at += 2 + length
        if sum(map(len, target)) > _MOST_TARGET:
            raise DamageError("the target of a link is too long")
    return is_joined
