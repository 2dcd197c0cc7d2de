"""The server's side of HTTP/2, as little as serving chunks needs and as fast as TLS takes it.

Frames are made and parsed by hand: a body goes out in the largest frames that the client allows, from the
buffer that its file was read into. Without I/O; one connection, one thread.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from hpack import Decoder, Encoder

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

WINDOW = 32 << 20
MAX_FRAME = 4 << 20
"""What a Proxmox Backup Server announces."""

HEADER_SIZE = 9

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = (
    0,
    1,
    3,
    4,
    6,
    7,
    8,
    9,
)
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
_INITIAL_WINDOW, _FRAME_SIZE, _HEADER_LIST = 4, 5, 6


class ClosedError(Exception):
    """The client ends the connection, or breaks the protocol."""


@dataclass(slots=True)
class _Body:
    """An answer's body on its way. `buffer`: it, behind room for one frame header."""

    buffer: bytearray
    sent: int = 0

    @property
    def left(self) -> int:
        return len(self.buffer) - HEADER_SIZE - self.sent


class Http2:
    """`received` takes bytes and returns requests (stream and path); `outgoing` is what to send next."""

    def __init__(self) -> None:
        self._decoder = Decoder()
        self._encoder = Encoder()
        self._buffer = bytearray()
        self._preface = False
        self._block = bytearray()
        self._frame_size = 16384
        self._initial_window = 65535
        self._window = 65535
        self._windows: dict[int, int] = {}
        self._bodies: dict[int, _Body] = {}
        self._turns: deque[int] = deque()
        self._control = bytearray()
        settings = b"".join(
            number.to_bytes(2, "big") + value.to_bytes(4, "big")
            for number, value in (
                (_INITIAL_WINDOW, WINDOW),
                (_FRAME_SIZE, MAX_FRAME),
                (_HEADER_LIST, 16 << 20),
            )
        )
        self._control += _header(len(settings), _SETTINGS, 0, 0) + settings
        self._control += _header(4, _WINDOW_UPDATE, 0, 0) + (WINDOW - 65535).to_bytes(4, "big")

    @property
    def busy(self) -> bool:
        """Whether a body has still to be sent; it may have to wait for the client's windows."""
        return bool(self._bodies)

    def received(self, data: bytes) -> list[tuple[int, str]]:
        """Raises ClosedError."""
        self._buffer += data
        if not self._preface:
            if len(self._buffer) < len(PREFACE):
                return []
            if not self._buffer.startswith(PREFACE):
                raise ClosedError("no HTTP/2")
            del self._buffer[: len(PREFACE)]
            self._preface = True
        requests: list[tuple[int, str]] = []
        while len(self._buffer) >= HEADER_SIZE:
            length = int.from_bytes(self._buffer[:3], "big")
            if len(self._buffer) < HEADER_SIZE + length:
                break
            kind, flags = self._buffer[3], self._buffer[4]
            stream = int.from_bytes(self._buffer[5:9], "big") & 0x7FFFFFFF
            payload = bytes(self._buffer[HEADER_SIZE : HEADER_SIZE + length])
            del self._buffer[: HEADER_SIZE + length]
            requests += self._frame(kind, flags, stream, payload)
        return requests

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> list[tuple[int, str]]:
        if kind in (_HEADERS, _CONTINUATION):
            if kind == _HEADERS:
                padding = payload[0] if flags & _PADDED else 0
                start = (1 if flags & _PADDED else 0) + (5 if flags & _PRIORITY else 0)
                payload = payload[start : len(payload) - padding]
            self._block += payload
            if flags & _END_HEADERS:
                headers = {str(n): str(v) for n, v in self._decoder.decode(bytes(self._block), raw=False)}
                self._block.clear()
                self._windows[stream] = self._initial_window
                return [(stream, headers[":path"])]
        elif kind == _WINDOW_UPDATE:
            amount = int.from_bytes(payload, "big")
            if stream == 0:
                self._window += amount
            elif stream in self._windows:
                self._windows[stream] += amount
        elif kind == _SETTINGS and not flags & _ACK:
            for at in range(0, len(payload), 6):
                self._set(
                    int.from_bytes(payload[at : at + 2], "big"),
                    int.from_bytes(payload[at + 2 : at + 6], "big"),
                )
            self._control += _header(0, _SETTINGS, _ACK, 0)
        elif kind == _PING and not flags & _ACK:
            self._control += _header(len(payload), _PING, _ACK, 0) + payload
        elif kind == _RST_STREAM:
            self._forget(stream)
        elif kind == _GOAWAY:
            raise ClosedError("the client ends the connection")
        return []

    def _set(self, setting: int, value: int) -> None:
        if setting == _INITIAL_WINDOW:
            for stream in self._windows:
                self._windows[stream] += value - self._initial_window
            self._initial_window = value
        elif setting == _FRAME_SIZE:
            self._frame_size = value

    def _forget(self, stream: int) -> None:
        self._windows.pop(stream, None)
        if self._bodies.pop(stream, None) is not None:
            self._turns.remove(stream)

    def answer(self, stream: int, status: int, buffer: bytearray) -> None:
        """Answers with the bytes of `buffer` from `HEADER_SIZE` on; what is before is room for a header."""
        size = len(buffer) - HEADER_SIZE
        fields = [(":status", str(status)), ("content-type", "application/octet-stream")]
        fields.append(("content-length", str(size)))
        block = self._encoder.encode(fields)
        flags = _END_HEADERS | (0 if size else _END_STREAM)
        self._control += _header(len(block), _HEADERS, flags, stream) + block
        if size and stream in self._windows:
            self._bodies[stream] = _Body(buffer)
            self._turns.append(stream)
        else:
            self._windows.pop(stream, None)

    def outgoing(self) -> bytes | memoryview | None:
        """What goes out next: what is no data, or one frame of it; None where there is nothing, or no room in
        the client's windows."""
        if self._control:
            control = bytes(self._control)
            self._control.clear()
            return control
        for _ in range(len(self._turns)):
            stream = self._turns[0]
            body = self._bodies[stream]
            size = min(body.left, self._frame_size, self._window, self._windows[stream])
            self._turns.rotate(-1)
            if size > 0:
                return self._data(stream, body, size)
        return None

    def _data(self, stream: int, body: _Body, size: int) -> memoryview:
        start = body.sent
        body.sent += size
        self._window -= size
        self._windows[stream] -= size
        done = body.left == 0
        # The header takes the place of what was sent before it.
        body.buffer[start : start + HEADER_SIZE] = _header(size, _DATA, _END_STREAM if done else 0, stream)
        frame = memoryview(body.buffer)[start : start + HEADER_SIZE + size]
        if done:
            self._forget(stream)
        return frame


def _header(length: int, kind: int, flags: int, stream: int) -> bytes:
    return length.to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big")
