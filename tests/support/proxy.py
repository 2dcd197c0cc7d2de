"""An HTTP proxy that opens tunnels (CONNECT) on the loopback address, for tests.

A thread accepts, and one for each connection passes bytes on. Names are the proxy's to resolve: those in
`names`, and no others.
"""

from __future__ import annotations

import base64
import contextlib
import select
import socket
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Self

LIMIT = 20.0
"""Seconds after which a connection is given up; only when something is broken."""

NAME = "pbs.invalid"
"""A name that only a proxy knows (RFC 6761, 6.4: nobody else may)."""


class ConnectProxy:
    """`user` and `password`: what it asks for, if anything. `answer`: what it says in the place of opening a
    tunnel. `targets`: what was asked for, in order; `heads`: the whole requests."""

    def __init__(
        self,
        *,
        user: str | None = None,
        password: str = "",
        answer: bytes | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._wanted = None if user is None else base64.b64encode(f"{user}:{password}".encode()).decode()
        self._answer = answer
        self._names = {"127.0.0.1": "127.0.0.1", "localhost": "127.0.0.1", NAME: "127.0.0.1"} | dict(
            names or {}
        )
        self.targets: list[str] = []
        self.heads: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, name="proxy", daemon=True)
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in [self._accepting, *self._threads]:
            thread.join(LIMIT)
            assert not thread.is_alive()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _address = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), name="proxy", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(LIMIT)
        with connection, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                more = connection.recv(4096)
                if not more:
                    return
                head += more
            self.heads.append(head)
            target = head.split(b" ")[1].decode()
            self.targets.append(target)
            answer = self._answer or self._refusal(head)
            if answer:
                connection.sendall(answer)
                return
            host, _colon, port = target.rpartition(":")
            address = self._names.get(host)
            if address is None:
                connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
                return
            try:
                onward = socket.create_connection((address, int(port)), LIMIT)
            except OSError:
                connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
                return
            with onward:
                connection.sendall(b"HTTP/1.1 200 Connection established\r\nVia: 1.1 test\r\n\r\n")
                self._pass_on(connection, onward)

    def _refusal(self, head: bytes) -> bytes:
        if not head.startswith(b"CONNECT "):
            return b"HTTP/1.1 405 Method Not Allowed\r\n\r\n"
        if self._wanted is not None and f"Basic {self._wanted}\r\n".encode() not in head:
            return (
                b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=x\r\n"
                b"Content-Length: 4\r\n\r\nno!\n"
            )
        return b""

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        """Until both sides have ended."""
        peers = {one: other, other: one}
        reading = [one, other]
        while reading and not self._ended.is_set():
            for source in select.select(reading, [], [], 0.1)[0]:
                data = source.recv(1 << 16)
                if data:
                    peers[source].sendall(data)
                else:
                    reading.remove(source)
                    peers[source].shutdown(socket.SHUT_WR)
