"""The reference server on made data: login, privileges, listing, and how it runs. Faults are elsewhere."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from pbsfs.base.names import Group, Namespace
from pbsfs.formats import blob
from pbsfs.testing.writer import DatastoreWriter
from tests.server.conftest import OWNED, PASSWORD, SECRET
from tests.server.h2_client import TIMEOUT, Connection, Reply, Session
from tests.support import made
from tests.support.program import environment
from tests.support.server import NOTHING, OWN_GROUPS, READER, ReferenceServer
from tests.support.server.factors import Factors
from tests.support.server.releases import PBS_4
from tests.support.server.tickets import LIFETIME, Tickets

API = "/api2/json"
STORE = f"{API}/admin/datastore/made"
SNAPSHOT = f"backup-type=vm&backup-id=100&backup-time={made.TIME}"
VIEWER = {"authorization": f"PBSAPIToken reader@pbs!viewer:{quote(SECRET)}"}


def get(server: ReferenceServer, path: str, headers: dict[str, str] | None = None) -> Reply:
    with Connection(server) as connection:
        return connection.request("GET", path, VIEWER if headers is None else headers)


def log_in(
    server: ReferenceServer,
    password: str = PASSWORD,
    user: str = "reader@pbs",
    challenge: str | None = None,
) -> Reply:
    more = {} if challenge is None else {"tfa-challenge": challenge}
    body = json.dumps({"username": user, "password": password, **more}).encode()
    with Connection(server) as connection:
        return connection.request("POST", f"{API}/access/ticket", {"content-type": "application/json"}, body)


def cookie(ticket: str, name: str = "PBSAuthCookie") -> dict[str, str]:
    return {"cookie": f"{name}={quote(ticket, safe='')}"}


def token(name: str, secret: str) -> dict[str, str]:
    return {"authorization": f"PBSAPIToken {name}:{secret}"}


# --- logging in


@pytest.mark.parametrize("name", ["PBSAuthCookie", "__Host-PBSAuthCookie"])
def test_a_ticket_opens_the_api_for_two_hours(server: ReferenceServer, name: str) -> None:
    ticket = log_in(server).data["ticket"]
    assert re.fullmatch(r"PBS:reader@pbs:[0-9A-F]{8}::[A-Za-z0-9+/]{342}", ticket)
    assert get(server, f"{API}/version", cookie(ticket, name)).status == 200
    server.clock.advance(LIFETIME - 60)
    assert get(server, f"{API}/version", cookie(ticket, name)).status == 200
    server.clock.advance(120)
    reply = get(server, f"{API}/version", cookie(ticket, name))
    assert (reply.status, reply.text) == (401, "authentication failed - invalid ticket - expired")


def test_an_old_ticket_is_a_password_as_long_as_it_lives(server: ReferenceServer) -> None:
    ticket = log_in(server).data["ticket"]
    server.clock.advance(LIFETIME - 60)
    newer = log_in(server, ticket).data["ticket"]
    server.clock.advance(120)
    assert log_in(server, ticket).status == 401
    assert get(server, f"{API}/version", cookie(newer)).status == 200


def test_a_ticket_is_nobody_elses_password(server: ReferenceServer) -> None:
    server.add_user("other@pbs", "x" * 8)
    assert log_in(server, log_in(server).data["ticket"], "other@pbs").status == 401


def test_tickets_that_this_server_has_not_signed_are_refused(server: ReferenceServer) -> None:
    foreign = Tickets(server.clock).issue("reader@pbs")
    reply = get(server, f"{API}/version", cookie(foreign))
    assert (reply.status, reply.text) == (401, "authentication failed - ticket with invalid signature")


def test_a_second_factor_leaves_a_partial_ticket(server: ReferenceServer) -> None:
    server.add_user("two@pbs", PASSWORD, factors=Factors(server.clock, recovery=["a", "b"]))
    reply = log_in(server, user="two@pbs")
    assert reply.data["ticket"].startswith('PBS:!tfa!{"totp"%3Atrue,"recovery"%3A[0,1]}:')
    assert reply.data["CSRFPreventionToken"] == "invalid"
    assert get(server, f"{API}/version", cookie(reply.data["ticket"])).status == 401
    assert log_in(server, reply.data["ticket"], "two@pbs").status == 401


def answer(server: ReferenceServer, response: str, challenge: str | None = None) -> Reply:
    """The answer to a challenge of two@pbs, a new one if none is given."""
    found = log_in(server, user="two@pbs").data["ticket"] if challenge is None else challenge
    return log_in(server, response, "two@pbs", challenge=found)


def test_a_code_of_the_app_is_good_once(server: ReferenceServer) -> None:
    factors = Factors(server.clock)
    server.add_user("two@pbs", PASSWORD, factors=factors)
    server.clock.set(1_700_000_000)
    ticket = answer(server, f"totp:{factors.code()}").data["ticket"]
    assert get(server, f"{API}/version", cookie(ticket)).status == 200
    assert log_in(server, ticket, "two@pbs").status == 200, "renewing needs no second factor"
    assert answer(server, f"totp:{factors.code()}").status == 401
    assert answer(server, f"totp:{factors.code(-1)}").status == 401, "older than the last one"
    assert answer(server, f"totp:{factors.code(1)}").status == 200
    server.clock.advance(90)
    assert answer(server, f"totp:{factors.code(2)}").status == 401
    assert answer(server, factors.code()).status == 401
    refused = answer(server, "recovery:a")
    assert (refused.status, refused.text) == (401, "permission check failed.")


def test_a_recovery_code_is_good_once_and_unlocks_the_app(server: ReferenceServer) -> None:
    factors = Factors(server.clock, recovery=["a-1", "b-2"])
    server.add_user("two@pbs", PASSWORD, factors=factors)
    server.clock.set(1_700_000_000)
    for _ in range(8):
        assert answer(server, "totp:000").status == 401
    assert factors.totp_locked
    assert answer(server, f"totp:{factors.code()}").status == 401
    assert answer(server, "recovery:b-2").status == 200
    assert answer(server, "recovery:b-2").status == 401
    assert '"recovery"%3A[0]' in log_in(server, user="two@pbs").data["ticket"]
    assert answer(server, f"totp:{factors.code()}").status == 200


def test_too_many_wrong_answers_lock_the_factors_for_an_hour(server: ReferenceServer) -> None:
    factors = Factors(server.clock, recovery=["a"])
    server.add_user("two@pbs", PASSWORD, factors=factors)
    challenge = log_in(server, user="two@pbs").data["ticket"]
    for _ in range(100):
        assert answer(server, "recovery:z", challenge).status == 401
    assert answer(server, "recovery:a").status == 401
    server.clock.advance(3601)
    assert answer(server, "recovery:a").status == 200


def test_a_challenge_is_for_one_user_and_ten_minutes(server: ReferenceServer) -> None:
    for user in ("two@pbs", "three@pbs"):
        server.add_user(user, PASSWORD, factors=Factors(server.clock, recovery=["a", "b"]))
    challenge = log_in(server, user="three@pbs").data["ticket"]
    assert answer(server, "recovery:a", challenge).status == 401
    assert answer(server, "recovery:a", log_in(server).data["ticket"]).status == 401, "not a challenge"
    challenge = log_in(server, user="two@pbs").data["ticket"]
    server.clock.advance(601)
    assert answer(server, "recovery:a", challenge).status == 401
    assert answer(server, "recovery:a").status == 200


def test_the_ticket_may_be_in_a_cookie_only(datastore: Path) -> None:
    with ReferenceServer(datastore, store="made", release=PBS_4, ticket_in_cookie=True) as server:
        server.add_user("reader@pbs", PASSWORD)
        reply = log_in(server)
        assert "ticket" not in reply.data
        name, _, ticket = reply.headers["set-cookie"].partition(";")[0].partition("=")
        assert name == "__Host-PBSAuthCookie"
        assert ticket.startswith("PBS:reader@pbs:")
        assert get(server, f"{API}/version", cookie(ticket, name)).data["version"] == "4.2"
        assert get(server, f"{API}/version", cookie(ticket)).status == 401


def test_tokens_come_in_two_forms(server: ReferenceServer) -> None:
    for between in " =":
        header = f"PBSAPIToken{between}reader@pbs!viewer:{quote(SECRET, safe='')}"
        assert get(server, f"{API}/version", {"authorization": header}).status == 200


def test_a_revoked_token_is_refused(server: ReferenceServer) -> None:
    server.remove("reader@pbs!viewer")
    reply = get(server, f"{API}/version")
    assert reply.status == 401
    assert reply.text == "authentication failed - user account or token disabled or expired."


def test_a_user_takes_their_tokens_with_them(server: ReferenceServer) -> None:
    ticket = log_in(server).data["ticket"]
    server.remove("reader@pbs")
    assert get(server, f"{API}/version").status == 401
    assert get(server, f"{API}/version", cookie(ticket)).status == 401


def test_a_user_is_no_token_and_a_token_no_user(server: ReferenceServer) -> None:
    assert get(server, f"{API}/version", token("reader@pbs", PASSWORD)).status == 401
    assert log_in(server, SECRET, "reader@pbs!viewer").status == 400


def test_anybody_may_ping(server: ReferenceServer) -> None:
    assert get(server, f"{API}/ping", {}).data == {"pong": True}


# --- privileges


def test_owning_a_group_shows_that_group_only(server: ReferenceServer) -> None:
    server.accounts.grant("reader@pbs", "/datastore/made", READER | OWN_GROUPS)
    server.accounts.grant("reader@pbs!viewer", "/datastore/made", OWN_GROUPS)
    assert get(server, f"{STORE}/groups").data == []
    (group,) = get(server, f"{STORE}/groups?ns=prod").data
    (snapshot,) = get(server, f"{STORE}/snapshots?ns=prod").data
    assert group["backup-id"] == snapshot["backup-id"] == OWNED.id
    assert get(server, f"{STORE}/files?{SNAPSHOT}").text.startswith("backup owner check failed")
    owned = f"ns=prod&backup-type=host&backup-id={OWNED.id}&backup-time={made.TIME}"
    with Session(server, VIEWER, f"store=made&{owned}") as session:
        assert session.get("/download?file-name=a.img.fidx").status == 200
    refused = get(server, f"{API}/reader?store=made&{SNAPSHOT}", VIEWER | _UPGRADE)
    assert (refused.status, refused.text) == (400, "backup owner check failed!")


_UPGRADE = {"connection": "upgrade", "upgrade": "proxmox-backup-reader-protocol-v1"}


def test_a_user_owns_what_their_tokens_own(server: ReferenceServer) -> None:
    server.accounts.grant("reader@pbs", "/datastore/made", OWN_GROUPS)
    headers = cookie(log_in(server).data["ticket"])
    assert len(get(server, f"{STORE}/groups?ns=prod", headers).data) == 1


def test_what_is_granted_further_down_holds_there(server: ReferenceServer) -> None:
    server.accounts.grant("reader@pbs!viewer", "/datastore/made/prod", NOTHING)
    assert get(server, f"{STORE}/groups").status == 200
    reply = get(server, f"{STORE}/groups?ns=prod")
    assert reply.status == 403
    assert reply.text.endswith("missing Datastore.Audit|Datastore.Backup on /datastore/made/prod")
    assert get(server, f"{STORE}/namespace").data == [{"ns": ""}]


def test_a_token_may_no_more_than_its_user(server: ReferenceServer) -> None:
    server.accounts.grant("reader@pbs", "/datastore/made", NOTHING)
    assert get(server, f"{STORE}/groups").status == 403
    assert get(server, f"{STORE}/namespace").text == "permission check failed"
    assert get(server, f"{API}/admin/datastore").data == []


def test_root_may_do_all(server: ReferenceServer) -> None:
    server.add_user("root@pam", PASSWORD, grants={})
    headers = cookie(log_in(server, user="root@pam").data["ticket"])
    assert len(get(server, f"{STORE}/groups", headers).data) == 2
    reply = get(server, f"{API}/admin/datastore/nope/groups", headers)
    assert (reply.status, reply.text) == (400, "no such datastore 'nope'")


# --- parameters

_NO_MATCH = "value does not match the regex pattern"


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("foo=1", " - 'foo': schema does not allow additional properties."),
        ("ns=a//b", f" - 'ns': {_NO_MATCH}"),
        ("backup-type=x", " - 'backup-type': value 'x' is not defined in the enumeration."),
        ("ns=//&backup-id=/", f":\n- 'ns': {_NO_MATCH}\n- 'backup-id': {_NO_MATCH}"),
    ],
)
def test_parameters_that_are_not_known_are_refused(server: ReferenceServer, query: str, text: str) -> None:
    reply = get(server, f"{STORE}/snapshots?{query}")
    assert (reply.status, reply.text) == (400, f"parameter verification failed{text}")


def test_numbers_are_checked(server: ReferenceServer) -> None:
    assert "maximum value of 7 (got 8)" in get(server, f"{STORE}/namespace?max-depth=8").text
    query = "backup-type=vm&backup-id=100&backup-time="
    assert "minimum value of 1 (got 0)" in get(server, f"{STORE}/files?{query}0").text
    assert "invalid digit found in string" in get(server, f"{STORE}/files?{query}now").text


def test_a_body_has_to_be_json(server: ReferenceServer) -> None:
    with Connection(server) as connection:
        headers = {"content-type": "application/json"}
        reply = connection.request("POST", f"{API}/access/ticket", headers, b"{")
        assert reply.status == 400
        reply = connection.request("POST", f"{API}/access/ticket", headers, b'{"username": 1}')
        assert "'username': Expected string value." in reply.text


# --- listing


def test_groups_and_snapshots_carry_what_the_directory_says(server: ReferenceServer) -> None:
    groups = {group["backup-id"]: group for group in get(server, f"{STORE}/groups").data}
    assert groups["100"]["comment"] == "the group's"
    assert groups["100"]["backup-count"] == 2
    assert groups["100"]["last-backup"] == made.TIME + made.DAY
    assert sorted(groups["100"]["files"]) == ["big.img.fidx", "index.json.blob"]
    assert "comment" not in groups["200"]
    snapshots = get(server, f"{STORE}/snapshots?backup-type=vm").data
    (first,) = [snapshot for snapshot in snapshots if snapshot["backup-time"] == made.TIME]
    assert first["protected"] is True
    assert first["comment"] == "first line"
    assert first["verification"]["state"] == "ok"
    assert {"filename": "client.log.blob"} in first["files"]
    assert get(server, f"{STORE}/notes?{SNAPSHOT}").data == "first line\nsecond"
    assert get(server, f"{STORE}/snapshots?backup-id=200").data[0]["backup-type"] == "ct"
    assert get(server, f"{STORE}/status").data["total"] > 0


def test_an_unfinished_snapshot_is_listed_without_sizes(writer: DatastoreWriter) -> None:
    path = writer.add_snapshot(made.snapshot(), {"a.img.fidx": b"x"})
    (path / "index.json.blob").unlink()
    with _serving(writer.path) as server:
        (snapshot,) = get(server, f"{STORE}/snapshots").data
        assert snapshot["files"] == [{"filename": "a.img.fidx"}]
        assert "size" not in snapshot
        reply = get(server, f"{STORE}/files?{SNAPSHOT}")
        assert reply.status == 400
        assert reply.text.startswith("unable to load blob")


def test_a_damaged_manifest_hides_no_snapshot(writer: DatastoreWriter) -> None:
    path = writer.add_snapshot(made.snapshot(), {"a.img.fidx": b"x"})
    (path / "index.json.blob").write_bytes(blob.encode(b"[]"))
    with _serving(writer.path) as server:
        assert "size" not in get(server, f"{STORE}/snapshots").data[0]


def test_what_is_no_part_of_a_datastore_is_not_listed(writer: DatastoreWriter) -> None:
    writer.add_snapshot(made.snapshot(), {"a.img.fidx": b"x"})
    for name in ("vm/-x", "vm/100/yesterday", "ns/-x", "lost+found", "host/empty"):
        (writer.path / name).mkdir(parents=True)
    with _serving(writer.path) as server:
        assert [group["backup-id"] for group in get(server, f"{STORE}/groups").data] == ["100"]
        assert len(get(server, f"{STORE}/snapshots").data) == 1
        assert get(server, f"{STORE}/namespace").data == [{"ns": ""}]


def _serving(path: Path) -> ReferenceServer:
    server = ReferenceServer(path, store="made")
    server.add_user("reader@pbs", PASSWORD)
    server.add_token("reader@pbs!viewer", SECRET)
    return server


def test_namespaces_go_as_deep_as_asked(writer: DatastoreWriter) -> None:
    deep = Namespace(("a", "b", "c"))
    writer.add_snapshot(Group(deep, "vm", "1").snapshot(made.TIME), {"a.img.fidx": b"x"})
    with _serving(writer.path) as server:
        for depth, expected in [(0, ["a"]), (1, ["a", "a/b"]), (7, ["a", "a/b", "a/b/c"])]:
            found = get(server, f"{STORE}/namespace?parent=a&max-depth={depth}").data
            assert [item["ns"] for item in found] == expected


def test_a_stored_file_is_downloaded_without_a_session(server: ReferenceServer, datastore: Path) -> None:
    reply = get(server, f"{STORE}/download?{SNAPSHOT}&file-name=index.json.blob")
    path = datastore / str(made.snapshot()) / "index.json.blob"
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.body == path.read_bytes()
    missing = get(server, f"{STORE}/download?{SNAPSHOT}&file-name=nope.blob")
    assert missing.text == "File open failed: No such file or directory (os error 2)"
    assert server.sessions.all() == []


def test_there_may_be_several_datastores(server: ReferenceServer, writer: DatastoreWriter) -> None:
    server.add_datastore("other", writer.path)
    assert [item["store"] for item in get(server, f"{API}/admin/datastore").data] == ["made"]
    for auth_id in ("reader@pbs", "reader@pbs!viewer"):
        server.accounts.grant(auth_id, "/datastore/other", READER)
    assert len(get(server, f"{API}/admin/datastore").data) == 2
    assert get(server, f"{API}/admin/datastore/other/groups").data == []


# --- trust


def test_the_fingerprint_is_the_leafs(server: ReferenceServer) -> None:
    with Connection(server) as connection:
        leaf = connection.socket.getpeercert(binary_form=True)
    assert leaf is not None
    assert blob.chunk_digest(leaf, None).hex(":") == server.fingerprint


def test_a_ca_may_have_signed_the_certificate_for_localhost(datastore: Path) -> None:
    with ReferenceServer(datastore, ca_signed=True) as server:
        context = ssl.create_default_context(cadata=server.ca)
        assert _handshake(server, context, "localhost")
        with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
            _handshake(server, context, "127.0.0.1")
        with pytest.raises(ssl.SSLCertVerificationError):
            _handshake(server, ssl.create_default_context(), "localhost")


def test_a_self_signed_certificate_is_not_trusted(server: ReferenceServer) -> None:
    assert server.ca is None
    with pytest.raises(ssl.SSLCertVerificationError):
        _handshake(server, ssl.create_default_context(), "localhost")


def _handshake(server: ReferenceServer, context: ssl.SSLContext, name: str) -> str | None:
    with (
        socket.create_connection((server.address, server.port), TIMEOUT) as plain,
        context.wrap_socket(plain, server_hostname=name) as tls,
    ):
        return tls.version()


# --- how it runs


def test_one_connection_serves_many_requests(server: ReferenceServer) -> None:
    with Connection(server) as connection:
        for _ in range(3):
            assert connection.request("GET", f"{API}/version", VIEWER).status == 200
            assert connection.request("GET", f"{API}/version").status == 401
        connection.send("GET", f"{API}/version", VIEWER)
        connection.send("GET", f"{STORE}/groups", VIEWER)  # before the first is answered
        first = connection.read_head()
        first.body = connection.read(int(first.headers["content-length"]))
        assert first.data["version"] == "3.2"
        assert connection.read_head().status == 200
    assert server.connections == 1


def test_a_client_may_ask_for_the_connections_end(server: ReferenceServer) -> None:
    with Connection(server) as connection:
        reply = connection.request("GET", f"{API}/version", VIEWER | {"connection": "close"})
        assert reply.headers["connection"] == "close"
        assert connection.socket.recv(1) == b""


def test_requests_are_noted(server: ReferenceServer) -> None:
    get(server, f"{STORE}/groups?ns=prod")
    get(server, f"{STORE}/groups", {})
    first, second = server.requests.matching("/groups")
    assert (first.protocol, first.method, first.path) == ("http/1.1", "GET", f"{STORE}/groups")
    assert (first.target, first.user, first.status) == (
        f"{STORE}/groups?ns=prod",
        "reader@pbs!viewer",
        200,
    )
    assert (second.user, second.status) == (None, 401)
    assert server.requests.count() == 2
    server.requests.clear()
    assert server.requests.count() == 0


def test_what_is_no_http_is_refused(server: ReferenceServer) -> None:
    with Connection(server) as connection:
        connection.socket.sendall(b"hello\r\n\r\n")
        assert connection.read_head().status == 400


def test_it_listens_on_ipv6_too(datastore: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 loopback address")
    with ReferenceServer(datastore, address="::1") as server:
        assert get(server, f"{API}/ping", {}).status == 200
        assert server.repository("a@pbs") == f"a@pbs@[::1]:{server.port}:golden"


def test_it_listens_on_loopback_addresses_only(datastore: Path) -> None:
    with pytest.raises(ValueError, match="not a loopback address"):
        ReferenceServer(datastore, address="0.0.0.0")


def test_a_port_that_is_taken_is_an_error_at_once(server: ReferenceServer, datastore: Path) -> None:
    with pytest.raises(OSError, match="in use"), ReferenceServer(datastore, port=server.port):
        pass


def test_an_error_of_the_servers_own_fails_the_test(datastore: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise RuntimeError("a bug")

    server = ReferenceServer(datastore)
    monkeypatch.setattr(server.accounts, "authenticate", fail)
    with (
        pytest.raises(AssertionError, match="the reference server failed"),
        server,
        pytest.raises(ConnectionError),
    ):
        get(server, f"{API}/version")


def test_it_starts_by_hand(datastore: Path, tmp_path: Path) -> None:
    (tmp_path / "password").write_text(f"{PASSWORD}\nsecond line\n")
    command = [sys.executable, "-m", "tests.support.server", "--datastore-dir", str(datastore)]
    command += ["--store", "made", "--port", "0", "--token", "cli"]
    command += ["--password-file", str(tmp_path / "password")]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command,
        cwd=root,
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(7)]
            found = re.search(r"^repository:  (.+)@127\.0\.0\.1:(\d+):(.+)$", lines[0])
            assert found is not None, (lines, process.poll())
            auth_id, port, store = found.groups()
            assert (auth_id, store) == ("reader@pbs!cli", "made")
            secret = re.search("PBS_PASSWORD='(.*)'", "".join(lines))
            assert secret is not None
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            with (
                socket.create_connection(("127.0.0.1", int(port)), TIMEOUT) as plain,
                context.wrap_socket(plain) as tls,
            ):
                leaf = tls.getpeercert(binary_form=True)
                assert leaf is not None
                assert blob.chunk_digest(leaf, None).hex(":") == lines[1].split()[1]
                header = f"Authorization: PBSAPIToken reader@pbs!cli:{secret[1]}"
                tls.sendall(f"GET {STORE}/groups HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode())
                assert tls.recv(100).startswith(b"HTTP/1.1 200 OK")
            os.kill(process.pid, signal.SIGTERM)
            assert process.wait(TIMEOUT) == 0
        finally:
            process.kill()
