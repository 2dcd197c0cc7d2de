"""What lies between the server's TLS and the client: counted, cut, stalled, slowed down.

A `Wire` wraps the socket of one connection. A `SlowLink` is shared by all connections made while it
is the server's link: each piece of data arrives half a round trip after it has passed the link, whose
bandwidth all connections share, in each direction by itself. The kernel's own handshake of TCP is
not slowed down. Used by the server's loop only; one task may send and one receive at a time.
"""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from contextlib import suppress

import trio

from tests.support.server.faults import Drop, Faults, Stall, WireFault

_LINGER = 1.0  # seconds that a client may take to close its side

_PIECE = 1 << 14  # bytes that pass a slow link as one


class DroppedError(Exception):
    """A fault has closed the connection; whoever works on it ends."""


class _Direction:
    """One direction of a slow link: when what is sent now arrives."""

    def __init__(self, delay: float, bandwidth: float | None) -> None:
        self._delay = delay
        self._bandwidth = bandwidth
        self._free = 0.0

    def arrival(self, size: int) -> float:
        start = max(trio.current_time(), self._free)
        self._free = start + (size / self._bandwidth if self._bandwidth else 0.0)
        return self._free + self._delay


class SlowLink:
    """`round_trip`: seconds; `bandwidth`: bytes a second in each direction, None for no limit; `window`:
    bytes of one connection that may be under way in one direction, as TCP's window limits them."""

    def __init__(
        self, round_trip: float = 0.0, bandwidth: float | None = None, window: int = 1 << 20
    ) -> None:
        self.round_trip = round_trip
        self.window = window
        self.down = _Direction(round_trip / 2, bandwidth)
        self.up = _Direction(round_trip / 2, bandwidth)


class Wire(trio.abc.Stream):
    """The bytes of one connection. `sent`: how many the server has sent, TLS included."""

    def __init__(self, stream: trio.SocketStream, faults: Faults, link: SlowLink | None) -> None:
        self.sent = 0
        self._stream = stream
        self._faults = faults
        self._link = link
        self._marks: dict[WireFault, int] = {}
        self._queued: deque[tuple[float, bytes]] = deque()
        self._unacknowledged: deque[tuple[float, int]] = deque()
        self._under_way = 0
        self._news = trio.Event()
        self._idle = trio.Event()
        self._idle.set()
        self._arriving, self._arrived = trio.open_memory_channel[tuple[float, bytes]](1 << 10)

    async def run(self) -> None:
        """Moves data over a slow link; has to run beside what uses the wire. Ends with the connection."""
        if self._link is not None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._deliver)
                nursery.start_soon(self._collect, self._link)

    def mark(self, target: str) -> None:
        """A request has arrived: faults that wait for it count from here."""
        for fault in self._faults.armed():
            wanted = fault.match is not None and fault.goes_for(target) and fault not in self._marks
            if wanted and not self._faults.passes(fault):
                self._marks[fault] = self.sent

    # --- sending

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            fault, room = self._next_fault()
            if fault is None or room >= len(rest):
                await self._send(bytes(rest))
                break
            if room:
                await self._send(bytes(rest[:room]))
                rest = rest[room:]
            await self._strike(fault)
        await trio.lowlevel.checkpoint()

    def _next_fault(self) -> tuple[WireFault | None, int]:
        """The fault that strikes first, and how many bytes may be sent before it does."""
        found: WireFault | None = None
        least = 0
        for fault in self._faults.armed():
            base = 0 if fault.match is None else self._marks.get(fault)
            if base is None:
                continue
            room = max(0, base + fault.after_bytes - self.sent)
            if found is None or room < least:
                found, least = fault, room
        return found, least

    async def _strike(self, fault: WireFault) -> None:
        self._marks.pop(fault, None)
        if not self._faults.strike(fault):
            return
        if isinstance(fault, Stall):
            await fault.stalled()
        if isinstance(fault, Drop):
            await self._idle.wait()
            if fault.reset:
                linger = struct.pack("ii", 1, 0)
                self._stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            else:
                self._read_away()
            await trio.aclose_forcefully(self._stream)
            raise DroppedError

    def _read_away(self) -> None:
        """Reads what has come in: a socket that is closed with unread data resets the connection."""
        with suppress(OSError):
            while os.read(self._stream.socket.fileno(), 1 << 16):
                pass

    async def _send(self, data: bytes) -> None:
        self.sent += len(data)
        if self._link is None:
            await self._stream.send_all(data)
            return
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            await self._wait_for_window(self._link)
            arrival = self._link.down.arrival(len(piece))
            self._under_way += len(piece)
            self._unacknowledged.append((arrival + self._link.round_trip / 2, len(piece)))
            self._queued.append((arrival, piece))
            self._idle = trio.Event() if self._idle.is_set() else self._idle
            self._news.set()

    async def _wait_for_window(self, link: SlowLink) -> None:
        while True:
            while self._unacknowledged and self._unacknowledged[0][0] <= trio.current_time():
                self._under_way -= self._unacknowledged.popleft()[1]
            if self._under_way < link.window:
                return
            await trio.sleep_until(self._unacknowledged[0][0])

    async def _deliver(self) -> None:
        try:
            while True:
                while not self._queued:
                    self._idle.set()
                    self._news = trio.Event()
                    await self._news.wait()
                arrival, piece = self._queued[0]
                await trio.sleep_until(arrival)
                await self._stream.send_all(piece)
                self._queued.popleft()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._queued.clear()
            self._idle.set()

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    # --- receiving

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self._link is None:
            return await self._stream.receive_some(max_bytes)
        try:
            arrival, piece = await self._arrived.receive()
        except trio.EndOfChannel:
            return b""
        await trio.sleep_until(arrival)
        return piece

    async def _collect(self, link: SlowLink) -> None:
        with self._arriving:
            try:
                while piece := bytes(await self._stream.receive_some(_PIECE)):
                    await self._arriving.send((link.up.arrival(len(piece)), piece))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

    async def aclose(self) -> None:
        """Closes in order: what the client still sends is read, or it would get a reset and lose the rest."""
        try:
            await self._idle.wait()
            await self._stream.send_eof()
            with trio.move_on_after(_LINGER):
                while await self.receive_some():
                    pass
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await trio.aclose_forcefully(self._stream)
