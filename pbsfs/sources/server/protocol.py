"""The reader protocol over HTTP/2: requests out, answers in, without any I/O.

The session that owns it sends what `outgoing()` has, receives into `target()`, and tells `received()`.
Every length that the server announces is checked before it is believed. Not thread-safe.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    SettingsAcknowledged,
    StreamEnded,
    StreamReset,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from hyperframe.exceptions import HyperframeError

from pbsfs.errors import ConnectError, DamageError, PbsfsError
from pbsfs.sources.server.frames import MAX_FRAME_SIZE, install

WINDOW = (1 << 31) - 2
"""Bytes that the server may send before we acknowledge any, per stream and in all: as the vendor's client
has it. What may be in flight is limited by what is asked for."""

ACKNOWLEDGE_AFTER = 64 << 20
"""Bytes after which the connection's window is filled up again: rarely, as every frame costs."""

MAX_HEADER_LIST_SIZE = 64 << 10
"""Bytes of all headers of an answer; real ones have a hundred."""

MAX_ERROR_BODY = 16 << 10
"""Bytes of an error's text that are kept."""


LARGE_BODY = 32 << 20
"""Bytes above which a body (an index of many TiB) is gathered in one place as it comes: joining its parts in
the end would take twice its size."""

SMALL_PART = 4 << 10
"""Bytes below which a frame's data is put together with that of its neighbours: a body of frames of one
byte each would take hundreds of times its size."""


@dataclass(frozen=True, slots=True)
class Response:
    """A complete answer. `body` is at most as long as the request's limit."""

    status: int
    body: bytes


@dataclass(slots=True)
class _Stream:
    limit: int
    status: int = 0
    size: int = 0
    announced: int | None = None
    parts: list[memoryview | bytearray] = field(default_factory=list)
    gathered: io.BytesIO | None = None  # all of it, where it is too large to be joined in the end

    def add(self, data: memoryview) -> None:
        if self.gathered is None and self.size > LARGE_BODY:
            self.gathered = io.BytesIO()
            for part in self.parts:
                self.gathered.write(part)
            self.parts.clear()
        if self.gathered is not None:
            self.gathered.write(data)
        elif len(data) >= SMALL_PART:
            self.parts.append(data)
        elif data:
            last = self.parts[-1] if self.parts else None
            if isinstance(last, bytearray):
                last += data
            else:
                self.parts.append(bytearray(data))

    def body(self) -> bytes:
        return b"".join(self.parts) if self.gathered is None else self.gathered.getvalue()


class ReaderProtocol:
    """The client's side of one connection, from behind the upgrade on.

    `greeted`: whether the server has answered our greeting, which it does at once.
    """

    def __init__(self) -> None:
        self._h2 = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        # In force from the start: what is set later is so only when the server has acknowledged it.
        self._h2.local_settings = Settings(
            client=True,
            initial_values={
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: WINDOW,
                SettingCodes.MAX_FRAME_SIZE: MAX_FRAME_SIZE,
                SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEADER_LIST_SIZE,
            },
        )
        self._frames = install(self._h2)
        self._streams: dict[int, _Stream] = {}
        self._unacknowledged = 0
        self._heads = 0
        self.greeted = False
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(WINDOW - 65535)

    @property
    def busy(self) -> bool:
        """Whether an answer is outstanding."""
        return bool(self._streams)

    @property
    def progress(self) -> int:
        """Grows whenever something of an answer arrives; not with pings and the like."""
        return self._frames.data_received + self._heads

    def request(self, path: str, limit: int) -> int:
        """Asks for `path` (query included); returns the number that its answer will have.

        `limit`: most bytes of the body. Raises ConnectError where the connection takes no more requests.
        """
        headers = [(":method", "GET"), (":scheme", "http"), (":authority", "localhost"), (":path", path)]
        try:
            stream_id = self._h2.get_next_available_stream_id()
            self._h2.send_headers(stream_id, headers, end_stream=True)
        except ProtocolError as error:
            raise ConnectError(f"the connection takes no more requests: {error}") from None
        self._streams[stream_id] = _Stream(limit)
        return stream_id

    def cancel(self, stream_id: int) -> None:
        """Nobody waits for this answer any more."""
        if self._streams.pop(stream_id, None) is not None:
            with contextlib.suppress(ProtocolError):  # the connection is at its end anyway
                self._h2.reset_stream(stream_id, ErrorCodes.CANCEL)

    def outgoing(self) -> bytes:
        """What is to be sent now."""
        return self._h2.data_to_send()

    def target(self) -> memoryview:
        """Where to receive the next bytes."""
        return self._frames.target()

    def received(self, count: int) -> list[tuple[int, Response | PbsfsError]]:
        """`count` bytes were received into `target()`: the answers that are complete now, by number.

        Raises ConnectError where the connection is of no more use.
        """
        try:
            if not self._frames.advance(count):
                return []
            events = self._h2.receive_data(b"")
        except (ProtocolError, HyperframeError, ValueError) as error:
            raise ConnectError(f"the server broke the protocol: {type(error).__name__}: {error}") from None
        done: list[tuple[int, Response | PbsfsError]] = []
        for event in events:
            self._handle(event, done)
        return done

    def _handle(self, event: Event, done: list[tuple[int, Response | PbsfsError]]) -> None:
        if isinstance(event, DataReceived):
            self._data(event, done)
        elif isinstance(event, ResponseReceived):
            stream = self._streams.get(event.stream_id or 0)
            if stream is not None:
                self._heads += 1
                self._head(event, stream, done)
        elif isinstance(event, StreamEnded):
            stream = self._streams.pop(event.stream_id or 0, None)
            if stream is not None:
                done.append((event.stream_id or 0, self._whole(stream)))
        elif isinstance(event, StreamReset):
            if self._streams.pop(event.stream_id or 0, None) is not None:
                reset = ConnectError(f"the server broke off an answer (code {event.error_code})")
                done.append((event.stream_id or 0, reset))
        elif isinstance(event, SettingsAcknowledged):
            self.greeted = True
        elif isinstance(event, ConnectionTerminated):
            raise ConnectError(f"the server ends the connection (code {event.error_code})")

    def _whole(self, stream: _Stream) -> Response | PbsfsError:
        # h2 compares the lengths where the last frame is one of data, and only there.
        if stream.status == 200 and stream.announced not in (None, stream.size):
            return ConnectError(f"the server ends an answer after {stream.size} of {stream.announced} bytes")
        return Response(stream.status, stream.body())

    def _head(
        self, event: ResponseReceived, stream: _Stream, done: list[tuple[int, Response | PbsfsError]]
    ) -> None:
        headers = {bytes(name): bytes(value) for name, value in event.headers or []}
        status = headers.get(b":status", b"")
        stream.status = int(status) if status.isdigit() and len(status) == 3 else 0
        if stream.status != 200:
            stream.limit = MAX_ERROR_BODY
            return
        length = headers.get(b"content-length", b"")
        if length.isdigit():
            stream.announced = int(length)
            if stream.announced > stream.limit:
                self._refuse(event.stream_id or 0, stream, f"{stream.announced} bytes", done)

    def _data(self, event: DataReceived, done: list[tuple[int, Response | PbsfsError]]) -> None:
        self._unacknowledged += event.flow_controlled_length or 0
        if self._unacknowledged >= ACKNOWLEDGE_AFTER:
            self._h2.increment_flow_control_window(self._unacknowledged)
            self._unacknowledged = 0
        stream = self._streams.get(event.stream_id or 0)
        if stream is None:
            return
        data = memoryview(event.data or b"")
        stream.size += len(data)
        if stream.size <= stream.limit:
            stream.add(data)
        elif stream.status == 200:
            self._refuse(event.stream_id or 0, stream, "more", done)
        else:  # who wants to read more of an error?
            stream.add(data[: len(data) - (stream.size - stream.limit)])
            self.cancel(event.stream_id or 0)
            done.append((event.stream_id or 0, Response(stream.status, stream.body())))

    def _refuse(
        self, stream_id: int, stream: _Stream, what: str, done: list[tuple[int, Response | PbsfsError]]
    ) -> None:
        self.cancel(stream_id)
        done.append(
            (stream_id, DamageError(f"the server sends {what} where {stream.limit} bytes are the most"))
        )
