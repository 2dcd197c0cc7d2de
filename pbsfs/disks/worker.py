"""The parser process: reads the file systems on the disks of one snapshot, and has nothing but their bytes.

Started by `host.Parser` as `python -I -m pbsfs.disks.worker`, with the socket to its parent as standard input
and the names and sizes of the disks as the first message. It ends when its parent is gone, and when nothing
was asked for a while. One thread.
"""

from __future__ import annotations

import codecs
import functools
import gc
import select
import socket
import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from pbsfs.base.errors import DamageError, PbsfsError, UnsupportedError
from pbsfs.contents.base import Contents
from pbsfs.disks import sandbox, wire
from pbsfs.disks.filesystem import FileSystem
from pbsfs.disks.guest import DOS, UNIX, UNREADABLE, Guest, Part
from pbsfs.disks.probe import Found, probe
from pbsfs.disks.volume import Disk

IDLE = 60.0
"""Seconds without a request after which the process ends."""

BLOCK = 256 << 10
"""Bytes that are asked for at once: a part of a chunk, many blocks of a file system."""

KEPT = 48
"""Blocks that are kept."""

LARGE = 1 << 20
"""Bytes from which a read is passed on as it is."""

SMALL_MAP = 16
"""Pieces of a map that is sent before it is wanted."""

MOST_DAMAGE = 1000
"""Reasons that a disk remembers, to tell volumes that damage hides from those that are not supported."""

OBJECTS = 50_000
"""New objects after which the interpreter looks for garbage: a listing makes thousands, which are none."""

_CODECS = ("ascii", "utf-8", "utf-16-le", "utf-16-be", "latin-1", "cp437")


class _RefusedError(BaseException):
    """The parent can't give bytes, for a reason that says nothing about the disk."""


class RemoteDisk:
    """A disk that the parent reads: a `contents.base.Stream`."""

    def __init__(self, sock: socket.socket, number: int, size: int) -> None:
        self._sock = sock
        self._number = number
        self.size = size
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self.damage: list[str] = []  # that was met, up to MOST_DAMAGE

    def pread(self, offset: int, size: int) -> bytes:
        size = max(0, min(size, self.size - offset))
        if size >= LARGE:
            return self._ask(offset, size)
        parts = []
        end = offset + size
        while offset < end:
            number, start = divmod(offset, BLOCK)
            try:
                part = self._block(number)[start : start + end - offset]
            except DamageError:  # of something else in the block, where chunks are smaller
                part = self._ask(offset, min(BLOCK - start, end - offset))
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _block(self, number: int) -> bytes:
        block = self._blocks.get(number)
        if block is not None:
            self._blocks.move_to_end(number)
            return block
        start = number * BLOCK
        block = self._ask(start, min(BLOCK, self.size - start))
        if len(self._blocks) >= KEPT:
            self._blocks.popitem(last=False)
        self._blocks[number] = block
        return block

    def _ask(self, offset: int, size: int) -> bytes:
        wire.send(self._sock, wire.READ, wire.RANGE.pack(self._number, offset, size))
        kind, data = wire.receive(self._sock)
        if kind == wire.DATA:
            return data
        damage = wire.unpack(data)
        if damage is None:
            raise _RefusedError
        if len(self.damage) < MOST_DAMAGE:
            self.damage.append(damage)
        raise DamageError(damage)

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        wanted: list[int] = []
        for offset, size in ranges:
            for number in range(offset // BLOCK, min((offset + size - 1) // BLOCK, self.size // BLOCK) + 1):
                if number not in self._blocks and (not wanted or wanted[-1] != number):
                    wanted.append(number)
                if len(wanted) >= wire.MOST_RANGES:
                    break
        if len(wanted) > 1:
            rows = (wire.RANGE.pack(self._number, number * BLOCK, BLOCK) for number in wanted)
            wire.send(self._sock, wire.AHEAD, b"".join(rows))


def _fail(problem: str) -> FileSystem:
    raise DamageError(problem)


class Worker:
    """Answers requests about the volumes of a snapshot."""

    def __init__(self, sock: socket.socket, disks: Sequence[tuple[str, int]]) -> None:
        self._sock = sock
        self._disks = [(name, RemoteDisk(sock, number, size)) for number, (name, size) in enumerate(disks)]
        self._found: list[Found] | None = None
        self._volumes = [Disk(disk, number) for number, (_name, disk) in enumerate(self._disks)]
        self._open: dict[int, Contents] = {}

    def volumes(self) -> list[Found]:
        if self._found is None:
            names = [name for name, _disk in self._disks]
            self._found = probe(list(zip(names, self._volumes, strict=True)))
        return self._found

    def described(self) -> list[list[object]]:
        """What the parent is to know of the volumes; the last is the machine's own tree, if it has one."""
        found = self.volumes()
        rows: list[list[object]] = [
            [wire.text(f.name.encode()), f.size, f.kind, f.problem, f.part_uuid] for f in found
        ]
        readable = [f for f in found if f.problem is None]
        if any(f.kind in UNIX | DOS for f in readable) and all(f.name != wire.GUEST for f in found):
            rows.append([wire.GUEST, 0, wire.GUEST, None, None])
        return rows

    def contents(self, number: int) -> Contents:
        if number not in self._open:
            found = self.volumes()
            if number < len(found):
                self._open[number] = found[number].open()
            else:
                parts = [
                    Part(
                        f.name,
                        f.kind if f.problem is None else UNREADABLE,
                        f.part_uuid,
                        functools.partial(self._system, n)
                        if f.problem is None
                        else functools.partial(_fail, f.problem),
                        f.part_label,
                        f.mapper_uuid,
                    )
                    for n, f in enumerate(found)
                    if f.problem is None or self._is_damage(f.problem)
                ]
                self._open[number] = Guest(parts, self._volumes)
        return self._open[number]

    def _is_damage(self, problem: str) -> bool:
        return any(reason in problem for _name, disk in self._disks for reason in disk.damage)

    def _system(self, number: int) -> FileSystem:
        system = self.contents(number)
        if not isinstance(system, FileSystem):
            raise DamageError("not a file system")
        return system

    def answer(self, method: str, *arguments: Any) -> object:
        """The result of a request: for JSON, or bytes."""
        if method == "volumes":
            return self.described()
        system = self.contents(arguments[0])
        if method == "open":
            return [wire.entry_row(system.root), system.facts()]
        if method == "data":
            return self._maps(system, arguments[1], unconfirmed=arguments[2])
        entry = wire.trusted_entry(arguments[1])
        if method == "children":
            found = system.children(entry, names_only=arguments[2])
            return [list(map(wire.entry_row, found.entries)), found.damage and str(found.damage)]
        if method == "child":
            child = system.child(entry, arguments[2].encode("latin-1"))
            return child and wire.entry_row(child)
        if method == "complete":
            done = system.complete(entry, list(map(wire.trusted_entry, arguments[2])))
            return [str(one) if isinstance(one, DamageError) else one and wire.entry_row(one) for one in done]
        if method == "xattrs":
            return [[wire.text(name), wire.text(value)] for name, value in system.xattrs(entry).items()]
        if method == "decoded_from":
            stored = system.decoded_from(entry)
            return None if stored is None else [[p.stream, p.offset, p.length] for p in stored]
        if method == "read":
            return system.read(entry, arguments[2], arguments[3])
        raise ValueError(method)

    @staticmethod
    def _maps(system: Contents, rows: list[list[Any]], *, unconfirmed: bool) -> list[object]:
        """The maps of files, the first of which is wanted now; None for others that are large or cannot be
        read: they are asked for again when they are wanted."""
        found: list[object] = []
        for number, row in enumerate(rows):
            try:
                pieces = system.data(wire.trusted_entry(row), unconfirmed=unconfirmed)
            except DamageError:
                if not number:
                    raise
                found.append(None)
                continue
            small = not number or len(pieces) <= SMALL_MAP
            found.append([piece for piece in pieces if piece.length] if small else None)
        return found

    def run(self) -> None:
        """Answers until there is nobody to ask."""
        ready = select.poll()
        ready.register(self._sock, select.POLLIN)
        while ready.poll(IDLE * 1000):
            try:
                _kind, data = wire.receive(self._sock)
            except EOFError:
                return
            sandbox.start_clock()
            try:
                answer = self.answer(*wire.unpack(data))
                if isinstance(answer, bytes):
                    wire.send(self._sock, wire.BYTES, answer)
                else:
                    wire.send(self._sock, wire.ANSWER, wire.pack(answer))
            except _RefusedError:
                wire.send(self._sock, wire.FAILED, wire.pack(None))
            except UnsupportedError as error:
                wire.send(self._sock, wire.DAMAGED, wire.pack([str(error), True]))
            except PbsfsError as error:
                wire.send(self._sock, wire.DAMAGED, wire.pack([str(error), False]))
            except OSError:
                return
            except Exception as error:  # a fault of a reader must not end what other volumes need
                place = _place(error)
                wire.send(self._sock, wire.FAILED, wire.pack(f"{type(error).__name__} {place}"))
            sandbox.stop_clock()


def _place(error: BaseException) -> str:
    """Where in the program an error came from, without reading its source."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f"in {trace.tb_frame.f_code.co_name}, line {trace.tb_lineno}"


def main() -> int:
    sock = socket.socket(fileno=0)
    for name in _CODECS:  # Python loads them when they are first used, which needs files
        codecs.lookup(name)
        b"".decode(name)
    gc.freeze()
    gc.set_threshold(OBJECTS)
    _kind, data = wire.receive(sock)
    sandbox.enter()
    disks = wire.unpack(data)
    Worker(sock, [(name, size) for name, size in disks]).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
