"""A reader session: one TLS connection to one snapshot, in a thread of its own.

The thread connects, upgrades, sends requests and receives answers; only this thread uses the socket. Tasks of
the trio loop hand over requests and wait. When a session fails, all its outstanding requests fail, and the
pool opens another. Used by `pool` through `opening`.

The session sends at most as many requests at once as the server allows; the others wait in it.

The limit on time is on signs of life, not on the whole answer: a server that fetches a chunk from an object
store may be silent for minutes. While an answer is outstanding and nothing arrives, the session asks by PING.
It fails if the server gives no sign of life for `stall_timeout` seconds; after the limit of a waiting request
(`retry.patience_ends`), for `Pacing.least_try` seconds. The session gives up an answer that does not grow for
`answer_timeout` seconds even if the server lives.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

import trio

from pbsfs.base.errors import ConnectError, PbsfsError, SourceError
from pbsfs.sources.retry import patience_ends
from pbsfs.sources.server.limits import DEFAULT, ServerLimits
from pbsfs.sources.server.patience import Patience
from pbsfs.sources.server.protocol import ReaderProtocol, RefusedStreamError, Response
from pbsfs.sources.server.proxy import Proxy
from pbsfs.sources.server.repository import Repository
from pbsfs.sources.server.tls import Connection, Trust, connect
from pbsfs.sources.server.upgrade import RefusedError, upgrade

log = logging.getLogger(__name__)

GATHER = 1 << 20
"""Bytes that the session receives at most before it sends waiting requests: a TLS record has 16 KiB, and a
turn for each would cost more than the bytes."""

MOMENT = 20
"""Milliseconds to wait for more bytes before the turn ends. A new request ends the wait."""

LONGEST_TURN = 0.25
"""Seconds after which a turn ends in any case: a server may send a few bytes at a time."""

MAX_UNSENT = 1 << 20
"""Bytes that may wait to be sent: thousands of requests, more than a working server ever leaves unread."""


class _Exchange:
    """A request and the place for its answer.

    `until`: the time of `time.monotonic()` at which the limit of its retries ends. `given_up`: the caller was
    cancelled. `number`: the answer's, once the request was sent. `refused`: the server refused the request
    once.
    """

    __slots__ = ("answered", "given_up", "limit", "number", "path", "refused", "result", "until")

    def __init__(self, path: str, limit: int, until: float = math.inf) -> None:
        self.path = path
        self.limit = limit
        self.until = until
        self.given_up = False
        self.number: int | None = None
        self.refused = False
        self.answered = trio.Event()
        self.result: Response | Exception | None = None

    def answer(self, result: Response | Exception) -> None:
        self.result = result
        self.answered.set()


class Session:
    """A session to one snapshot. `query`: names the snapshot. `headers`: authenticate the user.

    `round_trip`: seconds, measured while connecting and by the server's first answers. `in_flight`: how many
    requests have no answer yet. `when_ended`: called in the trio loop when the connection is closed, after
    which `ended` is set. Both happen once to every session that `open` was called for, whether it failed,
    was cancelled or was closed.
    """

    def __init__(
        self,
        repository: Repository,
        trust: Trust,
        proxy: Proxy | None,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        *,
        stall_timeout: float,
        answer_timeout: float,
        limits: ServerLimits = DEFAULT,
        when_ended: Callable[[Session], None] = lambda _session: None,
    ) -> None:
        self._repository = repository
        self._trust = trust
        self._proxy = proxy
        self._query = dict(query)
        self._headers = dict(headers)
        self._stall_timeout = stall_timeout
        self._answer_timeout = answer_timeout
        self._limits = limits
        self.round_trip = 0.0
        self.in_flight = 0
        self.failure: PbsfsError | None = None
        self.ended = trio.Event()
        self._when_ended = when_ended
        self._opening = _Exchange("", 0)
        self._requests: deque[_Exchange] = deque()
        self._cancelled: deque[_Exchange] = deque()
        self._connected = False
        self._closing = False
        self._wake = -1  # an eventfd while the thread runs
        self._wake_lock = threading.Lock()
        self._trio = trio.lowlevel.current_trio_token()

    @property
    def ending(self) -> bool:
        """Whether it ends now: it was closed, and is not connecting, which takes longer to end."""
        return self._closing and self._connected

    async def open(self) -> None:
        """Opens the session. Raises SourceError, its subclasses, and RefusedError if the server refuses."""
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            threading.Thread(target=self._run, name="pbsfs-session", daemon=True).start()
        except (OSError, RuntimeError) as error:  # too many descriptors or threads
            self._end(SourceError(f"a session can't be opened: {error}", retryable=True), {})
        try:
            await self._opening.answered.wait()
        except trio.Cancelled:
            self.close()
            raise
        if isinstance(self._opening.result, Exception):
            raise self._opening.result

    async def get(self, path: str, limit: int) -> Response:
        """The answer to GET `path`. Raises ConnectError when it is lost, DamageError above `limit` bytes."""
        if self.failure is not None:
            raise ConnectError(str(self.failure))
        exchange = _Exchange(path, limit, patience_ends())
        self.in_flight += 1
        try:
            self._requests.append(exchange)
            self._notify()
            await exchange.answered.wait()
        except trio.Cancelled:
            exchange.given_up = True
            self._cancelled.append(exchange)
            self._notify()
            raise
        finally:
            self.in_flight -= 1
        if isinstance(exchange.result, Response):
            return exchange.result
        assert isinstance(exchange.result, Exception)
        raise exchange.result.with_traceback(None)

    def close(self) -> None:
        """Ends the session soon; from any thread, also more than once."""
        self._closing = True
        self._notify()

    def _notify(self) -> None:
        with self._wake_lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    # --- the session's thread

    def _run(self) -> None:
        waiting: dict[int, _Exchange] = {}
        connection: Connection | None = None
        failure: Exception = ConnectError("the session was closed")
        try:
            connection = connect(self._repository, self._trust, self._proxy)
            self._connected = True
            started = time.monotonic()
            connection.socket.settimeout(self._stall_timeout)
            early = upgrade(
                connection.socket, self._repository.address, self._query, self._headers, self._receive_some
            )
            # The TCP handshake may have been that of a tunnel's near end.
            self.round_trip = max(connection.round_trip, time.monotonic() - started)
            self._tell(self._opening, Response(101, b""))
            self._serve(connection, early, waiting)
        except (PbsfsError, RefusedError) as error:
            failure = error
        except TimeoutError:
            failure = ConnectError(f"{self._repository.address}: no answer for {self._stall_timeout:.0f} s")
        except OSError as error:
            failure = ConnectError(f"{self._repository.address}: connection lost: {error.strerror or error}")
        except Exception as error:
            log.exception("a session failed with an unexpected error")
            failure = SourceError(f"{self._repository.address}: {type(error).__name__}: {error}")
        finally:
            if connection is not None:
                connection.socket.close()
            self._end(failure, waiting)

    def _end(self, failure: Exception, waiting: dict[int, _Exchange]) -> None:
        with self._wake_lock:
            if self._wake >= 0:
                os.close(self._wake)
                self._wake = -1

        def tell() -> None:
            self.failure = failure if isinstance(failure, PbsfsError) else ConnectError(str(failure))
            for exchange in (self._opening, *waiting.values(), *self._requests):
                if not exchange.answered.is_set():
                    exchange.answer(failure)
            self._requests.clear()
            self.ended.set()
            self._when_ended(self)

        self._in_trio(tell)

    def _tell(self, exchange: _Exchange, result: Response | Exception) -> None:
        self._in_trio(lambda: exchange.answer(result))

    def _in_trio(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(trio.RunFinishedError):  # no task is left that could wait
            self._trio.run_sync_soon(call)

    def _receive_some(self, sock: ssl.SSLSocket) -> bytes:
        """What arrives next, b"" at the end. Raises TimeoutError, and ConnectError when it is closed."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(sock, select.POLLIN)
        while not self._closing:
            with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return sock.recv(64 << 10)
            if not poll.poll(self._stall_timeout * 1000):
                raise TimeoutError
        raise ConnectError("the session was closed")

    def _serve(self, connection: Connection, early: bytes, waiting: dict[int, _Exchange]) -> None:
        """Sends and receives until the session is closed. Raises ConnectError and OSError when it fails."""
        sock = connection.socket
        protocol = ReaderProtocol(self._limits)
        sock.setblocking(False)
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        unsent = b""
        self._take_early(protocol, early, waiting)
        started = time.monotonic()
        patience = Patience(self._stall_timeout, self._limits.pacing.least_try, started)
        awaited = ""
        greeted = False
        while not self._closing:
            self._take_requests(protocol, waiting)
            now = time.monotonic()
            before, awaited = awaited, self._awaited(protocol)
            if awaited != before:
                patience.restart(now)
            if awaited:
                patience.until = self._until(waiting)
                if patience.over(now):
                    raise ConnectError(
                        f"{self._repository.address}: {awaited} for {patience.silence(now):.0f} s"
                    )
                if protocol.busy and patience.to_ask(now):
                    protocol.ping()
                self._give_up_overdue(protocol, waiting, now)
            unsent = _send(sock, unsent + protocol.outgoing())
            if len(unsent) > MAX_UNSENT:
                raise ConnectError(f"{self._repository.address}: accepts no more data")
            poll.register(sock, select.POLLIN | (select.POLLOUT if unsent else 0))
            if not sock.pending():
                # An idle session waits without a limit: the pool closes sessions that are not used.
                ready = poll.poll(self._time_left(protocol, patience, now) * 1000 + 1 if awaited else None)
                if any(fd == self._wake for fd, _event in ready):
                    os.eventfd_read(self._wake)
            progress = protocol.progress
            self._receive(sock, protocol, waiting, poll)
            if protocol.progress != progress:
                patience.restart(time.monotonic())
            if protocol.greeted and not greeted:
                greeted = True
                # The upgrade included the time that the server needed to open the snapshot.
                greeting = time.monotonic() - started
                self.round_trip = min(self.round_trip, max(connection.round_trip, greeting))

    def _awaited(self, protocol: ReaderProtocol) -> str:
        """What the server does not do while pbsfs waits, in the words of an error; empty while idle."""
        if protocol.busy:
            return "no answer"
        return "allows no requests" if self._requests else ""

    def _until(self, waiting: dict[int, _Exchange]) -> float:
        """When the limit of the first request that waits for an answer, or to be sent, ends."""
        until = min((exchange.until for exchange in waiting.values()), default=math.inf)
        return min(until, self._requests[0].until) if self._requests else until

    def _give_up_overdue(self, protocol: ReaderProtocol, waiting: dict[int, _Exchange], now: float) -> None:
        """Fails the requests that a reachable server does not answer."""
        text = (
            f"{self._repository.address}: no answer for {self._answer_timeout:.0f} s, "
            "though the server is reachable"
        )
        for number in protocol.overdue(now - self._answer_timeout):
            protocol.cancel(number)
            self._tell(waiting.pop(number), ConnectError(text))

    def _time_left(self, protocol: ReaderProtocol, patience: Patience, now: float) -> float:
        """Seconds until there is something to do, if nothing arrives."""
        left = patience.left(now)
        if protocol.oldest is not None:
            left = min(left, protocol.oldest + self._answer_timeout - now)
        return max(0.0, left)

    def _take_requests(self, protocol: ReaderProtocol, waiting: dict[int, _Exchange]) -> None:
        while self._requests and protocol.room > 0:
            exchange = self._requests.popleft()
            if exchange.given_up:
                continue
            try:
                exchange.number = protocol.request(exchange.path, exchange.limit, time.monotonic())
            except ConnectError:
                self._requests.appendleft(exchange)  # fails with the rest
                raise
            waiting[exchange.number] = exchange
        while self._cancelled:
            number = self._cancelled.popleft().number
            if number is not None and waiting.pop(number, None) is not None:
                protocol.cancel(number)

    def _take_early(self, protocol: ReaderProtocol, early: bytes, waiting: dict[int, _Exchange]) -> None:
        while early:
            target = protocol.target()
            count = min(len(target), len(early))
            target[:count] = early[:count]
            early = early[count:]
            self._pass_on(protocol.received(count, time.monotonic()), waiting)

    def _receive(
        self,
        sock: ssl.SSLSocket,
        protocol: ReaderProtocol,
        waiting: dict[int, _Exchange],
        poll: select.poll,
    ) -> None:
        """Receives up to `GATHER` bytes, until there is something else to do.

        Raises ConnectError at the end of the connection.
        """
        total = 0
        until = time.monotonic() + LONGEST_TURN
        only_this = [(sock.fileno(), select.POLLIN)]
        while total < GATHER:
            try:
                count = sock.recv_into(protocol.target())
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                # Within an answer the next record comes soon: a turn for each record would cost more.
                if protocol.busy and total and time.monotonic() < until and poll.poll(MOMENT) == only_this:
                    continue
                break
            if count == 0:
                raise ConnectError(f"{self._repository.address}: closed the connection")
            total += count
            done = protocol.received(count, time.monotonic())
            if done:
                self._pass_on(done, waiting)

    def _pass_on(self, done: list[tuple[int, Response | PbsfsError]], waiting: dict[int, _Exchange]) -> None:
        for number, result in done:
            exchange = waiting.pop(number, None)
            if exchange is None:
                continue
            if isinstance(result, RefusedStreamError) and not exchange.refused:
                # The server may have lowered its limit. If it refuses again, the caller waits and retries.
                exchange.refused, exchange.number = True, None
                self._requests.appendleft(exchange)
            else:
                self._tell(exchange, result)


def _send(sock: ssl.SSLSocket, data: bytes) -> bytes:
    """Sends as much as possible without blocking; returns the rest."""
    while data:
        try:
            data = data[sock.send(data) :]
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            break
    return data
