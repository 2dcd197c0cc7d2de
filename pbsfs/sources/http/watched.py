"""What a connection receives, watched: an answer that grows too slowly is given up.

A limit on silence does not end an answer of which a byte comes now and then. One slow stretch says nothing:
what follows a silence may be the short end of an answer, or this process was stopped (Ctrl-Z) and has taken
only a part of what arrived. So an answer is too slow after two in a row. Used by `client`, in the thread that
makes the request.
"""

from __future__ import annotations

import http.client
import io
import math
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pbsfs.sources.http.limits import HttpLimits

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class SlowError(Exception):
    """An answer grows by less than `HttpLimits.least_rate`. `received`: bytes in `seconds`."""

    def __init__(self, received: int, seconds: float) -> None:
        super().__init__(received, seconds)
        self.received = received
        self.seconds = seconds


class Watched(io.RawIOBase):
    """What arrives on `sock`, from the first byte of one answer on."""

    def __init__(
        self, sock: socket.socket, limits: HttpLimits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock`: seconds."""
        self._sock = sock
        self._reference = sock.makefile("rb", buffering=0)  # as long as it is open, so is the socket
        self._limits = limits
        self._clock = clock
        self._since = math.inf  # the server may need long to begin
        self._received = 0  # since then
        self._was_slow = False  # the stretch before that

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Receives what is there, and waits for it as long as the socket's limit allows. Raises OSError, and
        SlowError."""
        count = self._sock.recv_into(buffer)
        now, limits = self._clock(), self._limits
        if self._since == math.inf:
            self._since = now
        self._received += count
        seconds = now - self._since
        if seconds >= limits.slow_time and count:
            is_slow = self._received < limits.least_rate * seconds
            if is_slow and self._was_slow:
                raise SlowError(self._received, seconds)
            self._since, self._received, self._was_slow = now, 0, is_slow
        return count

    def close(self) -> None:
        self._reference.close()
        super().close()


class Response(http.client.HTTPResponse):
    """An answer whose bytes are watched, from its first line on."""

    def __init__(self, sock: socket.socket, *, method: str | None, limits: HttpLimits) -> None:
        super().__init__(sock, method=method)
        self.fp.close()
        self.fp = io.BufferedReader(Watched(sock, limits))
