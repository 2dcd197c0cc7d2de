"""The reference server itself: a thread with a trio loop that listens and serves.

Tests use it as a context manager, from any thread, trio loop or process. All that the server does
happens in its own loop; what tests set (accounts, faults, clock, link) takes effect with the next
request or connection. An error in the server that nobody has scripted fails the test at the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import trio

from pbsfs.base.names import Snapshot
from tests.support.server import certificate
from tests.support.server.accounts import COOKIES, READER, Accounts
from tests.support.server.answers import Request
from tests.support.server.api import Api
from tests.support.server.clock import Clock
from tests.support.server.datastore import Datastore
from tests.support.server.factors import Factors
from tests.support.server.faults import Faults
from tests.support.server.http1 import Service
from tests.support.server.link import SlowLink
from tests.support.server.listener import Listener
from tests.support.server.releases import PBS_3, Release
from tests.support.server.requests import Record, Requests
from tests.support.server.sessions import Session, Sessions

T = TypeVar("T")

LIMIT = 20.0
"""Seconds that a start, a stop or a command to the loop may take, unless something is broken."""

Grants = Mapping[str, frozenset[str]]


class ReferenceServer:
    """Serves the datastore in the directory `path` as `store`.

    `release`: the line that it answers like.
    `shown_path`: what texts show in the place of `path`. `ca_signed`: a certificate that a CA has signed,
    see `ca`, in the place of a self-signed one. `ticket_in_cookie`: as servers 4.x may do it, a login's
    ticket is in `Set-Cookie` only, and only the new cookie's name is known. `port` 0: any that is free.
    `address`: a loopback address, nothing else is ever listened on. `link`: see `SlowLink`.
    `max_streams`: requests at once in a session, 200 with servers 4.x; more are refused as hyper does.
    """

    def __init__(
        self,
        path: Path,
        *,
        store: str = "golden",
        shown_path: str | None = None,
        address: str = "127.0.0.1",
        port: int = 0,
        ca_signed: bool = False,
        release: Release = PBS_3,
        ticket_in_cookie: bool = False,
        link: SlowLink | None = None,
        max_streams: int | None = None,
    ) -> None:
        if address not in ("127.0.0.1", "::1"):
            raise ValueError(f"{address} is not a loopback address")
        self.store = store
        self.clock = Clock()
        self.accounts = Accounts(
            self.clock, COOKIES[:1] if ticket_in_cookie else COOKIES, newer=release.newer
        )
        self.faults = Faults()
        self.sessions = Sessions(self.clock, release)
        if max_streams is not None:
            self.sessions.max_streams = max_streams
        self.requests = Requests()
        self._certificate = certificate.make(ca_signed=ca_signed)
        self._datastores: dict[str, Datastore] = {}
        self.add_datastore(store, path, shown_path=shown_path)
        api = Api(self.accounts, self._datastores, release=release, ticket_in_cookie=ticket_in_cookie)
        service = Service(api, self.accounts, self.faults, self.sessions, self._note)
        self._listener = Listener(service, self._certificate.context(), address, port, link)
        self._thread: threading.Thread | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope: trio.CancelScope | None = None

    # --- what tests ask it

    @property
    def address(self) -> str:
        return self._listener.address

    @property
    def port(self) -> int:
        return self._listener.port

    @property
    def host(self) -> str:
        """The address as repository strings and URLs have it."""
        return f"[{self.address}]" if ":" in self.address else self.address

    @property
    def url(self) -> str:
        return f"https://{self.host}:{self.port}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate: 32 hex pairs with colons between them."""
        return self._certificate.fingerprint

    @property
    def ca(self) -> str | None:
        """The CA's certificate as PEM, where a CA has signed the server's."""
        return self._certificate.ca

    def repository(self, auth_id: str, *, store: str | None = None, host: str | None = None) -> str:
        """The repository string for a user or token."""
        return f"{auth_id}@{host or self.host}:{self.port}:{store or self.store}"

    @property
    def connections(self) -> int:
        """How many connections were accepted."""
        return self._listener.connections

    @property
    def open_connections(self) -> int:
        return self._listener.open_connections

    def open_sessions(self) -> list[Session]:
        """The reader sessions that are open; `sessions` knows them all, and their locks."""
        return self.sessions.open()

    # --- what tests set

    @property
    def link(self) -> SlowLink | None:
        """What connections made from now on go over."""
        return self._listener.link

    @link.setter
    def link(self, link: SlowLink | None) -> None:
        self._listener.link = link

    def add_datastore(self, name: str, path: Path, *, shown_path: str | None = None) -> None:
        self._datastores[name] = Datastore(name, path, str(path) if shown_path is None else shown_path)

    def add_user(
        self,
        user: str,
        password: str | None = None,
        *,
        grants: Grants | None = None,
        factors: Factors | None = None,
    ) -> str:
        """Adds `name@realm`; returns the password.

        `grants`: privileges by path, reading all by default. `factors`: second factors, on the clock here.
        """
        return self.accounts.add(user, password, self._grants(grants), factors=factors)

    def add_token(self, token: str, secret: str | None = None, *, grants: Grants | None = None) -> str:
        """Adds `name@realm!token`, whose user has to be there; returns the secret."""
        return self.accounts.add(token, secret, self._grants(grants))

    def _grants(self, grants: Grants | None) -> Grants:
        return {f"/datastore/{self.store}": READER} if grants is None else grants

    def remove(self, auth_id: str) -> None:
        """Revokes a token, or removes a user. Sessions that are open go on, as they do on a real server."""
        self.accounts.remove(auth_id)

    @contextmanager
    def locked(self, snapshot: Snapshot) -> Iterator[None]:
        """Holds a snapshot locked, as a running backup or a delete does."""
        self.sessions.lock(snapshot)
        try:
            yield
        finally:
            self.sessions.unlock(snapshot)

    def limit_streams(self, most: int) -> None:
        """Announces another limit to the sessions that are open; what is above it is refused from now on."""

        def announce() -> None:
            self.sessions.max_streams = most
            for session in self.sessions.open():
                session.max_streams = most
                session.when_limited()

        self._in_loop(announce)

    def drop_connections(self) -> None:
        """Closes all connections; new ones are accepted."""
        self._in_loop(self._listener.drop_connections)

    def go_down(self) -> None:
        """Closes all connections and refuses new ones. The port stays this server's."""
        self._in_loop(self._listener.go_down)

    def come_back(self) -> None:
        """Accepts connections again, on the same port."""
        self._in_loop(self._listener.come_back)

    def restart(self) -> None:
        self.go_down()
        self.come_back()

    # --- its life

    def __enter__(self) -> Self:
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=trio.run, args=(self._run, started), name="reference-server", daemon=True
        )
        self._thread.start()
        started.result(LIMIT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.faults.clear()
        assert self._thread is not None
        self._in_loop(self._end)
        self._thread.join(LIMIT)
        assert not self._thread.is_alive(), "the reference server does not end"
        if error is None and self._listener.failures:
            raise AssertionError("the reference server failed") from self._listener.failures[0]

    async def _run(self, started: Future[None]) -> None:
        try:
            self._listener.bind()
        except OSError as error:
            started.set_exception(error)
            return
        async with trio.open_nursery() as nursery:
            self._token = trio.lowlevel.current_trio_token()
            self._scope = nursery.cancel_scope
            self._listener.start(nursery)
            started.set_result(None)
            await trio.sleep_forever()

    def _end(self) -> None:
        assert self._scope is not None
        self._listener.close()
        self._scope.cancel()

    def _in_loop(self, work: Callable[[], T]) -> T:
        """What `work` returns in the server's loop. Unlike trio's own way this may be called anywhere."""
        assert self._token is not None, "the server was not started"
        done: Future[T] = Future()

        def call() -> None:
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)

        self._token.run_sync_soon(call)
        return done.result(LIMIT)

    def _note(self, protocol: str, request: Request, user: str | None, status: int) -> None:
        self.requests.add(Record(protocol, request.method, request.target, user, status))
