"""A simulated slow link: a proxy through which every byte arrives half a round trip later.

The bandwidth is shared by all connections, in each direction by itself. A connection has at most `WINDOW`
bytes under way in one direction, which is what TCP's default buffers on Linux allow; slow start is not
simulated, and TCP's own handshake takes no time.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections import deque

WINDOW = 3 << 20
"""Linux's default for a receiver: 6 MiB of buffer (`tcp_rmem`), half of which is announced."""

PIECE = 64 << 10

QUEUE = 0.005
"""Seconds that what passes the link may wait before it; what is more waits with its sender."""


class _Direction:
    """One direction of the link, shared by all connections: when what is sent now has passed it."""

    def __init__(self, bandwidth: float | None) -> None:
        self._bandwidth = bandwidth
        self._free = 0.0
        self._guard = threading.Lock()

    def passed(self, size: int) -> float:
        """Waits for a place in the link's queue."""
        while True:
            with self._guard:
                now = time.monotonic()
                wait = self._free - now - QUEUE
                if wait <= 0:
                    self._free = max(now, self._free)
                    if self._bandwidth:
                        self._free += size / self._bandwidth
                    return self._free
            time.sleep(wait)


class Link:
    """Listens on `port`, and connects to `target`, both of the loopback address."""

    def __init__(self, target: int, round_trip: float, bandwidth: float | None) -> None:
        self._target = target
        self._delay = round_trip / 2
        self._up = _Direction(bandwidth)
        self._down = _Direction(bandwidth)
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listening.getsockname()[1]

    def start(self) -> None:
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _address = self._listening.accept()
            far = socket.create_connection(("127.0.0.1", self._target))
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, target, direction in ((near, far, self._up), (far, near, self._down)):
                pieces: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
                arguments = (source, direction, pieces)
                threading.Thread(target=self._take, args=arguments, daemon=True).start()
                threading.Thread(target=self._deliver, args=(target, pieces), daemon=True).start()

    def _take(
        self, source: socket.socket, direction: _Direction, pieces: queue.SimpleQueue[tuple[float, bytes]]
    ) -> None:
        under_way: deque[tuple[float, int]] = deque()
        total = 0
        while True:
            while under_way and (total >= WINDOW or under_way[0][0] <= time.monotonic()):
                time.sleep(max(0.0, under_way[0][0] - time.monotonic()))
                total -= under_way.popleft()[1]
            piece = b""
            with contextlib.suppress(OSError):
                piece = source.recv(PIECE)
            arrival = direction.passed(len(piece)) + self._delay
            pieces.put((arrival, piece))
            if not piece:
                return
            under_way.append((arrival + self._delay, len(piece)))
            total += len(piece)

    def _deliver(self, target: socket.socket, pieces: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        broken = False
        while True:
            arrival, piece = pieces.get()
            time.sleep(max(0.0, arrival - time.monotonic()))
            try:
                if not piece:
                    target.shutdown(socket.SHUT_WR)
                elif not broken:
                    target.sendall(piece)
            except OSError:
                broken = True
            if not piece:
                return
