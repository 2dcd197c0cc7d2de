"""The server's HTTP API: logging in, and lists.

Blocking requests over a few kept connections, run in worker threads; called from tasks of one trio
loop. Answers are bounded before they are read, and parsed by `listing`. The ticket of a password login
is renewed long before it ends, so a mount can go on for weeks.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any, TypeVar

import trio

from pbsfs.base.errors import (
    AuthError,
    ConnectError,
    DamageError,
    ForbiddenError,
    NotFoundError,
    NotPbsError,
    PbsfsError,
    SourceError,
    UnavailableError,
    UnknownDatastoreError,
    UnknownRealmError,
)
from pbsfs.base.secret import Secret
from pbsfs.base.text import first_of, one_line
from pbsfs.sources.retry import SharedTry, connecting
from pbsfs.sources.server.limits import DEFAULT, ServerLimits
from pbsfs.sources.server.proxy import Proxy
from pbsfs.sources.server.refusals import (
    MAX_ERROR_TEXT,
    Meaning,
    meaning_of,
    meaning_of_file,
    words_of,
)
from pbsfs.sources.server.repository import Repository
from pbsfs.sources.server.tls import Trust, connect

log = logging.getLogger(__name__)

R = TypeVar("R")

COOKIES = ("PBSAuthCookie", "__Host-PBSAuthCookie")
"""Servers up to 3.x read the first, 4.x prefers the second."""


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes
    cookies: Mapping[str, str]

    @property
    def words(self) -> str:
        """An error's text, as one line that is fit to be shown."""
        return words_of(self.body, self.status)

    @property
    def meaning(self) -> Meaning:
        """What an error says, of an answer to anything but a download."""
        return meaning_of(self.status, self.words)


class Api:
    """The API of one server, as one user."""

    def __init__(
        self,
        repository: Repository,
        secret: Secret,
        trust: Trust,
        proxy: Proxy | None = None,
        threads: int = 8,
        limits: ServerLimits = DEFAULT,
    ) -> None:
        self.repository = repository
        self.trust = trust
        self.proxy = proxy
        self.limits = limits
        self._secret = secret
        self._threads = trio.CapacityLimiter(threads)
        self._idle: list[tuple[float, http.client.HTTPConnection]] = []
        self._kept = trio.Event()  # there is an idle connection to be closed some day
        self._ticket: Secret | None = None
        self._ticket_time = 0.0
        self._closed = False
        self._logging_in = SharedTry[Secret]()

    async def headers(self) -> dict[str, str]:
        """The headers that say who asks; logs in, or renews the ticket, where that is due."""
        if self.repository.token is not None:
            secret = urllib.parse.quote(self._secret.reveal(), safe="")  # the server decodes it
            return {"Authorization": f"PBSAPIToken {self.repository.auth_id}:{secret}"}
        return _cookie(await self._logging_in.run(self._kept_ticket, self._log_in))

    def _kept_ticket(self) -> Secret | None:
        """The ticket, unless it has to be renewed."""
        return self._ticket if time.monotonic() - self._ticket_time <= self.limits.ticket_renewal else None

    def forget_ticket(self, headers: Mapping[str, str]) -> bool:
        """The server refused `headers`: whether they held a ticket, and logging in again may help.

        A ticket that came since, for another request that was refused, is kept.
        """
        if self._ticket is not None and headers == _cookie(self._ticket):
            self._ticket = None
        return "Cookie" in headers

    async def greet(self) -> None:
        """Asks something harmless, to know that it is a server and accepts who asks.

        Raises NotPbsError, AuthError and others of SourceError's kin.
        """
        try:
            await self.get("/version", {})
        except NotFoundError as error:
            raise NotPbsError(f"{error}: is it a Proxmox Backup Server?") from None

    async def get(
        self,
        path: str,
        parameters: Mapping[str, str],
        parse: Callable[[Any], Any] = lambda data: data,
    ) -> Any:
        """What `parse` makes of the `data` of the answer to GET `path` (below `/api2/json`).

        Large answers are parsed in a worker thread, so `parse` has to be pure. Raises SourceError and its
        kin, NotFoundError, and what `parse` raises.
        """
        answer = await self._get(path, parameters, self.limits.max_list, meaning_of)
        where = f"{self.repository.address}: the answer to {path}"
        if len(answer.body) <= self.limits.parse_at_once:
            return _parsed(answer.body, parse, where, self.limits.max_values)
        return await trio.to_thread.run_sync(
            _parsed,
            answer.body,
            parse,
            where,
            self.limits.max_values,
            limiter=self._threads,
            abandon_on_cancel=True,
        )

    async def download(self, path: str, parameters: Mapping[str, str], limit: int) -> bytes:
        """The body of the answer to GET `path`; DamageError above `limit` bytes, and for what the server
        calls broken."""
        return (await self._get(path, parameters, limit, meaning_of_file)).body

    async def tidy(self) -> None:
        """Closes connections that lay idle for long; runs as long as the API is used."""
        while True:
            if not self._idle:
                self._kept = trio.Event()
                await self._kept.wait()
            await trio.sleep(self.limits.keep_time / 4)
            now = time.monotonic()
            for kept in [kept for kept in self._idle if now - kept[0] >= self.limits.keep_time]:
                self._idle.remove(kept)
                kept[1].close()

    def close(self) -> None:
        self._closed = True
        for _since, connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _get(
        self,
        path: str,
        parameters: Mapping[str, str],
        limit: int,
        meaning: Callable[[int, str], Meaning],
    ) -> _Answer:
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        headers = await self.headers()
        answer = await self._request("GET", f"/api2/json{path}{query}", headers, limit=limit)
        if answer.status != 200 and answer.meaning is Meaning.NOT_ACCEPTED and self.forget_ticket(headers):
            # Its time is over, or the server has a new key.
            headers = await self.headers()
            answer = await self._request("GET", f"/api2/json{path}{query}", headers, limit=limit)
        if answer.status != 200:
            raise self.error(meaning(answer.status, answer.words), answer.status, answer.words)
        return answer

    def error(self, meaning: Meaning, status: int, words: str) -> PbsfsError:
        """The error for an answer that means so, of `status` and with its text."""
        server, user = self.repository.address, self.repository.auth_id
        match meaning:
            case Meaning.NOT_ACCEPTED:
                return AuthError(f"{server} does not accept {user}: {words}")
            case Meaning.FORBIDDEN:
                return ForbiddenError(f"{server} does not allow it to {user}: {words}")
            case Meaning.MISSING:
                return NotFoundError(f"{server}: {words}")
            case Meaning.DAMAGED:
                return DamageError(f"the server can't read it: {words}")
            case Meaning.NO_DATASTORE:
                return UnknownDatastoreError(f"{server}: {words}")
            case Meaning.MAINTENANCE:
                return UnavailableError(f"{server}: {words}")
            case Meaning.LOCKED:
                return UnavailableError(f"{server}: it is being written, removed or the like: {words}")
            case Meaning.NOT_PBS:
                return NotPbsError(
                    f"{server} answers with status {status} ({words}): is it a Proxmox Backup Server?"
                )
            case Meaning.PASSING:
                return SourceError(f"{server}: status {status}: {words}", retryable=True)
            case Meaning.DELETING | Meaning.REFUSED:
                return SourceError(f"{server}: status {status}: {words}")

    async def _log_in(self) -> Secret:
        """With the old ticket while it is good, else with the password."""
        if self._ticket is not None:
            answer = await self._post_ticket(self._ticket)
            if answer.status == 200:
                return self._take_ticket(answer)
            log.debug("the ticket was not renewed (status %d); logging in again", answer.status)
        answer = await self._post_ticket(self._secret)
        if answer.status != 200 and answer.meaning is Meaning.NOT_ACCEPTED:
            raise await self._refused(answer.words)
        if answer.status in (404, 405):
            raise NotPbsError(
                f"{self.repository.address} knows no login ({answer.words}): is it a Proxmox Backup Server?"
            )
        if answer.status != 200:
            raise self.error(answer.meaning, answer.status, answer.words)
        return self._take_ticket(answer)

    async def _post_ticket(self, secret: Secret) -> _Answer:
        body = json.dumps({"username": self.repository.user, "password": secret.reveal()}).encode()
        headers = {"Content-Type": "application/json"}
        return await self._request("POST", "/api2/json/access/ticket", headers, body=body, limit=1 << 20)

    def _take_ticket(self, answer: _Answer) -> Secret:
        try:
            ticket = json.loads(answer.body)["data"].get("ticket") or answer.cookies.get(COOKIES[1])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            ticket = None
        if not isinstance(ticket, str) or not ticket:
            raise NotPbsError(f"{self.repository.address} returned an invalid login ticket")
        if ":!tfa!" in ticket or "!tfa!" in ticket.partition("::")[0]:
            raise AuthError(
                f"{self.repository.user} logs in with a second factor, which can't be given here: "
                f"make an API token for it on the server and use that"
            )
        self._ticket = Secret(ticket)
        self._ticket_time = time.monotonic()
        return self._ticket

    async def _refused(self, words: str) -> AuthError:
        """Why a login failed: the server tells wrong passwords and unknown realms by the same words."""
        server, user = self.repository.address, self.repository.user
        try:
            answer = await self._request("GET", "/api2/json/access/domains", {}, limit=1 << 20)
            realms = [entry["realm"] for entry in json.loads(answer.body)["data"]]
        except (SourceError, DamageError, ValueError, KeyError, TypeError, RecursionError):
            realms = []
        if realms and self.repository.realm not in realms:
            there = one_line(first_of(str(realm)[:100] for realm in realms))
            return UnknownRealmError(
                f"{server} has no realm '{self.repository.realm}' (of {user}); there is {there}: {words}"
            )
        return AuthError(f"{server} does not accept {user} and this password: {words}")

    async def _request(
        self, method: str, target: str, headers: Mapping[str, str], *, body: bytes | None = None, limit: int
    ) -> _Answer:
        connection = self._take_kept()
        log.debug("%s %s", method, target)
        if connection is not None:
            try:
                return await self._in_thread(connection, method, target, headers, body, limit)
            except ConnectError:
                pass  # it was closed while it lay idle
        return await self._in_thread(None, method, target, headers, body, limit)

    def _take_kept(self) -> http.client.HTTPConnection | None:
        now = time.monotonic()
        while self._idle:
            since, connection = self._idle.pop()
            if now - since < self.limits.keep_time:
                return connection
            connection.close()
        return None

    async def _in_thread(
        self,
        connection: http.client.HTTPConnection | None,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes | None,
        limit: int,
    ) -> _Answer:
        call = _Call(connection)

        def work() -> tuple[_Answer, http.client.HTTPConnection]:
            with call.connection() as used:
                return _exchange(used, method, target, headers, body, limit), used

        def open_connection() -> None:
            call.open(self.repository, self.trust, self.proxy, self.limits)

        try:
            if connection is None:
                with connecting(self.repository.address):
                    await trio.to_thread.run_sync(
                        open_connection, limiter=self._threads, abandon_on_cancel=True
                    )
            answer, used = await trio.to_thread.run_sync(work, limiter=self._threads, abandon_on_cancel=True)
        except BaseException:
            call.give_up()
            raise
        if used.sock is not None and len(self._idle) < self.limits.kept_connections and not self._closed:
            self._idle.append((time.monotonic(), used))
            self._kept.set()
        else:
            used.close()
        return answer


class _Call:
    """Sees to it that a request's connection is closed when the request fails or is given up.

    A thread that is in the middle of it is not waited for: its connection is cut, and it closes that itself.
    """

    def __init__(self, connection: http.client.HTTPConnection | None) -> None:
        self._connection = connection
        self._in_use = False
        self._given_up = False
        self._lock = threading.Lock()

    def open(self, repository: Repository, trust: Trust, proxy: Proxy | None, limits: ServerLimits) -> None:
        """Makes a connection, where there is none; for a thread."""
        opened = _open(repository, trust, proxy, limits)
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
            raise ConnectError("nobody waits for the answer any more")

    def give_up(self) -> None:
        """Nobody waits any more; also after a failure."""
        with self._lock:
            self._given_up = True
            if self._connection is None:
                return
            if not self._in_use:
                self._connection.close()
            elif self._connection.sock is not None:
                with contextlib.suppress(OSError):
                    # Not the TLS socket's own way: that would let the thread go on without TLS.
                    socket.socket.shutdown(self._connection.sock, socket.SHUT_RDWR)


def _open(
    repository: Repository, trust: Trust, proxy: Proxy | None, limits: ServerLimits
) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(repository.host, repository.port)
    connection.sock = connect(repository, trust, proxy, limits).socket
    connection.sock.settimeout(limits.request_timeout)
    return connection


def _exchange(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    headers: Mapping[str, str],
    body: bytes | None,
    limit: int,
) -> _Answer:
    """One request on `connection`. Raises ConnectError, NotPbsError, DamageError (above `limit`)."""
    where = f"{connection.host}:{connection.port}"
    # Never on a connection that http.client would open by itself, which nobody verified.
    assert connection.sock is not None
    connection.auto_open = 0
    try:
        connection.request(method, target, body=body, headers=dict(headers))
        # Closed in any case: the last answer on a connection owns its socket.
        with connection.getresponse() as response:
            data = _read_bounded(response, limit if response.status == 200 else 4 * MAX_ERROR_TEXT)
    except TimeoutError:
        raise ConnectError(f"{where}: no answer for {connection.sock.gettimeout():.0f} s") from None
    except (http.client.RemoteDisconnected, http.client.IncompleteRead, http.client.NotConnected):
        raise ConnectError(f"{where}: the connection was closed in the middle") from None
    except http.client.BadStatusLine as error:
        if _is_cut(str(error.args[0])):
            raise ConnectError(f"{where}: the connection was closed in the middle") from None
        raise NotPbsError(f"{where} does not answer as a Proxmox Backup Server does") from None
    except OSError as error:
        raise ConnectError(f"{where}: the connection was lost: {error.strerror or error}") from None
    except (http.client.HTTPException, ValueError) as error:
        raise NotPbsError(
            f"{where} does not answer as a Proxmox Backup Server does ({type(error).__name__})"
        ) from None
    if response.status == 200 and not data and response.length is None and not response.chunked:
        # Servers tell how long an answer is: the headers that say so were cut off.
        raise ConnectError(f"{where}: the connection was closed in the middle")
    if len(data) > limit and response.status == 200:
        del data  # the error holds on to what is here
        raise DamageError(f"{where}: the answer has more than {limit} bytes")
    if response.status != 200 or response.will_close:
        connection.close()  # its body may not have been read to the end
    return _Answer(response.status, data, _cookies(response))


def _read_bounded(response: http.client.HTTPResponse, limit: int) -> bytes:
    parts = []
    size = 0
    while size <= limit and (part := response.read(min(1 << 20, limit + 1 - size))):
        parts.append(part)
        size += len(part)
    if response.length and size <= limit:  # what was announced and did not come
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _cookies(response: http.client.HTTPResponse) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in response.headers.get_all("Set-Cookie", []):
        try:
            found |= {name: morsel.value for name, morsel in SimpleCookie(line).items()}
        except CookieError:
            continue
    return found


def _is_cut(status_line: str) -> bool:
    """Whether it may be the begin of a good one: `HTTP/1.1 200`, less of it, and no end of line."""
    return len(status_line) < 12 and not status_line.endswith("\n")


def _parsed(body: bytes, parse: Callable[[Any], R], where: str, max_values: int) -> R:
    # Counted before there are any: the shortest value takes two bytes here, and 50 times that as an object.
    if sum(map(body.count, (b",", b"[", b"{"))) > max_values:
        raise NotPbsError(f"{where} has more than {max_values} values")
    try:
        # The hook does nothing, but it is Python: between two calls the loop gets a turn, which the parser,
        # being C, would not let it have before the end.
        data = json.loads(body, object_hook=lambda entry: entry)["data"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise NotPbsError(f"{where} makes no sense") from None
    return parse(data)


def _cookie(ticket: Secret) -> dict[str, str]:
    quoted = urllib.parse.quote(ticket.reveal(), safe="")
    return {"Cookie": "; ".join(f"{name}={quoted}" for name in COOKIES)}
