"""What the parser process and its parent say to each other, over one socket.

The parent asks one thing at a time. Until it has the answer, the process asks it for bytes of the disks. A
message is a kind of one byte, a length of four, and that many bytes: JSON, or bytes of a disk or file. Text
that is bytes is Latin-1 in JSON. What the process says is checked here like what is on a disk: it is the one
that the disk's content may have taken over.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import DECODED, FILE_TYPES, Entry, Piece

ASK = ord("Q")  # parent: a method and its arguments
DATA, REFUSED = ord("D"), ord("E")  # parent: bytes that were read; why they could not be
READ, AHEAD = ord("R"), ord("P")  # process: wants bytes; will want ranges
ANSWER, BYTES, DAMAGED, FAILED = ord("A"), ord("B"), ord("F"), ord("X")  # process: results

HEAD = struct.Struct("<BI")
RANGE = struct.Struct("<HQI")  # a disk, an offset, a size
MOST = 128 << 20
"""Bytes of a message: a listing of a million names."""

MOST_RANGES = 10_000
"""Ranges of one AHEAD message."""

GUEST = "guest"
"""The name and kind of the machine's own tree."""

_BIG = 1 << 63
_SECOND = 1_000_000_000
_TARGET = Entry._fields.index("target")


class WireError(Exception):
    """What came is not what the other side would send, or it is gone."""


def send(sock: socket.socket, kind: int, data: bytes | bytearray | memoryview) -> None:
    """Raises OSError."""
    if len(data) < 1 << 16:
        sock.sendall(HEAD.pack(kind, len(data)) + bytes(data))
    else:
        sock.sendall(HEAD.pack(kind, len(data)))
        sock.sendall(data)


def receive(sock: socket.socket) -> tuple[int, bytes]:
    """The next message. Raises WireError, EOFError where the other side has ended before it, OSError."""
    head = _exactly(sock, HEAD.size)
    kind, length = HEAD.unpack(head)
    if length > MOST:
        raise WireError(f"a message of {length} bytes")
    try:
        return kind, _exactly(sock, length)
    except EOFError:
        raise WireError("a message ends early") from None


def _exactly(sock: socket.socket, size: int) -> bytes:
    parts: list[bytes] = []
    missing = size
    while missing:
        part = sock.recv(min(missing, 1 << 20))
        if not part:
            if missing < size:
                raise WireError("a message ends early")
            raise EOFError
        parts.append(part)
        missing -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def pack(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def unpack(data: bytes) -> Any:
    """Raises WireError."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise WireError("a message is not JSON") from None


def text(data: bytes) -> str:
    return data.decode("latin-1")


def raw(value: object) -> bytes:
    """The bytes that `text` made a string of. Raises WireError."""
    if not isinstance(value, str):
        raise WireError("a name is not a string")
    try:
        return value.encode("latin-1")
    except UnicodeEncodeError:
        raise WireError("a name is not bytes") from None


def entry_row(entry: Entry) -> list[object]:
    """An entry as JSON has it: its fields in order."""
    row: list[object] = list(entry)
    row[0] = entry.name.decode("latin-1")
    if entry.target is not None:
        row[_TARGET] = entry.target.decode("latin-1")
    return row


def entry_of(row: Any, *, root: bool = False) -> Entry:
    """The entry of a row that the process sent. `root`: its name has to be empty. Raises WireError."""
    try:
        name, mode, uid, gid, mtime, size, inode, rdev, target, xattrs, exact, position, end, hint, links = (
            row
        )
        numbers = (mode, uid, gid, mtime, size, inode, rdev, position, end, hint, links)
    except (TypeError, ValueError):
        raise WireError("an entry has other fields") from None
    for number in numbers:
        if type(number) is not int:
            raise WireError("a field of an entry is not a number")
    name = raw(name)
    if (root and name) or (not root and (not name or b"/" in name or b"\0" in name or name in {b".", b".."})):
        raise WireError("a name that no file can have")
    if (
        mode & 0o170000 not in FILE_TYPES
        or not 0 <= mode <= 0o177777
        or not (0 <= uid < 1 << 32 and 0 <= gid < 1 << 32)
        or not -_BIG <= mtime // _SECOND < _BIG
        or not 0 <= size < _BIG
        or not 0 <= rdev < _BIG
        or not 0 <= links < _BIG
        or not 0 <= inode < 1 << 200
        or max(abs(position), abs(end), abs(hint)) >= 1 << 200
        or type(xattrs) is not bool
        or type(exact) is not bool
    ):
        raise WireError("a field of an entry is out of range")
    if target is not None:
        target = raw(target)
        if b"\0" in target or len(target) > 1 << 16:
            raise WireError("a link's target that no link can have")
    return Entry(
        name, mode, uid, gid, mtime, size, inode, rdev, target, xattrs, exact, position, end, hint, links
    )


def trusted_entry(row: list[Any]) -> Entry:
    """The entry of a row that the parent sent."""
    row[0] = row[0].encode("latin-1")
    if row[_TARGET] is not None:
        row[_TARGET] = row[_TARGET].encode("latin-1")
    return Entry._make(row)


def pieces_of(rows: Any, size: int, disks: Sequence[int]) -> list[Piece]:
    """The pieces of a file of `size` bytes, on disks of the sizes `disks`. Raises WireError, DamageError."""
    found = _pieces(rows, size, disks)
    total = 0
    for piece in found:
        total += piece.length
    if total != size:
        raise DamageError(f"the map of a file of {size} bytes has {total}")
    return found


def ranges_of(rows: Any, disks: Sequence[int]) -> list[Piece]:
    """Ranges of disks of the sizes `disks`. Raises WireError."""
    found = _pieces(rows, 0, disks)
    if any(piece.stream is None for piece in found):
        raise WireError("a range lies on no disk")
    return found


def _pieces(rows: Any, size: int, disks: Sequence[int]) -> list[Piece]:
    """`size`: of the file, which pieces of it that are decoded lie in."""
    found: list[Piece] = []
    if not isinstance(rows, list):
        raise WireError("pieces are not a list")
    for row in rows:
        try:
            stream, offset, length = row
        except (TypeError, ValueError):
            raise WireError("a piece has other fields") from None
        if type(offset) is not int or type(length) is not int or offset < 0 or length <= 0:
            raise WireError("a piece is not a range")
        if stream is None or stream == DECODED:
            end = size
        elif type(stream) is int and 0 <= stream < len(disks):
            end = disks[stream]
        else:
            raise WireError("a piece lies on no disk")
        if stream is not None and offset + length > end:
            raise WireError("a piece lies beyond its disk")
        found.append(Piece(stream, offset, length))
    return found
