"""Asks the API of the reference server, and looks at how that fails."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
import trio

from pbsfs.base.errors import PbsfsError
from pbsfs.base.secret import Secret
from pbsfs.sources.http.tls import Trust, parse_fingerprint
from pbsfs.sources.server.api import Api
from pbsfs.sources.server.limits import DEFAULT, ServerLimits
from pbsfs.sources.server.repository import Repository
from tests.sources.server.peers import Peer
from tests.sources.server.serving import LIMIT, PASSWORD, SECRET, USER
from tests.support.server import ReferenceServer
from tests.support.server.certificate import Certificate

LOGIN = "/access/ticket"
GROUPS = "/admin/datastore/golden/groups"
DOMAINS = json.dumps({"data": [{"realm": "pam"}, {"realm": "pbs"}]})

T = TypeVar("T")


class Clock:
    """Time for one API: the true one, and what a test adds to it."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


def api_of(
    server: ReferenceServer,
    auth_id: str = USER,
    secret: str | None = None,
    *,
    threads: int = 8,
    limits: ServerLimits = DEFAULT,
    clock: Callable[[], float] = time.monotonic,
) -> Api:
    if secret is None:
        secret = SECRET if "!" in auth_id else PASSWORD
    return api_with(server, Secret(secret), auth_id, threads=threads, limits=limits, clock=clock)


def api_with(
    server: ReferenceServer,
    secret: Secret,
    auth_id: str = USER,
    *,
    threads: int = 8,
    limits: ServerLimits = DEFAULT,
    clock: Callable[[], float] = time.monotonic,
) -> Api:
    trust = Trust(pinned=parse_fingerprint(server.fingerprint))
    repository = Repository.parse(server.repository(auth_id))
    return Api(repository, secret, trust, None, limits, threads=threads, clock=clock)


def peer_api(peer: Peer, found: Certificate, *, token: bool = True) -> Api:
    repository = peer.repository() if token else Repository(USER, None, "127.0.0.1", peer.port, "golden")
    return Api(repository, Secret(SECRET), Trust(pinned=parse_fingerprint(found.fingerprint)))


def using(api: Api, work: Callable[[], Awaitable[T]]) -> T:
    """What `work`, which uses `api`, returns; nothing hangs."""

    async def main() -> T:
        try:
            with trio.fail_after(LIMIT):
                return await work()
        finally:
            api.close()

    return trio.run(main)


def got(api: Api, path: str = "/version", **parameters: str) -> Any:
    return using(api, lambda: api.get(path, parameters))


def failure(api: Api, kind: type[PbsfsError], path: str = "/version", **parameters: str) -> str:
    """How asking fails: with just this kind of error, in one line, without a secret."""
    with pytest.raises(PbsfsError) as caught:
        got(api, path, **parameters)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert text.isprintable()
    for secret in (PASSWORD, SECRET, "PBS:", "hunter2"):
        assert secret not in text
    return text


def logins(server: ReferenceServer) -> int:
    return server.requests.count(LOGIN)
