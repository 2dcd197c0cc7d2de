"""Received HTTP/2 frames, without copies of their data.

h2 implements the protocol; `Frames` replaces its buffer of received bytes. The buffer of h2 copies the data
of a frame four times and formats all of it as hex for a trace log, which takes longer than TLS. Here the
caller receives into the place of a stream's body, or into a frame's own buffer, and the text form of a data
frame leaves its data out. Used by `protocol`. Not thread-safe; belongs to one connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from h2.connection import H2Connection
from h2.exceptions import FrameTooLargeError, ProtocolError
from h2.frame_buffer import FrameBuffer
from hyperframe.frame import DataFrame, Frame

MAX_FRAME_SIZE = 4 << 20
"""Bytes of data in a frame at most, as announced to the server: a usual chunk arrives in one frame."""

MAX_CONTROL_FRAME_SIZE = 64 << 10
"""Bytes of any other frame at most: the memory that a hostile server could claim. Real ones have tens."""

_HEADER_SIZE = 9
_DATA_TYPE = 0
_PADDED = 0x8
_END_STREAM = 0x1

Place = Callable[[int, int], memoryview | None]
"""Where the data of a stream's next frame goes, by the stream's number and the length of the data, which is
the length of the view; None for a new buffer."""


class QuietDataFrame(DataFrame):
    """A DATA frame whose `repr` does not format its data."""

    def __repr__(self) -> str:
        return f"DataFrame(stream_id={self.stream_id}, {len(self.data)} bytes)"


class Frames(FrameBuffer):
    """Cuts received bytes into frames. Receive into `target()`, then call `advance()` with the count."""

    def __init__(self, place: Place = lambda _stream_id, _length: None) -> None:
        super().__init__()
        self._place = place
        self._header = memoryview(bytearray(_HEADER_SIZE))
        self._payload: memoryview | None = None  # of the frame whose header is complete
        self._filled = 0  # bytes of the header, or then of the payload
        self.data_received = 0  # bytes of payload, including frames that are not complete yet
        self._complete: deque[tuple[bytes, memoryview]] = deque()

    def target(self) -> memoryview:
        """The buffer for the next received bytes; never empty."""
        place = self._header if self._payload is None else self._payload
        return place[self._filled :]

    def advance(self, count: int) -> bool:
        """Takes `count` bytes that are in `target()`; returns whether they complete a frame.

        Raises ProtocolError.
        """
        self._filled += count
        if self._payload is not None and self._header[3] == _DATA_TYPE:
            self.data_received += count
        if self._payload is None:
            if self._filled < _HEADER_SIZE:
                return False
            self._payload = self._room()
            self._filled = 0
        if self._filled < len(self._payload):
            return False
        self._complete.append((bytes(self._header), self._payload))
        self._payload = None
        self._filled = 0
        return True

    def clear(self) -> None:
        """Lets go of what was received."""
        self._payload = None
        self._filled = 0
        self._complete.clear()

    def _room(self) -> memoryview:
        length = self._announced()
        place = self._place(self._stream_id(self._header), length) if self._is_data(self._header) else None
        return memoryview(bytearray(length)) if place is None else place

    @staticmethod
    def _is_data(header: bytes | memoryview) -> bool:
        """Whether it is that of data without padding."""
        return header[3] == _DATA_TYPE and not header[4] & _PADDED

    @staticmethod
    def _stream_id(header: bytes | memoryview) -> int:
        return int.from_bytes(header[5:], "big") & 0x7FFFFFFF

    def _announced(self) -> int:
        """The payload's length from the header, checked before it sizes a buffer."""
        length = int.from_bytes(self._header[:3], "big")
        most = MAX_FRAME_SIZE if self._header[3] == _DATA_TYPE else MAX_CONTROL_FRAME_SIZE
        if length > most:
            raise FrameTooLargeError(f"frame of {length} bytes where {most} is the most")
        return length

    def add_data(self, data: object) -> None:
        """Does nothing: h2 calls this with the received bytes, which `advance` has taken already."""

    def __next__(self) -> Frame:
        while self._complete:
            header, payload = self._complete.popleft()
            frame = self._parse(header, payload)
            whole = self._update_header_buffer(frame)
            if whole is not None:
                return whole
        raise StopIteration

    def _parse(self, header: bytes, payload: memoryview) -> Frame:
        if self._is_data(header):
            stream_id = self._stream_id(header)
            if stream_id == 0:
                raise ProtocolError("data without a stream")
            data = QuietDataFrame(stream_id)
            if header[4] & _END_STREAM:
                data.flags.add("END_STREAM")
            data.data = payload  # type: ignore[assignment]  # h2 asks for its length only
            return data
        frame, _length = Frame.parse_frame_header(memoryview(header))
        frame.parse_body(payload)
        return frame


def install(connection: H2Connection, place: Place) -> Frames:
    """Replaces the buffer of `connection`; returns the new one."""
    frames = Frames(place)
    connection.incoming_buffer = frames
    # h2 finds a frame's handler by its class, and not by a base class.
    handlers = connection._frame_dispatch_table
    handlers[QuietDataFrame] = handlers[DataFrame]
    return frames
