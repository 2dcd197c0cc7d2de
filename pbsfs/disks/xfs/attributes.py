"""The extended attributes of an inode of XFS: in the inode, or in a tree of blocks. Used by `reader`."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.disks.xfs.blocks import REMOTE, TREE, Blocks
from pbsfs.disks.xfs.extents import Map
from pbsfs.disks.xfs.inode import LIST, LOCAL, Fork, Inode

MOST_BYTES = 16 << 20
"""Of names and values of one inode."""

_MOST_VALUE = 64 << 10
_MOST_LEVELS = 16
_ROOT, _SECURE, _PARENT, _INCOMPLETE, _IN_LEAF = 2, 4, 8, 0x80, 1
_ENTRY = struct.Struct(">4xHB")
_LOCAL_HEAD = struct.Struct(">HB")
_REMOTE_HEAD = struct.Struct(">IIB")
_LISTS = {b"SGI_ACL_FILE": b"system.posix_acl_access", b"SGI_ACL_DEFAULT": b"system.posix_acl_default"}
_ACL_ENTRY = struct.Struct(">IIH2x")


def has_any(fork: Fork | None) -> bool:
    """Whether an inode has attributes that people see; True where that costs reading blocks."""
    if fork is None:
        return False
    if fork.format == LOCAL:
        return (
            len(fork.data) > 2
            and fork.data[2] > 0
            and any(_visible(flags) for flags, _, _ in _short(fork.data))
        )
    return fork.extents > 0


def attributes(blocks: Blocks, inode: Inode) -> dict[bytes, bytes]:
    """The attributes by their full names, as the kernel lists them to root: an access control list in the
    kernel's form, and as it is stored. Raises DamageError."""
    fork = inode.attributes
    found: dict[bytes, bytes] = {}
    if fork is None or (fork.format == LIST and not fork.extents):
        return found
    stored = _short(fork.data) if fork.format == LOCAL else _blocks(blocks, inode.number, fork)
    held = 0
    for flags, name, value in stored:
        if not _visible(flags):
            continue
        held += len(name) + len(value)
        if held > MOST_BYTES:
            raise UnsupportedError(f"more than {MOST_BYTES >> 20} MiB of attributes is not supported")
        full = (b"trusted." if flags & _ROOT else b"security." if flags & _SECURE else b"user.") + name
        if full in found:
            raise DamageError("it has an attribute twice")
        found[full] = value
        if flags & _ROOT and name in _LISTS:
            found[_LISTS[name]] = _list(value)
    return found


def _visible(flags: int) -> bool:
    return not flags & (_INCOMPLETE | _PARENT)


def _list(value: bytes) -> bytes:
    """An access control list in the form of linux/posix_acl_xattr.h."""
    count = int.from_bytes(value[:4], "big")
    if len(value) < 4 or len(value) < 4 + count * _ACL_ENTRY.size:
        raise DamageError("an access control list is cut off")
    made = [struct.pack("<I", 2)]
    for number in range(count):
        tag, who, permissions = _ACL_ENTRY.unpack_from(value, 4 + number * _ACL_ENTRY.size)
        if tag not in {1, 2, 4, 8, 16, 32}:
            raise DamageError("an access control list is wrong")
        made.append(struct.pack("<HHI", tag, permissions, who if tag in {2, 8} else 0xFFFFFFFF))
    return b"".join(made)


def _short(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    total, count = struct.unpack_from(">HB", data) if len(data) >= 4 else (0, 0)
    if not 4 <= total <= len(data):
        raise DamageError("its list of attributes is wrong")
    at = 4
    for _ in range(count):
        if at + 3 > total:
            raise DamageError("its list of attributes is wrong")
        length, size, flags = data[at : at + 3]
        end = at + 3 + length + size
        if not length or end > total:
            raise DamageError("its list of attributes is wrong")
        yield flags, data[at + 3 : at + 3 + length], data[end - size : end]
        at = end


def _blocks(blocks: Blocks, number: int, fork: Fork) -> Iterator[tuple[int, bytes, bytes]]:
    """From the leftmost leaf on, leaf by leaf."""
    checksums = blocks.superblock.has_checksums
    node, leaf = (b"\x3e\xbe", b"\x3b\xee") if checksums else (b"\xfe\xbe", b"\xfb\xee")
    count_at = 56 if checksums else 12
    extents = Map(blocks, fork)
    at = depth = 0
    while True:
        data = blocks.block(extents.parts(at, 1), TREE, number)
        if data[8:10] != node:
            break
        depth += 1
        if depth > _MOST_LEVELS or not int.from_bytes(data[count_at : count_at + 2], "big"):
            raise DamageError("the tree of its attributes is wrong")
        entries = 64 if checksums else 16
        at = int.from_bytes(data[entries + 4 : entries + 8], "big")
    seen: set[int] = set()
    while True:
        if data[8:10] != leaf:
            raise DamageError("a block of its attributes is of another kind")
        seen.add(at)
        yield from _leaf(blocks, number, extents, data)
        at = int.from_bytes(data[:4], "big")
        if not at:
            return
        if at in seen:
            raise DamageError("the blocks of its attributes form a loop")
        data = blocks.block(extents.parts(at, 1), TREE, number)


def _leaf(blocks: Blocks, number: int, extents: Map, data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    checksums = blocks.superblock.has_checksums
    count_at, entries = (56, 80) if checksums else (12, 32)
    count = int.from_bytes(data[count_at : count_at + 2], "big")
    if entries + count * 8 > len(data):
        raise DamageError("a block of its attributes is wrong")
    for position in range(entries, entries + count * 8, 8):
        at, flags = _ENTRY.unpack_from(data, position)
        if not _visible(flags):
            continue
        head = _LOCAL_HEAD if flags & _IN_LEAF else _REMOTE_HEAD
        if at + head.size > len(data):
            raise DamageError("a block of its attributes is wrong")
        start = 0
        if flags & _IN_LEAF:
            size, length = head.unpack_from(data, at)
        else:
            start, size, length = head.unpack_from(data, at)
        at += head.size
        if not length or at + length + (size if flags & _IN_LEAF else 0) > len(data):
            raise DamageError("a block of its attributes is wrong")
        name = data[at : at + length]
        if flags & _IN_LEAF:
            yield flags, name, data[at + length : at + length + size]
        else:
            yield flags, name, _value(blocks, number, extents, start, size)


def _value(blocks: Blocks, number: int, extents: Map, start: int, size: int) -> bytes:
    if size > _MOST_VALUE:
        raise DamageError("an attribute is too long")
    superblock = blocks.superblock
    step = superblock.block_size
    if not superblock.has_checksums:
        stored = extents.parts(start, -(-size // step)) if size else []
        return b"".join(blocks.read(*part) for part in stored)[:size]
    value = b""
    while len(value) < size:
        data = blocks.block(extents.parts(start, 1), REMOTE, number)
        at, length = struct.unpack_from(">II", data, 4)
        expected = min(step - 56, size - len(value))
        if data[:4] != b"XARM" or at != len(value) or length != expected:
            raise DamageError("a block of an attribute's value is wrong")
        value += data[56 : 56 + length]
        start += 1
    return value
