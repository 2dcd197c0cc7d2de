"""The pxar archive format, versions 1 and 2: bytes to values.

An archive is a sequence of items, each a type and a size (16 bytes) and content; all numbers are
little-endian. `Archive` (pbsfs.contents.archive) reads the bytes and calls this module with windows of them.
No I/O, no state: for any thread. The format's source: proxmox/pxar, src/format/mod.rs,
src/format/acl.rs and src/accessor/mod.rs.
"""

from __future__ import annotations

import stat as stat_bits
import struct
from typing import NamedTuple

from pbsfs.base.errors import DamageError
from pbsfs.formats import posix_acl
from pbsfs.formats.siphash import siphash_2_4

FORMAT_VERSION = 0x730F6C75DF16A40D
PRELUDE = 0xE309D79D9F7B771B
ENTRY = 0xD5956474E588ACEF
ENTRY_V1 = 0x11DA850A1C1CCEFF
FILENAME = 0x16701121063917B3
SYMLINK = 0x27F971E7DBF5DC5F
HARDLINK = 0x51269C8422BD7275
DEVICE = 0x9FC9E906586D5CE9
XATTR = 0x0DAB0229B57DCD03
ACL_USER = 0x2CE8540A457D55B8
ACL_GROUP = 0x136E3ECEB04C03AB
ACL_GROUP_OBJ = 0x10868031E9582876
ACL_DEFAULT = 0xBBBB13415A6896F5
ACL_DEFAULT_USER = 0xC89357B40532CD1F
ACL_DEFAULT_GROUP = 0xF90A8A5816038FFE
FCAPS = 0x2DA9DD9DB5F7FB67
QUOTA_PROJID = 0xE07540E82F7D1CBB
PAYLOAD = 0x28147A1B0B7C1A25
PAYLOAD_REF = 0x419D3D6BC4BA977E
GOODBYE = 0x2FEC4FA642D5731D
GOODBYE_TAIL = 0xEF5EED5B753E1555
PAYLOAD_START = 0x834C68C2194A4ED2
PAYLOAD_TAIL = 0x6C72B78B984C81B5

NAME_KEYS = (0x83AC3F1CFBB450DB, 0xAA4F1B6879369FBD)
"""The keys of the hashes of names in goodbye tables."""

HEADER = struct.Struct("<QQ")  # type, size with this header
ITEM = struct.Struct("<QQQ")  # of a goodbye table: hash, offset, size
ITEM_SIZE = 24
HEADER_SIZE = 16
MAX_NAME = 4096
"""Bytes of a name or of a link's target, as the vendor limits them."""

MAX_ATTRIBUTES = 4 << 20
"""Bytes of the attributes of one entry. A file system with 64 KiB for each may have more in theory only."""

MAX_ENTRY = MAX_ATTRIBUTES + 3 * MAX_NAME
"""Bytes of an entry without its payload, at most."""

_STAT_NEXT = struct.Struct(
    "<QQQQIIqIIQQ"
)  # header; mode, flags, uid, gid, seconds, nanoseconds, zero; the next header
_STAT_V1 = struct.Struct("<QQQQIIQ")  # header; mode, flags, uid, gid, nanoseconds
_TWO = struct.Struct("<QQ")
_U64 = struct.Struct("<Q")

_ATTRIBUTE_SIZES = {
    ACL_USER: 16,
    ACL_GROUP: 16,
    ACL_GROUP_OBJ: 8,
    ACL_DEFAULT: 32,
    ACL_DEFAULT_USER: 16,
    ACL_DEFAULT_GROUP: 16,
    QUOTA_PROJID: 8,
}
_SINGLE = {ACL_GROUP_OBJ, ACL_DEFAULT, FCAPS, QUOTA_PROJID}
_MAX_XATTR = 255 + 1 + (64 << 10)
_TYPES = {
    stat_bits.S_IFREG,
    stat_bits.S_IFDIR,
    stat_bits.S_IFLNK,
    stat_bits.S_IFBLK,
    stat_bits.S_IFCHR,
    stat_bits.S_IFIFO,
    stat_bits.S_IFSOCK,
}


class ShortError(Exception):
    """The window ends before the entry does. `needed`: bytes of it that are needed, at least."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


class Parsed(NamedTuple):
    """An entry.

    `mode`: as st_mode; 0 for a hard link. `size`: of a file's content. `value`: of a file in version 2, the
    offset of its payload's header in the payload stream; of a device its number as `os.makedev` returns it;
    of a hard link, how far back its target lies. `target`: of a link. `end`: where in the archive the
    entry ends; of a directory, where its first child or its goodbye table starts.
    """

    name: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    value: int
    target: bytes | None
    has_xattrs: bool
    end: int


def parse_entry(data: bytes, at: int, base: int, *, split: bool) -> Parsed:
    """The entry whose FILENAME item starts at `at` of the window `data`.

    `base`: where the window starts in the archive. `split`: whether that is of version 2.

    Of a payload, its header alone has to be in the window. Raises DamageError, and ShortError.
    """
    try:
        kind, size = HEADER.unpack_from(data, at)
        if kind != FILENAME:
            raise DamageError("an entry is missing")
        if not 17 < size <= HEADER_SIZE + MAX_NAME + 1:
            raise DamageError(f"a name of {size - 17} bytes")
        start = at + size
        if start > len(data):
            raise ShortError(start - at)
        name = data[at + HEADER_SIZE : start - 1]
        if data[start - 1] or b"/" in name or b"\0" in name or name in (b".", b".."):
            raise DamageError("a name that no file can have")
        return _parse_rest(data, at, base, start, name, split)
    except struct.error:
        raise ShortError(len(data) - at + 1) from None


def parse_root(data: bytes, at: int, base: int, *, split: bool) -> Parsed:
    """The root's entry, whose ENTRY item starts at `at`: as `parse_entry`."""
    try:
        parsed = _parse_rest(data, at, base, at, b"", split)
    except struct.error:
        raise ShortError(len(data) - at + 1) from None
    if not stat_bits.S_ISDIR(parsed.mode):
        raise DamageError("the root is not a directory")
    return parsed


def _parse_rest(data: bytes, at: int, base: int, start: int, name: bytes, split: bool) -> Parsed:
    """What follows the name: the item at `start` and those that belong to it. Raises struct.error too."""
    kind, size = HEADER.unpack_from(data, start)
    if kind == ENTRY:
        if size != 56:
            raise DamageError(f"an entry of {size} bytes")
        _k, _s, mode, _flags, uid, gid, seconds, nanoseconds, _zero, kind, size = _STAT_NEXT.unpack_from(
            data, start
        )
        if nanoseconds >= 1_000_000_000:
            raise DamageError("a time with too many nanoseconds")
        mtime_ns = seconds * 1_000_000_000 + nanoseconds
        here = start + 56
    elif kind == ENTRY_V1:
        if size != 48:
            raise DamageError(f"an entry of {size} bytes")
        _k, _s, mode, _flags, uid, gid, mtime_ns = _STAT_V1.unpack_from(data, start)
        here = start + 48
        kind, size = HEADER.unpack_from(data, here)
    elif kind == HARDLINK:
        if not 26 <= size <= HEADER_SIZE + 8 + MAX_NAME + 1:
            raise DamageError(f"a hard link of {size} bytes")
        end = start + size
        if end > len(data):
            raise ShortError(end - at)
        (back,) = _U64.unpack_from(data, start + HEADER_SIZE)
        return Parsed(name, 0, 0, 0, 0, 0, back, data[start + 24 : end - 1], False, base + end)
    else:
        raise DamageError("a name without an entry")
    has_xattrs = False
    kind_of_file = mode & ~0o7777
    if kind not in _ENDINGS:
        here, has_xattrs = _skip_attributes(data, at, here, kind_of_file in _WITHOUT_ENDING)
        kind, size = HEADER.unpack_from(data, here)
    if kind_of_file == stat_bits.S_IFREG:
        if kind == PAYLOAD_REF and split:
            if size != 32:
                raise DamageError(f"a reference of {size} bytes to a payload")
            value, length = _TWO.unpack_from(data, here + HEADER_SIZE)
            end = base + here + 32
            return Parsed(name, mode, uid, gid, mtime_ns, length, value, None, has_xattrs, end)
        if kind == PAYLOAD and not split:
            if size < HEADER_SIZE:
                raise DamageError(f"a payload of {size} bytes with its header")
            length, end = size - HEADER_SIZE, base + here + size
            return Parsed(name, mode, uid, gid, mtime_ns, length, 0, None, has_xattrs, end)
        raise DamageError("a file without content")
    if kind_of_file == stat_bits.S_IFDIR:
        if kind in _CONTENT:
            raise DamageError("a directory with content")
        return Parsed(name, mode, uid, gid, mtime_ns, 0, 0, None, has_xattrs, base + here)
    if kind_of_file == stat_bits.S_IFLNK:
        if kind != SYMLINK:
            raise DamageError("a symbolic link without a target")
        if not 17 < size <= HEADER_SIZE + MAX_NAME + 1:
            raise DamageError(f"a symbolic link to a path of {size - 17} bytes")
        end = here + size
        if end > len(data):
            raise ShortError(end - at)
        target = data[here + HEADER_SIZE : end - 1]
        if data[end - 1] or b"\0" in target:
            raise DamageError("a symbolic link to a path that no file can have")
        return Parsed(name, mode, uid, gid, mtime_ns, len(target), 0, target, has_xattrs, base + end)
    if kind_of_file in (stat_bits.S_IFBLK, stat_bits.S_IFCHR):
        if kind != DEVICE or size != 32:
            raise DamageError("a device without a number")
        major, minor = _TWO.unpack_from(data, here + HEADER_SIZE)
        rdev = device_number(major, minor)
        return Parsed(name, mode, uid, gid, mtime_ns, 0, rdev, None, has_xattrs, base + here + 32)
    if kind_of_file in (stat_bits.S_IFIFO, stat_bits.S_IFSOCK):
        if kind in _CONTENT:
            raise DamageError("a FIFO or socket with content")
        return Parsed(name, mode, uid, gid, mtime_ns, 0, 0, None, has_xattrs, base + here)
    raise DamageError(f"an unknown type of file (mode {mode:o})")


_CONTENT = frozenset({PAYLOAD, PAYLOAD_REF, SYMLINK, DEVICE})
_ENDINGS = _CONTENT | {FILENAME, GOODBYE}
_WITHOUT_ENDING = frozenset({stat_bits.S_IFDIR, stat_bits.S_IFIFO, stat_bits.S_IFSOCK})


def device_number(major: int, minor: int) -> int:
    """As `os.makedev` returns it. Raises DamageError for what Linux cannot have: its device numbers are of
    12 and 20 bits (linux/kdev_t.h)."""
    if major >> 12 or minor >> 20:
        raise DamageError("a device with an impossible number")
    return major << 8 | (minor & 0xFF) | (minor & 0xFFF00) << 12


def _skip_attributes(data: bytes, at: int, here: int, open_ended: bool) -> tuple[int, bool]:
    """Where the attributes that start at `here` end, and whether there are extended ones among them.

    `open_ended`: for an entry that ends where the next one begins. What is unknown there may be that one, and
    damaged; then the entry counts as one with extended attributes, and `parse_xattrs` raises the error.
    """
    first = here
    has_xattrs = False
    seen = set()
    while True:
        kind, size = HEADER.unpack_from(data, here)
        if kind in _ENDINGS:
            return here, has_xattrs
        if kind in (XATTR, FCAPS):
            if not HEADER_SIZE <= size <= HEADER_SIZE + _MAX_XATTR:
                raise DamageError(f"an attribute of {size} bytes")
        elif size - HEADER_SIZE != _ATTRIBUTE_SIZES.get(kind):
            if open_ended and kind not in _ATTRIBUTE_SIZES:
                return here, True
            raise DamageError("an attribute of an unknown type or size")
        if kind in _SINGLE:
            if kind in seen:
                raise DamageError("the same attribute twice")
            seen.add(kind)
        has_xattrs |= kind != QUOTA_PROJID
        here += size
        if here - first > MAX_ATTRIBUTES:
            raise DamageError("too many attributes")
        if here > len(data):
            raise ShortError(here - at)


def parse_xattrs(data: bytes, at: int, *, named: bool) -> dict[bytes, bytes]:
    """The extended attributes of the entry at `at`, which `parse_entry` took (`parse_root`, if not `named`).

    ACLs are `system.posix_acl_access` and `system.posix_acl_default` in the kernel's form, file capabilities
    `security.capability`. Raises DamageError.
    """
    if named:
        at += HEADER.unpack_from(data, at)[1]
    kind, size = HEADER.unpack_from(data, at)
    if kind not in (ENTRY, ENTRY_V1):
        return {}
    (mode,) = _U64.unpack_from(data, at + HEADER_SIZE)
    at += size
    found: dict[bytes, bytes] = {}
    acls: dict[int, list[tuple[int, ...]]] = {}
    while True:
        kind, size = HEADER.unpack_from(data, at)
        if kind in _ENDINGS:
            break
        if kind not in (XATTR, FCAPS) and kind not in _ATTRIBUTE_SIZES:
            raise DamageError("an attribute of an unknown type")
        content = data[at + HEADER_SIZE : at + size]
        at += size
        if kind == XATTR:
            name, nul, value = content.partition(b"\0")
            if not name or not nul:
                raise DamageError("an extended attribute without a name")
            if len(name) > 255 or name.startswith(b"system.posix_acl_"):
                raise DamageError("an extended attribute with a name that it cannot have")
            found[name] = value
        elif kind == FCAPS:
            found[b"security.capability"] = content
        else:
            acls.setdefault(kind, []).append(struct.unpack(f"<{len(content) // 8}Q", content))
    return found | _acls(mode, acls)


_NOT_SET = 0xFFFFFFFFFFFFFFFF


def _acls(mode: int, items: dict[int, list[tuple[int, ...]]]) -> dict[bytes, bytes]:
    """The ACLs that `items` make, as pbs-client/src/pxar/metadata.rs sets them. Raises DamageError."""
    found = {}
    users, groups = _pairs(items.get(ACL_USER)), _pairs(items.get(ACL_GROUP))
    if users or groups or ACL_GROUP_OBJ in items:
        of_mode = mode >> 3 & 7
        group = items[ACL_GROUP_OBJ][0][0] if ACL_GROUP_OBJ in items else of_mode
        found[posix_acl.ACCESS] = posix_acl.encode(mode >> 6 & 7, users, group, groups, of_mode, mode & 7)
    if ACL_DEFAULT in items:
        users, groups = _pairs(items.get(ACL_DEFAULT_USER)), _pairs(items.get(ACL_DEFAULT_GROUP))
        user_obj, group_obj, other, mask = (n if n != _NOT_SET else None for n in items[ACL_DEFAULT][0])
        found[posix_acl.DEFAULT] = posix_acl.encode(user_obj, users, group_obj, groups, mask, other)
    return found


def _pairs(items: list[tuple[int, ...]] | None) -> list[tuple[int, int]]:
    return [(number, permissions) for number, permissions in items or ()]


def parse_tail(raw: bytes) -> tuple[int, int]:
    """The last 24 bytes of a directory: how far back its entry lies from its goodbye item, and that item's
    size. Raises DamageError."""
    mark, offset, size = ITEM.unpack(raw)
    if mark != GOODBYE_TAIL:
        raise DamageError("a directory does not end with its table")
    if size < HEADER_SIZE + ITEM_SIZE or (size - HEADER_SIZE) % ITEM_SIZE:
        raise DamageError(f"a directory's table of {size} bytes")
    return offset, size


def hash_name(name: bytes) -> int:
    """The hash of a name in a goodbye table."""
    return siphash_2_4(NAME_KEYS, name)
