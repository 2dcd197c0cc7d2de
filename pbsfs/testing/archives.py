"""Writes pxar archives, of version 1 and 2, and catalogs, as the vendor's client does.

For the demo and the tests: whole archives in memory, made of `Node`s. A node may also be made wrong on
purpose, as no client would write it. Synchronous, no state.
"""

from __future__ import annotations

import stat as stat_bits
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import SEEK_CUR, BytesIO
from typing import BinaryIO

from pbsfs.formats import catalog as catalogs
from pbsfs.formats import pxar
from pbsfs.formats.pxar import HEADER, HEADER_SIZE, ITEM, ITEM_SIZE

Row = tuple[int, int, int]
"""An item of a goodbye table: hash, offset, size."""


@dataclass(eq=False)
class Node:
    """A directory, file, link, device, FIFO or socket that is to be written.

    `mode`: as st_mode. `device`: major and minor. `xattrs`: by name, ACLs in the kernel's form. `zeros`: how
    many of them follow `data` in a file. `link_to`: what a hard link is another name of, written before it.
    What follows is for archives that are wrong: `extra`: items behind the attributes. `rows`: changes a
    directory's table. `back`, `claimed_size`, `reference`: what a hard link and a file's header or reference
    say instead of the truth.
    """

    name: bytes = b""
    mode: int = stat_bits.S_IFDIR | 0o755
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    data: bytes = b""
    zeros: int = 0
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[bytes, bytes] = field(default_factory=dict)
    children: list[Node] = field(default_factory=list)
    link_to: Node | None = None
    extra: bytes = b""
    rows: Callable[[list[Row]], list[Row]] | None = None
    back: int | None = None
    claimed_size: int | None = None
    reference: int | None = None

    @property
    def is_directory(self) -> bool:
        return stat_bits.S_ISDIR(self.mode) and self.link_to is None

    @property
    def size(self) -> int:
        """Bytes of a file's content."""
        return len(self.data) + self.zeros


@dataclass(frozen=True)
class Written:
    """An archive. `payload`: of version 2, unless it went to a file. `positions`: of each node's FILENAME
    item (the root's ENTRY)."""

    main: bytes
    payload: bytes | None
    positions: dict[Node, int]


def item(kind: int, content: bytes = b"") -> bytes:
    return HEADER.pack(kind, HEADER_SIZE + len(content)) + content


def write(
    root: Node,
    *,
    split: bool,
    prelude: bytes | None = None,
    old_entries: bool = False,
    padding: bytes = b"",
    backwards: bool = False,
    payload_to: BinaryIO | None = None,
) -> Written:
    """The archive of `root` and all below.

    `split`: as version 2, with `prelude`. `old_entries`: ENTRY items as clients wrote them until 2020.
    `padding`: stale bytes before each payload. `backwards`: payloads in the reverse order of the entries.
    `payload_to`: an empty file for the payload stream, in which `zeros` are holes.
    """
    stream = payload_to or BytesIO()
    references = _payloads(root, stream, padding, backwards) if split else {}
    payload = stream.getvalue() if split and isinstance(stream, BytesIO) else None
    out = bytearray()
    if split:
        out += item(pxar.FORMAT_VERSION, struct.pack("<Q", 2))
        if prelude is not None:
            out += item(pxar.PRELUDE, prelude)
    positions: dict[Node, int] = {}
    entries_at: dict[Node, int] = {}
    paths: dict[Node, bytes] = {}
    rows: dict[Node, list[tuple[Node, int]]] = {}  # the children of a directory, and their ends
    stack: list[tuple[Node, Node | None, bool]] = [(root, None, False)]
    while stack:
        node, parent, is_done = stack.pop()
        if is_done:
            goodbye = len(out)
            table = [
                (pxar.hash_name(child.name), goodbye - positions[child], end - positions[child])
                for child, end in rows[node]
            ]
            table = _tree(sorted(table)) if node.rows is None else node.rows(_tree(sorted(table)))
            size = HEADER_SIZE + ITEM_SIZE * (len(table) + 1)
            start = 0 if parent is None else entries_at[node]
            tail = ITEM.pack(pxar.GOODBYE_TAIL, goodbye - start, size)
            out += item(pxar.GOODBYE, b"".join(ITEM.pack(*row) for row in table) + tail)
        else:
            positions[node] = len(out)
            paths[node] = b"/".join(filter(None, (paths[parent], node.name))) if parent else b""
            if parent is not None:
                out += item(pxar.FILENAME, node.name + b"\0")
            entries_at[node] = len(out)
            if node.link_to is not None:
                back = positions[node] - positions[node.link_to] if node.back is None else node.back
                out += item(pxar.HARDLINK, struct.pack("<Q", back) + paths[node.link_to] + b"\0")
            else:
                out += _entry(node, old_entries) + _attributes(node) + node.extra
                out += _ending(node, references)
            if node.is_directory:
                rows[node] = []
                stack.append((node, parent, True))
                stack += [(child, node, False) for child in reversed(node.children)]
                continue
        if parent is not None:
            # The client counts the content that it writes, though that goes to the other stream.
            elsewhere = node.size if node in references else 0
            rows[parent].append((node, len(out) + elsewhere))
    return Written(bytes(out), payload, positions)


def _payloads(root: Node, out: BinaryIO, padding: bytes, backwards: bool) -> dict[Node, int]:
    """Writes the payload stream; returns where each file's payload is in it."""
    files: list[Node] = []
    stack = [root]
    while stack:
        node = stack.pop()
        if stat_bits.S_ISREG(node.mode) and node.link_to is None:
            files.append(node)
        stack += reversed(node.children)
    out.write(item(pxar.PAYLOAD_START))
    references = {}
    for node in reversed(files) if backwards else files:
        out.write(padding)
        references[node] = out.tell()
        out.write(HEADER.pack(pxar.PAYLOAD, HEADER_SIZE + node.size) + node.data)
        out.seek(node.zeros, SEEK_CUR)  # what is written behind it makes it zeros
    out.write(item(pxar.PAYLOAD_TAIL))
    return references


def _entry(node: Node, old: bool) -> bytes:
    if old:
        return item(pxar.ENTRY_V1, struct.pack("<QQIIQ", node.mode, 0, node.uid, node.gid, node.mtime_ns))
    seconds, nanoseconds = divmod(node.mtime_ns, 1_000_000_000)
    return item(
        pxar.ENTRY, struct.pack("<QQIIqII", node.mode, 0, node.uid, node.gid, seconds, nanoseconds, 0)
    )


def _ending(node: Node, references: Mapping[Node, int]) -> bytes:
    kind = stat_bits.S_IFMT(node.mode)
    if kind == stat_bits.S_IFREG:
        size = node.size if node.claimed_size is None else node.claimed_size
        if node in references:
            where = references[node] if node.reference is None else node.reference
            return item(pxar.PAYLOAD_REF, struct.pack("<QQ", where, size))
        return HEADER.pack(pxar.PAYLOAD, HEADER_SIZE + size) + node.data + bytes(node.zeros)
    if kind == stat_bits.S_IFLNK:
        return item(pxar.SYMLINK, node.target + b"\0")
    if kind in (stat_bits.S_IFBLK, stat_bits.S_IFCHR):
        return item(pxar.DEVICE, struct.pack("<QQ", *node.device))
    return b""


def _attributes(node: Node) -> bytes:
    out = b""
    for name, value in node.xattrs.items():
        if name not in (b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default"):
            out += item(pxar.XATTR, name + b"\0" + value)
    access = _acl(node.xattrs.get(b"system.posix_acl_access", b""))
    for number, permissions in access.get(2, []):
        out += item(pxar.ACL_USER, struct.pack("<QQ", number, permissions))
    for number, permissions in access.get(8, []):
        out += item(pxar.ACL_GROUP, struct.pack("<QQ", number, permissions))
    if 16 in access:  # then the mode has the mask for the group's permissions
        out += item(pxar.ACL_GROUP_OBJ, struct.pack("<Q", access[4][0][1]))
    default = _acl(node.xattrs.get(b"system.posix_acl_default", b""))
    if default:
        fields = [default[tag][0][1] if tag in default else (1 << 64) - 1 for tag in (1, 4, 32, 16)]
        out += item(pxar.ACL_DEFAULT, struct.pack("<QQQQ", *fields))
    for number, permissions in default.get(2, []):
        out += item(pxar.ACL_DEFAULT_USER, struct.pack("<QQ", number, permissions))
    for number, permissions in default.get(8, []):
        out += item(pxar.ACL_DEFAULT_GROUP, struct.pack("<QQ", number, permissions))
    if b"security.capability" in node.xattrs:
        out += item(pxar.FCAPS, node.xattrs[b"security.capability"])
    return out


def _acl(raw: bytes) -> dict[int, list[tuple[int, int]]]:
    """The entries of an ACL in the kernel's form: ids and permissions by tag."""
    found: dict[int, list[tuple[int, int]]] = {}
    for tag, permissions, number in struct.iter_unpack("<HHI", raw[4:]):
        found.setdefault(tag, []).append((number, permissions))
    return found


def _tree(rows: list[Row]) -> list[Row]:
    """`rows`, sorted by hash, as the binary search tree that lies in an array (proxmox/pxar,
    src/binary_tree_array.rs)."""
    out = list(rows)
    stack = [(len(rows), 0, max(len(rows), 1).bit_length() - 1, 0)]
    while stack:
        count, offset, power, place = stack.pop()
        if not count:
            continue
        half = 1 << power
        full = half + (half >> 1) - 1
        middle = half - 1 if count > full else half - 1 - (full - count)
        out[place] = rows[offset + middle]
        if middle > 0:
            stack.append((middle, offset, power - 1, 2 * place + 1))
        if middle + 1 < count:
            stack.append((count - middle - 1, offset + middle + 1, power - 1, 2 * place + 2))
    return out


# --- catalogs

_CATALOG_TYPES = {
    stat_bits.S_IFREG: catalogs.FILE,
    stat_bits.S_IFLNK: catalogs.SYMLINK,
    stat_bits.S_IFBLK: catalogs.BLOCK,
    stat_bits.S_IFCHR: catalogs.CHARACTER,
    stat_bits.S_IFIFO: catalogs.FIFO,
    stat_bits.S_IFSOCK: catalogs.SOCKET,
}


def write_catalog(archives: Mapping[bytes, Node]) -> bytes:
    """The catalog of `archives`, by their stored names (`root.pxar.didx`)."""
    out = bytearray(catalogs.MAGIC)
    roots = {name: _write_tables(out, root) for name, root in archives.items()}
    start = len(out)
    table = [bytes([catalogs.DIRECTORY]) + _string(n) + _number(start - at) for n, at in roots.items()]
    _write_table(out, table)
    return bytes(out) + struct.pack("<Q", start)


def _write_tables(out: bytearray, root: Node) -> int:
    """Appends the tables of `root` and all below, children first; returns where that of `root` is."""
    places: dict[Node, int] = {}
    stack = [(root, False)]
    while stack:
        node, is_ready = stack.pop()
        if not is_ready:
            stack.append((node, True))
            stack += [(child, False) for child in reversed(node.children) if child.is_directory]
            continue
        places[node] = len(out)
        _write_table(out, [_catalog_entry(child, len(out), places) for child in node.children])
    return places[root]


def _write_table(out: bytearray, entries: list[bytes]) -> None:
    table = _number(len(entries)) + b"".join(entries)
    out += _number(len(table)) + table


def _catalog_entry(node: Node, block: int, places: Mapping[Node, int]) -> bytes:
    if node.link_to is not None:
        return bytes([catalogs.HARDLINK]) + _string(node.name)
    if node.is_directory:
        return bytes([catalogs.DIRECTORY]) + _string(node.name) + _number(block - places[node])
    kind = _CATALOG_TYPES[stat_bits.S_IFMT(node.mode)]
    entry = bytes([kind]) + _string(node.name)
    if kind == catalogs.FILE:
        entry += _number(node.size) + _signed(node.mtime_ns // 1_000_000_000)
    return entry


def _string(text: bytes) -> bytes:
    return _number(len(text)) + text


def _number(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def _signed(value: int) -> bytes:
    if value >= 0:
        return _number(value)
    out = bytearray()
    value = -value
    while value:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + b"\0"
