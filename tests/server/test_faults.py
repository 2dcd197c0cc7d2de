"""Each fault of the reference server happens as it was declared, and nothing else does."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import h2.connection
import pytest
import trio
import trio.testing
import zstandard

from pbsfs.base.errors import DamageError
from pbsfs.formats import blob
from tests.server.conftest import SECRET
from tests.server.h2_client import Connection, Reply, Session
from tests.server.snapshots import BIG, SNAPSHOT, chunks, refused, stored
from tests.support import made
from tests.support.server import (
    Body,
    Corrupt,
    Drop,
    EndlessHeaders,
    Garbage,
    GoAway,
    Hold,
    Huge,
    ReferenceServer,
    Reset,
    SlowLink,
    Stall,
    Status,
    Truncate,
    WrongLength,
    ZipBomb,
)
from tests.support.waiting import wait_until

VIEWER = {"authorization": f"PBSAPIToken reader@pbs!viewer:{quote(SECRET)}"}
GROUPS = "/api2/json/admin/datastore/made/groups"
DOWNLOAD = (
    f"/api2/json/admin/datastore/made/download?backup-type=vm&backup-id=100&backup-time={made.TIME}"
    "&file-name=index.json.blob"
)
INDEX = "/download?file-name=drive-scsi0.img.fidx"


def get(server: ReferenceServer, path: str = GROUPS) -> Reply:
    with Connection(server) as connection:
        return connection.request("GET", path, VIEWER)


def is_gone(action: Callable[[], object]) -> None:
    """Expects that the connection ends while `action` runs."""
    with pytest.raises((ConnectionError, ssl.SSLError)):
        action()


def received(server: ReferenceServer, *, sent: bytes = b"") -> bytes:
    """All that the server sends on a plain TCP connection, on which `sent` is sent."""
    with socket.create_connection((server.address, server.port), 20) as plain:
        plain.sendall(sent)
        data = b""
        with suppress(ConnectionResetError):
            while more := plain.recv(1 << 16):
                data += more
        return data


def client_hello() -> bytes:
    """The first bytes of a TLS handshake."""
    outgoing = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing)
    with suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


# --- on the wire


@pytest.mark.parametrize("size", [0, 1, 5, 100, 500])
def test_drop_during_the_handshake(server: ReferenceServer, size: int) -> None:
    fault = server.faults.add(Drop(after_bytes=size))
    assert len(received(server, sent=client_hello())) == size
    assert fault.hits == 1
    assert get(server).status == 200


def test_drop_counts_from_the_request_that_matches(server: ReferenceServer) -> None:
    with Session(server, VIEWER, BIG, window=1 << 30) as session:
        requests = chunks(session, "big.img.fidx")
        fault = server.faults.add(Drop(match=requests[1], after_bytes=1 << 20))
        whole = session.get(requests[0])
        assert len(whole.body) > 4 << 20
        stream = session.start(requests[1])
        is_gone(lambda: session.finish(stream))
        assert 1 << 19 < len(session.replies[stream].body) < 1 << 20
        assert fault.hits == 1
    with Session(server, VIEWER, BIG) as session:
        assert session.get(chunks(session, "big.img.fidx")[1]).status == 200
    wait_until(lambda: not server.open_sessions(), "the sessions end")


def test_drop_by_a_reset(server: ReferenceServer) -> None:
    server.faults.add(Drop(after_bytes=10, reset=True))
    with socket.create_connection((server.address, server.port), 20) as plain:
        plain.sendall(client_hello())
        assert len(plain.recv(100)) == 10
        with pytest.raises(ConnectionResetError):
            plain.recv(100)


@pytest.mark.parametrize("after", [0, 10, 100])
def test_drop_during_the_upgrade(server: ReferenceServer, after: int) -> None:
    server.faults.add(Drop(match="/api2/json/reader", after_bytes=after))
    is_gone(lambda: Session(server, VIEWER, SNAPSHOT))
    wait_until(lambda: not server.open_sessions(), "the session ends")


def test_faults_strike_as_often_as_said(server: ReferenceServer) -> None:
    server.faults.add(Drop(match=GROUPS, skip=1, times=2))
    assert get(server).status == 200
    is_gone(lambda: get(server))
    assert get(server, "/api2/json/version").status == 200
    is_gone(lambda: get(server))
    assert get(server).status == 200
    always = server.faults.add(Status(match=GROUPS, status=503, times=None))
    for _ in range(3):
        assert get(server).status == 503
    assert always.hits == 3
    server.faults.clear()
    assert get(server).status == 200


def test_stall_and_resume(server: ReferenceServer, datastore: Path) -> None:
    with Session(server, VIEWER, BIG, window=1 << 30) as session:
        request = chunks(session, "big.img.fidx")[0]
        fault = server.faults.add(Stall(match="/chunk", after_bytes=100_000))
        stream = session.start(request)
        fault.wait()
        session.connection.socket.settimeout(0.05)
        with pytest.raises(TimeoutError):
            session.finish(stream)
        assert len(session.replies[stream].body) < 100_000
        assert len(server.open_sessions()) == 1
        assert get(server).status == 200  # other connections go on
        session.connection.socket.settimeout(20)
        fault.resume()
        assert session.finish(stream)[0].body == stored(datastore, request)


def test_the_server_stops_while_it_stalls(server: ReferenceServer) -> None:
    fault = server.faults.add(Stall(match=GROUPS))
    with Connection(server) as connection:
        connection.send("GET", GROUPS, VIEWER)
        fault.wait()
        server.drop_connections()
        is_gone(connection.read_head)


# --- answers


@pytest.mark.parametrize("status", [500, 503, 401])
def test_status_of_both_parts(server: ReferenceServer, status: int) -> None:
    server.faults.add(Status(status=status, text="try later", match=GROUPS))
    reply = get(server)
    assert (reply.status, reply.text) == (status, "try later")
    server.faults.add(Status(status=status, match="/chunk"))
    with Session(server, VIEWER, SNAPSHOT) as session:
        request = chunks(session)[0]
        assert session.get(request).status == status
        assert session.get(request).status == 200
    server.faults.add(Status(status=400, text="no session", match="/api2/json/reader"))
    assert refused(server) == "no session"
    assert get(server).status == 200


def test_corrupt(server: ReferenceServer, datastore: Path) -> None:
    with Session(server, VIEWER, SNAPSHOT) as session:
        request = chunks(session)[0]
        right = stored(datastore, request)
        for at in (0, 20, -1):
            server.faults.add(Corrupt(match="/chunk", at=at))
            wrong = session.get(request).body
            assert [i for i, pair in enumerate(zip(right, wrong, strict=True)) if len(set(pair)) == 2] == [
                at % len(right)
            ]
        assert session.get(request).body == right


def test_another_body(server: ReferenceServer) -> None:
    server.faults.add(Body(match=GROUPS, make=lambda body: body[::-1]))
    assert get(server).text.startswith("}]")


def test_truncate(server: ReferenceServer, datastore: Path) -> None:
    with Session(server, VIEWER, SNAPSHOT) as session:
        request = chunks(session)[0]
        index = session.get(INDEX).body
        server.faults.add(Truncate(match="/chunk", missing=10))
        server.faults.add(Truncate(match="/download", missing=32))
        with pytest.raises(Exception, match=r"Expected .* bytes"):  # h2 holds it against the length announced
            session.get(request)
    with Session(server, VIEWER, SNAPSHOT) as session:
        assert session.get(INDEX).body == index[:-32]
    for path in (GROUPS, DOWNLOAD):
        server.faults.add(Truncate(match=path))
        is_gone(lambda path=path: get(server, path))  # type: ignore[misc]
        assert get(server, path).status == 200
    assert len(stored(datastore, request)) > 10


@pytest.mark.parametrize("by", [-1, 1])
def test_wrong_length(server: ReferenceServer, by: int) -> None:
    right = get(server)
    server.faults.add(WrongLength(match=GROUPS, by=by))
    with Connection(server) as connection:
        connection.send("GET", GROUPS, VIEWER)
        head = connection.read_head()
        assert int(head.headers["content-length"]) == len(right.body) + by
        is_gone(lambda: connection.read(1 << 20))
    server.faults.add(WrongLength(match="/speedtest", by=by))
    with (
        Session(server, VIEWER, SNAPSHOT) as session,
        pytest.raises(Exception, match=r"Expected .* bytes"),
    ):
        session.get("/speedtest")


@pytest.mark.parametrize("announce", [True, False])
def test_huge(server: ReferenceServer, announce: bool) -> None:
    server.faults.add(Huge(match="/download", announce=announce))
    with Session(server, VIEWER, SNAPSHOT, window=1 << 30) as session:
        stream = session.start(INDEX)
        reply = session.replies[stream]
        while len(reply.body) < 3 << 20:
            session.pump()
        assert reply.headers.get("content-length") == (str(10 << 30) if announce else None)
        assert reply.body.startswith(bytes.fromhex("2f7f41ed91fd0fcd"))
        assert not any(reply.body[1 << 20 : 2 << 20])
    wait_until(lambda: not server.open_sessions(), "the server notices that nobody reads")
    server.faults.add(Huge(match=GROUPS, announce=announce))
    with Connection(server) as connection:
        connection.send("GET", GROUPS, VIEWER)
        connection.read_head()
        assert len(connection.read(3 << 20)) == 3 << 20


@pytest.mark.parametrize("announce", [True, False])
def test_zip_bomb(server: ReferenceServer, announce: bool) -> None:
    size = 1 << 30
    server.faults.add(ZipBomb(match="/chunk", size=size + 1, announce=announce))
    with Session(server, VIEWER, SNAPSHOT) as session:
        raw = session.get(chunks(session)[0]).body
    assert len(raw) < 100_000
    with pytest.raises(DamageError, match=r"zstd frame (announces|holds more)|zstd: "):
        blob.decode(raw, max_size=size >> 10)
    frame = zstandard.get_frame_parameters(raw[12:])
    assert frame.content_size == (size + 1 if announce else zstandard.CONTENTSIZE_UNKNOWN)
    unpacked = 0
    with zstandard.ZstdDecompressor().stream_reader(raw[12:]) as reader:
        while piece := reader.read(16 << 20):
            unpacked += len(piece)
    assert unpacked == size + 1


def test_endless_headers(server: ReferenceServer) -> None:
    server.faults.add(EndlessHeaders(match="/", times=None))
    with Connection(server) as connection:
        connection.send("GET", GROUPS, VIEWER)
        data = connection.read(2 << 20)
        assert data.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\n\r\n" not in data
    server.faults.clear()
    fault = server.faults.add(EndlessHeaders(match="/chunk"))
    with Session(server, VIEWER, SNAPSHOT) as session:
        request = chunks(session)[0]
        stream = session.start(request)
        with pytest.raises(Exception, match=r"(?i)header|continuation"):
            session.finish(stream)
        assert fault.hits == 1
    wait_until(lambda: not server.open_sessions(), "the server notices that nobody reads")


def test_reset(server: ReferenceServer) -> None:
    with Session(server, VIEWER, SNAPSHOT) as session:
        request = chunks(session)[0]
        server.faults.add(Reset(match="/chunk", code=7))
        server.faults.add(Reset(match="/chunk", after_bytes=1000))
        refused_stream, broken, fine = session.finish(*(session.start(request) for _ in range(3)))
    assert (refused_stream.reset, refused_stream.body) == (7, b"")
    assert (broken.reset, len(broken.body)) == (2, 1000)
    assert fine.status == 200
    assert fine.ended


def test_hold_the_api(server: ReferenceServer) -> None:
    held = server.faults.add(Hold(match=GROUPS))
    with Connection(server) as connection:
        connection.send("GET", GROUPS, VIEWER)
        held.wait()
        assert get(server).status == 200
        held.release()
        assert connection.read_head().status == 200


# --- sessions


def test_go_away_answers_what_came_before(server: ReferenceServer, datastore: Path) -> None:
    with Session(server, VIEWER, BIG) as session:
        first, second, _third = chunks(session, "big.img.fidx")
        held = server.faults.add(Hold(match=first))
        server.faults.add(GoAway(match=second))
        before, after = session.start(first), session.start(second)
        while session.went_away is None:
            session.pump()
        assert session.went_away == (0, before)
        session.h2.state_machine.state = h2.connection.ConnectionState.CLIENT_OPEN  # h2 reads no further
        held.release()
        with pytest.raises(ConnectionError):
            session.finish(after)
        assert session.replies[before].body == stored(datastore, first)
        assert session.replies[after].status == 0
    wait_until(lambda: not server.open_sessions(), "the session ends")


def test_go_away_with_a_stream_and_a_code(server: ReferenceServer) -> None:
    server.faults.add(GoAway(match="/speedtest", code=11, last_stream_id=0))
    with Session(server, VIEWER, SNAPSHOT) as session:
        session.get("/nothing")  # h2 reads nothing behind a GOAWAY: let all else be exchanged before
        session.start("/speedtest")
        while session.went_away is None:
            session.pump()
        assert session.went_away == (11, 0)
        is_gone(session.connection.receive)


def test_garbage_in_the_place_of_http2(server: ReferenceServer) -> None:
    fault = server.faults.add(Garbage())
    with Session(server, VIEWER, SNAPSHOT) as session:
        assert session.connection.receive() == fault.data
        is_gone(session.connection.receive)
    with Session(server, VIEWER, SNAPSHOT) as session:
        assert session.get("/speedtest").status == 200


# --- the server as a whole


def test_down_and_back(server: ReferenceServer) -> None:
    port = server.port
    with Session(server, VIEWER, SNAPSHOT) as session, Connection(server) as connection:
        connection.request("GET", GROUPS, VIEWER)
        server.go_down()
        is_gone(lambda: session.get("/speedtest"))
        is_gone(lambda: connection.request("GET", GROUPS, VIEWER))
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                get(server)
        wait_until(lambda: not server.open_sessions(), "the session ends")
        assert server.sessions.locks() == {}
    server.come_back()
    assert server.port == port
    assert get(server).status == 200


def test_restarts_can_be_repeated(server: ReferenceServer) -> None:
    for _ in range(20):
        server.restart()
        assert get(server).status == 200
    server.go_down()
    server.go_down()


def test_dropped_connections_are_all_that_is_lost(server: ReferenceServer) -> None:
    with Session(server, VIEWER, SNAPSHOT) as session:
        server.drop_connections()
        is_gone(lambda: session.get("/speedtest"))
    assert get(server).status == 200
    wait_until(lambda: server.open_connections == 0, "all connections end")


async def ask_from_a_loop(server: ReferenceServer) -> None:
    server.restart()
    await trio.to_thread.run_sync(get, server)


def test_another_loop_may_command_it(server: ReferenceServer) -> None:
    trio.run(ask_from_a_loop, server)
    assert server.requests.count() == 1


# --- a slow link


def test_a_round_trip_takes_as_long_as_said(server: ReferenceServer) -> None:
    server.link = SlowLink(0.05)
    begin = time.monotonic()
    with Connection(server) as connection:
        handshake = time.monotonic()
        assert connection.request("GET", GROUPS, VIEWER).status == 200
        end = time.monotonic()
    assert handshake - begin >= 0.05
    assert end - handshake >= 0.05
    assert end - begin < 1.0  # two round trips, not twenty


def test_round_trips_overlap(server: ReferenceServer, datastore: Path) -> None:
    server.link = SlowLink(0.1)
    with Session(server, VIEWER, SNAPSHOT) as session:
        requests = chunks(session)
        begin = time.monotonic()
        replies = session.finish(*(session.start(request) for request in requests * 10))
        took = time.monotonic() - begin
    assert [reply.body for reply in replies] == [stored(datastore, request) for request in requests * 10]
    assert 0.1 <= took < 2.0  # one after the other they would take 7 s


def test_bandwidth_is_shared_by_all_connections(server: ReferenceServer) -> None:
    server.link = SlowLink(bandwidth=10_000_000)
    with Session(server, VIEWER, SNAPSHOT) as one, Session(server, VIEWER, SNAPSHOT) as two:
        begin = time.monotonic()
        streams = one.start("/speedtest"), two.start("/speedtest")
        assert len(one.finish(streams[0])[0].body) == len(two.finish(streams[1])[0].body) == 1 << 20
        assert time.monotonic() - begin >= (2 << 20) / 10_000_000


def test_the_window_bounds_what_is_under_way(server: ReferenceServer) -> None:
    server.link = SlowLink(0.05, window=1 << 18)
    with Session(server, VIEWER, SNAPSHOT, window=1 << 30) as session:
        begin = time.monotonic()
        assert session.get("/speedtest").status == 200
        assert time.monotonic() - begin >= 0.05 * 3  # four windows


def test_faults_and_a_slow_link_go_together(server: ReferenceServer) -> None:
    server.link = SlowLink(0.02)
    server.faults.add(Drop(after_bytes=300))
    assert len(received(server, sent=client_hello())) == 300
    assert get(server).status == 200
    with Session(server, VIEWER, SNAPSHOT) as session:
        server.go_down()
        is_gone(lambda: session.get("/speedtest"))


def test_arrivals_are_exact() -> None:
    async def check() -> None:
        link = SlowLink(0.5, bandwidth=1000)
        assert [link.down.arrival(100), link.down.arrival(200)] == pytest.approx([0.35, 0.55])
        assert link.up.arrival(100) == pytest.approx(0.35)
        await trio.sleep(10)
        assert link.down.arrival(100) == pytest.approx(10.35)

    trio.run(check, clock=_from_zero())


def _from_zero() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0)
