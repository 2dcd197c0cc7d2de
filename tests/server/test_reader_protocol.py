"""The reader protocol of the reference server: sessions, flow control, many streams at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from pbsfs.testing.writer import DatastoreWriter
from tests.server.conftest import OWNED, SECRET
from tests.server.h2_client import Session
from tests.server.snapshots import BIG, FIRST, SECOND, SNAPSHOT, VIEWER, chunks, refused, stored
from tests.support import made
from tests.support.server import Hold, ReferenceServer
from tests.support.waiting import wait_until

CHUNK = 4 << 20


@pytest.fixture
def session(server: ReferenceServer) -> Iterator[Session]:
    with Session(server, VIEWER, SNAPSHOT) as session:
        yield session


@pytest.mark.parametrize(
    ("query", "name"),
    [
        (SNAPSHOT, "drive-scsi0.img.fidx"),
        (f"store=made&backup-type=ct&backup-id=200&backup-time={made.TIME}", "root.pxar.didx"),
    ],
)
def test_all_chunks_of_an_archive_at_once(
    server: ReferenceServer, datastore: Path, query: str, name: str
) -> None:
    with Session(server, VIEWER, query) as session:
        requests = chunks(session, name)
        replies = session.finish(*(session.start(request) for request in requests))
    for request, reply in zip(requests, replies, strict=True):
        assert reply.status == 200
        assert reply.body == stored(datastore, request)
        assert reply.headers["content-length"] == str(len(reply.body))


def test_a_login_opens_sessions_too(server: ReferenceServer) -> None:
    ticket = server.accounts.tickets.issue("reader@pbs")
    with Session(server, {"cookie": f"__Host-PBSAuthCookie={quote(ticket)}"}, SNAPSHOT) as session:
        assert session.get("/download?file-name=client.log.blob").status == 200
    assert server.sessions.all()[0].user == "reader@pbs"


def test_an_index_opens_its_own_chunks_only(server: ReferenceServer, session: Session) -> None:
    with Session(server, VIEWER, BIG) as other:
        of_others = chunks(other, "big.img.fidx")[0]
    own = chunks(session)[0]
    assert session.get(own).status == 200
    assert session.get(of_others).status == 401
    with Session(server, VIEWER, SNAPSHOT) as again:
        assert again.get(own).status == 401


def test_a_missing_chunk(writer: DatastoreWriter) -> None:
    writer.add_snapshot(FIRST, {"a.img.fidx": b"x"})
    with ReferenceServer(writer.path, store="made", shown_path="/shown") as server:
        server.add_user("reader@pbs")
        server.add_token("reader@pbs!viewer", SECRET)
        with Session(server, VIEWER, SNAPSHOT) as session:
            (request,) = chunks(session, "a.img.fidx")
            digest = request.rpartition("=")[2]
            (writer.path / ".chunks" / digest[:4] / digest).unlink()
            reply = session.get(request)
            assert reply.status == 400
            path = f"/shown/.chunks/{digest[:4]}/{digest}"
            assert reply.text == f'reading file "{path}" failed: No such file or directory (os error 2)'
            (writer.path / str(FIRST) / "a.img.fidx").write_bytes(b"damaged")
            reply = session.get("/download?file-name=a.img.fidx")
            assert reply.status == 400
            assert reply.text.startswith("Unable to open fixed index")


def test_unknown_methods_and_parameters(session: Session) -> None:
    (reply,) = session.finish(session.start("/speedtest", "POST"))
    assert (reply.status, reply.text) == (404, "Path '/speedtest' not found.")
    assert "schema does not allow additional properties" in session.get("/speedtest?a=b").text


# --- flow control


def test_no_more_is_sent_than_the_client_has_room_for(server: ReferenceServer, datastore: Path) -> None:
    with Session(server, VIEWER, BIG, window=1000) as session:
        request = chunks(session, "big.img.fidx")[0]
        session.read_ahead = False
        stream = session.start(request)
        other = session.start("/nothing")
        session.finish(other)  # whose room is its own
        while len(session.replies[stream].body) < 1000:
            session.pump()
        session.finish(session.start("/nothing"))
        assert len(session.replies[stream].body) == 1000
        session.read_ahead = True
        session.h2.increment_flow_control_window(CHUNK, stream)
        session.h2.increment_flow_control_window(CHUNK)
        session.flush()
        assert session.finish(stream)[0].body == stored(datastore, request)


@pytest.mark.parametrize("frame", [1 << 14, 1 << 20])
def test_no_frame_is_longer_than_the_client_allows(server: ReferenceServer, frame: int) -> None:
    with Session(server, VIEWER, BIG, window=1 << 30, frame=frame) as session:
        request = chunks(session, "big.img.fidx")[0]
        session.get(request)
        assert max(length for _stream, length in session.frames) == frame


def test_answers_share_the_connection(server: ReferenceServer) -> None:
    with Session(server, VIEWER, BIG, window=1 << 30) as session:
        requests = chunks(session, "big.img.fidx")
        session.frames.clear()
        streams = [session.start(request) for request in requests]
        session.finish(*streams)
        order = [stream for stream, _length in session.frames]
        last = {stream: len(order) - order[::-1].index(stream) for stream in streams}
        first = {stream: order.index(stream) for stream in streams}
        assert max(first.values()) < min(last.values())


def test_many_streams_at_once(server: ReferenceServer, session: Session, datastore: Path) -> None:
    requests = chunks(session) * 40
    replies = session.finish(*(session.start(request) for request in requests))
    assert len(replies) == 280
    assert [r.body for r in replies] == [stored(datastore, request) for request in requests]
    assert server.requests.count("/chunk") == 280


def test_one_answer_does_not_wait_for_another(server: ReferenceServer, session: Session) -> None:
    held = server.faults.add(Hold(match="/speedtest"))
    slow = session.start("/speedtest")
    quick = session.start("/nothing")
    session.finish(quick)
    assert not session.replies[slow].ended
    assert server.open_sessions()[0].streams == 1
    held.release()
    assert session.finish(slow)[0].status == 200
    assert server.open_sessions()[0].peak == 2


def test_a_client_may_reset_a_stream(server: ReferenceServer, session: Session) -> None:
    held = server.faults.add(Hold(match="/speedtest"))
    first, second = session.start("/speedtest"), session.start("/download?file-name=index.json.blob")
    session.h2.reset_stream(first)
    session.flush()
    assert session.finish(second)[0].status == 200
    wait_until(lambda: server.open_sessions()[0].streams == 0, "the request is given up")
    held.release()
    assert session.get("/speedtest").status == 200
    session.read_ahead = False
    session.h2.reset_stream(session.start("/speedtest"))
    assert session.get("/nothing").status == 404


# --- sessions


def test_sessions_are_listed_with_their_locks(server: ReferenceServer) -> None:
    with Session(server, VIEWER, SNAPSHOT), Session(server, VIEWER, SNAPSHOT), Session(server, VIEWER, BIG):
        assert len(server.open_sessions()) == 3
        assert server.sessions.locks() == {FIRST: 2, SECOND: 1}
        assert {session.snapshot for session in server.open_sessions()} == {FIRST, SECOND}
        with pytest.raises(ValueError, match="locked already"):
            server.sessions.lock(FIRST)
    wait_until(lambda: not server.open_sessions(), "the sessions end")
    assert server.sessions.locks() == {}
    assert [session.closed is not None for session in server.sessions.all()] == [True] * 3


def test_a_session_ends_with_a_clients_goaway(server: ReferenceServer, session: Session) -> None:
    session.h2.close_connection()
    session.flush()
    wait_until(lambda: not server.open_sessions(), "the session ends")


def test_a_session_ends_when_the_client_breaks_the_protocol(server: ReferenceServer) -> None:
    with Session(server, VIEWER, SNAPSHOT) as session:
        session.connection.socket.sendall(b"\0\0\1\0\0\0\0\0\0x")  # DATA on stream 0
        while session.went_away is None:
            session.pump()
        assert session.went_away[0] == 1
    wait_until(lambda: not server.open_sessions(), "the session ends")


def test_a_locked_snapshot_is_refused(datastore: Path, server: ReferenceServer) -> None:
    with server.locked(FIRST):
        assert refused(server) == (
            f'unable to acquire lock on snapshot directory "{datastore / str(FIRST)}"'
            " - locked by another operation"
        )
        with Session(server, VIEWER, BIG):
            pass
    with Session(server, VIEWER, SNAPSHOT):
        pass


def test_a_session_survives_the_tokens_end(server: ReferenceServer, session: Session) -> None:
    server.remove("reader@pbs!viewer")
    assert session.get("/download?file-name=index.json.blob").status == 200


def test_a_namespaces_snapshot(server: ReferenceServer) -> None:
    query = f"store=made&backup-type=host&backup-id={OWNED.id}&backup-time={made.TIME}"
    assert refused(server, query) == "snapshot host/owned/2023-11-14T22:13:20Z does not exist."
    with Session(server, VIEWER, f"{query}&ns=prod&debug=false") as session:
        assert len(chunks(session, "a.img.fidx")) == 1
        assert str(server.open_sessions()[0].snapshot) == "ns/prod/host/owned/2023-11-14T22:13:20Z"


def test_many_clients_at_once(server: ReferenceServer, datastore: Path) -> None:
    """Each in a thread of its own: what they read is theirs."""
    failures: list[BaseException] = []

    def read() -> None:
        try:
            with Session(server, VIEWER, SNAPSHOT) as session:
                for request in chunks(session):
                    assert session.get(request).body == stored(datastore, request)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=read) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(server.sessions.all()) == 20
