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
import copy
import logging
import select
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping

import trio

from pbsfs.base.errors import ConnectError, PbsfsError, SourceError
from pbsfs.runtime.stats import COUNTS
from pbsfs.runtime.threads import start
from pbsfs.sources.http.proxy import Proxy
from pbsfs.sources.http.tls import Connection, Trust, connect
from pbsfs.sources.retry import patience_ends
from pbsfs.sources.server.conversation import Conversation
from pbsfs.sources.server.exchanges import Exchange, Inbox
from pbsfs.sources.server.limits import DEFAULT, ServerLimits
from pbsfs.sources.server.protocol import Response
from pbsfs.sources.server.repository import Repository
from pbsfs.sources.server.upgrade import RefusedError, upgrade

log = logging.getLogger(__name__)


class Session:
    """A session to one snapshot. `query`: names the snapshot.

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
        self._headers: dict[str, str] | None = None
        self._stall_timeout = stall_timeout
        self._answer_timeout = answer_timeout
        self._limits = limits
        self.round_trip = 0.0
        self.in_flight = 0
        self.failure: PbsfsError | None = None
        self.ended = trio.Event()
        self._when_ended = when_ended
        self._opening = Exchange("", 0)
        self._inbox = Inbox()
        self._connected = False
        self._trio = trio.lowlevel.current_trio_token()

    @property
    def ending(self) -> bool:
        """Whether it ends now: it was closed, and is not connecting, which takes longer to end."""
        return self._inbox.closing and self._connected

    async def open(self, headers: Callable[[], Awaitable[Mapping[str, str]]]) -> None:
        """Opens the session. `headers`: returns those that authenticate the user; a login that this needs
        takes place while the session connects.

        Raises SourceError, its subclasses, RefusedError if the server refuses, and what `headers` raises.
        """
        COUNTS.sessions += 1  # until `_end`
        try:
            self._inbox.open()
            start(threading.Thread(target=self._run, name="pbsfs-session", daemon=True))
        except OSError as error:
            text = (
                f"a session can't be opened: {error.strerror}; allow this process more open files (ulimit -n)"
            )
            self._end(SourceError(text, retryable=True), ())
        except SourceError as error:  # no thread
            self._end(error, ())
        try:
            self._headers = dict(await headers())
            self._inbox.notify()
            await self._opening.answered.wait()
        except BaseException:  # the login failed, or the task was cancelled
            self.close()
            raise
        if isinstance(self._opening.result, Exception):
            raise _own(self._opening.result)
        COUNTS.sessions_opened += 1

    async def get(self, path: str, limit: int) -> Response:
        """The answer to GET `path`. Raises ConnectError when it is lost, DamageError above `limit` bytes."""
        if self.failure is not None:
            raise ConnectError(str(self.failure))
        exchange = Exchange(path, limit, patience_ends())
        self.in_flight += 1
        try:
            self._inbox.add(exchange)
            await exchange.answered.wait()
        except trio.Cancelled:
            self._inbox.cancel(exchange)
            raise
        finally:
            self.in_flight -= 1
        if isinstance(exchange.result, Response):
            return exchange.result
        assert isinstance(exchange.result, Exception)
        raise _own(exchange.result)

    def close(self) -> None:
        """Ends the session soon; from any thread, also more than once."""
        self._inbox.close()

    # --- the session's thread

    def _run(self) -> None:
        connection: Connection | None = None
        conversation: Conversation | None = None
        failure: Exception = ConnectError("the session was closed")
        try:
            connection = connect(self._repository, self._trust, self._proxy, self._limits)
            self._connected = True
            headers = self._wait_for_headers()
            started = time.monotonic()
            connection.socket.settimeout(self._stall_timeout)
            early = upgrade(
                connection.socket, self._repository.address, self._query, headers, self._receive_some
            )
            # The TCP handshake may have been that of a tunnel's near end.
            self.round_trip = max(connection.round_trip, time.monotonic() - started)
            self._tell(self._opening, Response(101, b""))
            conversation = Conversation(
                connection,
                self._repository.address,
                self._inbox,
                self._tell,
                self._greeted,
                stall_timeout=self._stall_timeout,
                answer_timeout=self._answer_timeout,
                limits=self._limits,
            )
            conversation.serve(early)
        except (PbsfsError, RefusedError) as error:
            failure = error.with_traceback(None)  # its frames would keep what was received
            failure.__context__ = None
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
            if conversation is not None:
                conversation.close()
            self._end(failure, conversation.waiting.values() if conversation is not None else ())

    def _greeted(self, round_trip: float) -> None:
        # The upgrade included the time that the server needed to open the snapshot.
        self.round_trip = min(self.round_trip, round_trip)

    def _end(self, failure: Exception, waiting: Iterable[Exchange]) -> None:
        self._inbox.end()

        def tell() -> None:
            COUNTS.sessions -= 1
            self.failure = failure if isinstance(failure, PbsfsError) else ConnectError(str(failure))
            for exchange in (self._opening, *waiting, *self._inbox.requests):
                if not exchange.answered.is_set():
                    exchange.answer(failure)
            self._inbox.requests.clear()
            self.ended.set()
            self._when_ended(self)

        self._in_trio(tell)

    def _tell(self, exchange: Exchange, result: Response | Exception) -> None:
        self._in_trio(lambda: exchange.answer(result))

    def _in_trio(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(trio.RunFinishedError):  # no task is left that could wait
            self._trio.run_sync_soon(call)

    def _wait_for_headers(self) -> Mapping[str, str]:
        """What authenticates the user. Raises ConnectError when the session is closed."""
        poll = select.poll()
        poll.register(self._inbox.descriptor, select.POLLIN)
        while not self._inbox.closing:
            poll.poll()
            self._inbox.clear()
            if self._headers is not None:
                return self._headers
        raise ConnectError("the session was closed")

    def _receive_some(self, sock: ssl.SSLSocket) -> bytes:
        """What arrives next, b"" at the end. Raises TimeoutError, and ConnectError when it is closed."""
        poll = select.poll()
        poll.register(self._inbox.descriptor, select.POLLIN)
        poll.register(sock, select.POLLIN)
        while not self._inbox.closing:
            with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return sock.recv(64 << 10)
            if not poll.poll(self._stall_timeout * 1000):
                raise TimeoutError
        raise ConnectError("the session was closed")


def _own(failure: Exception) -> Exception:
    """An error of its own for each task: a raised one refers to the frames of its task, and so to what that
    reads when it tries again, and the session keeps its failure."""
    return copy.copy(failure) if isinstance(failure, PbsfsError) else failure
