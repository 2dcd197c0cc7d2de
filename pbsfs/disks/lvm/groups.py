"""Volume groups, as the metadata of their physical volumes has them: the newest text of each group.

Called by `lvm.volumes`. Synchronous; keeps no state.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pbsfs.base.errors import DamageError
from pbsfs.base.text import quoted
from pbsfs.disks.lvm.label import PhysicalVolume, metadata
from pbsfs.disks.lvm.text import Section, parse

SECTOR = 512
"""Bytes of the unit in which LVM2 gives places and sizes."""

MOST_TEXTS = 8 << 20
"""Bytes of the metadata of all groups together."""

_NAME = re.compile(r"[A-Za-z0-9+_.][A-Za-z0-9+_.-]{0,126}")
"""lvm(8), under VALID NAMES."""

_UUID = re.compile(r"[A-Za-z0-9-]{32,40}")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Member:
    """A physical volume that a group has. `uuid`: 32 characters, without dashes. `device`: where it was last
    seen. `start`: of its extents, bytes. `is_missing`: whether LVM2 says not to use it."""

    uuid: str
    device: str
    start: int
    is_missing: bool


@dataclass(frozen=True, slots=True)
class Group:
    """`uuid`: with dashes. `sequence`: the number of the change that made it so. `extent`: bytes. `members`,
    `logical`: by the names that segments use."""

    name: str
    uuid: str
    sequence: int
    extent: int
    members: dict[str, Member]
    logical: dict[str, Section]


def groups(
    physical: Sequence[PhysicalVolume],
) -> tuple[list[Group], list[tuple[PhysicalVolume, DamageError]]]:
    """The groups, in the order of their first physical volumes; and the physical volumes whose metadata is
    damaged, unless a group has them all the same. Raises SourceError."""
    newest: dict[str, Group] = {}
    damaged: list[tuple[PhysicalVolume, DamageError]] = []
    seen: set[bytes] = set()
    for one in physical:
        damage: DamageError | None = None
        for text in metadata(one):
            if isinstance(text, DamageError):
                damage = damage or text
                continue
            if text in seen:
                continue
            try:
                if sum(map(len, seen)) + len(text) > MOST_TEXTS:
                    raise DamageError("the LVM metadata of all groups is too large")
                seen.add(text)
                group = _group(parse(text))
            except DamageError as error:
                damage = damage or error
                continue
            known = newest.get(group.uuid)
            if known is None or known.sequence < group.sequence:
                newest[group.uuid] = group
        if damage is not None:
            damaged.append((one, damage))
    found = list(newest.values())
    used = {member.uuid for group in found for member in group.members.values()}
    return found, [(one, damage) for one, damage in damaged if one.uuid not in used]


def _group(text: Section) -> Group:
    sections = [(name, value) for name, value in text.items() if isinstance(value, dict)]
    if len(sections) != 1:
        raise DamageError(f"the LVM metadata has {len(sections)} groups")
    name, section = sections[0]
    if not is_name(name):
        raise DamageError(f"a volume group has the name {quoted(name)}")
    members = {
        key: Member(
            typed(value, "id", str).replace("-", ""),
            typed(value, "device", str, "a device"),
            typed(value, "pe_start", int, 0) * SECTOR,
            "MISSING" in typed(value, "flags", list, []),
        )
        for key, value in _sections(section, "physical_volumes")
    }
    uuid = typed(section, "id", str)
    if _UUID.fullmatch(uuid) is None:
        raise DamageError(f"group {name} has the UUID {quoted(uuid)}")
    extent = typed(section, "extent_size", int) * SECTOR
    if not extent:
        raise DamageError(f"group {name} has extents of 0 bytes")
    logical = dict(_sections(section, "logical_volumes"))
    for key in logical:
        if not is_name(key):
            raise DamageError(f"group {name} has a volume with the name {quoted(key)}")
    return Group(name, uuid, typed(section, "seqno", int), extent, members, logical)


def _sections(section: Section, name: str) -> Iterable[tuple[str, Section]]:
    for key, value in typed(section, name, dict, {}).items():
        if not isinstance(value, dict):
            raise DamageError(f"{quoted(key)} in the LVM metadata is not a section")
        yield key, value


def typed(section: Section, name: str, kind: type[T], default: T | None = None) -> T:
    """A value of a section. Raises DamageError where it has another type, or is missing without a default."""
    value = section.get(name, default)
    if not isinstance(value, kind):
        raise DamageError(f"{name} in the LVM metadata is missing, or has a wrong type")
    return value


def is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and name not in {".", ".."}
