"""A plain client of the server, of blocking sockets, h11-free HTTP/1 by hand and h2.

Made for the tests of the reference server: simple rather than fast, independent of pbsfs, and able to do
what a good client does not, like reading nothing. One thread may use a connection.
"""

from __future__ import annotations

import json
import socket
import ssl
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import h2.config
import h2.connection
import h2.events
import h2.settings

from tests.support.server import ReferenceServer

PROTOCOL = "proxmox-backup-reader-protocol-v1"

TIMEOUT = 20.0
"""Seconds after which a socket that is silent fails the test."""


@dataclass
class Reply:
    """An answer. `reset`: the error code that a stream was reset with; `ended`: whether it ended in order."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    reset: int | None = None
    ended: bool = False
    reason: str = ""

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def data(self) -> Any:
        return json.loads(self.body)["data"]


class Connection:
    """A TLS connection, whose certificate is checked by its fingerprint, that speaks HTTP/1.1."""

    def __init__(self, server: ReferenceServer, *, receive_buffer: int | None = None) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        plain = socket.socket(socket.AF_INET6 if ":" in server.address else socket.AF_INET)
        try:
            plain.settimeout(TIMEOUT)
            if receive_buffer is not None:
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            plain.connect((server.address, server.port))
            self.socket = context.wrap_socket(plain)
        except BaseException:
            plain.close()
            raise
        self.rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def receive(self) -> bytes:
        """What comes next; ConnectionError at the end."""
        data, self.rest = self.rest, b""
        data = data or self.socket.recv(1 << 16)
        if not data:
            raise ConnectionError("closed by the server")
        return data

    def send(self, method: str, target: str, headers: dict[str, str], body: bytes = b"") -> None:
        fields = {"host": "localhost", **({"content-length": str(len(body))} if body else {}), **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.socket.sendall(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode() + body)

    def read_head(self) -> Reply:
        data = b""
        while b"\r\n\r\n" not in data:
            data += self.receive()
        head, _, self.rest = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        _version, status, reason = first.split(" ", 2)
        headers = dict(line.split(": ", 1) for line in lines)
        return Reply(int(status), headers, reason=reason)

    def request(
        self, method: str, target: str, headers: dict[str, str] | None = None, body: bytes = b""
    ) -> Reply:
        """A request and its answer, whose body has to be whole."""
        self.send(method, target, headers or {}, body)
        reply = self.read_head()
        if reply.headers.get("transfer-encoding") == "chunked":
            reply.body = self._read_chunked()
        else:
            reply.body = self.read(int(reply.headers.get("content-length", 0)))
        reply.ended = True
        return reply

    def read(self, size: int) -> bytes:
        data, self.rest = self.rest, b""
        while len(data) < size:
            data += self.receive()
        self.rest = data[size:]
        return data[:size]

    def _read_chunked(self) -> bytes:
        body = b""
        while True:
            line = b""
            while not line.endswith(b"\r\n"):
                line += self.read(1)
            size = int(line, 16)
            body += self.read(size)
            self.read(2)
            if not size:
                return body


class Session:
    """A reader session on a connection of its own. `window`, `frame`: what is announced to the server."""

    def __init__(
        self,
        server: ReferenceServer,
        auth: dict[str, str],
        query: str,
        *,
        window: int = 1 << 20,
        frame: int = 1 << 16,
    ) -> None:
        self.connection = Connection(server)
        try:
            upgrade = {"connection": "upgrade", "upgrade": PROTOCOL}
            self.connection.send("GET", f"/api2/json/reader?{query}", auth | upgrade)
            reply = self.connection.read_head()
            assert reply.status == 101, reply
        except BaseException:
            self.connection.socket.close()
            raise
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        codes = h2.settings.SettingCodes
        self.h2.local_settings = h2.settings.Settings(
            client=True, initial_values={codes.INITIAL_WINDOW_SIZE: window, codes.MAX_FRAME_SIZE: frame}
        )
        self.h2.max_inbound_frame_size = frame
        self.h2.initiate_connection()
        if window > 65535:  # the connection's own window starts with that many
            self.h2.increment_flow_control_window(window - 65535)
        self.replies: dict[int, Reply] = {}
        self.settings: dict[int, int] = {}
        self.frames: list[tuple[int, int]] = []  # stream and length of each DATA frame
        self.went_away: tuple[int, int | None] | None = None
        self.read_ahead = True  # whether what was received makes room for more
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.connection.socket.close()

    def flush(self) -> None:
        self.connection.socket.sendall(self.h2.data_to_send())

    def start(self, path: str, method: str = "GET") -> int:
        """Sends a request; returns its stream."""
        stream = self.h2.get_next_available_stream_id()
        fields = [(":method", method), (":path", path), (":scheme", "https"), (":authority", "localhost")]
        self.h2.send_headers(stream, fields, end_stream=True)
        self.replies[stream] = Reply()
        self.flush()
        return stream

    def pump(self) -> None:
        """Receives once. Raises ConnectionError where the server has closed the connection."""
        for event in self.h2.receive_data(self.connection.receive()):
            self._note(event)
        self.flush()

    def _note(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RemoteSettingsChanged):
            self.settings |= {int(code): new.new_value for code, new in event.changed_settings.items()}
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.went_away = (int(event.error_code or 0), event.last_stream_id)
        elif isinstance(event, h2.events.ResponseReceived):
            headers = {str(name): str(value) for name, value in event.headers}
            self.replies[event.stream_id].status = int(headers.pop(":status"))
            self.replies[event.stream_id].headers = headers
        elif isinstance(event, h2.events.DataReceived):
            self.replies[event.stream_id].body += event.data
            self.frames.append((event.stream_id, len(event.data)))
            if self.read_ahead:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamReset):
            self.replies[event.stream_id].reset = int(event.error_code)
        elif isinstance(event, h2.events.StreamEnded):
            self.replies[event.stream_id].ended = True

    def finish(self, *streams: int) -> list[Reply]:
        """The answers of streams, once they have ended or were reset."""
        while any(not self.replies[s].ended and self.replies[s].reset is None for s in streams):
            self.pump()
        return [self.replies[stream] for stream in streams]

    def get(self, path: str) -> Reply:
        return self.finish(self.start(path))[0]
