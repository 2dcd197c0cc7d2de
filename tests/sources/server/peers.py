"""Peers that are not what they should be: one thread, TLS or not, that says what a test wants."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from pbsfs.sources.server.repository import Repository
from tests.support.server.certificate import Certificate

LIMIT = 20.0
"""Seconds after which a peer gives up; only when something is broken."""

Talk = Callable[[socket.socket], None]


def to_the_end(connection: socket.socket) -> bytes:
    """All that the other side sends until it closes."""
    received = b""
    with contextlib.suppress(OSError):
        while more := connection.recv(1 << 16):
            received += more
    return received


def request_of(connection: socket.socket) -> bytes:
    """A request; nothing at the end."""
    received = b""
    while not _is_whole(received) and (more := connection.recv(1 << 16)):
        received += more
    return received


def _is_whole(request: bytes) -> bool:
    head, end, body = request.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    return bool(end) and len(body) >= (int(length[1]) if length else 0)


def saying(answer: bytes) -> Talk:
    """Answers every connection's first request with `answer`, and closes."""

    def talk(connection: socket.socket) -> None:
        request_of(connection)
        connection.sendall(answer)

    return talk


def reset(connection: socket.socket) -> None:
    """Ends a connection with a TCP reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


class Peer:
    """Listens on the loopback address and talks with one connection after the other.

    `connections`: how many came; `received`: what each sent behind TLS until it closed, where `talk` is
    not given.
    """

    def __init__(self, certificate: Certificate | None = None, talk: Talk | None = None) -> None:
        self._context = None if certificate is None else certificate.context()
        self._talk = talk
        self.connections = 0
        self.received: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, name="peer", daemon=True)

    def repository(self, host: str = "127.0.0.1") -> Repository:
        return Repository("reader@pbs", "viewer", host, self.port, "store")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Wakes the thread in its accept: what comes before that is served first.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(LIMIT)
        assert not self._thread.is_alive()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _address = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            connection.settimeout(LIMIT)
            with connection, contextlib.suppress(OSError):
                self._meet(connection)

    def _meet(self, connection: socket.socket) -> None:
        if self._context is None:
            self._answer(connection)
            return
        try:
            wrapped = self._context.wrap_socket(connection, server_side=True)
        except ssl.SSLError:
            self.received.append(b"")  # not trusted: it went away in the handshake
            raise
        with wrapped:
            self._answer(wrapped)

    def _answer(self, connection: socket.socket) -> None:
        if self._talk is None:
            self.received.append(to_the_end(connection))
        else:
            self._talk(connection)
