"""The HTTP API: logging in and staying so, connections, and an error of its own for each thing that fails."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import trio

from pbsfs.base.errors import (
    AuthError,
    ConnectError,
    DamageError,
    ForbiddenError,
    NotFoundError,
    NotPbsError,
    PbsfsError,
    ResolveError,
    SourceError,
    TrustError,
    UnknownDatastoreError,
    UnknownRealmError,
    exit_status_of,
)
from pbsfs.base.secret import Secret
from pbsfs.sources.server import api as api_module
from pbsfs.sources.server.api import Api
from pbsfs.sources.server.limits import DEFAULT, ServerLimits
from pbsfs.sources.server.repository import Repository
from pbsfs.sources.server.source import ServerSettings, ServerSource
from pbsfs.sources.server.tls import Trust, parse_fingerprint
from pbsfs.testing.writer import DatastoreWriter
from tests.sources.server.peers import Peer, Talk, request_of, saying
from tests.support import made
from tests.support.server import (
    NOTHING,
    Body,
    EndlessHeaders,
    Hold,
    Huge,
    ReferenceServer,
    Stall,
    Status,
    Truncate,
    WrongLength,
    certificate,
)
from tests.support.server.certificate import Certificate
from tests.support.server.releases import PBS_4
from tests.support.waiting import wait_until

USER = "reader@pbs"
TOKEN = "reader@pbs!viewer"
PASSWORD = "p:a s+s/w%rd"
SECRET = "5ec2e7/%41+:secret"
LOGIN = "/access/ticket"
GROUPS = "/admin/datastore/golden/groups"
DOMAINS = json.dumps({"data": [{"realm": "pam"}, {"realm": "pbs"}]})

LIMIT = 20.0
"""Seconds that a request may take; only when something is broken does it take long."""

T = TypeVar("T")


@pytest.fixture(scope="module")
def datastore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    writer = DatastoreWriter(tmp_path_factory.mktemp("made") / "datastore")
    writer.add_snapshot(made.snapshot(), {"qemu-server.conf.blob": b"name: made\n" * 1000}, compress=False)
    return writer.path


@pytest.fixture
def server(datastore: Path) -> Iterator[ReferenceServer]:
    with ReferenceServer(datastore) as server:
        server.add_user(USER, PASSWORD)
        server.add_token(TOKEN, SECRET)
        yield server


class Clock:
    """Time for the API alone: the true one, and what a test adds to it."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(api_module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def api_of(
    server: ReferenceServer,
    auth_id: str = USER,
    secret: str | None = None,
    *,
    threads: int = 8,
    limits: ServerLimits = DEFAULT,
) -> Api:
    if secret is None:
        secret = SECRET if "!" in auth_id else PASSWORD
    trust = Trust(pinned=parse_fingerprint(server.fingerprint))
    return Api(
        Repository.parse(server.repository(auth_id)), Secret(secret), trust, threads=threads, limits=limits
    )


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


# --- who asks


def test_a_password_is_sent_once_for_many_requests(server: ReferenceServer) -> None:
    api = api_of(server)

    async def work() -> None:
        for _ in range(3):
            assert (await api.get("/version", {}))["version"] == "3.2"
        (group,) = await api.get(GROUPS, {})
        assert group["backup-id"] == "100"

    using(api, work)
    assert logins(server) == 1
    assert {record.user for record in server.requests.matching("/version")} == {USER}


def test_requests_at_once_log_in_once(server: ReferenceServer) -> None:
    api = api_of(server)

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(api.get, "/version", {})

    using(api, work)
    assert (logins(server), server.requests.count("/version")) == (1, 6)


def test_a_token_needs_no_login_and_its_secret_may_have_any_characters(server: ReferenceServer) -> None:
    assert got(api_of(server, TOKEN), GROUPS)
    assert logins(server) == 0
    server.add_token("reader@pbs!odd", "ünï %41\t\x7f\"'\r{}")
    assert got(api_of(server, "reader@pbs!odd", "ünï %41\t\x7f\"'\r{}"))
    assert server.requests.all()[-1].user == "reader@pbs!odd"


@pytest.mark.parametrize("user", ["jürgen@pbs", "a%41b@pbs", "jane@example.com@pbs", "x+y&z=1@pbs"])
def test_users_of_all_names_log_in_and_their_tickets_are_renewed(
    server: ReferenceServer, clock: Clock, user: str
) -> None:
    server.add_user(user, PASSWORD)
    api = api_of(server, user)

    async def work() -> None:
        assert await api.get("/version", {})
        clock.ahead = DEFAULT.ticket_renewal + 1
        assert await api.get("/version", {})

    using(api, work)
    assert [record.status for record in server.requests.all()] == [200] * 4
    assert {record.user for record in server.requests.matching("/version")} == {user}


def test_a_wrong_password_is_refused_in_the_servers_words(server: ReferenceServer) -> None:
    text = failure(api_of(server, secret="hunter2"), AuthError)
    assert f"does not accept {USER} and this password: permission check failed." in text
    assert str(server.port) in text


def test_a_user_that_does_not_exist_is_refused_like_a_wrong_password(server: ReferenceServer) -> None:
    server.faults.add(Status(status=200, text=DOMAINS, match="/access/domains"))
    assert "nobody@pbs" in failure(api_of(server, "nobody@pbs"), AuthError)


def test_a_realm_that_the_server_has_not_is_told_from_a_wrong_password(server: ReferenceServer) -> None:
    server.faults.add(Status(status=200, text=DOMAINS, match="/access/domains"))
    text = failure(api_of(server, "reader@ldap"), UnknownRealmError)
    assert "has no realm 'ldap' (of reader@ldap); there is pam, pbs: permission check failed." in text


@pytest.mark.parametrize(
    "domains",
    ["", "[]", '{"data": null}', '{"data": []}', '{"data": [7]}', '{"data": [{"name": "x"}]}', "[" * 100_000],
)
def test_realms_that_make_no_sense_leave_a_wrong_password(server: ReferenceServer, domains: str) -> None:
    server.faults.add(Status(status=200, text=domains, match="/access/domains"))
    failure(api_of(server, "reader@ldap"), AuthError)


def test_names_of_realms_do_not_write_to_the_terminal(server: ReferenceServer) -> None:
    text = json.dumps({"data": [{"realm": "\x1b[2Jpam\n"}, {"realm": ["x\n"]}]})
    server.faults.add(Status(status=200, text=text, match="/access/domains"))
    failure(api_of(server, "reader@ldap"), UnknownRealmError)


def test_a_wrong_or_unknown_token_is_refused_at_once(server: ReferenceServer) -> None:
    text = failure(api_of(server, TOKEN, "hunter2"), AuthError)
    assert f"does not accept {TOKEN}: authentication failed - invalid credentials" in text
    failure(api_of(server, "reader@pbs!nope", "hunter2"), AuthError)
    assert server.requests.count() == 2


def test_a_token_that_is_revoked_is_refused_from_then_on(server: ReferenceServer) -> None:
    api = api_of(server, TOKEN)
    got(api)
    server.remove(TOKEN)
    failure(api, AuthError)


def test_a_second_factor_cannot_be_given_and_a_token_is_the_way(server: ReferenceServer) -> None:
    server.add_user("careful@pbs", PASSWORD, second_factor=True)
    text = failure(api_of(server, "careful@pbs"), AuthError)
    assert "second factor" in text
    assert "API token" in text


def test_a_ticket_that_comes_in_a_cookie_only_is_taken_from_there(datastore: Path, clock: Clock) -> None:
    with ReferenceServer(datastore, release=PBS_4, ticket_in_cookie=True) as server:
        for user in (USER, "jürgen@pbs"):
            server.add_user(user, PASSWORD)
            api = api_of(server, user)

            async def work(api: Api = api) -> None:
                assert (await api.get("/version", {}))["version"] == "4.2"
                clock.ahead += DEFAULT.ticket_renewal + 1
                assert await api.get("/version", {})

            using(api, work)
        assert {record.status for record in server.requests.all()} == {200}


@pytest.mark.parametrize(
    "answer",
    ["", "{}", "[]", '{"data": null}', '{"data": {}}', '{"data": {"ticket": 7}}', '{"data": "x"}', "{"],
)
def test_a_login_that_gives_no_ticket_is_not_one_of_ours(server: ReferenceServer, answer: str) -> None:
    server.faults.add(Status(status=200, text=answer, match=LOGIN))
    assert "invalid login ticket" in failure(api_of(server), NotPbsError)


# --- staying logged in


def test_a_ticket_is_renewed_after_an_hour_and_not_before(server: ReferenceServer, clock: Clock) -> None:
    api = api_of(server)

    async def work() -> None:
        await api.get("/version", {})
        clock.ahead = DEFAULT.ticket_renewal - 60
        await api.get("/version", {})
        assert logins(server) == 1
        clock.ahead = DEFAULT.ticket_renewal + 1
        await api.get("/version", {})
        assert logins(server) == 2
        clock.ahead = 2 * DEFAULT.ticket_renewal - 60
        await api.get("/version", {})
        assert logins(server) == 2

    using(api, work)
    assert DEFAULT.ticket_renewal == 3600


def test_a_ticket_is_renewed_by_itself_for_weeks_even_with_a_new_password(
    server: ReferenceServer, clock: Clock
) -> None:
    api = api_of(server)

    async def work() -> None:
        await api.get("/version", {})
        server.add_user(USER, "another password")
        for _ in range(24):
            server.clock.advance(DEFAULT.ticket_renewal + 1)
            clock.ahead += DEFAULT.ticket_renewal + 1
            await api.get("/version", {})

    using(api, work)
    assert {record.status for record in server.requests.all()} == {200}
    assert logins(server) == 25


def test_where_the_old_ticket_is_refused_the_password_is_used(server: ReferenceServer, clock: Clock) -> None:
    api = api_of(server)

    async def work() -> None:
        await api.get("/version", {})
        server.clock.advance(3 * DEFAULT.ticket_renewal)
        clock.ahead = 3 * DEFAULT.ticket_renewal
        await api.get("/version", {})

    using(api, work)
    assert [record.status for record in server.requests.matching(LOGIN)] == [200, 401, 200]


def test_a_ticket_that_is_refused_in_between_leads_to_one_new_login(server: ReferenceServer) -> None:
    api = api_of(server)

    async def work() -> None:
        await api.get("/version", {})
        server.clock.advance(3 * DEFAULT.ticket_renewal)
        assert await api.get(GROUPS, {})

    using(api, work)
    assert [record.status for record in server.requests.matching(GROUPS)] == [401, 200]
    assert logins(server) == 2


def test_requests_at_once_that_are_all_refused_are_all_asked_again(server: ReferenceServer) -> None:
    api = api_of(server)
    answers = []

    async def ask() -> None:
        answers.append(await api.get(GROUPS, {}))

    async def work() -> None:
        await api.get("/version", {})
        server.clock.advance(3 * DEFAULT.ticket_renewal)
        held = server.faults.add(Hold(match=GROUPS, times=5))
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
            await trio.to_thread.run_sync(wait_until, lambda: held.hits == 5, "five requests")
            held.release()

    using(api, work)
    assert len(answers) == 5
    assert sorted(record.status for record in server.requests.matching(GROUPS)) == [200] * 5 + [401] * 5
    assert logins(server) == 2


def test_a_new_ticket_is_not_forgotten_for_the_refusal_of_an_old_one(server: ReferenceServer) -> None:
    api = api_of(server)

    async def work() -> None:
        old = await api.headers()
        assert api.forget_ticket(old)
        server.clock.advance(5)
        new = await api.headers()
        assert new != old
        assert api.forget_ticket(old)
        assert await api.headers() == new

    using(api, work)
    assert logins(server) == 2
    assert not api_of(server, TOKEN).forget_ticket({"Authorization": "PBSAPIToken x:y"})


def test_who_is_refused_again_after_a_new_login_is_refused(server: ReferenceServer) -> None:
    server.faults.add(Status(status=401, text="no and no", match="/version", times=None))
    assert "no and no" in failure(api_of(server), AuthError)
    assert (server.requests.count("/version"), logins(server)) == (2, 2)


def test_a_password_that_changed_meanwhile_is_told_of(server: ReferenceServer) -> None:
    api = api_of(server)

    async def work() -> None:
        await api.get("/version", {})
        server.add_user(USER, "another password")
        server.clock.advance(3 * DEFAULT.ticket_renewal)
        with pytest.raises(AuthError, match="permission check failed"):
            await api.get("/version", {})

    using(api, work)


# --- connections


def test_a_connection_is_kept_and_used_again(server: ReferenceServer) -> None:
    api = api_of(server)

    async def work() -> None:
        for _ in range(5):
            await api.get(GROUPS, {})
        assert server.open_connections == 1

    using(api, work)
    assert server.connections == 1
    wait_until(lambda: server.open_connections == 0, "closing")


def test_as_many_connections_are_kept_as_are_of_use(server: ReferenceServer) -> None:
    more = DEFAULT.kept_connections + 3
    api = api_of(server, TOKEN, threads=more)

    async def work() -> None:
        held = server.faults.add(Hold(match="/version", times=more))
        async with trio.open_nursery() as nursery:
            for _ in range(more):
                nursery.start_soon(api.get, "/version", {})
            await trio.to_thread.run_sync(wait_until, lambda: held.hits == more, "all requests")
            held.release()
        await trio.to_thread.run_sync(
            wait_until, lambda: server.open_connections == DEFAULT.kept_connections, "closing the others"
        )

    using(api, work)
    assert server.connections == more


def test_a_connection_that_was_idle_for_long_is_not_used_again(server: ReferenceServer, clock: Clock) -> None:
    api = api_of(server, TOKEN)

    async def work() -> None:
        await api.get("/version", {})
        clock.ahead = DEFAULT.keep_time - 5
        await api.get("/version", {})
        assert server.connections == 1
        clock.ahead += DEFAULT.keep_time + 1
        await api.get("/version", {})
        assert server.connections == 2

    using(api, work)


def test_a_server_may_close_connections_that_are_idle(server: ReferenceServer) -> None:
    api = api_of(server)

    async def work() -> None:
        for cut in (server.drop_connections, server.restart, server.drop_connections):
            await api.get("/version", {})
            await trio.to_thread.run_sync(cut)
        await api.get("/version", {})

    using(api, work)
    assert (server.requests.count("/version"), logins(server)) == (4, 1)


def test_a_server_that_is_down_may_come_back(server: ReferenceServer) -> None:
    api = api_of(server)

    async def work() -> None:
        await api.get("/version", {})
        await trio.to_thread.run_sync(server.go_down)
        with pytest.raises(ConnectError, match="Connection refused") as caught:
            await api.get("/version", {})
        assert caught.value.retryable
        await trio.to_thread.run_sync(server.come_back)
        assert await api.get("/version", {})

    using(api, work)
    assert logins(server) == 1


def test_a_server_that_goes_silent_is_given_up(server: ReferenceServer) -> None:
    server.faults.add(Stall(match="/version", after_bytes=10))
    api = api_of(server, TOKEN, limits=ServerLimits(request_timeout=0.1))
    assert "no answer for" in failure(api, ConnectError)


# --- what the server refuses


def test_what_is_not_allowed_is_told_in_the_servers_words(server: ReferenceServer) -> None:
    server.add_token("reader@pbs!limited", SECRET, grants={"/datastore/golden": NOTHING})
    text = failure(api_of(server, "reader@pbs!limited"), ForbiddenError, GROUPS)
    assert "missing Datastore.Audit|Datastore.Backup on /datastore/golden" in text
    assert "reader@pbs!limited" in text


def test_a_namespace_that_is_not_there_is_not_found(server: ReferenceServer) -> None:
    assert "ENOENT" in failure(api_of(server), NotFoundError, GROUPS, ns="nope")


def test_a_request_that_the_server_does_not_understand_is_not_tried_again(server: ReferenceServer) -> None:
    text = failure(api_of(server), SourceError, GROUPS, nonsense="x")
    assert "status 400" in text
    assert "schema does not allow additional properties" in text


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_in_trouble_may_get_over_it(server: ReferenceServer, status: int) -> None:
    server.faults.add(Status(status=status, text="out of luck", match="/version"))
    api = api_of(server, TOKEN)
    with pytest.raises(SourceError, match=f"status {status}: out of luck") as caught:
        got(api)
    assert caught.value.retryable
    assert got(api)


def test_a_connection_that_lies_idle_is_closed(server: ReferenceServer) -> None:
    api = api_of(server, TOKEN, limits=ServerLimits(keep_time=0.05))

    async def work() -> None:
        await api.get("/version", {})
        assert server.open_connections == 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.tidy)
            await trio.to_thread.run_sync(wait_until, lambda: server.open_connections == 0, "closed")
            await api.get("/version", {})  # and on a new one, which is closed too
            await trio.to_thread.run_sync(wait_until, lambda: server.open_connections == 0, "closed")
            nursery.cancel_scope.cancel()

    using(api, work)
    assert server.connections == 2


@pytest.mark.parametrize("status", [301, 302, 405, 501])
def test_an_answer_that_only_other_servers_give_is_no_pbs(server: ReferenceServer, status: int) -> None:
    server.faults.add(Status(status=status, text="so be it", match="/version"))
    with pytest.raises(NotPbsError, match=rf"status {status} \(so be it\)"):
        got(api_of(server, TOKEN))


@pytest.mark.parametrize("status", [400, 402, 410, 418])
def test_other_refusals_do_not_get_better(server: ReferenceServer, status: int) -> None:
    server.faults.add(Status(status=status, text="so be it", match="/version"))
    with pytest.raises(SourceError, match=f"status {status}: so be it") as caught:
        got(api_of(server, TOKEN))
    assert not caught.value.retryable


def test_an_error_is_one_line_of_bounded_length_whatever_the_server_says(server: ReferenceServer) -> None:
    hostile = "\x1b[2J\r\n\0\u202e" + "e" * 100_000
    server.faults.add(Status(status=400, text=hostile, match="/version"))
    text = failure(api_of(server, TOKEN), SourceError)
    assert 1000 < len(text) < 3000
    server.faults.add(Status(status=400, text="\n\n", match="/version"))
    assert failure(api_of(server, TOKEN), SourceError).endswith("status 400: status 400")


def test_neither_password_nor_ticket_nor_secret_is_logged(
    server: ReferenceServer, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    caplog.set_level(logging.DEBUG)
    api = api_of(server)
    cookies = []

    async def work() -> None:
        await api.get(GROUPS, {"ns": ""})
        cookies.append((await api.headers())["Cookie"])
        clock.ahead = DEFAULT.ticket_renewal + 1
        server.clock.advance(3 * DEFAULT.ticket_renewal)
        await api.get("/version", {})
        cookies.append((await api.headers())["Cookie"])

    using(api, work)
    got(api_of(server, TOKEN))
    assert "GET /api2/json/version" in caplog.text
    for secret in (PASSWORD, SECRET, "PBS%3A", "PBS:", *cookies):
        assert secret not in caplog.text


# --- what no server should answer


def test_an_answer_larger_than_its_limit_is_refused(server: ReferenceServer) -> None:
    query = {"backup-type": "vm", "backup-id": "100", "backup-time": str(made.TIME)}
    query["file-name"] = "qemu-server.conf.blob"
    path = "/admin/datastore/golden/download"
    api = api_of(server)
    size = 12 + 11_000

    async def work() -> None:
        assert len(await api.download(path, query, size)) == size
        with pytest.raises(DamageError, match=f"more than {size - 1} bytes"):
            await api.download(path, query, size - 1)
        assert len(await api.download(path, query, size)) == size

    using(api, work)


@pytest.mark.parametrize("announce", [True, False])
def test_an_endless_answer_is_refused_and_not_read(server: ReferenceServer, announce: bool) -> None:
    server.faults.add(Huge(match="/version", announce=announce))
    api = api_of(server, TOKEN, limits=ServerLimits(max_list=1 << 20))

    async def work() -> None:
        with pytest.raises(DamageError, match="more than 1048576 bytes"):
            await api.get("/version", {})
        assert await api.get("/version", {})

    using(api, work)


def test_an_endless_error_is_cut(server: ReferenceServer) -> None:
    class HugeError(Huge):
        def change(self, answer: Any) -> Any:
            return super().change(Status(status=500, text="broken ").change(answer))

    server.faults.add(HugeError(match="/version"))
    with pytest.raises(SourceError, match="status 500: broken") as caught:
        got(api_of(server, TOKEN))
    assert caught.value.retryable


def test_endless_headers_are_refused(server: ReferenceServer) -> None:
    server.faults.add(EndlessHeaders(match="/version"))
    assert "does not answer as a Proxmox Backup Server does" in failure(api_of(server, TOKEN), NotPbsError)


@pytest.mark.parametrize("fault", [WrongLength(by=1), WrongLength(by=1 << 40), Truncate(missing=3)])
def test_an_answer_that_breaks_off_is_a_lost_connection(
    server: ReferenceServer, fault: WrongLength | Truncate
) -> None:
    fault.match = GROUPS
    server.faults.add(fault)
    api = api_of(server, TOKEN)
    assert "closed in the middle" in failure(api, ConnectError, GROUPS)
    assert got(api, GROUPS)


def test_an_answer_that_is_longer_than_announced_is_no_answer(server: ReferenceServer) -> None:
    server.faults.add(WrongLength(by=-1, match="/version"))
    api = api_of(server, TOKEN)
    assert "makes no sense" in failure(api, NotPbsError)
    assert got(api)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b'{"error": 1}',
        b"<html>",
        b"\xff\xfe",
        b"[" * 200_000,
        b"1" * 10_000,
    ],
)
def test_an_answer_that_is_no_data_makes_no_sense(server: ReferenceServer, body: bytes) -> None:
    server.faults.add(Body(make=lambda _right: body, match="/version"))
    assert "the answer to /version makes no sense" in failure(api_of(server, TOKEN), NotPbsError)


@pytest.fixture(scope="module")
def peer_certificate() -> Certificate:
    return certificate.make()


def peer_api(peer: Peer, found: Certificate, *, token: bool = True) -> Api:
    repository = peer.repository() if token else Repository(USER, None, "127.0.0.1", peer.port, "golden")
    return Api(repository, Secret(SECRET), Trust(pinned=parse_fingerprint(found.fingerprint)))


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", ConnectError),
        (b"HTTP/1.1 200 OK\r\n", ConnectError),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n{}", ConnectError),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{}", ConnectError),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n{}", ConnectError),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", NotPbsError),
        (b"\0\0\x12\x04" + bytes(30), NotPbsError),
        (b"HTTP/1.1 999999 what\r\n\r\n", NotPbsError),
        (b"HTTP/1.1 abc what\r\n\r\n", NotPbsError),
        (b"HTTP/1.1 200 " + b"x" * 100_000, NotPbsError),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", NotPbsError),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>hello</html>", NotPbsError),
        (b"HTTP/1.1 200 OK\r\nset-cookie: \xff=\xfe;;;\r\nset-cookie: a\x00b\r\n\r\nx", NotPbsError),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 15\r\n\r\n<html>no</html>", NotPbsError),
    ],
)
@pytest.mark.parametrize("token", [True, False])
def test_a_peer_that_is_no_server_of_ours_is_told_as_what_it_is(
    peer_certificate: Certificate, answer: bytes, kind: type[PbsfsError], token: bool
) -> None:
    with Peer(peer_certificate, saying(answer)) as peer:
        api = peer_api(peer, peer_certificate, token=token)
        with pytest.raises(PbsfsError) as caught:
            using(api, api.greet)
    assert type(caught.value) is kind
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        b'HTTP/1.1 200 OK\r\ndate: now\r\ncontent-length: 13\r\nserver: x\r\n\r\n{"data": [1]}',
        b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n7\r\n{"data"\r\n6\r\n: [1]}\r\n0\r\n\r\n',
    ],
)
def test_an_answer_that_breaks_off_at_any_byte_is_a_lost_connection(
    peer_certificate: Certificate, answer: bytes
) -> None:
    cuts = iter(range(len(answer) + 1))
    sent = iter(range(len(answer) + 1))

    def talk(connection: socket.socket) -> None:
        request_of(connection)
        connection.sendall(answer[: next(sent)])

    with Peer(peer_certificate, talk) as peer:
        for _ in zip(range(len(answer.rstrip())), cuts, strict=False):
            with pytest.raises(ConnectError, match="closed in the middle"):
                got(peer_api(peer, peer_certificate))
        for _ in cuts:  # nothing is missing any more but ends of lines
            assert got(peer_api(peer, peer_certificate)) == [1]


def test_an_answer_that_nobody_asked_for_is_not_taken_for_the_next_one(peer_certificate: Certificate) -> None:
    good = b'{"data": "%d"}'

    def talk(connection: Any) -> None:
        first, smuggled = good % 1, good % 2
        head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n"
        while request_of(connection):
            connection.sendall(head % len(first) + first + head % len(smuggled) + smuggled)

    speaking: Talk = talk
    with Peer(peer_certificate, speaking) as peer:
        api = peer_api(peer, peer_certificate)

        async def work() -> None:
            assert await api.get("/version", {}) == "1"
            assert await api.get("/version", {}) == "1"

        using(api, work)


# --- the exit statuses


def source_failure(server: ReferenceServer, repository: str, secret: str, trust: Trust) -> PbsfsError:
    """How opening a source fails."""
    source = ServerSource(Repository.parse(repository), Secret(secret), trust, ServerSettings(0))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            try:
                with trio.fail_after(LIMIT):
                    await source.open(nursery)
            finally:
                await source.aclose()

    with pytest.RaisesGroup(PbsfsError, flatten_subgroups=True) as caught:
        trio.run(main)
    (error,) = caught.value.exceptions
    assert isinstance(error, PbsfsError)
    return error


def test_everything_that_can_be_wrong_ends_with_its_own_status(
    server: ReferenceServer, peer_certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust = Trust(pinned=parse_fingerprint(server.fingerprint))
    right = server.repository(USER)
    server.faults.add(Status(status=200, text=DOMAINS, match="/access/domains", times=None))
    server.add_token("reader@pbs!nothing", SECRET, grants={})
    server.add_datastore("other", Path("/nonexistent"))
    found = {
        "password": source_failure(server, right, "hunter2", trust),
        "realm": source_failure(server, server.repository("reader@ldap"), PASSWORD, trust),
        "datastore": source_failure(server, server.repository(USER, store="nope"), PASSWORD, trust),
        "fingerprint": source_failure(server, right, PASSWORD, Trust(pinned="ab" * 32)),
        "name": source_failure(server, f"{USER}@a..b:golden", PASSWORD, trust),
    }
    server.faults.add(Status(status=403, text="permission check failed", match="/namespace"))
    found["privilege"] = source_failure(server, right, PASSWORD, trust)
    with Peer(peer_certificate, saying(b"HTTP/1.1 404 Not Found\r\n\r\nno such page")) as peer:
        stranger = Trust(pinned=parse_fingerprint(peer_certificate.fingerprint))
        found["stranger"] = source_failure(server, f"{TOKEN}@127.0.0.1:{peer.port}:golden", SECRET, stranger)
    server.go_down()
    found["port"] = source_failure(server, right, PASSWORD, trust)

    assert {what: (type(error), exit_status_of(error)) for what, error in found.items()} == {
        "password": (AuthError, 10),
        "privilege": (ForbiddenError, 11),
        "fingerprint": (TrustError, 12),
        "name": (ResolveError, 13),
        "port": (ConnectError, 14),
        "stranger": (NotPbsError, 15),
        "datastore": (UnknownDatastoreError, 16),
        "realm": (UnknownRealmError, 17),
    }
    for error in found.values():
        assert PASSWORD not in str(error)
        assert "hunter2" not in str(error)
        assert str(error).isprintable()
