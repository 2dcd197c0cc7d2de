"""Access control lists in the kernel's form: the values of `system.posix_acl_*` (linux/posix_acl_xattr.h).

A version (u32) and entries of a tag (u16), permissions (u16) and an id (u32), in the order that the kernel
requires. Pure, for any thread.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from pbsfs.base.errors import DamageError

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
"""Tags."""

_VERSION = 2
_NOBODY = 0xFFFFFFFF
"""The id of entries that have none."""


def encode(
    user: int | None,
    users: Iterable[tuple[int, int]],
    group: int | None,
    groups: Iterable[tuple[int, int]],
    mask: int | None,
    other: int | None,
) -> bytes:
    """The list of these permissions (0 … 7; None: not set). `users`, `groups`: ids and their permissions.

    Raises DamageError where a number does not fit.
    """
    entries = [
        (USER_OBJ, user, _NOBODY),
        *((USER, permissions, number) for number, permissions in sorted(users)),
        (GROUP_OBJ, group, _NOBODY),
        *((GROUP, permissions, number) for number, permissions in sorted(groups)),
        (MASK, mask, _NOBODY),
        (OTHER, other, _NOBODY),
    ]
    raw = [struct.pack("<I", _VERSION)]
    for tag, permissions, number in entries:
        if permissions is None:
            continue
        if permissions > 7 or number > _NOBODY:
            raise DamageError("an access control list with an impossible entry")
        raw.append(struct.pack("<HHI", tag, permissions, number))
    return b"".join(raw)
