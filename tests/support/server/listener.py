"""Listens on one port, and serves each connection in a task of its own.

Everything here runs in the server's loop. While it is down the port stays bound, so that connections
are refused and nobody else gets it.
"""

from __future__ import annotations

import errno
import socket
import ssl
from dataclasses import dataclass, field

import trio

from tests.support.server.http1 import HttpConnection, Service
from tests.support.server.link import DroppedError, SlowLink, Wire

_BACKLOG = 1000

_GONE = (trio.BrokenResourceError, trio.ClosedResourceError, DroppedError, ssl.SSLError)
"""How a connection ends that the client or a fault has ended."""


@dataclass(eq=False)
class Listener:
    """`link`: what connections made from now on go over; `connections`: how many were accepted;
    `failures`: errors that are neither the client's nor scripted."""

    service: Service
    context: ssl.SSLContext
    address: str
    port: int
    link: SlowLink | None = None
    connections: int = 0
    failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._open: dict[trio.socket.SocketType, trio.CancelScope] = {}
        self._socket: trio.socket.SocketType | None = None
        self._accepting: trio.CancelScope | None = None
        self._nursery: trio.Nursery | None = None

    @property
    def open_connections(self) -> int:
        return len(self._open)

    def bind(self) -> None:
        """Takes the port. Raises OSError where it can't be had."""
        self._socket = self._bind()

    def start(self, nursery: trio.Nursery) -> None:
        """Listens; connections are served in `nursery`."""
        self._nursery = nursery
        self.come_back()

    def close(self) -> None:
        self.go_down(keep_port=False)

    def go_down(self, *, keep_port: bool = True) -> None:
        """Closes everything and refuses connections."""
        if self._accepting is not None:
            self._accepting.cancel()
            self._accepting = None
            self._close_socket()
            if keep_port:
                self._socket = self._bind()
        elif not keep_port:
            self._close_socket()
        self.drop_connections()

    def come_back(self) -> None:
        """Accepts connections (again)."""
        if self._accepting is None:
            assert self._nursery is not None
            assert self._socket is not None
            self._socket.listen(_BACKLOG)
            self._accepting = trio.CancelScope()
            self._nursery.start_soon(self._accept, self._socket, self._accepting)

    def drop_connections(self) -> None:
        for connection, scope in list(self._open.items()):
            connection.close()
            scope.cancel()

    def _close_socket(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _bind(self) -> trio.socket.SocketType:
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((self.address, self.port))
        except BaseException:
            made.close()
            raise
        self.port = made.getsockname()[1]
        return trio.socket.from_stdlib_socket(made)

    async def _accept(self, listening: trio.socket.SocketType, scope: trio.CancelScope) -> None:
        assert self._nursery is not None
        with scope:
            while True:
                try:
                    connection, _address = await listening.accept()
                except trio.ClosedResourceError:
                    return
                except ConnectionAbortedError:
                    continue
                except OSError as error:
                    if error.errno == errno.EBADF:
                        return  # closed between its becoming readable and the call
                    raise
                self.connections += 1
                self._nursery.start_soon(self._serve, connection)

    async def _serve(self, connection: trio.socket.SocketType) -> None:
        scope = self._open[connection] = trio.CancelScope()
        try:
            with scope:
                await self._serve_tls(connection)
        except* _GONE:
            pass
        except* Exception as group:
            self.failures.extend(group.exceptions)
        finally:
            del self._open[connection]
            connection.close()

    async def _serve_tls(self, connection: trio.socket.SocketType) -> None:
        wire = Wire(trio.SocketStream(connection), self.service.faults, self.link)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.run)
            tls = trio.SSLStream(wire, self.context, server_side=True)
            await tls.do_handshake()
            await HttpConnection(self.service, tls, wire).serve()
            nursery.cancel_scope.cancel()
