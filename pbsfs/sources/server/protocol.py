"""The reader protocol over HTTP/2: requests out, answers in, without any I/O.

The session that owns it sends what `outgoing()` returns, receives into `target()`, and calls `received()`.
Every length that the server announces is checked before use. Not thread-safe.
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
    PingAckReceived,
    RemoteSettingsChanged,
    ResponseReceived,
    SettingsAcknowledged,
    StreamEnded,
    StreamReset,
)
from h2.exceptions import H2Error
from h2.settings import SettingCodes, Settings
from hyperframe.exceptions import HyperframeError

from pbsfs.base.errors import ConnectError, DamageError, PbsfsError
from pbsfs.formats.blob import Stored
from pbsfs.sources.server.frames import MAX_FRAME_SIZE, install
from pbsfs.sources.server.limits import DEFAULT, ServerLimits

MAX_HEADER_LIST_SIZE = 64 << 10
"""Bytes of all headers of an answer; real answers have some hundred."""

MAX_ERROR_BODY = 16 << 10
"""Bytes of an error's text that pbsfs keeps."""


MAX_STREAMS = 128
"""Requests at once on one connection at most, even if the server allows more: enough to fill the link with
the smallest chunks, and less than the 200 that current servers allow."""

PING = b"pbsfs up"
"""The content of a PING: any eight bytes."""

LARGE_BODY = 32 << 20
"""Bytes above which the parts of a body (the index of an image of many TiB) go into one buffer as they
arrive: joining them at the end would take twice its size."""

SMALL_PART = 4 << 10
"""Bytes below which the data of adjacent frames is joined: as objects of their own, frames of one byte each
would take hundreds of times the size of the body."""

LEAST_GROWTH = 16 << 10
"""Bytes by which an answer has to grow (or end) within the limit of its time, which is 30 minutes: a server
that sends many answers in turn sends as much of each at a time, a frame of the default size."""


@dataclass(frozen=True, slots=True)
class Response:
    """A complete answer. `body` is at most as long as the request's limit; a chunk's is usually a view of
    what was received."""

    status: int
    body: Stored


class RefusedStreamError(ConnectError):
    """The server did not process the request (REFUSED_STREAM, RFC 9113, 8.7). The connection is usable."""


@dataclass(slots=True)
class _Stream:
    limit: int
    since: float  # when pbsfs sent the request, or its answer last grew by LEAST_GROWTH
    status: int = 0
    size: int = 0
    grown: int = 0  # bytes since then
    announced: int | None = None
    parts: list[memoryview | bytearray] = field(default_factory=list)
    gathered: io.BytesIO | None = None  # the body so far, if it is too large to join at the end
    whole: bytearray | None = None  # the place of all of the body, if its length is known

    def place(self, length: int) -> memoryview | None:
        """Where the next `length` bytes of the body go; None where the length of the body is unknown, too
        large, or exceeded, and for no bytes."""
        if self.announced is None or self.announced > LARGE_BODY:
            return None
        if not 0 < length <= self.announced - self.size:
            return None
        if self.whole is None and not self.size:
            self.whole = bytearray(self.announced)
        return None if self.whole is None else memoryview(self.whole)[self.size : self.size + length]

    def add(self, data: memoryview) -> None:
        """Takes the last part of the body so far, up to `size`."""
        if self.whole is not None:
            if data.obj is not self.whole:  # of a padded frame
                self.whole[self.size - len(data) : self.size] = data
            return
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

    def body(self) -> Stored:
        if self.whole is not None:
            return memoryview(self.whole).toreadonly()
        return b"".join(self.parts) if self.gathered is None else self.gathered.getvalue()


class ReaderProtocol:
    """The client's side of one connection, after the upgrade.

    `greeted`: whether the server has acknowledged the client's settings, which it does at once. Times are
    seconds of one clock, which the caller reads.
    """

    def __init__(self, limits: ServerLimits = DEFAULT) -> None:
        self._limits = limits
        self._h2 = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        # In force from the start: later settings only apply once the server has acknowledged them.
        self._h2.local_settings = Settings(
            client=True,
            initial_values={
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: limits.window,
                SettingCodes.MAX_FRAME_SIZE: MAX_FRAME_SIZE,
                SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEADER_LIST_SIZE,
            },
        )
        self._frames = install(self._h2, self._place)
        self._streams: dict[int, _Stream] = {}
        self._unacknowledged = 0
        self._heads = 0
        self._pongs = 0
        self._settings_known = False
        self.greeted = False
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(limits.window - 65535)

    @property
    def busy(self) -> bool:
        """Whether an answer is outstanding."""
        return bool(self._streams)

    @property
    def progress(self) -> int:
        """Grows whenever part of an answer arrives, or the server answers a PING."""
        return self._frames.data_received + self._heads + self._pongs

    @property
    def room(self) -> int:
        """How many more requests may be sent now: none before the server's settings have arrived.

        Below 1 if the server has lowered its limit. Servers send their settings at once, and refuse requests
        above their limit. Source: SETTINGS_MAX_CONCURRENT_STREAMS, RFC 9113, 6.5.2.
        """
        if not self._settings_known:
            return 0
        return min(MAX_STREAMS, self._h2.remote_settings.max_concurrent_streams) - len(self._streams)

    @property
    def oldest(self) -> float | None:
        """The time at which the least recently active answer last grew; None if none is outstanding."""
        return min((stream.since for stream in self._streams.values()), default=None)

    def overdue(self, before: float) -> list[int]:
        """The answers that have not grown since `before`, by number."""
        return [number for number, stream in self._streams.items() if stream.since < before]

    def restart(self, now: float) -> None:
        """Has all answers count as having grown `now`."""
        for stream in self._streams.values():
            stream.since = now

    def ping(self) -> None:
        """Asks the server for a sign of life."""
        with contextlib.suppress(H2Error):  # the connection is ending
            self._h2.ping(PING)

    def request(self, path: str, limit: int, now: float = 0.0) -> int:
        """Asks for `path` (query included); returns the number that its answer will have.

        `limit`: bytes of the body at most. Raises ConnectError if the connection takes no more requests.
        """
        headers = [(":method", "GET"), (":scheme", "http"), (":authority", "localhost"), (":path", path)]
        try:
            stream_id = self._h2.get_next_available_stream_id()
            self._h2.send_headers(stream_id, headers, end_stream=True)
        except H2Error as error:
            raise ConnectError(f"the connection takes no more requests: {error}") from None
        self._streams[stream_id] = _Stream(limit, now)
        return stream_id

    def cancel(self, stream_id: int) -> None:
        """Cancels a request; pbsfs ignores the rest of its answer."""
        if self._streams.pop(stream_id, None) is not None:
            with contextlib.suppress(H2Error):  # the connection is ending
                self._h2.reset_stream(stream_id, ErrorCodes.CANCEL)

    def outgoing(self) -> bytes:
        """The bytes to send now."""
        return self._h2.data_to_send()

    def target(self) -> memoryview:
        """Where to receive the next bytes."""
        return self._frames.target()

    def received(self, count: int, now: float = 0.0) -> list[tuple[int, Response | PbsfsError]]:
        """Takes `count` bytes that are in `target()`; returns the answers that are complete now, by number.

        Raises ConnectError if the connection can't be used any more.
        """
        try:
            if not self._frames.advance(count):
                return []
            done: list[tuple[int, Response | PbsfsError]] = []
            for event in self._h2.receive_data(b""):
                self._handle(event, done, now)
        except (H2Error, HyperframeError, ValueError) as error:
            raise ConnectError(f"the server broke the protocol: {type(error).__name__}: {error}") from None
        return done

    def close(self) -> None:
        """Lets go of what was received. The objects of h2 refer to each other: without this, all unfinished
        answers would stay in memory until the garbage collector runs."""
        self._streams.clear()
        self._frames.clear()

    def _handle(self, event: Event, done: list[tuple[int, Response | PbsfsError]], now: float) -> None:
        if isinstance(event, DataReceived):
            self._data(event, done, now)
        elif isinstance(event, ResponseReceived):
            stream = self._streams.get(event.stream_id or 0)
            if stream is not None:
                self._heads += 1
                stream.since = now
                self._head(event, stream, done)
        elif isinstance(event, StreamEnded):
            stream = self._streams.pop(event.stream_id or 0, None)
            if stream is not None:
                done.append((event.stream_id or 0, self._whole(stream)))
        elif isinstance(event, StreamReset):
            if self._streams.pop(event.stream_id or 0, None) is not None:
                refused = event.error_code == ErrorCodes.REFUSED_STREAM
                kind, what = (
                    (RefusedStreamError, "refuses a request")
                    if refused
                    else (ConnectError, "broke off an answer")
                )
                done.append((event.stream_id or 0, kind(f"the server {what} (code {event.error_code})")))
        elif isinstance(event, PingAckReceived):
            self._pongs += 1
        elif isinstance(event, RemoteSettingsChanged):
            self._settings_known = True
        elif isinstance(event, SettingsAcknowledged):
            self.greeted = True
        elif isinstance(event, ConnectionTerminated):
            raise ConnectError(f"the server ends the connection (code {event.error_code})")

    def _place(self, stream_id: int, length: int) -> memoryview | None:
        stream = self._streams.get(stream_id)
        return None if stream is None else stream.place(length)

    def _whole(self, stream: _Stream) -> Response | PbsfsError:
        # h2 compares the lengths only if the last frame is a DATA frame.
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

    def _data(self, event: DataReceived, done: list[tuple[int, Response | PbsfsError]], now: float) -> None:
        self._unacknowledged += event.flow_controlled_length or 0
        if self._unacknowledged >= self._limits.acknowledge_after:
            self._h2.increment_flow_control_window(self._unacknowledged)
            self._unacknowledged = 0
        stream = self._streams.get(event.stream_id or 0)
        if stream is None:
            return
        data = memoryview(event.data or b"")
        stream.grown += len(data)
        if stream.grown >= LEAST_GROWTH:  # less is not progress: a byte now and then would never end
            stream.since, stream.grown = now, 0
        stream.size += len(data)
        if stream.size <= stream.limit:
            stream.add(data)
        elif stream.status == 200:
            self._refuse(event.stream_id or 0, stream, "more", done)
        else:  # enough of an error
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
