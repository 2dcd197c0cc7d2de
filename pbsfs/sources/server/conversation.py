"""The life of a connected session: sends requests and receives answers, until it is closed or fails.

Used by `session`, in the session's thread, which is the only one that uses the socket.
"""

from __future__ import annotations

import math
import select
import ssl
import time
from collections.abc import Callable

from pbsfs.base.errors import ConnectError, PbsfsError
from pbsfs.sources.http.tls import Connection
from pbsfs.sources.server.exchanges import Exchange, Inbox
from pbsfs.sources.server.limits import ServerLimits
from pbsfs.sources.server.patience import Patience
from pbsfs.sources.server.protocol import ReaderProtocol, RefusedStreamError, Response

GATHER = 1 << 20
"""Bytes that the session receives at most before it sends waiting requests: a TLS record has 16 KiB, and a
turn for each would cost more than the bytes."""

MOMENT = 20
"""Milliseconds to wait for more bytes before the turn ends. A new request ends the wait."""

LONGEST_TURN = 0.25
"""Seconds after which a turn ends in any case: a server may send a few bytes at a time."""

LATE = 5.0
"""Seconds by which a turn has to be late to show that this process was stopped (Ctrl-Z, a container that is
paused). The silence until then says nothing of the server."""

MAX_UNSENT = 1 << 20
"""Bytes that may wait to be sent: thousands of requests, more than a working server ever leaves unread."""


class Conversation:
    """Requests and answers on one connection.

    `waiting`: the requests that were sent and have no answer yet, by number.
    """

    def __init__(
        self,
        connection: Connection,
        address: str,
        inbox: Inbox,
        tell: Callable[[Exchange, Response | Exception], None],
        greeted: Callable[[float], None],
        *,
        stall_timeout: float,
        answer_timeout: float,
        limits: ServerLimits,
    ) -> None:
        """`address`: names the server in errors. `tell`: passes an answer on to the task that waits for it.
        `greeted`: receives the round trip in seconds, as measured by the server's first answer."""
        self._connection = connection
        self._address = address
        self._inbox = inbox
        self._tell = tell
        self._greeted = greeted
        self._stall_timeout = stall_timeout
        self._answer_timeout = answer_timeout
        self._limits = limits
        self._protocol = ReaderProtocol(limits)
        self.waiting: dict[int, Exchange] = {}

    def serve(self, early: bytes) -> None:
        """Sends and receives until the session is closed. `early`: bytes received behind the upgrade.

        Raises ConnectError and OSError when the connection fails.
        """
        sock = self._connection.socket
        protocol = self._protocol
        sock.setblocking(False)
        poll = select.poll()
        poll.register(self._inbox.descriptor, select.POLLIN)
        unsent = b""
        self._take_early(early)
        started = time.monotonic()
        patience = Patience(self._stall_timeout, self._limits.pacing.least_try, started)
        awaited = ""
        greeted = False
        due = math.inf  # when the next turn begins at the latest
        while not self._inbox.closing:
            self._take_requests()
            now = time.monotonic()
            if now > due + LATE:
                patience.restart(now)
                protocol.restart(now)
            before, awaited = awaited, self._awaited()
            if awaited != before:
                patience.restart(now)
            if awaited:
                patience.until = self._until()
                if patience.over(now):
                    raise ConnectError(f"{self._address}: {awaited} for {patience.silence(now):.0f} s")
                if protocol.busy and patience.to_ask(now):
                    protocol.ping()
                self._give_up_overdue(now)
            unsent = _send(sock, unsent + protocol.outgoing())
            if len(unsent) > MAX_UNSENT:
                raise ConnectError(f"{self._address}: accepts no more data")
            poll.register(sock, select.POLLIN | (select.POLLOUT if unsent else 0))
            # An idle session waits without a limit: the pool closes sessions that are not used.
            left = self._time_left(patience, now) if awaited else None
            due = math.inf if left is None else now + left
            if not sock.pending():
                ready = poll.poll(None if left is None else left * 1000 + 1)
                if any(fd == self._inbox.descriptor for fd, _event in ready):
                    self._inbox.clear()
            progress = protocol.progress
            self._receive(sock, poll)
            if protocol.progress != progress:
                patience.restart(time.monotonic())
            if protocol.greeted and not greeted:
                greeted = True
                greeting = time.monotonic() - started
                self._greeted(max(self._connection.round_trip, greeting))

    def close(self) -> None:
        """Lets go of what was received."""
        self._protocol.close()

    def _awaited(self) -> str:
        """What the server does not do while pbsfs waits, in the words of an error; empty while idle."""
        if self._protocol.busy:
            return "no answer"
        return "allows no requests" if self._inbox.requests else ""

    def _until(self) -> float:
        """When the limit of the first request that waits for an answer, or to be sent, ends."""
        until = min((exchange.until for exchange in self.waiting.values()), default=math.inf)
        return min(until, self._inbox.requests[0].until) if self._inbox.requests else until

    def _give_up_overdue(self, now: float) -> None:
        """Fails the requests that a reachable server does not answer."""
        text = f"{self._address}: no answer for {self._answer_timeout:.0f} s, though the server is reachable"
        for number in self._protocol.overdue(now - self._answer_timeout):
            self._protocol.cancel(number)
            exchange = self.waiting.pop(number)
            error = ConnectError(text)
            error.retryable = now < exchange.until  # waiting as long once more does not help
            self._tell(exchange, error)

    def _time_left(self, patience: Patience, now: float) -> float:
        """Seconds until there is something to do, if nothing arrives."""
        left = patience.left(now)
        if self._protocol.oldest is not None:
            left = min(left, self._protocol.oldest + self._answer_timeout - now)
        return max(0.0, left)

    def _take_requests(self) -> None:
        while self._inbox.requests and self._protocol.room > 0:
            exchange = self._inbox.requests.popleft()
            if exchange.given_up:
                continue
            try:
                exchange.number = self._protocol.request(exchange.path, exchange.limit, time.monotonic())
            except ConnectError:
                self._inbox.requests.appendleft(exchange)  # fails with the rest
                raise
            self.waiting[exchange.number] = exchange
        while self._inbox.cancelled:
            number = self._inbox.cancelled.popleft().number
            if number is not None and self.waiting.pop(number, None) is not None:
                self._protocol.cancel(number)

    def _take_early(self, early: bytes) -> None:
        while early:
            target = self._protocol.target()
            count = min(len(target), len(early))
            target[:count] = early[:count]
            early = early[count:]
            self._pass_on(self._protocol.received(count, time.monotonic()))

    def _receive(self, sock: ssl.SSLSocket, poll: select.poll) -> None:
        """Receives up to `GATHER` bytes, until there is something else to do.

        Raises ConnectError at the end of the connection.
        """
        protocol = self._protocol
        total = 0
        until = time.monotonic() + LONGEST_TURN
        only_this = [(sock.fileno(), select.POLLIN)]
        while total < GATHER:
            count, more = fill(sock, protocol.target()[: GATHER - total], until)
            if count:
                total += count
                done = protocol.received(count, time.monotonic())
                if done:
                    self._pass_on(done)
            if more is None:
                raise ConnectError(f"{self._address}: closed the connection")
            if time.monotonic() > until:
                break
            # Within an answer the next record comes soon: a turn for each record would cost more.
            if not more and not (protocol.busy and total and poll.poll(MOMENT) == only_this):
                break

    def _pass_on(self, done: list[tuple[int, Response | PbsfsError]]) -> None:
        for number, result in done:
            exchange = self.waiting.pop(number, None)
            if exchange is None:
                continue
            if isinstance(result, RefusedStreamError) and not exchange.refused:
                # The server may have lowered its limit. If it refuses again, the caller waits and retries.
                exchange.refused, exchange.number = True, None
                self._inbox.requests.appendleft(exchange)
            else:
                self._tell(exchange, result)


def fill(sock: ssl.SSLSocket, target: memoryview, until: float) -> tuple[int, bool | None]:
    """Receives into `target` until it is full, nothing more is there, or it is `until`.

    Returns the count of bytes, and whether more may be there now: None at the end of the connection. TLS
    gives at most 16 KiB at a time, so each step of this loop costs 30,000 times for half a GiB.
    """
    count, size = 0, len(target)
    try:
        while count < size:
            received = sock.recv_into(target[count:])
            if not received:
                return count, None
            count += received
            if time.monotonic() > until:
                break
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return count, False
    return count, True


def _send(sock: ssl.SSLSocket, data: bytes) -> bytes:
    """Sends as much as possible without blocking; returns the rest."""
    while data:
        try:
            data = data[sock.send(data) :]
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            break
    return data
