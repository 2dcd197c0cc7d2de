"""A client as bare as can be, of pbsfs's own parts: a blocking connection, one thread, no store, no cache.

What a chunk costs at least, and the model of a reader that has one chunk at a time under way.
"""

from __future__ import annotations

import socket
import time
from types import TracebackType
from typing import Self
from urllib.parse import urlencode

from bench.serving import Access
from pbsfs.base.names import Snapshot
from pbsfs.chunks.decoder import decode_chunk
from pbsfs.formats.blob import Stored
from pbsfs.formats.index import FixedIndex
from pbsfs.formats.keys import Key
from pbsfs.sources.http.tls import Connection, Trust, connect, parse_fingerprint
from pbsfs.sources.server.opening import snapshot_query
from pbsfs.sources.server.protocol import ReaderProtocol, Response
from pbsfs.sources.server.repository import Repository
from pbsfs.sources.server.upgrade import PROTOCOL

LIMIT = 1 << 30


def connected(access: Access) -> Connection:
    """A TLS connection, as pbsfs makes it."""
    repository = Repository.parse(access.repository)
    return connect(repository, Trust(pinned=parse_fingerprint(access.fingerprint)))


class BareSession:
    """A reader session."""

    def __init__(self, access: Access, snapshot: Snapshot) -> None:
        self._socket = connected(access).socket
        query = urlencode(snapshot_query(access.store, snapshot))
        self._socket.sendall(
            f"GET /api2/json/reader?{query} HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\n"
            f"Upgrade: {PROTOCOL}\r\nAuthorization: {access.authorization}\r\n\r\n".encode()
        )
        head = b""
        while b"\r\n\r\n" not in head:
            received = self._socket.recv(1)
            if not received:
                raise ConnectionError(head.decode(errors="replace"))
            head += received
        if b" 101 " not in head.split(b"\r\n")[0]:
            raise ConnectionError(head.decode(errors="replace"))
        self._protocol = ReaderProtocol()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def ask(self, path: str) -> int:
        """Sends a request; returns the number that its answer will have."""
        number = self._protocol.request(path, LIMIT)
        self._socket.sendall(self._protocol.outgoing())
        return number

    def receive(self) -> list[tuple[int, Response]]:
        """The answers that the next bytes complete."""
        count = self._socket.recv_into(self._protocol.target())
        if not count:
            raise ConnectionError("closed by the server")
        done: list[tuple[int, Response]] = []
        for number, result in self._protocol.received(count):
            if not isinstance(result, Response):
                raise result
            done.append((number, result))
        unsent = self._protocol.outgoing()
        if unsent:
            self._socket.sendall(unsent)
        return done

    def get(self, path: str) -> Stored:
        number = self.ask(path)
        while True:
            for answered, response in self.receive():
                if answered == number:
                    if response.status != 200:
                        raise ConnectionError(bytes(response.body).decode(errors="replace"))
                    return response.body

    def index(self, name: str, key: Key | None = None) -> FixedIndex:
        return FixedIndex(bytes(self.get(f"/download?file-name={name}")), key)

    def chunk(self, digest: bytes) -> Stored:
        """A chunk as it is stored."""
        return self.get(f"/chunk?digest={digest.hex()}")

    def decoded(self, index: FixedIndex, number: int, key: Key | None) -> bytes:
        """Chunk `number`, fetched, verified and decoded."""
        digest = index.digest(number)
        start, end = index.span(number)
        raw = self.chunk(digest)
        return decode_chunk(raw, digest=digest, length=end - start, encrypted=key is not None, key=key)


def firehose(access: Access, size: int) -> None:
    """Receives so many bytes over TLS and drops them."""
    connection = connected(access).socket
    try:
        connection.sendall(f"GET /firehose?{size} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        buffer = memoryview(bytearray(4 << 20))
        done = 0
        while done < size:
            count = connection.recv_into(buffer)
            if not count:
                raise ConnectionError("closed by the server")
            done += count
    finally:
        connection.close()


def log_in(access: Access) -> float:
    """Seconds that a login with a password takes: a connection and one call."""
    started = time.perf_counter()
    connection = connected(access).socket
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    body = urlencode({"username": access.auth_id, "password": access.secret})
    connection.sendall(
        f"POST /api2/json/access/ticket HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        f"Content-Type: application/x-www-form-urlencoded\r\nConnection: close\r\n\r\n{body}".encode()
    )
    head = connection.recv(16)
    took = time.perf_counter() - started
    connection.close()
    if b" 200" not in head:
        raise ConnectionError(head.decode(errors="replace"))
    return took
