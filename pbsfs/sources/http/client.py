"""HTTP/1.1 requests to one server, over a few connections that are kept.

Each request runs in a worker thread and blocks only that. Used by the sources that are
servers, in tasks of one trio loop. Answers are bounded before they are read.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.message import Message
from http.cookies import CookieError, SimpleCookie
from typing import TypeVar

import trio

from pbsfs.base.errors import ConnectError, DamageError, WrongServerError
from pbsfs.runtime.threads import in_thread
from pbsfs.sources.http.limits import DEFAULT, HttpLimits
from pbsfs.sources.http.peer import Peer
from pbsfs.sources.http.proxy import Proxy
from pbsfs.sources.http.tls import Trust, connect, connect_plain
from pbsfs.sources.http.watched import Response, SlowError
from pbsfs.sources.retry import connecting, patience_ends

log = logging.getLogger(__name__)

R = TypeVar("R")

READ_SIZE = 256 << 10
"""Bytes to receive at most before the time limit is looked at again."""

MAX_ERROR_BODY = 8000
"""Bytes of an error's body that pbsfs reads."""

SUCCESSES = (200, 206)
"""Answers whose body is what was requested, or the part of it that was."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that was received in full. `body`: of an error, at most its first few thousand bytes."""

    status: int
    body: bytes
    headers: Message

    @property
    def cookies(self) -> Mapping[str, str]:
        """The cookies that it sets: their values by name."""
        found: dict[str, str] = {}
        for line in self.headers.get_all("Set-Cookie", []):
            try:
                found |= {name: morsel.value for name, morsel in SimpleCookie(line).items()}
            except CookieError:
                continue
        return found


@dataclass(frozen=True, slots=True)
class Request:
    """`target`: path and query. `limit`: bytes of a successful answer's body at most."""

    method: str
    target: str
    headers: Mapping[str, str]
    limit: int
    body: bytes | None = None


class HttpClient:
    """Requests to one server, whose certificate is verified first."""

    def __init__(
        self,
        peer: Peer,
        trust: Trust,
        proxy: Proxy | None = None,
        limits: HttpLimits = DEFAULT,
        *,
        threads: trio.CapacityLimiter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`threads`: how many requests run at once. `clock`: seconds."""
        self._peer = peer
        self._trust = trust
        self._proxy = proxy
        self._limits = limits
        self._threads = threads
        self._clock = clock
        self._idle: list[tuple[float, http.client.HTTPConnection]] = []
        self._kept = trio.Event()  # there is an idle connection, which `tidy` closes later
        self._closed = False

    async def request(self, request: Request) -> Answer:
        """The server's answer, whatever its status. Raises SourceError, and DamageError above the limit."""
        connection = self._take_kept()
        log.debug("%s %s", request.method, request.target)
        until = patience_ends()
        if connection is not None:
            try:
                return await self._run(connection, request, until)
            except ConnectError:  # it was closed while it was idle
                if time.monotonic() >= until:
                    raise
        return await self._run(None, request, until)

    async def connect(self) -> None:
        """Makes a connection that the next request uses. Raises SourceError."""
        call = _Call(None)
        try:
            await self._open(call)
        except BaseException:
            call.give_up()
            raise
        with call.connection() as opened:
            self._keep(opened)

    async def tidy(self) -> None:
        """Closes connections that are idle for too long. Runs as long as the client is used."""
        while True:
            if not self._idle:
                self._kept = trio.Event()
                await self._kept.wait()
            await trio.sleep(self._limits.keep_time / 4)
            now = self._clock()
            for kept in [kept for kept in self._idle if now - kept[0] >= self._limits.keep_time]:
                self._idle.remove(kept)
                kept[1].close()

    def close(self) -> None:
        """Closes idle connections. The client keeps none from now on."""
        self._closed = True
        for _since, connection in self._idle:
            connection.close()
        self._idle.clear()

    def _take_kept(self) -> http.client.HTTPConnection | None:
        now = self._clock()
        while self._idle:
            since, connection = self._idle.pop()
            if now - since < self._limits.keep_time:
                return connection
            connection.close()
        return None

    async def _run(
        self, connection: http.client.HTTPConnection | None, request: Request, until: float
    ) -> Answer:
        call = _Call(connection)

        def exchange() -> tuple[Answer, http.client.HTTPConnection]:
            with call.connection() as used:
                return _exchange(used, request, self._peer, self._limits, until), used

        try:
            if connection is None:
                await self._open(call)
            answer, used = await self._in_thread(exchange)
        except BaseException:
            call.give_up()
            raise
        self._keep(used)
        return answer

    async def _open(self, call: _Call) -> None:
        with connecting(self._peer.address):
            await self._in_thread(lambda: call.open(self._connect))

    def _keep(self, connection: http.client.HTTPConnection) -> None:
        if (
            connection.sock is not None
            and len(self._idle) < self._limits.kept_connections
            and not self._closed
        ):
            self._idle.append((self._clock(), connection))
            self._kept.set()
        else:
            connection.close()

    async def _in_thread(self, work: Callable[[], R]) -> R:
        return await in_thread(work, limiter=self._threads, abandon_on_cancel=True)

    def _connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self._peer.host, self._peer.port)
        answers = functools.partial(Response, limits=self._limits)
        connection.response_class = answers  # type: ignore[assignment]  # only called
        if self._peer.secure:
            connection.sock = connect(self._peer, self._trust, self._proxy, self._limits).socket
        else:
            connection.sock = connect_plain(self._peer, self._proxy, self._limits)
        connection.sock.settimeout(self._limits.request_timeout)
        return connection


class _Call:
    """Makes sure that a request's connection is closed when the request fails or is cancelled.

    Cancelling does not wait for a thread that uses the connection: it cuts the connection, and the thread
    closes it.
    """

    def __init__(self, connection: http.client.HTTPConnection | None) -> None:
        self._connection = connection
        self._in_use = False
        self._given_up = False
        self._lock = threading.Lock()

    def open(self, make: Callable[[], http.client.HTTPConnection]) -> None:
        """Makes the connection; for a thread."""
        opened = make()
        try:
            with self._lock:
                self._check()
                self._connection = opened
        except BaseException:
            opened.close()
            raise

    @contextlib.contextmanager
    def connection(self) -> Iterator[http.client.HTTPConnection]:
        """The connection, to use it; for a thread."""
        used = self._connection
        assert used is not None
        try:
            with self._lock:
                self._check()
                self._in_use = True
            yield used
            with self._lock:
                self._check()
                self._in_use = False
        except BaseException:
            used.close()
            raise

    def _check(self) -> None:
        if self._given_up:
            raise ConnectError("request cancelled")

    def give_up(self) -> None:
        """The request failed or was cancelled."""
        with self._lock:
            self._given_up = True
            if self._connection is None:
                return
            if not self._in_use:
                self._connection.close()
            elif (sock := self._connection.sock) is not None:  # once: the thread may close it meanwhile
                with contextlib.suppress(OSError):
                    # Not the TLS socket's own method: after that, the thread could go on without TLS.
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _exchange(
    connection: http.client.HTTPConnection, request: Request, peer: Peer, limits: HttpLimits, until: float
) -> Answer:
    """One request on `connection`. `until`: when the limit of its
    retries ends, from which on the server may be silent for `least_try` seconds only.

    Raises ConnectError, WrongServerError, DamageError (above the limit).
    """
    address = peer.address
    connection.auto_open = 0  # http.client must not open a connection, which would not be verified
    sock = connection.sock
    timeout = limits.request_timeout

    def start_waiting() -> None:
        nonlocal timeout
        timeout = min(limits.request_timeout, max(limits.pacing.least_try, until - time.monotonic()))
        if sock is not None:
            sock.settimeout(timeout)

    try:
        start_waiting()
        connection.request(request.method, request.target, body=request.body, headers=dict(request.headers))
        # Closed in any case: the last answer on a connection owns its socket.
        with connection.getresponse() as response:
            limit = request.limit if response.status in SUCCESSES else MAX_ERROR_BODY
            data = read_bounded(response, limit, start_waiting)
    except TimeoutError:
        raise ConnectError(f"{address}: no answer for {timeout:.0f} s") from None
    except SlowError as error:
        raise ConnectError(
            f"{address}: an answer is too slow, {error.received} bytes in {error.seconds:.0f} s; check the "
            "network and the server, then try again"
        ) from None
    except (http.client.RemoteDisconnected, http.client.IncompleteRead, http.client.NotConnected):
        raise _cut(address) from None
    except http.client.BadStatusLine as error:
        if _is_cut(str(error.args[0])):
            raise _cut(address) from None
        raise WrongServerError(
            f"{address} does not answer as {peer.kind.name} does; {peer.kind.check_address}"
        ) from None
    except OSError as error:
        raise ConnectError(f"{address}: the connection was lost: {error.strerror or error}") from None
    except (http.client.HTTPException, ValueError) as error:
        raise WrongServerError(
            f"{address} does not answer as {peer.kind.name} does ({type(error).__name__}); "
            f"{peer.kind.check_address}"
        ) from None
    if response.status in SUCCESSES and not data and response.length is None and not response.chunked:
        # Servers announce how long an answer is: the headers that do so were cut off.
        raise _cut(address)
    if len(data) > request.limit and response.status in SUCCESSES:
        del data  # otherwise the error's traceback would hold it
        raise DamageError(f"{address}: the answer has more than {request.limit} bytes")
    if response.status not in SUCCESSES or response.will_close:
        connection.close()  # its body may not have been read to the end
    return Answer(response.status, data, response.headers)


def _cut(address: str) -> ConnectError:
    return ConnectError(f"{address}: the connection was closed before the answer was complete")


def _is_cut(status_line: str) -> bool:
    """Whether it may be the beginning of a valid one: of `HTTP/1.1 200`, or less, without an end of line."""
    return len(status_line) < 12 and not status_line.endswith("\n")


def read_bounded(response: http.client.HTTPResponse, limit: int, start_waiting: Callable[[], None]) -> bytes:
    """The body, or `limit + 1` bytes of a longer one. Calls `start_waiting` before it receives."""
    if response.length is not None and response.length <= limit:
        return _read_announced(response, response.length, start_waiting)
    parts = []
    size = 0
    while size <= limit:
        start_waiting()
        part = response.read1(min(READ_SIZE, limit + 1 - size))
        if not part:
            break
        parts.append(part)
        size += len(part)
    if response.length and size <= limit:  # what was announced and did not come
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _read_announced(
    response: http.client.HTTPResponse, size: int, start_waiting: Callable[[], None]
) -> bytes:
    """A body of `size` bytes, received into its place."""
    buffer = io.BytesIO(bytes(size))  # `getvalue` copies nothing once the view is released
    with buffer.getbuffer() as view:
        received = 0
        while received < size:
            start_waiting()
            # Released at once: a traceback that held it would keep the buffer from being closed.
            with view[received : received + READ_SIZE] as part:
                count = response.readinto(part)
            if not count:
                raise http.client.IncompleteRead(b"", size - received)
            received += count
    return buffer.getvalue()
