"""Real nbdkit with the plugin, gone when a test ends, whatever happens in it; and a strict client."""

from __future__ import annotations

import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.mounts import processes_with
from tests.support.needs import need
from tests.support.program import environment, run
from tests.support.waiting import LIMIT, wait_until

PLUGIN = str(Path(__file__).parents[2] / "nbd_bridge.py")

LIFETIME = 60.0
"""Seconds after which a nbdkit is killed, so that no test hangs for ever."""

AT_ONCE = 10.0
"""Seconds; what has to wait for a server takes the 120 of `retry_timeout=`."""


class Nbdkit:
    """A nbdkit that serves."""

    def __init__(self, process: subprocess.Popen[bytes], socket_path: Path, log: Path) -> None:
        self.process = process
        self.pid = process.pid
        self.socket = socket_path
        self._log = log
        self._log_is_looked_at = False

    def uri(self, export: str = "") -> str:
        return uri(self.socket, export)

    def connect(self, export: str = "", *, structured: bool = True, meta: bool = True) -> Client:
        """A strict client, for one `with`."""
        return Client(connected(self.socket), export, structured=structured, meta=meta)

    def read(self, export: str = "") -> bytes:
        """All of an export, in requests of 1 MiB."""
        with self.connect(export) as client:
            return client.read_all()

    def log_lines(self) -> list[str]:
        """What was logged so far. A test that never asks says that nothing is logged."""
        self._log_is_looked_at = True
        return self._log.read_text().splitlines()

    def status(self, name: str) -> int:
        """A number of /proc/PID/status: sizes are in KiB."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(text.partition(f"\n{name}:")[2].split()[0])

    def is_running(self) -> bool:
        return self.process.poll() is None

    def stop(self, *, limit: float = LIMIT) -> None:
        """Ends it by SIGTERM, and checks how it ends."""
        self.process.terminate()
        self.check_end(limit=limit)

    def check_end(self, *, limit: float = LIMIT) -> None:
        """Waits for its end: in order, and in silence where a test never looked at the log."""
        assert self.process.wait(limit) == 0, self._log.read_text()
        text = self._log.read_text()
        assert self._log_is_looked_at or not text, f"logged unexpectedly: {text}"
        assert "Traceback" not in text, text


def command(
    source: Path | None, *words: str, options: Sequence[str | Path] = (), plugin: str = PLUGIN
) -> list[str]:
    """`nbdkit OPTIONS python nbd_bridge.py WORDS`. `source`: a datastore's directory, if it is one."""
    need("nbdkit")
    first = [] if source is None else [f"datastore_dir={source}"]
    return ["nbdkit", *map(str, options), "python", plugin, *first, *words]


@contextmanager
def nbdkit(
    source: Path | dict[str, str],
    *words: str,
    options: Sequence[str | Path] = (),
    lifetime: float = LIFETIME,
    pass_fds: Sequence[int] = (),
    plugin: str = PLUGIN,
) -> Iterator[Nbdkit]:
    """Serves a datastore's images, and ends when the test has not done so.

    `source`: its directory, or the environment that tells which server has it. `words`: parameters.
    """
    told = environment() if isinstance(source, Path) else source
    with tempfile.TemporaryDirectory(prefix="nbd") as name:  # the path of a socket may have 107 bytes
        directory = Path(name)
        place, pidfile, log = directory / "socket", directory / "pid", directory / "log"
        basic: list[str | Path] = ["-f", "-U", place, "--pidfile", pidfile]
        line = command(
            source if isinstance(source, Path) else None, *words, options=[*basic, *options], plugin=plugin
        )
        with log.open("wb") as file:
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=told, pass_fds=pass_fds
            )
        watchdog = threading.Timer(lifetime, process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            wait_until(lambda: process.poll() is not None or has_content(pidfile), "nbdkit serves")
            assert process.poll() is None, f"nbdkit did not start: {log.read_text()}"
            server = Nbdkit(process, place, log)
            yield server
            if server.is_running():
                server.stop()
            else:
                server.check_end()
        finally:
            watchdog.cancel()
            process.kill()
            process.wait()


def has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def refused(source: Path | dict[str, str], *words: str, options: Sequence[str | Path] = ()) -> str:
    """The reason why nbdkit with these parameters ends before it serves: one line, and nothing is left."""
    told = environment() if isinstance(source, Path) else source
    with tempfile.TemporaryDirectory(prefix="nbd") as name:
        place = Path(name, "socket")
        basic: list[str | Path] = ["-U", place, "--pidfile", place.with_name("pid")]
        line = command(source if isinstance(source, Path) else None, *words, options=[*basic, *options])
        done = run(line, env=told)
        assert done.returncode == 1, f"status {done.returncode}: {done.stderr}"
        assert not list(Path(name).iterdir()), "it was left behind"
        assert not serving_at(place), "a process was left behind"
    lines = done.stderr.splitlines()
    assert len(lines) == 1, f"not one line: {done.stderr}"
    start = f"nbdkit: error: {PLUGIN}: "
    assert lines[0].startswith(start), lines[0]
    return lines[0].removeprefix(start).partition(": error: ")[2]


def serving_at(place: Path) -> list[int]:
    """The processes with the socket `place` in their command lines."""
    return processes_with(place)


def uri(place: Path, export: str = "") -> str:
    """As libnbd and qemu take it."""
    return f"nbd+unix:///{export.replace(':', '%3A')}?socket={place}"


def connected(place: Path) -> socket.socket:
    """A connection to the socket `place`, once somebody listens there."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(LIFETIME)
    connection.connect(str(place))
    return connection


# --- the client: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md


EXPORT_NAME, ABORT, LIST, INFO, GO, STRUCTURED, SET_META = 1, 2, 3, 6, 7, 8, 10
READ, WRITE, DISCONNECT, TRIM, CACHE, BLOCK_STATUS = 0, 1, 2, 4, 5, 7
DONT_FRAGMENT, REQ_ONE = 1 << 2, 1 << 3

ACK, SERVER, INFORMATION, META_CONTEXT = 1, 2, 3, 4
INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = 0, 1, 2, 3

READ_ONLY, ROTATIONAL, CAN_CACHE, MULTI_CONN, CAN_DF = 1 << 1, 1 << 4, 1 << 10, 1 << 8, 1 << 7
HOLE_AND_ZERO = 3

_SIMPLE, _CHUNKED = 0x67446698, 0x668E33EF


class NbdError(Exception):
    """What a server answered to a request. `number`: an errno, or the number of an option's error."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"{number}: {message}")
        self.number = number
        self.message = message


@dataclass
class _Request:
    """One that is under way, and what has come of it."""

    command: int
    offset: int
    size: int
    flags: int
    data: bytearray = field(default_factory=bytearray)
    covered: list[tuple[int, int]] = field(default_factory=list)
    extents: list[tuple[int, int]] | None = None
    error: NbdError | None = None
    done: bool = False


class Client:
    """One connection to one export, which believes a server nothing: every reply is checked against the
    protocol, and a read's chunks have to cover exactly what was asked for.

    Closing the context disconnects in order, unless `abandon` or `disconnect` was called.
    """

    def __init__(
        self, connection: socket.socket, export: str = "", *, structured: bool = True, meta: bool = True
    ) -> None:
        self._socket = connection
        self._requests: dict[int, _Request] = {}
        self._cookie = 0x5EED_0000_0000
        self._structured = structured
        self.name: str | None = None
        self.description: str | None = None
        self.block_sizes: tuple[int, ...] | None = None
        self._context: int | None = None
        self.size = -1
        self.flags = 0
        try:
            greet(connection)
            if structured:
                assert list(_option(connection, STRUCTURED, b"")) == []
            if structured and meta:
                self._context = _set_meta(connection, export)
            self._inform(_option(connection, GO, _informing(export)))
        except BaseException:
            connection.close()
            raise

    def _inform(self, replies: Iterator[tuple[int, bytes]]) -> None:
        seen = set()
        for kind, data in replies:
            assert kind == INFORMATION
            (what,) = struct.unpack(">H", data[:2])
            assert what not in seen, f"information {what} comes twice"
            seen.add(what)
            if what == INFO_EXPORT:
                assert len(data) == 12
                self.size, self.flags = struct.unpack(">QH", data[2:])
            elif what == INFO_NAME:
                self.name = data[2:].decode()
            elif what == INFO_DESCRIPTION:
                self.description = data[2:].decode()
            elif what == INFO_BLOCK_SIZE:
                self.block_sizes = struct.unpack(">III", data[2:])
        assert INFO_EXPORT in seen
        assert self.flags & 1, "flags have to be there"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._socket.fileno() >= 0:
            self.disconnect()
        self._socket.close()

    # --- requests

    def start(self, kind: int, offset: int, size: int, flags: int = 0, data: bytes = b"") -> int:
        """Sends a request, and does not wait; returns what `finish` takes."""
        self._cookie += 1
        self._requests[self._cookie] = _Request(
            kind, offset, size, flags, bytearray(size if kind == READ else 0)
        )
        header = struct.pack(">IHHQQI", 0x25609513, flags, kind, self._cookie, offset, size)
        self._socket.sendall(header + data)
        return self._cookie

    def finish(self, cookie: int) -> _Request:
        """Receives until this request is answered, whatever else is; raises NbdError if it failed."""
        while not self._requests[cookie].done:
            self._receive()
        request = self._requests.pop(cookie)
        if request.error is not None:
            raise request.error
        return request

    def read(self, offset: int, size: int, flags: int = 0) -> bytes:
        return bytes(self.finish(self.start(READ, offset, size, flags)).data)

    def read_all(self, step: int = 1 << 20) -> bytes:
        return b"".join(self.read(at, min(step, self.size - at)) for at in range(0, self.size, step))

    def extents(self, offset: int, size: int, flags: int = 0) -> list[tuple[int, int]]:
        """Lengths and flags, from `offset` on, as one answer has them."""
        found = self.finish(self.start(BLOCK_STATUS, offset, size, flags)).extents
        assert found
        return found

    def cache(self, offset: int, size: int) -> None:
        self.finish(self.start(CACHE, offset, size))

    def write(self, offset: int, data: bytes) -> None:
        self.finish(self.start(WRITE, offset, len(data), data=data))

    def disconnect(self) -> None:
        """Says goodbye, and waits until the server has closed; nothing may come after all was answered."""
        self._socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, DISCONNECT, 0, 0, 0))
        # Some versions of nbdkit wait until the client has closed its side.
        self._socket.shutdown(socket.SHUT_WR)
        rest = self._socket.recv(1)
        assert rest == b"", "there is more than was asked for"
        self._socket.close()

    def abandon(self) -> None:
        """Goes without a word."""
        self._socket.close()

    # --- replies

    def _receive(self) -> None:
        (magic,) = struct.unpack(">I", receive(self._socket, 4))
        if magic == _SIMPLE:
            number, cookie = struct.unpack(">IQ", receive(self._socket, 12))
            request = self._pending(cookie)
            assert not (self._structured and request.command == READ), "a simple reply to a read"
            if number:
                request.error = NbdError(number, "")
            elif request.command == READ:
                self._fill(request, 0, request.size)
            self._complete(request)
            return
        assert magic == _CHUNKED, f"{magic:#x} is no reply"
        assert self._structured, "a structured reply, which was not agreed on"
        flags, kind, cookie, length = struct.unpack(">HHQI", receive(self._socket, 16))
        assert flags in (0, 1)
        self._take_chunk(self._pending(cookie), kind, length, done=flags == 1)

    def _pending(self, cookie: int) -> _Request:
        request = self._requests.get(cookie)
        assert request is not None, f"a reply to {cookie:#x}, which was never asked"
        assert not request.done, f"a reply to {cookie:#x}, which is done"
        return request

    def _take_chunk(self, request: _Request, kind: int, length: int, *, done: bool) -> None:
        if kind == 0:  # nothing
            assert done
            assert length == 0
        elif kind in (1, 2):  # data, hole
            assert request.command == READ
            assert length == 12 if kind == 2 else length > 8
            (offset,) = struct.unpack(">Q", receive(self._socket, 8))
            if kind == 2:
                (size,) = struct.unpack(">I", receive(self._socket, 4))
                self._cover(request, offset - request.offset, size)
            else:
                self._fill(request, offset - request.offset, length - 8)
            assert not request.flags & DONT_FRAGMENT or done
        elif kind == 5:  # block status
            self._take_extents(request, receive(self._socket, length))
        else:
            assert kind in (0x8001, 0x8002), f"a chunk of the unknown kind {kind}"
            self._take_error(request, receive(self._socket, length), at_offset=kind == 0x8002)
        if done:
            self._complete(request)

    def _fill(self, request: _Request, start: int, size: int) -> None:
        self._cover(request, start, size)
        view = memoryview(request.data)[start : start + size]
        while view:
            got = self._socket.recv_into(view)
            assert got, "the connection ends within an answer"
            view = view[got:]

    def _cover(self, request: _Request, start: int, size: int) -> None:
        end = start + size
        assert size > 0
        assert 0 <= start < end <= request.size, f"{start} … {end} is outside of the request"
        assert all(end <= a or b <= start for a, b in request.covered), "comes twice"
        request.covered.append((start, end))

    def _take_extents(self, request: _Request, data: bytes) -> None:
        assert request.command == BLOCK_STATUS
        assert request.extents is None, "block status comes twice"
        assert len(data) >= 12
        assert len(data) % 8 == 4
        (context,) = struct.unpack(">I", data[:4])
        assert context == self._context, "a context that was not asked for"
        request.extents = [(length, flags) for length, flags in struct.iter_unpack(">II", data[4:])]
        assert all(length > 0 for length, _flags in request.extents)
        within = sum(length for length, _flags in request.extents[:-1])
        assert within < request.size, "extents go on behind the request"
        assert request.offset + within + request.extents[-1][0] <= self.size
        if request.flags & REQ_ONE:
            ((length, _flags),) = request.extents
            assert length <= request.size

    def _take_error(self, request: _Request, data: bytes, *, at_offset: bool) -> None:
        number, length = struct.unpack(">IH", data[:6])
        assert number
        assert len(data) == 6 + length + 8 * at_offset
        if at_offset:
            (offset,) = struct.unpack(">Q", data[6 + length :])
            assert request.offset <= offset < request.offset + request.size
        request.error = NbdError(number, data[6 : 6 + length].decode())

    def _complete(self, request: _Request) -> None:
        request.done = True
        if request.error is None and request.command == READ:
            assert sum(b - a for a, b in request.covered) == request.size, "less than was asked for"
        if request.error is None and request.command == BLOCK_STATUS:
            assert request.extents is not None


def exports_of(place: Path) -> list[tuple[str, str]]:
    """Names and descriptions, in the order in which the server lists them."""
    with connected(place) as connection:
        greet(connection)
        found = []
        for kind, data in _option(connection, LIST, b""):
            assert kind == SERVER
            (length,) = struct.unpack(">I", data[:4])
            found.append((data[4 : 4 + length].decode(), data[4 + length :].decode()))
        assert list(_option(connection, ABORT, b"")) == []
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
        return found


def greet(connection: socket.socket) -> None:
    """The begin of fixed newstyle."""
    assert receive(connection, 16) == b"NBDMAGICIHAVEOPT"
    (flags,) = struct.unpack(">H", receive(connection, 2))
    assert flags == 3, "fixed newstyle, no zeroes"
    connection.sendall(struct.pack(">I", flags))


def receive(connection: socket.socket, size: int) -> bytes:
    """Exactly so many bytes."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = connection.recv_into(view)
        assert got, "the connection ends within an answer"
        view = view[got:]
    return bytes(data)


def _option(connection: socket.socket, option: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    """The replies to an option but the last. Raises NbdError if that is an error."""
    connection.sendall(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)
    while True:
        magic, about, kind, length = struct.unpack(">QIII", receive(connection, 20))
        assert magic == 0x3E889045565A9
        assert about == option
        found = receive(connection, length)
        if kind & 1 << 31:
            raise NbdError(kind & ~(1 << 31), found.decode())
        if kind == ACK:
            assert not found
            return
        yield kind, found


def _set_meta(connection: socket.socket, export: str) -> int:
    query = b"base:allocation"
    asked = _name(export) + struct.pack(">II", 1, len(query)) + query
    ((kind, data),) = _option(connection, SET_META, asked)
    assert kind == META_CONTEXT
    assert data[4:] == query
    (number,) = struct.unpack(">I", data[:4])
    assert isinstance(number, int)
    return number


def _informing(export: str) -> bytes:
    wanted = (INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE)
    return _name(export) + struct.pack(">4H", len(wanted), *wanted)


def _name(export: str) -> bytes:
    name = export.encode()
    return struct.pack(">I", len(name)) + name
