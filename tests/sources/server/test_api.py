"""What the answers of the API mean: an error of its own for each thing that fails."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import trio

from pbsfs.base.errors import (
    AuthError,
    ConnectError,
    ForbiddenError,
    NotFoundError,
    PbsfsError,
    ResolveError,
    SourceError,
    TrustError,
    UnknownDatastoreError,
    UnknownRealmError,
    WrongServerError,
    exit_status_of,
)
from pbsfs.base.secret import Secret
from pbsfs.sources.http.tls import Trust, parse_fingerprint
from pbsfs.sources.server.limits import DEFAULT
from pbsfs.sources.server.repository import Repository
from pbsfs.sources.server.source import ServerSettings, ServerSource
from tests.sources.server.asking import (
    DOMAINS,
    GROUPS,
    Clock,
    api_of,
    failure,
    got,
    peer_api,
    using,
)
from tests.sources.server.peers import Peer, saying
from tests.sources.server.serving import LIMIT, PASSWORD, SECRET, TOKEN, USER
from tests.support.server import (
    NOTHING,
    Body,
    ReferenceServer,
    Status,
)
from tests.support.server.certificate import Certificate


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


@pytest.mark.parametrize("status", [301, 302, 405, 501])
def test_an_answer_that_only_other_servers_give_is_no_pbs(server: ReferenceServer, status: int) -> None:
    server.faults.add(Status(status=status, text="so be it", match="/version"))
    with pytest.raises(WrongServerError, match=rf"status {status} \(so be it\)"):
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
    server: ReferenceServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    clock = Clock()
    api = api_of(server, clock=clock)
    cookies = []

    async def work() -> None:
        await api.get(GROUPS, {"ns": ""})
        cookies.append((await api.login.headers())["Cookie"])
        clock.ahead = DEFAULT.ticket_renewal + 1
        server.clock.advance(3 * DEFAULT.ticket_renewal)
        await api.get("/version", {})
        cookies.append((await api.login.headers())["Cookie"])

    using(api, work)
    got(api_of(server, TOKEN))
    assert "GET /api2/json/version" in caplog.text
    for secret in (PASSWORD, SECRET, "PBS%3A", "PBS:", *cookies):
        assert secret not in caplog.text


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
    assert "the answer to /version makes no sense" in failure(api_of(server, TOKEN), WrongServerError)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", ConnectError),
        (b"HTTP/1.1 200 OK\r\n", ConnectError),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n{}", ConnectError),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{}", ConnectError),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n{}", ConnectError),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", WrongServerError),
        (b"\0\0\x12\x04" + bytes(30), WrongServerError),
        (b"HTTP/1.1 999999 what\r\n\r\n", WrongServerError),
        (b"HTTP/1.1 abc what\r\n\r\n", WrongServerError),
        (b"HTTP/1.1 200 " + b"x" * 100_000, WrongServerError),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", WrongServerError),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>hello</html>", WrongServerError),
        (b"HTTP/1.1 200 OK\r\nset-cookie: \xff=\xfe;;;\r\nset-cookie: a\x00b\r\n\r\nx", WrongServerError),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 15\r\n\r\n<html>no</html>", WrongServerError),
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
        "stranger": (WrongServerError, 15),
        "datastore": (UnknownDatastoreError, 16),
        "realm": (UnknownRealmError, 17),
    }
    for error in found.values():
        assert PASSWORD not in str(error)
        assert "hunter2" not in str(error)
        assert str(error).isprintable()
